/* What a pickle of torch.save may call, and what that means here.
 *
 * The table below is the whole of it.  A name in a pickle is compared with the
 * rows; it is never imported or resolved, so there is nothing to escape from.
 */
#include <stdio.h>
#include <string.h>

#include "../core/weights.h"
#include "pickle_internal.h"

typedef enum action {
    ORDERED_DICT,
    COUNTER,
    SET,
    BYTEARRAY,
    ENCODE,
    COMPLEX,
    SIZE,
    DEVICE,
    LAYOUT,
    STORAGE_TYPE,
    UNTYPED_STORAGE,
    DTYPE,
    TENSOR_TYPE,
    PARAMETER,
    REBUILD_TENSOR,
    REBUILD_TENSOR_V2,
    REBUILD_TENSOR_V3,
    REBUILD_PARAMETER,
    REBUILD_FROM_TYPE
} action;

typedef struct global {
    const char *module, *name;
    action action;
    pc_dtype dtype; /* DTYPE, STORAGE_TYPE; PC_DTYPE_NONE: a dtype that no tensor here can have */
} global;

static const global table[] = {
    {"collections", "OrderedDict", ORDERED_DICT, 0},
    {"collections", "Counter", COUNTER, 0},
    {"builtins", "set", SET, 0},
    {"__builtin__", "set", SET, 0}, /* what protocol 2 calls builtins */
    {"builtins", "bytearray", BYTEARRAY, 0},
    {"__builtin__", "bytearray", BYTEARRAY, 0},
    {"builtins", "complex", COMPLEX, 0},
    {"__builtin__", "complex", COMPLEX, 0},
    {"_codecs", "encode", ENCODE, 0}, /* how protocol 2 writes bytes */
    {"torch", "Size", SIZE, 0},
    {"torch", "device", DEVICE, 0},
    {"torch.serialization", "_get_layout", LAYOUT, 0},
    {"torch", "Tensor", TENSOR_TYPE, 0},
    {"torch.nn.parameter", "Parameter", PARAMETER, 0},
    {"torch._utils", "_rebuild_tensor", REBUILD_TENSOR, 0},
    {"torch._utils", "_rebuild_tensor_v2", REBUILD_TENSOR_V2, 0},
    {"torch._utils", "_rebuild_tensor_v3", REBUILD_TENSOR_V3, 0},
    {"torch._utils", "_rebuild_parameter", REBUILD_PARAMETER, 0},
    {"torch._utils", "_rebuild_parameter_with_state", REBUILD_PARAMETER, 0},
    {"torch._tensor", "_rebuild_from_type_v2", REBUILD_FROM_TYPE, 0},
    {"torch.storage", "UntypedStorage", UNTYPED_STORAGE, PC_U8},
    {"torch", "UntypedStorage", UNTYPED_STORAGE, PC_U8},
#define STORAGE(name, dtype)                    \
    {"torch", name "Storage", STORAGE_TYPE, dtype}, \
    {"torch.cuda", name "Storage", STORAGE_TYPE, dtype}
    STORAGE("Float", PC_F32),
    STORAGE("Half", PC_F16),
    STORAGE("BFloat16", PC_BF16),
    STORAGE("Double", PC_F64),
    STORAGE("Long", PC_I64),
    STORAGE("Int", PC_I32),
    STORAGE("Short", PC_I16),
    STORAGE("Char", PC_I8),
    STORAGE("Byte", PC_U8),
    STORAGE("Bool", PC_BOOL),
    STORAGE("ComplexFloat", PC_C64),
#undef STORAGE
    {"torch", "float32", DTYPE, PC_F32},
    {"torch", "float16", DTYPE, PC_F16},
    {"torch", "bfloat16", DTYPE, PC_BF16},
    {"torch", "float64", DTYPE, PC_F64},
    {"torch", "uint8", DTYPE, PC_U8},
    {"torch", "int8", DTYPE, PC_I8},
    {"torch", "int16", DTYPE, PC_I16},
    {"torch", "int32", DTYPE, PC_I32},
    {"torch", "int64", DTYPE, PC_I64},
    {"torch", "uint16", DTYPE, PC_U16},
    {"torch", "uint32", DTYPE, PC_U32},
    {"torch", "uint64", DTYPE, PC_U64},
    {"torch", "bool", DTYPE, PC_BOOL},
    {"torch", "complex64", DTYPE, PC_C64},
    {"torch", "complex128", DTYPE, PC_DTYPE_NONE},
    {"torch", "float8_e5m2", DTYPE, PC_F8_E5M2},
    {"torch", "float8_e4m3fn", DTYPE, PC_F8_E4M3},
    {"torch", "float8_e8m0fnu", DTYPE, PC_F8_E8M0},
    {"torch", "float8_e4m3fnuz", DTYPE, PC_F8_E4M3FNUZ},
    {"torch", "float8_e5m2fnuz", DTYPE, PC_F8_E5M2FNUZ},
};
#define ROWS (sizeof table / sizeof table[0])

