/* AdapterRegistry: modules that belong to another library (torch), and an adapter's tensors as a plan that such a host
 * makes its own objects from.
 *
 * The core works on shapes, dtypes and addresses; whose objects they come from does not matter to it.  A foreign module
 * is described by a tuple, so that a host needs no type of ours. */
#include "py_registry.h"

#include "../core/dtype.h"
#include "arrays.h"

static const struct {
    const char *name;
    pc_kind kind;
} foreign_kinds[] = {
    {"", PC_CONTAINER},         {"Linear", PC_LINEAR},       {"Conv1D", PC_CONV1D},
    {"Conv2d", PC_CONV2D},      {"Embedding", PC_EMBEDDING}, {"LayerNorm", PC_LAYERNORM},
    {"RMSNorm", PC_RMSNORM},    {"Conv1d", PC_CONV_ALONG_1}, {"Conv3d", PC_CONV_ALONG_3},
    {"MultiheadAttention", PC_ATTENTION},
};

static int kind_from_name(const char *name, pc_kind *kind)
{
    for (size_t i = 0; i < sizeof foreign_kinds / sizeof *foreign_kinds; i++) {
        if (strcmp(name, foreign_kinds[i].name) == 0) {
            *kind = foreign_kinds[i].kind;
            return 0;
        }
    }
    PyErr_Format(PyExc_ValueError, "unknown kind of module \"%s\"", name);
    return -1;
}

/* What a module's row may not be: the core multiplies these. */
static int check_geometry(const pc_module *entry)
{
    int64_t product;
    bool fits = entry->in_features >= 0 && entry->out_features >= 0 && entry->groups >= 1 &&
                !__builtin_mul_overflow(entry->in_features, entry->out_features, &product);
    for (int d = 0; d < pc_kind_kernel_dims(entry->kind) && fits; d++)
        fits = entry->kernel[d] >= 1 && !__builtin_mul_overflow(product, entry->kernel[d], &product);
    if (entry->kind == PC_ATTENTION)
        fits = fits && entry->in_features <= INT64_MAX / 3 && entry->out_features == 3 * entry->in_features;
    if (fits && product <= PTRDIFF_MAX / 8)
        return 0;
    PyErr_Format(PyExc_ValueError, "module %s has impossible extents", entry->name);
    return -1;
}

static int read_kernel(PyObject *kernel, pc_module *entry)
{
    const int dims = pc_kind_kernel_dims(entry->kind);
    if (dims == 0)
        return 0;
    if (kernel == NULL || !PyTuple_Check(kernel) || PyTuple_GET_SIZE(kernel) != dims) {
        PyErr_Format(PyExc_ValueError, "a %s needs a kernel of %d extents", pc_kind_name(entry->kind), dims);
        return -1;
    }
    for (int d = 0; d < dims; d++)
        entry->kernel[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(kernel, d));
    return PyErr_Occurred() ? -1 : 0;
}

int registry_describe_foreign(PyObject *row, pc_module *entry)
{
    const char *class_name, *kind, *dtype;
    PyObject *weight, *bias, *has_bias, *kernel = NULL;
    long long in, out, groups = 1;
    if (!PyArg_ParseTuple(row,
                          "sssLLOOO|OL;a foreign module is (class name, kind, dtype, in, out, weight's address, bias's "
                          "address, has bias[, kernel, groups])",
                          &class_name, &kind, &dtype, &in, &out, &weight, &bias, &has_bias, &kernel, &groups) ||
        kind_from_name(kind, &entry->kind) < 0)
        return -1;
    entry->opaque = true;
    entry->class_name = class_name;
    if (entry->kind == PC_CONTAINER)
        return 0;
    entry->dtype = pc_dtype_from_name(dtype, strlen(dtype));
    entry->in_features = in;
    entry->out_features = out;
    entry->has_weight = true;
    entry->has_bias = PyObject_IsTrue(has_bias) == 1;
    entry->groups = groups;
    if (weight != Py_None)
        entry->weight = PyLong_AsVoidPtr(weight);
    if (bias != Py_None)
        entry->bias = PyLong_AsVoidPtr(bias);
    return PyErr_Occurred() || read_kernel(kernel, entry) < 0 ? -1 : check_geometry(entry);
}

/* ---------------------------------------------------------------------- layout */

/* Python objects that many rows have in common: made once. */
#define SHAPES 16

typedef struct common {
    PyObject *shapes[SHAPES]; /* tuples, and … */
    pc_tensor like[SHAPES];   /* … tensors of those shapes */
    size_t next_shape;
    PyObject *module; /* the name of the module of the row before */
    int32_t module_index;
} common;

static void clear_common(common *c)
{
    for (size_t i = 0; i < SHAPES; i++)
        Py_XDECREF(c->shapes[i]);
    Py_XDECREF(c->module);
}

static bool same_shape(const pc_tensor *a, const pc_tensor *b)
{
    bool same = a->ndim == b->ndim;
    for (int d = 0; same && d < a->ndim; d++)
        same = a->shape[d] == b->shape[d];
    return same;
}

/* The tensor's shape as a tuple; a new reference. */
static PyObject *shape_of(common *c, const pc_tensor *tensor)
{
    for (size_t i = 0; i < SHAPES; i++)
        if (c->shapes[i] != NULL && same_shape(&c->like[i], tensor))
            return Py_NewRef(c->shapes[i]);
    PyObject *shape = PyTuple_New(tensor->ndim);
    for (int d = 0; shape != NULL && d < tensor->ndim; d++) {
        PyObject *extent = PyLong_FromLongLong(tensor->shape[d]);
        if (extent == NULL)
            Py_CLEAR(shape);
        else
            PyTuple_SET_ITEM(shape, d, extent);
    }
    if (shape != NULL) {
        Py_XSETREF(c->shapes[c->next_shape], Py_NewRef(shape));
        c->like[c->next_shape] = *tensor;
        c->next_shape = (c->next_shape + 1) % SHAPES;
    }
    return shape;
}

