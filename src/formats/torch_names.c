/* From the object in a pickle to a list of named tensors. */
#include <string.h>

#include "quote.h"
#include "torch_loader.h"

/* Expanded tensors (stride 0) and many views of one storage are larger than the file.
 * All together may take this much: eight times the file, and 64 MiB for small files. */
#define EXPANSION ((uint64_t)8)
#define ALWAYS_ALLOWED ((uint64_t)64 * 1024 * 1024)

#define MAX_NESTING 64                            /* of dicts that hold tensors */
#define MAX_VISITS ((size_t)4 * 1024 * 1024)      /* entries of dicts, each counted as often as it is reached */
#define MAX_NAME_BYTES ((size_t)64 * 1024 * 1024) /* of all names together */
#define MAX_DIMS_TOTAL ((size_t)8 * 1024 * 1024)  /* of all tensors together */

typedef struct named {
    const char *name;
    size_t name_len;
    uint32_t tensor; /* of the pickle */
} named;

/* The object, as it is walked through. */
typedef struct walk {
    pc_torch_bin *bin;
    const pc_pickle *pickle;
    named *list;
    size_t count, room;
    char *name; /* of the entry being looked at */
    size_t name_len, name_room;
    size_t name_bytes, visits;
    uint8_t *seen;          /* object → looked through already and found to hold no tensor */
    pc_pickle_ref *pending; /* objects still to look through */
    size_t pending_count, pending_room;
} walk;

static pc_status about_entry(const walk *w, pc_error *err, const char *why)
{
    char quoted[PC_QUOTED];
    return pc_fail(err, PC_ERR_UNPICKLE, "%s: entry %s %s", w->bin->label,
                   pc_quote(w->name, w->name_len, quoted), why);
}

/* Set what follows the first `prefix` bytes of the name, after a dot if inside another dict. */
static pc_status set_name(walk *w, size_t prefix, bool inside, const char *text, size_t len, pc_error *err)
{
    size_t want = prefix + 1 + len; /* both are limited far below SIZE_MAX */
    if (want > w->name_room) {
        char *moved = pc_realloc(w->name, want * 2);
        if (moved == NULL)
            return pc_fail_nomem(err, "a tensor's name");
        w->name = moved;
        w->name_room = want * 2;
    }
    if (inside)
        w->name[prefix++] = '.';
    memcpy(w->name + prefix, text, len);
    w->name_len = prefix + len;
    return PC_OK;
}

static pc_status add_pending(walk *w, pc_pickle_ref ref, pc_error *err)
{
    if (w->seen[ref] != 0)
        return PC_OK;
    w->seen[ref] = 1;
    if (w->pending_count == w->pending_room) {
        size_t room = w->pending_room != 0 ? w->pending_room * 2 : 64;
        pc_pickle_ref *moved = pc_realloc(w->pending, room * sizeof *moved); /* each object at most once */
        if (moved == NULL)
            return pc_fail_nomem(err, "the objects of a pickle");
        w->pending = moved;
        w->pending_room = room;
    }
    w->pending[w->pending_count++] = ref;
    return PC_OK;
}

/* A value that is not a tensor nor a dict is left out of the result, which is right only if no tensor is lost
 * with it.  Every object is looked through once, however often it is reached. */
static pc_status check_without_tensors(walk *w, pc_pickle_ref value, const char *complaint, pc_error *err)
{
    pc_status status = add_pending(w, value, err);
    while (status == PC_OK && w->pending_count != 0) {
        const pc_pickle_object *o = &w->pickle->objects[w->pending[--w->pending_count]];
        if (o->kind == PC_PICKLE_TENSOR || o->kind == PC_PICKLE_STORAGE)
            return about_entry(w, err, complaint);
        if (o->kind == PC_PICKLE_TUPLE || o->kind == PC_PICKLE_LIST || o->kind == PC_PICKLE_SET ||
            o->kind == PC_PICKLE_DICT) {
            const pc_pickle_ref *items = pc_pickle_items(o);
            for (uint32_t i = 0; i < o->count && status == PC_OK; i++)
                status = add_pending(w, items[i], err);
        }
    }
    return status;
}