static bool same(const char *text, size_t len, const char *word)
{
    return strlen(word) == len && memcmp(text, word, len) == 0;
}

pc_status pc_torch_find_global(const pc_pickle *pickle, const char *module, size_t module_len, const char *name,
                               size_t name_len, int64_t *row, pc_error *err)
{
    for (size_t i = 0; i < ROWS; i++)
        if (same(module, module_len, table[i].module) && same(name, name_len, table[i].name)) {
            *row = (int64_t)i;
            return PC_OK;
        }
    char text[2 * 255 + 2], quoted[PC_QUOTED];
    module_len = module_len > 255 ? 255 : module_len;
    name_len = name_len > 255 ? 255 : name_len;
    memcpy(text, module, module_len);
    text[module_len] = '.';
    memcpy(text + module_len + 1, name, name_len);
    return pc_pickle_bad(pickle, err,
                         "refused %s: a file of weights may only build dense tensors, numbers, strings and containers. "
                         "Nothing in the file was run",
                         pc_quote(text, module_len + 1 + name_len, quoted));
}

/* ------------------------------------------------------------------ arguments */

static const pc_pickle_object *at(const pc_pickle *pickle, pc_pickle_ref ref) { return &pickle->objects[ref]; }

static bool is_kind(const pc_pickle *pickle, pc_pickle_ref ref, pc_pickle_kind kind)
{
    return at(pickle, ref)->kind == (uint8_t)kind;
}

static bool is_text(const pc_pickle *pickle, pc_pickle_ref ref)
{
    return is_kind(pickle, ref, PC_PICKLE_TEXT) || is_kind(pickle, ref, PC_PICKLE_BYTES); /* bytes: from Python 2 */
}

static bool is_latin1(const pc_pickle *pickle, pc_pickle_ref ref)
{
    const pc_pickle_object *o = at(pickle, ref);
    return is_text(pickle, ref) && (same(pc_pickle_bytes(pickle, o), o->count, "latin1") ||
                                    same(pc_pickle_bytes(pickle, o), o->count, "latin-1"));
}

static bool is_number(const pc_pickle *pickle, pc_pickle_ref ref)
{
    return is_kind(pickle, ref, PC_PICKLE_INT) || is_kind(pickle, ref, PC_PICKLE_FLOAT);
}

static const global *as_global(const pc_pickle *pickle, pc_pickle_ref ref)
{
    return is_kind(pickle, ref, PC_PICKLE_GLOBAL) ? &table[at(pickle, ref)->as.number] : NULL;
}

static pc_status wrong_arguments(const pc_pickle *pickle, const global *g, pc_error *err)
{
    return pc_pickle_bad(pickle, err, "%s.%s is given arguments that torch.save does not give it", g->module, g->name);
}

/* A size, a count or an offset. */
static bool get_count(const pc_pickle *pickle, pc_pickle_ref ref, uint64_t *out)
{
    const pc_pickle_object *o = at(pickle, ref);
    if (o->kind != PC_PICKLE_INT || o->as.number < 0)
        return false;
    *out = (uint64_t)o->as.number;
    return true;
}

/* -------------------------------------------------------------------- storages */

