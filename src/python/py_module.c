/* peftc._core.Module: what every module of the NumPy host is.
 *
 * Children, parameters and names are the business of peftc.nn.Module in
 * Python; this type has the call, which takes the adapters that are active
 * once for the whole forward pass, and the link to the model's registry.
 */
#include "layer.h"

#include <structmember.h>

#include "tape.h"

static peftc_module_object *cast(PyObject *op) { return (peftc_module_object *)op; }

static PyObject *module_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args; /* __init__ checks them */
    (void)kwargs;
    peftc_module_object *self = cast(type->tp_alloc(type, 0));
    if (self != NULL)
        self->training = 1;
    return (PyObject *)self;
}

static int module_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_GET_SIZE(args) == 0 && (kwargs == NULL || PyDict_GET_SIZE(kwargs) == 0))
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes no arguments; define __init__ in the subclass", Py_TYPE(op)->tp_name);
    return -1;
}

static int module_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(cast(op)->dict);
    Py_VISIT(cast(op)->registry);
    Py_VISIT(cast(op)->outputs);
    return 0;
}

static int module_clear(PyObject *op)
{
    Py_CLEAR(cast(op)->dict);
    Py_CLEAR(cast(op)->registry);
    Py_CLEAR(cast(op)->outputs);
    return 0;
}

static void module_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (cast(op)->weakrefs != NULL)
        PyObject_ClearWeakRefs(op);
    module_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyObject *call_forward(PyObject *op, PyObject *args, PyObject *kwargs)
{
    PyObject *forward = PyObject_GetAttrString(op, "forward");
    if (forward == NULL)
        return NULL;
    PyObject *result = PyObject_Call(forward, args, kwargs);
    Py_DECREF(forward);
    return result;
}

/* Note what the gradient of an outermost call's result can start from; NULL when that fails. */
static PyObject *note_outputs(PyObject *op, bool recording, PyObject *result)
{
    peftc_state *state = peftc_state_of_type(Py_TYPE(op));
    PyObject *nodes = state != NULL && result != NULL && recording ? peftc_result_nodes(state, result) : NULL;
    if (result != NULL && recording && nodes == NULL)
        Py_CLEAR(result);
    if (result != NULL && nodes == NULL)
        nodes = Py_NewRef(Py_None);
    Py_XSETREF(cast(op)->outputs, nodes);
    return result;
}

static PyObject *module_call(PyObject *op, PyObject *args, PyObject *kwargs)
{
    PyObject *registry = Py_XNewRef(cast(op)->registry); /* another thread may bind the module anew meanwhile */
    const peftc_tape_scope tape = peftc_tape_enter(cast(op)->training != 0);
    if (tape.outermost)
        Py_CLEAR(cast(op)->outputs); /* what an earlier call saved, if nobody took its gradient */
    peftc_scope scope;
    if (registry != NULL)
        peftc_scope_enter(&scope, registry);
    PyObject *result = call_forward(op, args, kwargs);
    if (registry != NULL)
        peftc_scope_leave(&scope);
    peftc_tape_leave(tape);
    Py_XDECREF(registry);
    return tape.outermost ? note_outputs(op, tape.recording, result) : result;
}

static PyObject *module_forward(PyObject *op, PyObject *args, PyObject *kwargs)
{
    (void)args;
    (void)kwargs;
    return PyErr_Format(PyExc_NotImplementedError, "%s has no forward()", Py_TYPE(op)->tp_name);
}

/* The dotted name under which the registry knows the module; NULL when it knows none. */
static const pc_module *bound_entry(const peftc_module_object *self)
{
    if (self->registry == NULL)
        return NULL;
    const pc_module_table *table = pc_registry_modules(peftc_registry_core(self->registry));
    return (size_t)self->index < table->count ? &table->items[self->index] : NULL;
}

const char *peftc_layer_name(const peftc_layer_object *layer)
{
    const pc_module *entry = bound_entry(&layer->base);
    if (entry != NULL && entry->name_len != 0)
        return entry->name;
    const char *full = Py_TYPE(layer)->tp_name;
    const char *dot = strrchr(full, '.');
    return dot != NULL ? dot + 1 : full;
}

static PyObject *module_get_registry(PyObject *op, void *unused)
{
    (void)unused;
    PyObject *registry = cast(op)->registry;
    return Py_NewRef(registry != NULL ? registry : Py_None);
}

static PyObject *module_get_outputs(PyObject *op, void *unused)
{
    (void)unused;
    PyObject *outputs = cast(op)->outputs;
    return outputs != NULL ? Py_NewRef(outputs) : PyLong_FromLong(0);
}

static PyObject *module_get_bound_name(PyObject *op, void *unused)
{
    (void)unused;
    const pc_module *entry = bound_entry(cast(op));
    if (entry == NULL)
        Py_RETURN_NONE;
    return PyUnicode_DecodeUTF8(entry->name, (Py_ssize_t)entry->name_len, "strict");
}

static PyObject *module_get_training(PyObject *op, void *unused)
{
    (void)unused;
    return PyBool_FromLong(cast(op)->training);
}

static int module_set_training(PyObject *op, PyObject *value, void *unused)
{
    (void)unused;
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "training cannot be deleted");
        return -1;
    }
    int on = PyObject_IsTrue(value);
    if (on < 0)
        return -1;
    cast(op)->training = on != 0;
    return 0;
}

static PyMethodDef module_methods[] = {
    {"forward", (PyCFunction)(void (*)(void))module_forward, METH_VARARGS | METH_KEYWORDS,
     "forward($self, /, *args, **kwargs)\n--\n\nWhat a call computes; every subclass defines it."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef module_getset[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, NULL, NULL},
    {"registry", module_get_registry, NULL, "The AdapterRegistry of the model this belongs to, or None.", NULL},
    {"_outputs", module_get_outputs, NULL,
     "After a call: the nodes of its results, None when it recorded nothing; 0 when there was no call.", NULL},
    {"_bound_name", module_get_bound_name, NULL, "The dotted name in that model, or None.", NULL},
    {"training", module_get_training, module_set_training, "Whether dropout is applied; train() and eval() set it.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef module_members[] = {
    {"__dictoffset__", T_PYSSIZET, offsetof(peftc_module_object, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(peftc_module_object, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot module_slots[] = {
    {Py_tp_doc, (void *)"Module()\n--\n\nThe C base of peftc.nn.Module: the call, and the link to the model's adapters."},
    {Py_tp_new, module_new},
    {Py_tp_init, module_init},
    {Py_tp_dealloc, module_dealloc},
    {Py_tp_traverse, module_traverse},
    {Py_tp_clear, module_clear},
    {Py_tp_call, module_call},
    {Py_tp_methods, module_methods},
    {Py_tp_getset, module_getset},
    {Py_tp_members, module_members},
    {0, NULL},
};

static PyType_Spec module_spec = {
    .name = "peftc._core.Module",
    .basicsize = sizeof(peftc_module_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = module_slots,
};

int peftc_add_module_type(PyObject *module, peftc_state *state)
{
    state->module_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &module_spec, NULL);
    return state->module_type != NULL ? PyModule_AddType(module, state->module_type) : -1;
}
