/* peftc._core.AdapterRegistry: the mixin-compatible object.
 *
 * Everything here is thin: arguments to C, one core call, results to Python.
 * What is active is read and swapped in the core, whatever the model's size.
 */
#include "py_registry.h"

#include <structmember.h>
#include <unistd.h>

pc_registry *peftc_registry_core(PyObject *registry) { return ((registry_object *)registry)->core; }

int registry_lock(registry_object *self)
{
    const pid_t process = getpid();
    if (self->holder != 0 && self->holder_process != process) {
        /* Forked while another thread was adding an adapter: that thread does not exist here, and the lock that it
         * holds is nobody's.  What it was building is not listed yet. */
        PyThread_type_lock fresh = PyThread_allocate_lock();
        if (fresh == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        self->mutation = fresh; /* the old one cannot be freed: it is locked */
        self->holder = 0;
    }
    if (self->holder == PyThread_get_thread_ident()) {
        PyErr_SetString(PyExc_RuntimeError, "the adapters of this model are being changed by the code that called this");
        return -1;
    }
    if (!PyThread_acquire_lock(self->mutation, NOWAIT_LOCK)) {
        Py_BEGIN_ALLOW_THREADS
        PyThread_acquire_lock(self->mutation, WAIT_LOCK);
        Py_END_ALLOW_THREADS
    }
    self->holder = PyThread_get_thread_ident();
    self->holder_process = process;
    return 0;
}

void registry_unlock(registry_object *self)
{
    self->holder = 0;
    PyThread_release_lock(self->mutation);
}

/* ------------------------------------------------------------------ lifetime */

static PyObject *registry_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":AdapterRegistry", names))
        return NULL;
    peftc_state *state = peftc_state_of_type(type);
    if (state == NULL)
        return NULL;
    registry_object *self = (registry_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    pc_error err;
    self->objects = PyList_New(0);
    self->mutation = PyThread_allocate_lock();
    if (self->objects == NULL || self->mutation == NULL) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        Py_DECREF(self);
        return NULL;
    }
    if (pc_registry_new(&self->core, &err) != PC_OK) {
        Py_DECREF(self);
        return peftc_raise(state, &err);
    }
    return (PyObject *)self;
}

static int registry_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((registry_object *)op)->objects);
    return 0;
}

static int registry_clear(PyObject *op)
{
    Py_CLEAR(((registry_object *)op)->objects);
    return 0;
}

static void registry_dealloc(PyObject *op)
{
    registry_object *self = (registry_object *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs(op);
    registry_give_up(self);
    registry_clear(op);
    pc_registry_free(self->core);
    if (self->mutation != NULL)
        PyThread_free_lock(self->mutation);
    type->tp_free(op);
    Py_DECREF(type);
}

/* --------------------------------------------------------------------- names */

const char *registry_adapter_name(PyObject *obj, Py_ssize_t *len)
{
    if (!PyUnicode_Check(obj)) {
        PyErr_Format(PyExc_TypeError, "an adapter name is a str, got %R", obj);
        return NULL;
    }
    return PyUnicode_AsUTF8AndSize(obj, len);
}

pc_adapter *registry_find_adapter(registry_object *self, PyObject *arg)
{
    Py_ssize_t len;
    const char *name = registry_adapter_name(arg, &len);
    if (name == NULL)
        return NULL;
    pc_adapter *adapter = pc_registry_find(self->core, name, (size_t)len);
    if (adapter == NULL)
        PyErr_SetObject(PyExc_KeyError, arg);
    return adapter;
}

PyObject *registry_name_list(pc_adapter *const *adapters, size_t count)
{
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *text = PyUnicode_DecodeUTF8(adapters[i]->name, (Py_ssize_t)adapters[i]->name_len, "strict");
        if (text == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, text);
    }
    return list;
}

static Py_ssize_t registry_len(PyObject *op) { return (Py_ssize_t)pc_registry_count(((registry_object *)op)->core); }

static int registry_contains(PyObject *op, PyObject *arg)
{
    if (!PyUnicode_Check(arg))
        return 0;
    Py_ssize_t len;
    const char *name = PyUnicode_AsUTF8AndSize(arg, &len);
    if (name == NULL)
        return -1;
    return pc_registry_find(((registry_object *)op)->core, name, (size_t)len) != NULL;
}

PyDoc_STRVAR(names_doc, "names($self, /)\n--\n\nThe names of all adapters, in the order they were added.");