/* ("storage", type, key, location, count) and, in the legacy layout, a view of a storage or None. */
pc_status pc_torch_persistent(pc_pickle *pickle, pc_pickle_ref id, pc_pickle_ref *result, pc_error *err)
{
    if (pickle->storage == NULL)
        return pc_pickle_bad(pickle, err, "a storage is named where there can be none");
    const pc_pickle_object *tuple = at(pickle, id);
    if (tuple->kind != PC_PICKLE_TUPLE || (tuple->count != 5 && tuple->count != 6))
        return pc_pickle_bad(pickle, err, "a persistent id is not that of a storage");
    const pc_pickle_ref *item = pc_pickle_items(tuple);
    if (!is_text(pickle, item[0]) || !same(pc_pickle_bytes(pickle, at(pickle, item[0])), at(pickle, item[0])->count,
                                           "storage"))
        return pc_pickle_bad(pickle, err, "a persistent id is not that of a storage");
    const global *type = as_global(pickle, item[1]);
    if (type == NULL || (type->action != STORAGE_TYPE && type->action != UNTYPED_STORAGE))
        return pc_pickle_bad(pickle, err, "the type of a storage is %s and not a storage type",
                             pc_pickle_kind_name(at(pickle, item[1])));
    pc_pickle_storage request = {.dtype = type->dtype, .has_view_field = tuple->count == 6};
    if (!is_text(pickle, item[2]) || !is_text(pickle, item[3]) || !get_count(pickle, item[4], &request.count))
        return pc_pickle_bad(pickle, err, "a storage is described wrongly: key, location and size should be two strings "
                                          "and a number");
    request.key = pc_pickle_bytes(pickle, at(pickle, item[2]));
    request.key_len = at(pickle, item[2])->count;
    if (request.count > (uint64_t)INT64_MAX / pc_dtype_size(request.dtype))
        return pc_pickle_bad(pickle, err, "a storage of %llu elements cannot exist", (unsigned long long)request.count);
    request.nbytes = request.count * pc_dtype_size(request.dtype);
    if (tuple->count == 6 && item[5] != PC_PICKLE_REF_NONE) {
        const pc_pickle_object *view = at(pickle, item[5]);
        const pc_pickle_ref *part = pc_pickle_items(view);
        if (view->kind != PC_PICKLE_TUPLE || view->count != 3 || !get_count(pickle, part[1], &request.view_start) ||
            !get_count(pickle, part[2], &request.view_count))
            return pc_pickle_bad(pickle, err, "the view of a storage is described wrongly");
        if (request.view_start > request.count || request.view_count > request.count - request.view_start)
            return pc_pickle_bad(pickle, err, "the view of a storage reaches outside it");
        request.is_view = true;
    }
    uint32_t index;
    uint64_t nbytes;
    pc_status status = pickle->storage(pickle->context, pickle, &request, &index, &nbytes, err);
    if (status == PC_OK)
        status = pc_pickle_new(pickle, PC_PICKLE_STORAGE, result, err);
    if (status != PC_OK)
        return status;
    pc_pickle_object *object = &pickle->objects[*result];
    object->count = index;
    object->detail = (uint8_t)request.dtype;
    object->as.number = (int64_t)nbytes; /* at most what was asked for, which fits */
    return PC_OK;
}

/* --------------------------------------------------------------------- tensors */

/* Check shape, stride and offset against the storage; every product and sum may overflow. */
static pc_status check_extent(const pc_pickle *pickle, const pc_pickle_tensor *t, uint64_t storage_bytes,
                              uint64_t *nbytes, pc_error *err)
{
    const pc_pickle_object *shape = at(pickle, t->shape), *stride = at(pickle, t->stride);
    const pc_pickle_ref *sizes = pc_pickle_items(shape), *steps = pc_pickle_items(stride);
    uint64_t width = pc_dtype_size(t->dtype);
    uint64_t bytes = width, last = t->offset;
    bool empty = false, inside = true;
    for (uint32_t d = 0; d < shape->count; d++) {
        uint64_t size, step, reach;
        if (!get_count(pickle, sizes[d], &size) || !get_count(pickle, steps[d], &step))
            return pc_pickle_bad(pickle, err, "a size or stride of a tensor is negative or not a number");
        if (size == 0) {
            empty = true;
            continue;
        }
        if (__builtin_mul_overflow(bytes, size, &bytes) || bytes > (uint64_t)INT64_MAX)
            return pc_pickle_bad(pickle, err, "the sizes of a tensor multiply to more than any memory");
        inside = inside && !__builtin_mul_overflow(size - 1, step, &reach) &&
                 !__builtin_add_overflow(last, reach, &last);
    }
    *nbytes = empty ? 0 : bytes;
    if (!empty && (!inside || last >= storage_bytes / width))
        return pc_pickle_bad(pickle, err, "a tensor reaches outside its storage of %llu bytes",
                             (unsigned long long)storage_bytes);
    return PC_OK;
}

