/* Calls of adapted layers on torch, without the Python code that torch's modules go through when nothing is hooked on them.
 *
 * With every call nn.Module.__call__ asks for hooks, and then calls `forward`: two or three frames of Python, as long as the
 * sums of an adapter take for one token, and longer than it takes to pass an input on to the base layer while adapters are
 * disabled.  Here the same is asked in C.
 *
 * A class gets this by its slot tp_call alone.  Its attribute `__call__` stays nn.Module's, which is what torch.compile looks
 * for before it goes on to `forward`; and whoever assigns to nn.Module.__call__, as torch.fx does while it traces, makes
 * CPython put the slot of a class written in Python back, in this class too: such a call is made as it would be without us.
 */
#include "py_torch_watch.h"

/* What `direct_calls` is given, and names. */
enum piece {
    WATCH,    /* who looks for the calls of modules: see py_torch_watch.h */
    ANSWER,   /* (layer, x, live) → the output with the adapters `live`, or None where `forward` is to give it; or None */
    FORWARD,  /* names from here on, first of what the class must still have as it was */
    CALL,
    CALL_IMPL,
    COMPILED,
    SWITCH,
    LIVE,
    ROWS,
    MODULES,
    BASE_LAYER,
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    BACKWARD_HOOKS,
    BACKWARD_PRE_HOOKS,
    COUNT,
};

static const char *const names[COUNT - FORWARD] = {
    "forward", "__call__", "_call_impl", "_compiled_call_impl", "_peftc", "live",
    "rows", "_modules", "base_layer", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
};
enum { METHODS = COMPILED - FORWARD };

/* The classes, of which there are a dozen; the calls of others would stay as they are.  There is no way from an instance of a
 * class written in Python to the state of this module. */
enum { MOST_CLASSES = 32 };
static struct direct {
    PyTypeObject *type;
    ternaryfunc usual;          /* the slot that CPython gave it */
    PyObject *methods[METHODS]; /* what it had by the first names */
    PyObject *pieces[COUNT];
} table[MOST_CLASSES];
static int classes;

#define PIECE(d, i) ((d)->pieces[i])

/* The record of a class; NULL if it has none of its own. */
static struct direct *record_of(const PyTypeObject *type)
{
    for (int i = 0; i < classes; i++)
        if (table[i].type == type)
            return &table[i];
    return NULL;
}

/* Has the class the methods that it had? What fails is for the usual call to find. */
static bool is_as_it_was(const struct direct *d)
{
    bool same = true;
    for (int i = 0; same && i < METHODS; i++) {
        PyObject *now = PyObject_GetAttr((PyObject *)d->type, PIECE(d, FORWARD + i));
        same = now == d->methods[i];
        Py_XDECREF(now);
    }
    PyErr_Clear();
    return same;
}

/* An item of a dict, borrowed; NULL if there is none. */
static PyObject *item(const struct direct *d, PyObject *dict, int name)
{
    PyObject *found = dict != NULL && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, PIECE(d, name)) : NULL;
    if (found == NULL && PyErr_Occurred())
        PyErr_Clear();
    return found;
}

/* Would nn.Module.__call__ come to the class's `forward` at once? */
static bool goes_to_forward(const struct direct *d, PyObject *own, bool *failed)
{
    PyObject *compiled = item(d, own, COMPILED);
    return item(d, own, FORWARD) == NULL && (compiled == NULL || compiled == Py_None) &&
           peftc_is_empty(item(d, own, FORWARD_HOOKS)) && peftc_is_empty(item(d, own, FORWARD_PRE_HOOKS)) &&
           peftc_is_empty(item(d, own, BACKWARD_HOOKS)) && peftc_is_empty(item(d, own, BACKWARD_PRE_HOOKS)) &&
           is_as_it_was(d) && peftc_nobody_watches(PIECE(d, WATCH), failed);
}