/* A module's name; a new reference. */
static PyObject *module_name(common *c, const pc_registry *core, int32_t index)
{
    if (c->module == NULL || c->module_index != index) {
        const pc_module *module = &pc_registry_modules((pc_registry *)(uintptr_t)core)->items[index];
        Py_XSETREF(c->module, PyUnicode_FromStringAndSize(module->name, (Py_ssize_t)module->name_len));
        c->module_index = index;
    }
    return Py_XNewRef(c->module);
}

/* What the host calls the tensor. */
static const char *parameter_name(const pc_adapter *adapter, const pc_tensor *tensor, const char *key)
{
    const char *role = tensor->role == PC_ROLE_BASE_BIAS ? "bias" : "";
    for (size_t i = 0; i < adapter->method->role_count; i++)
        if (adapter->method->roles[i].role == tensor->role)
            role = adapter->method->roles[i].parameter;
    const char *suffix = strrchr(key, '.');
    return strcmp(role, "lora_B") == 0 && suffix != NULL && strcmp(suffix, ".bias") == 0 ? "lora_B.bias" : role;
}

/* A tuple of new references, which are given back if one is NULL. */
static PyObject *pack(PyObject **items, Py_ssize_t count)
{
    PyObject *tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; i < count; i++)
        if (items[i] == NULL)
            Py_CLEAR(tuple);
    for (Py_ssize_t i = 0; i < count; i++) {
        if (tuple != NULL)
            PyTuple_SET_ITEM(tuple, i, items[i]);
        else
            Py_XDECREF(items[i]);
    }
    return tuple;
}

static PyObject *tensor_row(const pc_registry *core, const pc_adapter *adapter, const pc_tensor *tensor, pc_pool *pool,
                            common *c)
{
    pc_string key;
    pc_error err;
    if (pc_tensor_name(core, adapter, tensor, false, pool, &key, &err) != PC_OK)
        return PyErr_NoMemory();
    PyObject *items[] = {
        PyUnicode_FromStringAndSize(key.text, (Py_ssize_t)key.len),
        module_name(c, core, tensor->module),
        PyUnicode_InternFromString(parameter_name(adapter, tensor, key.text)),
        PyUnicode_InternFromString(pc_dtype_get(tensor->dtype)->name),
        shape_of(c, tensor),
        PyLong_FromSize_t(tensor->offset),
        Py_NewRef(tensor->in_state_dict ? Py_True : Py_False),
        Py_NewRef(tensor->trainable ? Py_True : Py_False),
    };
    return pack(items, sizeof items / sizeof *items);
}

static PyObject *slot_row(const pc_registry *core, const pc_slot *slot, common *c)
{
    PyObject *items[] = {
        module_name(c, core, slot->module),
        Py_NewRef(slot->adapts ? Py_True : Py_False),
        PyLong_FromLongLong(slot->rank),
        PyFloat_FromDouble(slot->alpha),
        PyFloat_FromDouble(slot->scaling),
        Py_NewRef(slot->feedforward ? Py_True : Py_False),
    };
    return pack(items, sizeof items / sizeof *items);
}

const char registry_layout_doc[] =
    "layout($self, name, /)\n--\n\n"
    "An adapter as a host that makes its own tensors needs it: (arena, tensors, slots).\n\n"
    "arena is a writable uint8 array over all tensors; it keeps them alive. tensors is a list of (state-dict key, "
    "module, parameter, dtype, shape, offset in bytes, in the state dict?, trainable?), where those of one parameter, dtype "
    "and shape lie side by side (each begins at a multiple of 64 bytes), slots one of (module, "
    "adapts?, rank, alpha, scaling, feedforward?).";

PyObject *registry_layout(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    peftc_state *state = registry_state(self);
    pc_adapter *adapter = registry_find_adapter(self, arg);
    if (adapter == NULL)
        return NULL;
    pc_adapter_retain(adapter);
    pc_pool pool;
    pc_pool_init(&pool);
    common c = {.module = NULL};
    npy_intp bytes = (npy_intp)pc_arena_size(adapter->arena);
    PyObject *owner = registry_arena(state, adapter->arena);
    PyObject *arena = owner != NULL
                          ? peftc_array_over(state, PC_U8, 1, &bytes, pc_arena_data(adapter->arena), owner, 1)
                          : NULL;
    PyObject *tensors = arena != NULL ? PyList_New((Py_ssize_t)adapter->tensor_count) : NULL;
    PyObject *slots = tensors != NULL ? PyList_New((Py_ssize_t)adapter->slot_count) : NULL;
    bool made = slots != NULL;
    for (size_t i = 0; made && i < adapter->tensor_count; i++) {
        PyObject *row = tensor_row(self->core, adapter, &adapter->tensors[i], &pool, &c);
        made = row != NULL;
        PyList_SET_ITEM(tensors, (Py_ssize_t)i, row);
    }
    for (size_t i = 0; made && i < adapter->slot_count; i++) {
        PyObject *row = slot_row(self->core, &adapter->slots[i], &c);
        made = row != NULL;
        PyList_SET_ITEM(slots, (Py_ssize_t)i, row);
    }
    PyObject *result = made ? PyTuple_Pack(3, arena, tensors, slots) : NULL;
    Py_XDECREF(slots);
    Py_XDECREF(tensors);
    Py_XDECREF(arena);
    Py_XDECREF(owner);
    clear_common(&c);
    pc_pool_free(&pool);
    pc_adapter_release(adapter);
    return result;
}