static bool is_integer(pc_dtype dtype) { return dtype >= PC_BOOL && dtype <= PC_I64; }

/* Conjugated or negated lazily: {"conj": True}.  The stored numbers are not the tensor's. */
static bool plain_metadata(const pc_pickle *pickle, pc_pickle_ref ref)
{
    const pc_pickle_object *o = at(pickle, ref);
    if (o->kind == PC_PICKLE_NONE)
        return true;
    if (o->kind != PC_PICKLE_DICT)
        return false;
    const pc_pickle_ref *items = pc_pickle_items(o);
    for (uint32_t i = 1; i < o->count; i += 2)
        if (items[i] != PC_PICKLE_REF_FALSE)
            return false;
    return true;
}

/* (storage, offset, size, stride[, requires_grad, hooks[, dtype in v3][, metadata]]) */
static pc_status rebuild_tensor(pc_pickle *pickle, const global *g, const pc_pickle_ref *args, uint32_t count,
                                pc_pickle_ref *result, pc_error *err)
{
    uint32_t wanted = g->action == REBUILD_TENSOR ? 4 : g->action == REBUILD_TENSOR_V2 ? 6 : 7;
    if (count != wanted && (g->action == REBUILD_TENSOR || count != wanted + 1))
        return wrong_arguments(pickle, g, err);
    const pc_pickle_object *storage = at(pickle, args[0]);
    pc_pickle_tensor tensor = {.shape = args[2], .stride = args[3]};
    if (storage->kind != PC_PICKLE_STORAGE || !get_count(pickle, args[1], &tensor.offset) ||
        !is_kind(pickle, args[2], PC_PICKLE_TUPLE) || !is_kind(pickle, args[3], PC_PICKLE_TUPLE))
        return wrong_arguments(pickle, g, err);
    if (at(pickle, args[2])->count != at(pickle, args[3])->count)
        return pc_pickle_bad(pickle, err, "a tensor has %u sizes and %u strides", at(pickle, args[2])->count,
                             at(pickle, args[3])->count);
    if (at(pickle, args[2])->count > PC_MAX_DIMS)
        return pc_pickle_bad(pickle, err, "a tensor has %u dimensions; %d are supported", at(pickle, args[2])->count,
                             PC_MAX_DIMS);
    if (count > 4 && (!is_kind(pickle, args[4], PC_PICKLE_BOOL) ||
                      (!is_kind(pickle, args[5], PC_PICKLE_DICT) && !is_kind(pickle, args[5], PC_PICKLE_NONE))))
        return wrong_arguments(pickle, g, err);
    tensor.storage = storage->count;
    tensor.dtype = (pc_dtype)storage->detail;
    if (g->action == REBUILD_TENSOR_V3) {
        const global *dtype = as_global(pickle, args[6]);
        if (dtype == NULL || dtype->action != DTYPE)
            return wrong_arguments(pickle, g, err);
        if (dtype->dtype == PC_DTYPE_NONE)
            return pc_pickle_bad(pickle, err, "tensors of type torch.%s are not supported", dtype->name);
        tensor.dtype = dtype->dtype;
    }
    if (count > 4 && args[4] == PC_PICKLE_REF_TRUE && is_integer(tensor.dtype))
        return pc_pickle_bad(pickle, err, "a tensor of integers is said to require gradients");
    if (count == wanted + 1 && !plain_metadata(pickle, args[wanted]))
        return pc_pickle_bad(pickle, err, "a tensor is lazily conjugated or negated; call .resolve_conj().resolve_neg() "
                                          "on it before torch.save");
    pc_status status = check_extent(pickle, &tensor, (uint64_t)storage->as.number, &tensor.nbytes, err);
    return status == PC_OK ? pc_pickle_add_tensor(pickle, &tensor, result, err) : status;
}