/* The layer's output for one x; NULL without an exception for what is the usual call's to do. */
static PyObject *answer(const struct direct *d, PyObject *layer, PyObject *x)
{
    bool failed = false;
    PyObject *own = PyObject_GenericGetDict(layer, NULL), *result = NULL;
    if (own == NULL) {
        PyErr_Clear();
        return NULL;
    }
    PyObject *with = item(d, own, SWITCH), *base = item(d, item(d, own, MODULES), BASE_LAYER);
    if (with == NULL || base == NULL || !goes_to_forward(d, own, &failed)) {
        Py_DECREF(own);
        return NULL;
    }
    Py_INCREF(base); /* what is called may take it out */
    PyObject *live = PyObject_GetAttr(with, PIECE(d, LIVE)), *rows = PyObject_GetAttr(with, PIECE(d, ROWS));
    if (rows == Py_None && live != NULL && PyTuple_Check(live)) {
        if (PyTuple_GET_SIZE(live) == 0) {
            result = PyObject_CallOneArg(base, x);
        } else if (PIECE(d, ANSWER) != Py_None) {
            PyObject *arguments[] = {layer, x, live};
            result = PyObject_Vectorcall(PIECE(d, ANSWER), arguments, 3, NULL);
            if (result == Py_None)
                Py_CLEAR(result);
        }
    }
    Py_XDECREF(live);
    Py_XDECREF(rows);
    Py_DECREF(base);
    Py_DECREF(own);
    return result;
}

static PyObject *call(PyObject *layer, PyObject *args, PyObject *kwargs)
{
    struct direct *d = record_of(Py_TYPE(layer));
    if (d != NULL && PyTuple_GET_SIZE(args) == 1 && (kwargs == NULL || PyDict_GET_SIZE(kwargs) == 0)) {
        PyObject *result = answer(d, layer, PyTuple_GET_ITEM(args, 0));
        if (result != NULL || PyErr_Occurred())
            return result;
    }
    for (PyTypeObject *type = Py_TYPE(layer); d == NULL && type != NULL; type = type->tp_base)
        d = record_of(type); /* of a class that got the slot from its base: the usual one looks __call__ up */
    return d->usual(layer, args, kwargs);
}

/* A record of the class in the table; NULL with an exception, or without one if the table is full. */
static struct direct *enter(PyTypeObject *type, PyObject *watch, PyObject *with)
{
    if (classes == MOST_CLASSES)
        return NULL;
    struct direct made = {.type = type, .usual = type->tp_call, .pieces = {watch, with}};
    bool good = true;
    for (int i = FORWARD; good && i < COUNT; i++) {
        PIECE(&made, i) = PyUnicode_InternFromString(names[i - FORWARD]);
        good = PIECE(&made, i) != NULL;
    }
    for (int i = 0; good && i < METHODS; i++) {
        made.methods[i] = PyObject_GetAttr((PyObject *)type, PIECE(&made, FORWARD + i));
        good = made.methods[i] != NULL;
    }
    if (!good) {
        for (int i = FORWARD; i < COUNT; i++)
            Py_XDECREF(PIECE(&made, i));
        for (int i = 0; i < METHODS; i++)
            Py_XDECREF(made.methods[i]);
        return NULL;
    }
    Py_INCREF(type);
    Py_INCREF(watch);
    Py_INCREF(with);
    table[classes] = made;
    return &table[classes++];
}

PyDoc_STRVAR(direct_calls_doc,
             "direct_calls(cls, watch, answer, /)\n--\n\n"
             "Let calls of instances of the class `cls` of adapted layers, and of no subclass, skip nn.Module.__call__ and\n"
             "`forward` where nothing would be between them: for one x and no more arguments, the base layer's output if no\n"
             "adapter is active, else answer(layer, x, live) unless that, or `answer`, is None. Again for a class that has it\n"
             "already: nothing, or once more what an assignment to nn.Module.__call__, which has been taken back, ended.\n\n"
             "watch: who looks for calls of modules, as for lowrank_adder.");

static PyObject *direct_calls(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 3 || !PyType_Check(args[0]) || !PyType_HasFeature((PyTypeObject *)args[0], Py_TPFLAGS_HEAPTYPE) ||
        ((PyTypeObject *)args[0])->tp_call == NULL || !peftc_watch_check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "direct_calls() takes a class whose instances are called, a tuple that says who "
                                         "watches, and a function");
        return NULL;
    }
    PyTypeObject *type = (PyTypeObject *)args[0];
    const struct direct *d = record_of(type);
    if (d == NULL)
        d = enter(type, args[1], args[2]);
    if (d == NULL && PyErr_Occurred())
        return NULL;
    if (d != NULL && type->tp_call == d->usual && is_as_it_was(d))
        type->tp_call = call;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"direct_calls", (PyCFunction)(void (*)(void))direct_calls, METH_FASTCALL, direct_calls_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_call(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
