/* AdapterRegistry: an adapter's tensors, as arrays over its arena and as a file. */
#include "py_registry.h"

#include "../formats/safetensors.h"
#include "arrays.h"

typedef struct arena_object {
    PyObject_HEAD
    pc_arena *arena;
} arena_object;

static void arena_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    pc_arena_release(((arena_object *)op)->arena);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyType_Slot arena_slots[] = {
    {Py_tp_doc, (void *)"The memory of one adapter's tensors; the base of their arrays."},
    {Py_tp_dealloc, arena_dealloc},
    {0, NULL},
};

PyType_Spec registry_arena_spec = {
    .name = "peftc._core.Arena",
    .basicsize = sizeof(arena_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = arena_slots,
};

PyObject *registry_arena(peftc_state *state, pc_arena *arena)
{
    arena_object *self = (arena_object *)state->arena_type->tp_alloc(state->arena_type, 0);
    if (self != NULL)
        self->arena = pc_arena_retain(arena);
    return (PyObject *)self;
}

pc_arena *registry_arena_under(peftc_state *state, PyObject *array)
{
    PyObject *base = PyArray_Check(array) ? PyArray_BASE((PyArrayObject *)array) : NULL;
    return base != NULL && Py_IS_TYPE(base, state->arena_type) ? ((arena_object *)base)->arena : NULL;
}

static PyObject *tensor_array(peftc_state *state, const pc_adapter *adapter, const pc_tensor *tensor, PyObject *owner)
{
    npy_intp shape[PC_TENSOR_DIMS];
    for (int d = 0; d < tensor->ndim; d++)
        shape[d] = (npy_intp)tensor->shape[d];
    return peftc_array_over(state, tensor->dtype, tensor->ndim, shape, pc_tensor_data(adapter, tensor), owner, 1);
}

static PyObject *tensor_name(registry_object *self, const pc_adapter *adapter, const pc_tensor *tensor,
                             bool with_adapter_name, pc_pool *pool)
{
    pc_string name;
    pc_error err;
    if (pc_tensor_name(self->core, adapter, tensor, with_adapter_name, pool, &name, &err) != PC_OK)
        return peftc_raise(registry_state(self), &err);
    return PyUnicode_DecodeUTF8(name.text, (Py_ssize_t)name.len, "strict");
}

/* What a walk over an adapter's tensors adds one to; 0, or -1 with an exception. */
typedef struct walk {
    registry_object *self;
    peftc_state *state;
    const pc_adapter *adapter;
    PyObject *owner; /* of the arrays' memory */
    pc_pool pool;    /* names */
} walk;
typedef int (*add_fn)(walk *w, const pc_tensor *tensor, PyObject *result);

/* `result` (stolen, may be NULL) after `add` saw every tensor of the adapter called `arg`. */
static PyObject *walk_tensors(PyObject *op, PyObject *arg, PyObject *result, add_fn add)
{
    walk w = {.self = (registry_object *)op};
    pc_adapter *adapter = result != NULL ? registry_find_adapter(w.self, arg) : NULL;
    if (adapter == NULL) {
        Py_XDECREF(result);
        return NULL;
    }
    pc_adapter_retain(adapter);
    w.adapter = adapter;
    w.state = registry_state(w.self);
    w.owner = registry_arena(w.state, adapter->arena);
    pc_pool_init(&w.pool);
    if (w.owner == NULL)
        Py_CLEAR(result);
    for (int copies = 0; copies < 2; copies++) /* base weights come last, as in PEFT's state dict */
        for (size_t i = 0; result != NULL && i < adapter->tensor_count; i++)
            if (pc_is_base_copy(&adapter->tensors[i]) == (copies != 0) && add(&w, &adapter->tensors[i], result) < 0)
                Py_CLEAR(result);
    Py_XDECREF(w.owner);
    pc_pool_free(&w.pool);
    pc_adapter_release(adapter);
    return result;
}

static int add_row(walk *w, const pc_tensor *tensor, PyObject *list)
{
    PyObject *key = tensor_name(w->self, w->adapter, tensor, false, &w->pool);
    PyObject *name = key != NULL ? tensor_name(w->self, w->adapter, tensor, true, &w->pool) : NULL;
    PyObject *array = name != NULL ? tensor_array(w->state, w->adapter, tensor, w->owner) : NULL;
    const pc_module *module = &pc_registry_modules(w->self->core)->items[tensor->module];
    PyObject *row = array != NULL ? Py_BuildValue("(OOOOOs)", key, name, array,
                                                  tensor->in_state_dict ? Py_True : Py_False,
                                                  tensor->trainable ? Py_True : Py_False, module->name)
                                  : NULL;
    int status = row != NULL ? PyList_Append(list, row) : -1;
    Py_XDECREF(row);
    Py_XDECREF(array);
    Py_XDECREF(name);
    Py_XDECREF(key);
    return status;
}

const char registry_tensors_doc[] =
    "tensors($self, name, /)\n--\n\n"
    "All tensors of an adapter as tuples (state-dict key, name in the model, array, in the state dict?, "
    "trainable?, module's dotted name). The arrays are views of the arena and keep it alive.";

PyObject *registry_tensors(PyObject *op, PyObject *arg) { return walk_tensors(op, arg, PyList_New(0), add_row); }

static int add_item(walk *w, const pc_tensor *tensor, PyObject *dict)
{
    if (!tensor->in_state_dict)
        return 0;
    PyObject *key = tensor_name(w->self, w->adapter, tensor, false, &w->pool);
    PyObject *array = key != NULL ? tensor_array(w->state, w->adapter, tensor, w->owner) : NULL;
    int status = array != NULL ? PyDict_SetItem(dict, key, array) : -1;
    Py_XDECREF(array);
    Py_XDECREF(key);
    return status;
}

const char registry_state_dict_doc[] =
    "state_dict($self, name, /)\n--\n\n"
    "An adapter's state dict: PEFT's keys without the adapter's name -> views of the arena.";

/* Say so when base weights come along, which may be as large as the model: PEFT's words, and which.  -1 with an exception. */
static int warn_of_base_weights(registry_object *self, const pc_adapter *adapter)
{
    const pc_module_table *table = pc_registry_modules(self->core);
    const char *first = NULL;
    int count = 0;
    for (size_t i = 0; i < adapter->tensor_count; i++) {
        if (adapter->tensors[i].role != PC_ROLE_BASE_WEIGHT)
            continue;
        if (count++ == 0)
            first = table->items[adapter->tensors[i].module].name;
    }
    if (count == 0)
        return 0;
    return PyErr_WarnFormat(PyExc_UserWarning, 2,
                            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`: "
                            "the base weights of %s%s are part of the adapter's state",
                            first, count > 1 ? " and others" : "");
}

PyObject *registry_state_dict(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    pc_adapter *adapter = registry_find_adapter(self, arg);
    if (adapter == NULL)
        return NULL;
    pc_adapter_retain(adapter); /* a warning runs any code, which may delete it */
    int status = warn_of_base_weights(self, adapter);
    pc_adapter_release(adapter);
    return status == 0 ? walk_tensors(op, arg, PyDict_New(), add_item) : NULL;
}

/* Dotted names of the modules whose slot satisfies one flag. */
static PyObject *modules_where(registry_object *self, PyObject *arg, bool replaced)
{
    pc_adapter *adapter = registry_find_adapter(self, arg);
    if (adapter == NULL)
        return NULL;
    pc_adapter_retain(adapter); /* making the list may run a finalizer that deletes it */
    const pc_module_table *table = pc_registry_modules(self->core);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < adapter->slot_count; i++) {
        const pc_slot *slot = &adapter->slots[i];
        if (replaced ? !slot->replaces : !slot->adapts)
            continue;
        const pc_module *module = &table->items[slot->module];
        PyObject *name = PyUnicode_DecodeUTF8(module->name, (Py_ssize_t)module->name_len, "strict");
        if (name == NULL || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    pc_adapter_release(adapter);
    return list;
}

const char registry_saved_modules_doc[] =
    "saved_modules($self, name, /)\n--\n\nDotted names of the layers that the adapter "
                                "replaces (modules_to_save).";

PyObject *registry_saved_modules(PyObject *op, PyObject *arg)
{
    return modules_where((registry_object *)op, arg, true);
}

const char registry_adapted_modules_doc[] =
    "adapted_modules($self, name, /)\n--\n\nDotted names of the layers that the adapter's method changes.";

PyObject *registry_adapted_modules(PyObject *op, PyObject *arg)
{
    return modules_where((registry_object *)op, arg, false);
}

/* -------------------------------------------------------------------- saving */

typedef struct state_views {
    pc_tensor_view *views;
    size_t count;
    pc_pool pool;
} state_views;

/* The adapter's state dict as the writer wants it; names carry `prefix`. */
static pc_status collect_views(registry_object *self, const pc_adapter *adapter, const char *prefix, state_views *out,
                               pc_error *err)
{
    const size_t prefix_len = strlen(prefix);
    out->views = pc_pool_array(&out->pool, adapter->tensor_count, sizeof *out->views);
    if (out->views == NULL)
        return pc_fail_nomem(err, "the list of tensors to save");
    for (size_t i = 0; i < adapter->tensor_count; i++) {
        const pc_tensor *tensor = &adapter->tensors[i];
        if (!tensor->in_state_dict)
            continue;
        pc_string key;
        pc_status status = pc_tensor_name(self->core, adapter, tensor, false, &out->pool, &key, err);
        if (status != PC_OK)
            return status;
        char *name = pc_pool_alloc(&out->pool, prefix_len + key.len + 1);
        uint64_t *shape = pc_pool_array(&out->pool, PC_TENSOR_DIMS, sizeof *shape);
        if (name == NULL || shape == NULL)
            return pc_fail_nomem(err, "a tensor's name");
        memcpy(name, prefix, prefix_len);
        memcpy(name + prefix_len, key.text, key.len);
        for (int d = 0; d < tensor->ndim; d++)
            shape[d] = (uint64_t)tensor->shape[d];
        pc_tensor_view *view = &out->views[out->count++];
        view->info = (pc_tensor_info){.name = name,
                                      .name_len = prefix_len + key.len,
                                      .dtype = tensor->dtype,
                                      .ndim = tensor->ndim,
                                      .shape = shape,
                                      .nbytes = tensor->nbytes};
        view->data = pc_tensor_data(adapter, tensor);
    }
    return PC_OK;
}

const char registry_save_doc[] =
    "save($self, name, path, /, prefix='base_model.model.')\n--\n\n"
             "Write an adapter's state dict to a safetensors file, straight from the arena and atomically. The bytes are "
             "those that PEFT writes for the same tensors.";

PyObject *registry_save(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"", "", "prefix", NULL};
    PyObject *name, *path;
    const char *prefix = "base_model.model.";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO&|s:save", names, &name, PyUnicode_FSConverter, &path, &prefix))
        return NULL;
    pc_adapter *adapter = registry_find_adapter(self, name);
    if (adapter == NULL) {
        Py_DECREF(path);
        return NULL;
    }
    static const pc_metadata_item metadata = {"format", 6, "pt", 2};
    pc_adapter_retain(adapter);
    if (warn_of_base_weights(self, adapter) < 0) {
        pc_adapter_release(adapter);
        Py_DECREF(path);
        return NULL;
    }
    state_views collected = {0};
    pc_pool_init(&collected.pool);
    pc_error err;
    /* Names come from the module table, which only grows under the GIL; the bytes are written without it. */
    pc_status status = collect_views(self, adapter, prefix, &collected, &err);
    if (status == PC_OK) {
        Py_BEGIN_ALLOW_THREADS
        status = pc_safetensors_save(PyBytes_AS_STRING(path), collected.views, collected.count, &metadata, 1, true,
                                     &err);
        Py_END_ALLOW_THREADS
    }
    pc_adapter_release(adapter);
    pc_pool_free(&collected.pool);
    Py_DECREF(path);
    if (status != PC_OK)
        return peftc_raise(registry_state(self), &err);
    Py_RETURN_NONE;
}