/* (data, requires_grad, hooks[, state]): a parameter is its data here. */
static pc_status rebuild_parameter(const pc_pickle *pickle, const global *g, const pc_pickle_ref *args, uint32_t count,
                                   pc_pickle_ref *result, pc_error *err)
{
    bool ok = count >= 1 && count <= 4 && is_kind(pickle, args[0], PC_PICKLE_TENSOR) &&
              (count < 2 || is_kind(pickle, args[1], PC_PICKLE_BOOL));
    if (!ok)
        return wrong_arguments(pickle, g, err);
    *result = args[0];
    return PC_OK;
}

/* (function, type, its arguments, attributes): a tensor that was given attributes. */
static pc_status rebuild_from_type(pc_pickle *pickle, const global *g, const pc_pickle_ref *args, uint32_t count,
                                   pc_pickle_ref *result, pc_error *err)
{
    if (count != 4 || !is_kind(pickle, args[2], PC_PICKLE_TUPLE))
        return wrong_arguments(pickle, g, err);
    const global *function = as_global(pickle, args[0]), *type = as_global(pickle, args[1]);
    if (function == NULL || type == NULL || (type->action != TENSOR_TYPE && type->action != PARAMETER))
        return wrong_arguments(pickle, g, err);
    const pc_pickle_object *inner = at(pickle, args[2]);
    const pc_pickle_ref *inner_args = pc_pickle_items(inner);
    switch (function->action) {
    case REBUILD_TENSOR:
    case REBUILD_TENSOR_V2:
    case REBUILD_TENSOR_V3: {
        /* A tuple of at most two lives inside the objects, which may move: but no rebuild takes so few. */
        return inner->count > 2 ? rebuild_tensor(pickle, function, inner_args, inner->count, result, err)
                                : wrong_arguments(pickle, function, err);
    }
    case REBUILD_PARAMETER:
        return rebuild_parameter(pickle, function, inner_args, inner->count, result, err);
    default:
        return wrong_arguments(pickle, g, err);
    }
}

/* ------------------------------------------------------------------ containers */

/* OrderedDict() and OrderedDict([(key, value), …]), as Python 2 wrote it; Counter(dict). */
static pc_status make_dict(pc_pickle *pickle, const global *g, pc_pickle_ref arguments, pc_pickle_ref *result,
                           pc_error *err)
{
    uint32_t count = at(pickle, arguments)->count;
    if (count > 1)
        return wrong_arguments(pickle, g, err);
    pc_pickle_ref from = count == 1 ? pc_pickle_items(at(pickle, arguments))[0] : PC_PICKLE_REF_NONE;
    pc_status status = pc_pickle_new(pickle, PC_PICKLE_DICT, result, err);
    if (status != PC_OK)
        return status;
    pickle->objects[*result].detail = g->action == ORDERED_DICT;
    if (count == 0)
        return PC_OK;
    const pc_pickle_object *source = at(pickle, from); /* no object is made below: it stays where it is */
    if (source->kind == PC_PICKLE_DICT)
        return pc_pickle_extend(pickle, *result, pc_pickle_items(source), source->count, err);
    if (source->kind != PC_PICKLE_LIST || g->action != ORDERED_DICT)
        return wrong_arguments(pickle, g, err);
    for (uint32_t i = 0; i < source->count && status == PC_OK; i++) {
        const pc_pickle_object *pair = at(pickle, pc_pickle_items(source)[i]);
        if ((pair->kind != PC_PICKLE_LIST && pair->kind != PC_PICKLE_TUPLE) || pair->count != 2 ||
            !pc_pickle_hashable(at(pickle, pc_pickle_items(pair)[0])))
            return wrong_arguments(pickle, g, err);
        status = pc_pickle_extend(pickle, *result, pc_pickle_items(pair), 2, err);
    }
    return status;
}

static pc_status make_set(pc_pickle *pickle, const global *g, pc_pickle_ref arguments, pc_pickle_ref *result,
                          pc_error *err)
{
    uint32_t count = at(pickle, arguments)->count;
    pc_pickle_ref from = count == 1 ? pc_pickle_items(at(pickle, arguments))[0] : PC_PICKLE_REF_EMPTY;
    if (count > 1 || (!is_kind(pickle, from, PC_PICKLE_LIST) && !is_kind(pickle, from, PC_PICKLE_TUPLE)))
        return wrong_arguments(pickle, g, err);
    pc_status status = pc_pickle_new(pickle, PC_PICKLE_SET, result, err);
    if (status != PC_OK)
        return status;
    const pc_pickle_object *source = at(pickle, from);
    return pc_pickle_extend(pickle, *result, pc_pickle_items(source), source->count, err);
}

