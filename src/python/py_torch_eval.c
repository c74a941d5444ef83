/* Putting torch's modules in eval mode.
 *
 * Nothing here knows torch: a module is an object with a __dict__, in which `_modules` is the dict of its children. */
#include "py_torch_ahead.h"

typedef struct evaluation {
    PyObject *kinds; /* class → what its modules are */
    PyObject *ask;   /* … asked of classes that it lacks */
    PyObject *training, *modules, *awake, *base_layer, *train;
    PyObject *all, *base_alone; /* ways for the walk ahead */
} evaluation;

enum { PLAIN = 0, ADAPTED = 1, OWN_WAY = 2 };

static int kind_of(const evaluation *e, PyObject *module)
{
    PyObject *cls = (PyObject *)Py_TYPE(module), *kind = PyDict_GetItemWithError(e->kinds, cls);
    if (kind != NULL)
        Py_INCREF(kind);
    else if (!PyErr_Occurred())
        kind = PyObject_CallOneArg(e->ask, cls);
    const long value = kind != NULL ? PyLong_AsLong(kind) : -1;
    Py_XDECREF(kind);
    if (value >= PLAIN && value <= OWN_WAY)
        return (int)value;
    if (!PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "a %.200s is plain (0), adapted (1), or has its own way (2), not %ld",
                     Py_TYPE(module)->tp_name, value);
    return -1;
}

/* A module that is still to be put in eval mode; a strong reference. */
typedef struct waiting {
    PyObject *module;
    int depth;
} waiting;

typedef struct stack {
    waiting *items;
    Py_ssize_t count, room;
} stack;

static int push(stack *s, PyObject *module, int depth)
{
    if (s->count == s->room) {
        const Py_ssize_t room = s->room != 0 ? 2 * s->room : 256;
        waiting *items = PyMem_Realloc(s->items, (size_t)room * sizeof *items);
        if (items == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        s->items = items;
        s->room = room;
    }
    s->items[s->count++] = (waiting){Py_NewRef(module), depth};
    return 0;
}

/* What is below a module that will be looked at, for the walk ahead. */
static PyObject *way_of(const void *ctx, PyObject *module)
{
    const evaluation *e = ctx;
    PyObject *kind = ahead_of_class(e->kinds, module);
    const long value = kind != NULL && PyLong_CheckExact(kind) ? PyLong_AsLong(kind) : OWN_WAY;
    PyErr_Clear();
    return value == PLAIN ? e->all : value == ADAPTED ? e->base_alone : NULL;
}

static int push_children(stack *s, PyObject *children, int depth)
{
    PyObject *key, *child;
    Py_ssize_t at = 0;
    if (PyDict_GET_SIZE(children) > 0 && depth >= Py_GetRecursionLimit()) {
        PyErr_SetString(PyExc_RecursionError, "modules contain each other, or too deeply");
        return -1;
    }
    while (PyDict_Next(children, &at, &key, &child))
        if (child != Py_None && push(s, child, depth + 1) < 0)
            return -1;
    return 0;
}

/* An adapted layer that is in eval mode, and none of whose adapters is in train mode for itself, is passed over. */
static int sleeps(const evaluation *e, PyObject *own)
{
    PyObject *training = PyDict_GetItemWithError(own, e->training);
    PyObject *awake = training == Py_False ? PyDict_GetItemWithError(own, e->awake) : NULL;
    if (PyErr_Occurred())
        return -1;
    return training == Py_False && (awake == NULL || awake == Py_False);
}

static int eval_one(const evaluation *e, stack *s, const waiting *w, PyObject *own)
{
    const int kind = kind_of(e, w->module);
    if (kind == OWN_WAY) {
        PyObject *done = PyObject_CallMethodOneArg(w->module, e->train, Py_False);
        Py_XDECREF(done);
        return done != NULL ? 0 : -1;
    }
    const int asleep = kind == ADAPTED ? sleeps(e, own) : 0;
    PyObject *children = kind >= 0 && asleep >= 0 ? Py_XNewRef(PyDict_GetItemWithError(own, e->modules)) : NULL;
    int result = -1;
    if (children == NULL || !PyDict_Check(children)) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_TypeError, "%.200s is no torch module", Py_TYPE(w->module)->tp_name);
    } else if (asleep) {
        PyObject *base = PyDict_GetItemWithError(children, e->base_layer);
        result = base != NULL ? push(s, base, w->depth + 1) : PyErr_Occurred() ? -1 : 0;
    } else {
        PyObject *training = PyDict_GetItemWithError(own, e->training);
        result = training == Py_False ? 0 : PyErr_Occurred() ? -1 : PyDict_SetItem(own, e->training, Py_False);
        if (result == 0)
            result = push_children(s, children, w->depth);
    }
    Py_XDECREF(children);
    return result;
}

static int eval_all(const evaluation *e, PyObject *root)
{
    stack s = {NULL, 0, 0};
    ahead a = {.modules_name = e->modules};
    int result = push(&s, root, 0);
    while (result == 0 && s.count > 0) {
        ahead_of_walk(&a, s.items, (size_t)s.count, sizeof *s.items, way_of, e);
        const waiting w = s.items[--s.count];
        PyObject *own = PyObject_GenericGetDict(w.module, NULL);
        result = own != NULL ? eval_one(e, &s, &w, own) : -1;
        Py_XDECREF(own);
        Py_DECREF(w.module);
    }
    while (s.count > 0)
        Py_DECREF(s.items[--s.count].module);
    PyMem_Free(s.items);
    ahead_clear(&a);
    return result;
}

PyDoc_STRVAR(put_in_eval_doc,
             "put_in_eval(root, kinds, ask, /)\n--\n\n"
             "root.eval(), for modules that do what torch's own do.\n\n"
             "kinds is a dict: class -> 0 for one whose train() is torch's, 1 for an adapted layer (also torch's), 2 for one\n"
             "with a train() of its own, which is called; ask(class) says it of a class that the dict lacks. Of an adapted\n"
             "layer that is in eval mode already, and has no true `_awake`, only `base_layer` is looked at.");

static PyObject *put_in_eval(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 3 || !PyDict_Check(args[1]) || !PyCallable_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "put_in_eval() takes a module, a dict of kinds, and a function");
        return NULL;
    }
    evaluation e = {.kinds = args[1],
                    .ask = args[2],
                    .training = PyUnicode_InternFromString("training"),
                    .modules = PyUnicode_InternFromString("_modules"),
                    .awake = PyUnicode_InternFromString("_awake"),
                    .base_layer = PyUnicode_InternFromString("base_layer"),
                    .train = PyUnicode_InternFromString("train"),
                    .all = PyTuple_New(0)};
    int result = -1;
    if (e.base_layer != NULL)
        e.base_alone = PyTuple_Pack(1, e.base_layer);
    if (e.training != NULL && e.modules != NULL && e.awake != NULL && e.base_alone != NULL && e.train != NULL && e.all != NULL)
        result = eval_all(&e, args[0]);
    Py_XDECREF(e.all);
    Py_XDECREF(e.base_alone);
    Py_XDECREF(e.training);
    Py_XDECREF(e.modules);
    Py_XDECREF(e.awake);
    Py_XDECREF(e.base_layer);
    Py_XDECREF(e.train);
    if (result < 0)
        return NULL;
    Py_RETURN_NONE;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"put_in_eval", FASTCALL(put_in_eval), METH_FASTCALL, put_in_eval_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_eval(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