static PyObject *registry_names(PyObject *op, PyObject *unused)
{
    (void)unused;
    pc_registry *core = ((registry_object *)op)->core;
    size_t count = pc_registry_count(core);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < count; i++) {
        const pc_adapter *adapter = pc_registry_at(core, i);
        if (adapter == NULL)
            break; /* making the list ran a finalizer that deleted some */
        PyObject *text = PyUnicode_DecodeUTF8(adapter->name, (Py_ssize_t)adapter->name_len, "strict");
        if (text == NULL || PyList_Append(list, text) < 0)
            Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

PyDoc_STRVAR(peft_type_doc, "peft_type($self, name, /)\n--\n\nThe adapter's method: \"LORA\", \"IA3\", \"ADALORA\".");

static PyObject *registry_peft_type(PyObject *op, PyObject *arg)
{
    const pc_adapter *adapter = registry_find_adapter((registry_object *)op, arg);
    return adapter != NULL ? PyUnicode_FromString(adapter->method->schema.peft_type) : NULL;
}

PyDoc_STRVAR(trainable_doc, "trainable($self, name, /)\n--\n\nWhether the adapter's tensors receive gradients while it "
                            "is active.");

static PyObject *registry_trainable(PyObject *op, PyObject *arg)
{
    const pc_adapter *adapter = registry_find_adapter((registry_object *)op, arg);
    return adapter != NULL ? PyBool_FromLong(adapter->trainable) : NULL;
}

PyDoc_STRVAR(set_trainable_doc, "set_trainable($self, name, trainable, /)\n--\n\nFreeze or unfreeze an adapter.");

static PyObject *registry_set_trainable(PyObject *op, PyObject *args)
{
    PyObject *name;
    int trainable;
    if (!PyArg_ParseTuple(args, "Op:set_trainable", &name, &trainable))
        return NULL;
    pc_adapter *adapter = registry_find_adapter((registry_object *)op, name);
    if (adapter == NULL)
        return NULL;
    adapter->trainable = trainable != 0;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(remove_doc,
             "remove($self, name, /)\n--\n\n"
             "Delete an adapter; the others stay active in their order. Its memory is freed once no forward pass and no "
             "array views it. Raises ValueError for an unknown name.");

static PyObject *registry_remove(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    Py_ssize_t len;
    const char *name = registry_adapter_name(arg, &len);
    if (name == NULL)
        return NULL;
    pc_error err;
    if (registry_lock(self) < 0)
        return NULL;
    pc_status status = pc_registry_remove(self->core, name, (size_t)len, &err);
    if (status == PC_OK)
        registry_removed(self, name, len);
    registry_unlock(self);
    if (status != PC_OK)
        return peftc_raise(registry_state(self), &err);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(replace_doc,
             "replace($self, name, incoming, /)\n--\n\n"
             "Let the inactive adapter incoming take the place of name: its name, its place in the list and among the "
             "active ones. What was name is gone, as with remove().\n\n"
             "Raises ValueError for unknown names, and if incoming is active; nothing has changed then.");

static PyObject *registry_replace(PyObject *op, PyObject *args)
{
    registry_object *self = (registry_object *)op;
    PyObject *name_obj, *incoming_obj;
    Py_ssize_t len, incoming_len;
    if (!PyArg_ParseTuple(args, "OO:replace", &name_obj, &incoming_obj))
        return NULL;
    const char *name = registry_adapter_name(name_obj, &len);
    const char *incoming = name != NULL ? registry_adapter_name(incoming_obj, &incoming_len) : NULL;
    if (incoming == NULL)
        return NULL;
    pc_error err;
    if (registry_lock(self) < 0)
        return NULL;
    pc_status status =
        pc_registry_replace(self->core, name, (size_t)len, incoming, (size_t)incoming_len, &err);
    registry_unlock(self);
    if (status != PC_OK)
        return peftc_raise(registry_state(self), &err);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- activation */

#define NAMES_ON_STACK 16

PyDoc_STRVAR(activate_doc,
             "activate($self, names, /)\n--\n\n"
             "Make exactly these adapters active, in this order; the cost does not depend on the model.\n\n"
             "Raises ValueError for an unknown name or two adapters that replace the same module; nothing has changed "
             "then.");

static PyObject *registry_activate(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    const char *name_stack[NAMES_ON_STACK], **texts = name_stack;
    size_t len_stack[NAMES_ON_STACK], *lens = len_stack;
    PyObject *fast = PySequence_Fast(arg, "activate() takes a sequence of adapter names");
    if (fast == NULL)
        return NULL;
    PyObject *result = NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
    if (count > NAMES_ON_STACK) {
        texts = PyMem_New(const char *, (size_t)count);
        lens = PyMem_New(size_t, (size_t)count);
        if (texts == NULL || lens == NULL) {
            PyErr_NoMemory();
            goto done;
        }
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t len;
        texts[i] = registry_adapter_name(PySequence_Fast_GET_ITEM(fast, i), &len);
        if (texts[i] == NULL)
            goto done;
        lens[i] = (size_t)len;
    }
    pc_error err;
    if (pc_registry_activate(self->core, texts, lens, (size_t)count, &err) != PC_OK)
        peftc_raise(registry_state(self), &err);
    else
        result = Py_NewRef(Py_None);
done:
    if (texts != name_stack)
        PyMem_Free(texts);
    if (lens != len_stack)
        PyMem_Free(lens);
    Py_DECREF(fast);
    return result;
}

PyDoc_STRVAR(active_doc, "active($self, /)\n--\n\nA new list of the active adapters' names, in the order they apply; "
                         "what would apply, while disabled.");

static PyObject *registry_active(PyObject *op, PyObject *unused)
{
    (void)unused;
    pc_activation *activation = pc_registry_acquire(((registry_object *)op)->core);
    PyObject *list = registry_name_list(activation->adapters, activation->count);
    pc_activation_release(activation);
    return list;
}

static PyObject *registry_get_enabled(PyObject *op, void *unused)
{
    (void)unused;
    pc_activation *activation = pc_registry_acquire(((registry_object *)op)->core);
    bool enabled = activation->enabled;
    pc_activation_release(activation);
    return PyBool_FromLong(enabled);
}

static int registry_set_enabled(PyObject *op, PyObject *value, void *unused)
{
    (void)unused;
    registry_object *self = (registry_object *)op;
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "enabled cannot be deleted");
        return -1;
    }
    int on = PyObject_IsTrue(value);
    if (on < 0)
        return -1;
    pc_error err;
    if (pc_registry_set_enabled(self->core, on != 0, &err) != PC_OK) {
        peftc_raise(registry_state(self), &err);
        return -1;
    }
    return 0;
}

static PyObject *registry_get_version(PyObject *op, void *unused)
{
    (void)unused;
    pc_activation *activation = pc_registry_acquire(((registry_object *)op)->core);
    uint64_t version = activation->version;
    pc_activation_release(activation);
    return PyLong_FromUnsignedLongLong(version);
}

/* --------------------------------------------------------------------- types */

static PyMethodDef registry_methods[] = {
    {"bind", (PyCFunction)(void (*)(void))registry_bind, METH_VARARGS | METH_KEYWORDS, registry_bind_doc},
    {"add", (PyCFunction)(void (*)(void))registry_add, METH_VARARGS | METH_KEYWORDS, registry_add_doc},
    {"load", (PyCFunction)(void (*)(void))registry_load, METH_VARARGS | METH_KEYWORDS, registry_load_doc},
    {"finish", registry_finish, METH_NOARGS, registry_finish_doc},
    {"remove", registry_remove, METH_O, remove_doc},
    {"replace", registry_replace, METH_VARARGS, replace_doc},
    {"activate", registry_activate, METH_O, activate_doc},
    {"active", registry_active, METH_NOARGS, active_doc},
    {"names", registry_names, METH_NOARGS, names_doc},
    {"peft_type", registry_peft_type, METH_O, peft_type_doc},
    {"trainable", registry_trainable, METH_O, trainable_doc},
    {"set_trainable", registry_set_trainable, METH_VARARGS, set_trainable_doc},
    {"tensors", registry_tensors, METH_O, registry_tensors_doc},
    {"layout", registry_layout, METH_O, registry_layout_doc},
    {"state_dict", registry_state_dict, METH_O, registry_state_dict_doc},
    {"saved_modules", registry_saved_modules, METH_O, registry_saved_modules_doc},
    {"adapted_modules", registry_adapted_modules, METH_O, registry_adapted_modules_doc},
    {"save", (PyCFunction)(void (*)(void))registry_save, METH_VARARGS | METH_KEYWORDS, registry_save_doc},
    {"merge", (PyCFunction)(void (*)(void))registry_merge, METH_VARARGS | METH_KEYWORDS, registry_merge_doc},
    {"unmerge", registry_unmerge, METH_NOARGS, registry_unmerge_doc},
    {"merged", registry_merged, METH_NOARGS, registry_merged_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef registry_getset[] = {
    {"enabled", registry_get_enabled, registry_set_enabled,
     "Whether the active adapters apply. Setting it costs the same for any model.", NULL},
    {"version", registry_get_version, NULL, "A number that grows with every change of what is active.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef registry_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(registry_object, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(registry_doc, "AdapterRegistry()\n--\n\n"
                           "One model's modules, its adapters, and which of them are active.");

static PyType_Slot registry_slots[] = {
    {Py_tp_doc, (void *)registry_doc},
    {Py_tp_new, registry_new},
    {Py_tp_dealloc, registry_dealloc},
    {Py_tp_traverse, registry_traverse},
    {Py_tp_clear, registry_clear},
    {Py_tp_methods, registry_methods},
    {Py_tp_getset, registry_getset},
    {Py_tp_members, registry_members},
    {Py_sq_length, registry_len},
    {Py_sq_contains, registry_contains},
    {0, NULL},
};

static PyType_Spec registry_spec = {
    .name = "peftc._core.AdapterRegistry",
    .basicsize = sizeof(registry_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = registry_slots,
};

int peftc_add_registry(PyObject *module, peftc_state *state)
{
    state->registry_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &registry_spec, NULL);
    state->arena_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &registry_arena_spec, NULL);
    if (state->registry_type == NULL || state->arena_type == NULL)
        return -1;
    return PyModule_AddType(module, state->registry_type);
}