/* Values that carry no weights: checked for form, kept as themselves or as something opaque. */
static pc_status make_value(pc_pickle *pickle, const global *g, const pc_pickle_ref *args, uint32_t count,
                            pc_pickle_ref *result, pc_error *err)
{
    bool ok = false;
    pc_pickle_kind kind = PC_PICKLE_OPAQUE;
    switch (g->action) {
    case SIZE:
        ok = count == 1 && is_kind(pickle, args[0], PC_PICKLE_TUPLE);
        if (ok) {
            *result = args[0];
            return PC_OK;
        }
        break;
    case DEVICE: /* ("cuda", 0) */
        ok = count >= 1 && count <= 2 && is_text(pickle, args[0]) &&
             (count == 1 || is_kind(pickle, args[1], PC_PICKLE_INT));
        break;
    case LAYOUT:
        ok = count == 1 && is_text(pickle, args[0]);
        break;
    case COMPLEX:
        ok = count == 2 && is_number(pickle, args[0]) && is_number(pickle, args[1]);
        break;
    case ENCODE: /* ("text", "latin1") */
        ok = count == 2 && is_text(pickle, args[0]) && is_latin1(pickle, args[1]);
        break;
    case BYTEARRAY: /* never a number, which would ask for that much memory */
        ok = count == 0 || (count <= 2 && (is_text(pickle, args[0]) || is_kind(pickle, args[0], PC_PICKLE_OPAQUE)) &&
                            (count == 1 || is_latin1(pickle, args[1])));
        break;
    default:
        break;
    }
    return ok ? pc_pickle_new(pickle, kind, result, err) : wrong_arguments(pickle, g, err);
}

static bool is_type(const global *g)
{
    switch (g->action) {
    case ORDERED_DICT:
    case COUNTER:
    case SET:
    case BYTEARRAY:
    case COMPLEX:
    case SIZE:
    case DEVICE:
    case PARAMETER:
        return true;
    default:
        return false;
    }
}

pc_status pc_torch_reduce(pc_pickle *pickle, pc_pickle_ref callable, pc_pickle_ref arguments, bool new_object,
                          pc_pickle_ref *result, pc_error *err)
{
    const global *g = as_global(pickle, callable);
    if (g != NULL && new_object && !is_type(g))
        return pc_pickle_bad(pickle, err, "refused to create an instance of %s.%s", g->module, g->name);
    if (g == NULL)
        return pc_pickle_bad(pickle, err, "refused to call %s", pc_pickle_kind_name(at(pickle, callable)));
    if (!is_kind(pickle, arguments, PC_PICKLE_TUPLE))
        return wrong_arguments(pickle, g, err);
    const pc_pickle_object *tuple = at(pickle, arguments);
    /* A short tuple is inside its object, and objects move when one is added: take a copy. */
    pc_pickle_ref few[2] = {tuple->as.few[0], tuple->as.few[1]};
    const pc_pickle_ref *args = tuple->count <= 2 ? few : tuple->as.items;
    uint32_t count = tuple->count;
    switch (g->action) {
    case ORDERED_DICT:
    case COUNTER:
        return make_dict(pickle, g, arguments, result, err);
    case SET:
        return make_set(pickle, g, arguments, result, err);
    case REBUILD_TENSOR:
    case REBUILD_TENSOR_V2:
    case REBUILD_TENSOR_V3:
        return rebuild_tensor(pickle, g, args, count, result, err);
    case PARAMETER:
    case REBUILD_PARAMETER:
        return rebuild_parameter(pickle, g, args, count, result, err);
    case REBUILD_FROM_TYPE:
        return rebuild_from_type(pickle, g, args, count, result, err);
    case BYTEARRAY:
    case ENCODE:
    case COMPLEX:
    case SIZE:
    case DEVICE:
    case LAYOUT:
        return make_value(pickle, g, args, count, result, err);
    case STORAGE_TYPE:
    case UNTYPED_STORAGE:
    case DTYPE:
    case TENSOR_TYPE:
        break;
    }
    return pc_pickle_bad(pickle, err, "refused to call %s.%s", g->module, g->name);
}
