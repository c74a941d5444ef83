/* AdapterRegistry: merged weights. */
#include "py_registry.h"

/* Adapters to merge: those merged already, then the ones asked for (a tuple of str, or NULL for the active ones) that
 * are not.  Returned references are borrowed from `activation` and the registry, both kept by the caller; PyMem_Free the
 * array. */
static pc_adapter **merge_list(registry_object *self, const pc_activation *activation, PyObject *names, size_t *count)
{
    size_t merged = activation->merged != NULL ? activation->merged->adapter_count : 0;
    size_t asked = names != NULL ? (size_t)PyTuple_GET_SIZE(names) : activation->count;
    pc_adapter **list = PyMem_New(pc_adapter *, merged + asked + 1);
    if (list == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    size_t used = 0;
    for (size_t i = 0; i < merged; i++)
        list[used++] = activation->merged->adapters[i];
    for (size_t i = 0; i < asked; i++) {
        pc_adapter *adapter = names != NULL ? registry_find_adapter(self, PyTuple_GET_ITEM(names, (Py_ssize_t)i))
                                            : activation->adapters[i];
        if (adapter == NULL) {
            PyMem_Free(list);
            return NULL;
        }
        bool there = false;
        for (size_t j = 0; j < used; j++)
            there = there || list[j] == adapter;
        if (!there)
            list[used++] = adapter;
    }
    *count = used;
    return list;
}

/* The names that were asked for as a tuple of str; reading them may run any code. */
static PyObject *name_tuple(PyObject *names)
{
    PyObject *tuple = PySequence_Tuple(names);
    for (Py_ssize_t i = 0; tuple != NULL && i < PyTuple_GET_SIZE(tuple); i++) {
        Py_ssize_t len;
        if (registry_adapter_name(PyTuple_GET_ITEM(tuple, i), &len) == NULL)
            Py_CLEAR(tuple);
    }
    return tuple;
}

const char registry_merge_doc[] =
    "merge($self, names=None, safe_merge=False)\n--\n\n"
             "Fold adapters (the active ones by default) into copies of the base weights, beside what is merged already. "
             "The base weights themselves are not touched, so unmerge() is exact.\n\n"
             "safe_merge refuses a result with NaN or infinity with ValueError. Raises KeyError for an unknown name, "
             "MemoryError; nothing has changed then.";

PyObject *registry_merge(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"names", "safe_merge", NULL};
    PyObject *wanted = Py_None;
    int safe_merge = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|Op:merge", names, &wanted, &safe_merge))
        return NULL;
    peftc_state *state = registry_state(self);
    PyObject *asked = wanted != Py_None ? name_tuple(wanted) : NULL;
    if (state == NULL || (wanted != Py_None && asked == NULL))
        return NULL;
    if (registry_lock(self) < 0) {
        Py_XDECREF(asked);
        return NULL;
    }
    pc_activation *activation = pc_registry_acquire(self->core);
    size_t count = 0;
    pc_adapter **list = merge_list(self, activation, asked, &count);
    PyObject *pins = list != NULL ? registry_pin_weights(self, state) : NULL;
    pc_merged *merged = NULL;
    pc_error err;
    pc_status status = PC_OK;
    if (pins != NULL && count != 0) {
        Py_BEGIN_ALLOW_THREADS
        status = pc_merge(state->rt, self->core, list, count, safe_merge != 0, &merged, &err);
        Py_END_ALLOW_THREADS
        if (status == PC_OK)
            status = pc_registry_set_merged(self->core, merged, &err);
    }
    pc_activation_release(activation);
    registry_unlock(self);
    PyMem_Free(list);
    Py_XDECREF(asked);
    if (pins == NULL)
        return NULL;
    Py_DECREF(pins);
    if (status != PC_OK)
        return peftc_raise(state, &err);
    Py_RETURN_NONE;
}

const char registry_unmerge_doc[] =
    "unmerge($self, /)\n--\n\nGo back to the base weights, bit for bit.";

PyObject *registry_unmerge(PyObject *op, PyObject *unused)
{
    (void)unused;
    registry_object *self = (registry_object *)op;
    pc_error err;
    if (registry_lock(self) < 0)
        return NULL;
    pc_status status = pc_registry_set_merged(self->core, NULL, &err);
    registry_unlock(self);
    if (status != PC_OK)
        return peftc_raise(registry_state(self), &err);
    Py_RETURN_NONE;
}

const char registry_merged_doc[] =
    "merged($self, /)\n--\n\nThe names of the adapters that are merged, in order.";

PyObject *registry_merged(PyObject *op, PyObject *unused)
{
    (void)unused;
    pc_activation *activation = pc_registry_acquire(((registry_object *)op)->core);
    const pc_merged *merged = activation->merged;
    PyObject *list = merged != NULL ? registry_name_list(merged->adapters, merged->adapter_count) : PyList_New(0);
    pc_activation_release(activation);
    return list;
}