static pc_status add_named(walk *w, uint32_t tensor, pc_error *err)
{
    if (w->name_len > MAX_NAME_BYTES - w->name_bytes)
        return pc_bin_wrong(w->bin, err, "has more than 64 MiB of tensor names");
    w->name_bytes += w->name_len;
    if (w->count == w->room) {
        size_t room = w->room != 0 ? w->room * 2 : 256;
        named *moved = pc_realloc(w->list, room * sizeof *moved); /* at most MAX_VISITS */
        if (moved == NULL)
            return pc_fail_nomem(err, "the names of tensors");
        w->list = moved;
        w->room = room;
    }
    const char *name = pc_pool_strndup(&w->bin->pool, w->name, w->name_len);
    if (name == NULL)
        return pc_fail_nomem(err, "the names of tensors");
    w->list[w->count++] = (named){name, w->name_len, tensor};
    return PC_OK;
}

/* Of a key that is given twice the last value counts in Python.  torch.save never writes one, and which tensors a
 * file has must not depend on who reads it. */
static pc_status check_keys(walk *w, const pc_pickle_object *dict, size_t prefix, int depth, pc_error *err)
{
    const pc_pickle_ref *items = pc_pickle_items(dict);
    pc_strmap keys;
    pc_strmap_init(&keys);
    pc_status status = PC_OK;
    for (uint32_t i = 0; i < dict->count && status == PC_OK; i += 2) {
        const pc_pickle_object *key = &w->pickle->objects[items[i]];
        size_t other;
        if (key->kind != PC_PICKLE_TEXT)
            continue;
        const char *text = pc_pickle_bytes(w->pickle, key);
        if (pc_strmap_get(&keys, text, key->count, &other)) {
            status = set_name(w, prefix, depth > 1, text, key->count, err);
            if (status == PC_OK)
                status = about_entry(w, err, "is given twice in one dict");
        } else if (!pc_strmap_put(&keys, text, key->count, i)) {
            status = pc_fail_nomem(err, "the keys of a dict");
        }
    }
    pc_strmap_free(&keys);
    return status;
}

static pc_status flatten(walk *w, pc_pickle_ref dict, size_t prefix, int depth, pc_error *err)
{
    if (depth > MAX_NESTING)
        return about_entry(w, err, "is nested more than 64 dicts deep");
    const pc_pickle *pickle = w->pickle;
    const pc_pickle_object *object = &pickle->objects[dict];
    const pc_pickle_ref *items = pc_pickle_items(object);
    if (object->count / 2 > MAX_VISITS - w->visits)
        return pc_bin_wrong(w->bin, err, "has more than 4194304 entries in its dicts");
    w->visits += object->count / 2;
    pc_status status = PC_OK;
    size_t tensors_before = w->count;
    for (uint32_t i = 0; i < object->count && status == PC_OK; i += 2) {
        const pc_pickle_object *key = &pickle->objects[items[i]], *value = &pickle->objects[items[i + 1]];
        if (key->kind != PC_PICKLE_TEXT) {
            const char *kind = pc_pickle_kind_name(key);
            status = set_name(w, prefix, depth > 1, kind, strlen(kind), err);
            if (status == PC_OK)
                status = check_without_tensors(w, items[i + 1], "is a key that is not a string, and holds tensors",
                                               err);
            continue;
        }
        status = set_name(w, prefix, depth > 1, pc_pickle_bytes(pickle, key), key->count, err);
        if (status != PC_OK)
            break;
        if (value->kind == PC_PICKLE_TENSOR)
            status = add_named(w, (uint32_t)value->as.number, err);
        else if (value->kind == PC_PICKLE_DICT)
            status = flatten(w, items[i + 1], w->name_len, depth + 1, err);
        else
            status = check_without_tensors(w, items[i + 1],
                                           "holds tensors in something other than a dict; save them as a flat dict",
                                           err);
    }
    if (status == PC_OK && w->count != tensors_before)
        status = check_keys(w, object, prefix, depth, err);
    return status;
}

/* Strides as the tensor's own shape would give them (dimensions of size 1 may have any). */
static bool is_contiguous(const uint64_t *shape, const uint64_t *stride, int ndim)
{
    uint64_t expected = 1;
    for (int d = ndim; d-- > 0;) {
        if (shape[d] != 1 && stride[d] != expected)
            return false;
        expected *= shape[d]; /* a tensor that has elements and fits in its storage: no overflow */
    }
    return true;
}

