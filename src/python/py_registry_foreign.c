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
    int64_t product = 0;
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

static int read_row(PyObject *row, pc_module *entry)
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

int registry_describe_foreign(PyObject *row, foreign_rows *seen, pc_module *entry)
{
    const size_t place = ((uintptr_t)row >> 4) % FOREIGN_ROWS;
    if (seen->rows[place] == row) { /* the same tuple for many modules, and alive: the caller has all of them */
        const pc_module named = *entry;
        *entry = seen->entries[place];
        entry->name = named.name;
        entry->name_len = named.name_len;
        entry->output_embedding = named.output_embedding;
        entry->input_embedding = named.input_embedding;
        entry->alias_of = named.alias_of;
        return 0;
    }
    if (read_row(row, entry) < 0)
        return -1;
    seen->rows[place] = row;
    seen->entries[place] = *entry;
    return 0;
}

/* ---------------------------------------------------------------------- layout */

/* What is being put together for layout(). */
typedef struct plan {
    const pc_registry *core;
    const pc_adapter *adapter;
    pc_pool pool;
    pc_strmap groups; /* pc_likeness → index in the list of groups */
    PyObject *keys, *modules, *parameters, *saved, *group_list, *slots;
    PyObject *module; /* the name that was asked for last */
    int32_t module_index;
    PyObject *alpha, *scaling; /* the last slot's: most are the same in all of them */
} plan;

/* A module's name; a new reference. */
static PyObject *module_name(plan *p, int32_t index)
{
    if (p->module == NULL || p->module_index != index) {
        const pc_module *module = &pc_registry_modules((pc_registry *)(uintptr_t)p->core)->items[index];
        Py_XSETREF(p->module, PyUnicode_FromStringAndSize(module->name, (Py_ssize_t)module->name_len));
        p->module_index = index;
    }
    return Py_XNewRef(p->module);
}

/* What the host calls the tensor. */
static const char *parameter_name(const pc_adapter *adapter, const pc_tensor *tensor, pc_string key)
{
    const char *role = tensor->role == PC_ROLE_BASE_BIAS ? "bias" : "";
    for (size_t i = 0; i < adapter->method->role_count; i++)
        if (adapter->method->roles[i].role == tensor->role)
            role = adapter->method->roles[i].parameter;
    const char bias[] = ".bias"; /* the key ends with its length: no NUL follows */
    const size_t len = sizeof bias - 1;
    const bool is_bias = key.len >= len && memcmp(key.text + key.len - len, bias, len) == 0;
    return is_bias && strcmp(role, "lora_B") == 0 ? "lora_B.bias" : role;
}