static pc_status describe(walk *w, const named *item, pc_tensor_info *info, pc_bin_layout *layout, pc_error *err)
{
    pc_torch_bin *bin = w->bin;
    const pc_pickle *pickle = w->pickle;
    const pc_pickle_tensor *tensor = &pickle->tensors[item->tensor];
    const pc_pickle_object *shape_object = &pickle->objects[tensor->shape];
    const pc_pickle_ref *sizes = pc_pickle_items(shape_object);
    const pc_pickle_ref *steps = pc_pickle_items(&pickle->objects[tensor->stride]);
    int ndim = (int)shape_object->count;
    uint64_t *shape = pc_pool_array(&bin->pool, (size_t)ndim * 2, sizeof *shape);
    if (shape == NULL)
        return pc_fail_nomem(err, "the shapes of tensors");
    for (int d = 0; d < ndim; d++) {
        shape[d] = (uint64_t)pickle->objects[sizes[d]].as.number;
        shape[ndim + d] = (uint64_t)pickle->objects[steps[d]].as.number;
    }
    *info = (pc_tensor_info){.name = item->name,
                             .name_len = item->name_len,
                             .dtype = tensor->dtype,
                             .ndim = ndim,
                             .shape = shape,
                             .nbytes = tensor->nbytes};
    layout->storage = tensor->storage;
    layout->stride = shape + ndim;
    layout->contiguous = tensor->nbytes == 0 || is_contiguous(shape, shape + ndim, ndim);
    if (tensor->nbytes != 0)
        layout->start = tensor->offset * pc_dtype_size(tensor->dtype); /* inside the storage */
    if (!layout->contiguous)
        bin->storages[tensor->storage].gathers++;
    return PC_OK;
}

/* The list of names → the tensors of the pc_weights. */
static pc_status make_tensors(walk *w, pc_error *err)
{
    pc_torch_bin *bin = w->bin;
    pc_tensor_info *infos = pc_pool_array(&bin->pool, w->count, sizeof *infos);
    bin->layouts = pc_pool_array(&bin->pool, w->count, sizeof *bin->layouts);
    if (infos == NULL || bin->layouts == NULL)
        return pc_fail_nomem(err, "the tensors of a file");
    uint64_t limit = bin->source.size > UINT64_MAX / EXPANSION ? UINT64_MAX : bin->source.size * EXPANSION;
    limit = limit > ALWAYS_ALLOWED ? limit : ALWAYS_ALLOWED;
    uint64_t total = 0;
    size_t dims = 0;
    pc_strmap names;
    pc_strmap_init(&names);
    pc_status status = PC_OK;
    for (size_t i = 0; i < w->count && status == PC_OK; i++) {
        const named *item = &w->list[i];
        const pc_pickle_tensor *tensor = &w->pickle->tensors[item->tensor];
        char quoted[PC_QUOTED];
        size_t other;
        dims += w->pickle->objects[tensor->shape].count;
        if (pc_strmap_get(&names, item->name, item->name_len, &other))
            status = pc_fail(err, PC_ERR_UNPICKLE, "%s: tensor %s occurs twice", bin->label,
                             pc_quote(item->name, item->name_len, quoted));
        else if (tensor->nbytes > limit - total)
            status = pc_fail(err, PC_ERR_UNPICKLE,
                             "%s: with tensor %s its tensors take more than %llu bytes, from a file of %llu: "
                             "expanded tensors and views must be saved as .contiguous() or .clone()",
                             bin->label, pc_quote(item->name, item->name_len, quoted), (unsigned long long)limit,
                             (unsigned long long)bin->source.size);
        else if (dims > MAX_DIMS_TOTAL)
            status = pc_bin_wrong(bin, err, "has tensors of too many dimensions");
        else if (!pc_strmap_put(&names, item->name, item->name_len, i))
            status = pc_fail_nomem(err, "the names of tensors");
        else
            status = describe(w, item, &infos[i], &bin->layouts[i], err);
        total += tensor->nbytes;
    }
    pc_strmap_free(&names);
    bin->base.tensors = infos;
    bin->base.count = w->count;
    return status;
}

static pc_status take_object(walk *w, pc_pickle_ref top, pc_error *err)
{
    const pc_pickle_object *object = &w->pickle->objects[top];
    if (object->kind != PC_PICKLE_DICT)
        return pc_fail(err, PC_ERR_UNPICKLE, "%s holds %s and not a dict of tensors", w->bin->label,
                       pc_pickle_kind_name(object));
    w->seen = pc_calloc(w->pickle->object_count, 1);
    if (w->seen == NULL)
        return pc_fail_nomem(err, "the objects of a pickle");
    return flatten(w, top, 0, 1, err);
}

pc_status pc_bin_name_tensors(pc_bin_loader *load, pc_pickle_ref top, pc_error *err)
{
    walk w = {.bin = load->bin, .pickle = &load->pickle};
    pc_status status = take_object(&w, top, err);
    if (status == PC_OK)
        status = make_tensors(&w, err);
    pc_free(w.list);
    pc_free(w.name);
    pc_free(w.seen);
    pc_free(w.pending);
    return status;
}