/* Append a new reference, which is given back; false with an exception, also when it is NULL. */
static bool append(PyObject *list, PyObject *item)
{
    const bool good = item != NULL && PyList_Append(list, item) == 0;
    Py_XDECREF(item);
    return good;
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

static PyObject *shape_of(const pc_tensor *tensor)
{
    PyObject *shape = PyTuple_New(tensor->ndim);
    for (int d = 0; shape != NULL && d < tensor->ndim; d++) {
        PyObject *extent = PyLong_FromLongLong(tensor->shape[d]);
        if (extent == NULL)
            Py_CLEAR(shape);
        else
            PyTuple_SET_ITEM(shape, d, extent);
    }
    return shape;
}

/* The group of tensors like this one, borrowed; made when there is none. */
static PyObject *group_of(plan *p, const pc_tensor *tensor, PyObject *parameter)
{
    const pc_likeness same = pc_tensor_likeness(tensor);
    size_t index;
    if (pc_strmap_get(&p->groups, (const char *)&same, sizeof same, &index))
        return PyList_GET_ITEM(p->group_list, (Py_ssize_t)index);
    const char *key = pc_pool_strndup(&p->pool, (const char *)&same, sizeof same);
    index = (size_t)PyList_GET_SIZE(p->group_list);
    if (key == NULL || !pc_strmap_put(&p->groups, key, sizeof same, index)) {
        PyErr_NoMemory();
        return NULL;
    }
    PyObject *items[] = {
        Py_NewRef(parameter),
        PyUnicode_InternFromString(pc_dtype_get(tensor->dtype)->name),
        shape_of(tensor),
        PyList_New(0),
        PyList_New(0),
    };
    return append(p->group_list, pack(items, 5)) ? PyList_GET_ITEM(p->group_list, (Py_ssize_t)index) : NULL;
}

static bool plan_tensor(plan *p, size_t index)
{
    const pc_tensor *tensor = &p->adapter->tensors[index];
    pc_string key;
    pc_error err;
    if (pc_tensor_name(p->core, p->adapter, tensor, false, &p->pool, &key, &err) != PC_OK) {
        PyErr_NoMemory();
        return false;
    }
    PyObject *parameter = PyUnicode_InternFromString(parameter_name(p->adapter, tensor, key));
    PyObject *group = parameter != NULL ? group_of(p, tensor, parameter) : NULL;
    const bool good = group != NULL && append(PyTuple_GET_ITEM(group, 3), PyLong_FromSize_t(tensor->offset)) &&
                      append(PyTuple_GET_ITEM(group, 4), PyLong_FromSize_t(index)) &&
                      append(p->keys, PyUnicode_FromStringAndSize(key.text, (Py_ssize_t)key.len)) &&
                      append(p->modules, module_name(p, tensor->module)) && append(p->parameters, Py_NewRef(parameter)) &&
                      append(p->saved, Py_NewRef(tensor->in_state_dict ? Py_True : Py_False));
    Py_XDECREF(parameter);
    return good;
}

/* The number as a float, which *last is if it is that already; a new reference. */
static PyObject *number(PyObject **last, double value)
{
    const double before = *last != NULL ? PyFloat_AS_DOUBLE(*last) : 0.0;
    if (*last == NULL || memcmp(&value, &before, sizeof value) != 0)
        Py_XSETREF(*last, PyFloat_FromDouble(value));
    return Py_XNewRef(*last);
}

static PyObject *slot_row(plan *p, const pc_slot *slot)
{
    PyObject *items[] = {
        module_name(p, slot->module),
        Py_NewRef(slot->adapts ? Py_True : Py_False),
        PyLong_FromLongLong(slot->rank),
        number(&p->alpha, slot->alpha),
        number(&p->scaling, slot->scaling),
        Py_NewRef(slot->feedforward ? Py_True : Py_False),
        PyLong_FromLong(slot->tensor_count),
    };
    return pack(items, sizeof items / sizeof *items);
}

const char registry_layout_doc[] =
    "layout($self, name, /)\n--\n\n"
    "An adapter as a host that makes its own tensors needs it: (arena, keys, modules, parameters, saved, groups, slots).\n\n"
    "arena is a writable uint8 array over all tensors; it keeps them alive. Of each tensor there is the state-dict key, the "
    "module's name, the parameter's name, and whether it is in the state dict, in four lists. groups is a list of (parameter, "
    "dtype, shape, offsets in bytes, indices) of tensors that are alike; they lie side by side, each at a multiple of 64 "
    "bytes. slots is a list of (module, adapts?, rank, alpha, scaling, feedforward?, tensors): the tensors of a slot follow "
    "each other, and slots do, too.";

PyObject *registry_layout(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    peftc_state *state = registry_state(self);
    pc_adapter *adapter = registry_find_adapter(self, arg);
    if (adapter == NULL)
        return NULL;
    pc_adapter_retain(adapter);
    plan p = {.core = self->core, .adapter = adapter};
    pc_pool_init_scratch(&p.pool); /* no mapping to take back: that would wait for the threads that fill the adapter's memory */
    pc_strmap_init(&p.groups);
    PyObject **const lists[] = {&p.keys, &p.modules, &p.parameters, &p.saved, &p.group_list, &p.slots};
    bool good = true;
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        good = (*lists[i] = PyList_New(0)) != NULL && good;
    for (size_t i = 0; good && i < adapter->tensor_count; i++)
        good = plan_tensor(&p, i);
    for (size_t i = 0; good && i < adapter->slot_count; i++)
        good = append(p.slots, slot_row(&p, &adapter->slots[i]));
    npy_intp bytes = (npy_intp)pc_arena_size(adapter->arena);
    PyObject *owner = good ? registry_arena(state, adapter->arena) : NULL;
    PyObject *arena = owner != NULL
                          ? peftc_array_over(state, PC_U8, 1, &bytes, pc_arena_data(adapter->arena), owner, 1)
                          : NULL;
    PyObject *result = NULL;
    if (arena != NULL)
        result = PyTuple_Pack(7, arena, p.keys, p.modules, p.parameters, p.saved, p.group_list, p.slots);
    Py_XDECREF(arena);
    Py_XDECREF(owner);
    for (size_t i = 0; i < sizeof lists / sizeof *lists; i++)
        Py_XDECREF(*lists[i]);
    Py_XDECREF(p.module);
    Py_XDECREF(p.alpha);
    Py_XDECREF(p.scaling);
    pc_strmap_free(&p.groups);
    pc_pool_free(&p.pool);
    pc_adapter_release(adapter);
    return result;
}
