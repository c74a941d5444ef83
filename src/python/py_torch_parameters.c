/* The parameters of torch's modules by the hundred: finding them, and setting their flags.
 *
 * Nothing here knows torch but for what py_torch_dicts.h says of modules. */
#include "py_torch_shelf.h"

/* So many parameters before its turn one is fetched. */
#define AHEAD 8

/* ------------------------------------------------------------------- finding */

PyDoc_STRVAR(own_parameters_doc,
             "own_parameters(modules, /)\n--\n\n"
             "A list of the parameters of each of a list of modules, without those of their children.");

static PyObject *own_parameters(PyObject *module, PyObject *modules)
{
    (void)module;
    if (!PyList_Check(modules)) {
        PyErr_SetString(PyExc_TypeError, "own_parameters() takes a list of modules");
        return NULL;
    }
    PyObject *name = PyUnicode_InternFromString("_parameters"), *list = name != NULL ? PyList_New(0) : NULL;
    for (Py_ssize_t i = 0; list != NULL && i < PyList_GET_SIZE(modules); i++)
        if (!torch_append_own(list, PyList_GET_ITEM(modules, i), name))
            Py_CLEAR(list);
    Py_XDECREF(name);
    return list;
}

typedef struct names {
    PyObject *modules, *parameters;
} names;

/* children ← each container's (a ModuleDict's or ParameterDict's) child called `name`; whole ← where there is none, its
 * parameter of that name. */
static bool find_named(const shelf *containers, PyObject *name, const names *n, shelf *children, shelf *whole)
{
    bool good = shelf_of_shelf(children, containers) && shelf_step_into(children, n->modules) &&
                shelf_to_items(children, name) && shelf_of_shelf(whole, containers);
    for (size_t i = 0; good && i < whole->count; i++)
        if (children->items[i] != NULL)
            Py_CLEAR(whole->items[i]);
    return good && shelf_step_into(whole, n->parameters) && shelf_to_items(whole, name);
}

/* The list of the parameters that find_named has found. */
static PyObject *listed(shelf *children, const shelf *whole, const names *n)
{
    PyObject *list = shelf_step_into(children, n->parameters) ? PyList_New(0) : NULL;
    bool good = list != NULL;
    for (size_t i = 0; good && i < whole->count; i++) {
        if (i + AHEAD < whole->count)
            ahead_table(children->items[i + AHEAD], 2);
        if (whole->items[i] != NULL)
            good = PyList_Append(list, whole->items[i]) == 0;
        else if (children->items[i] != NULL)
            good = torch_append_values(list, children->items[i]);
    }
    if (!good)
        Py_CLEAR(list);
    return list;
}

PyDoc_STRVAR(parameters_of_doc,
             "parameters_of(layers, fields, name, /)\n--\n\n"
             "A list of one adapter's parameters in each of a list of layers: in each of its children that a tuple of fields\n"
             "names, the parameter called `name` or those of the child called `name`.");

static PyObject *parameters_of(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 3 || !PyList_Check(args[0]) || !PyTuple_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "parameters_of() takes a list of layers, a tuple of fields, and a name");
        return NULL;
    }
    const names n = {PyUnicode_InternFromString("_modules"), PyUnicode_InternFromString("_parameters")};
    shelf layers = {.items = NULL}, containers = {.items = NULL}, children = {.items = NULL}, whole = {.items = NULL};
    PyObject *list = NULL;
    if (n.modules != NULL && n.parameters != NULL && shelf_of_list(&layers, args[0]) && shelf_step_into(&layers, n.modules) &&
        shelf_of_items(&containers, &layers, args[1])) {
        shelf_close_up(&containers);
        if (find_named(&containers, args[2], &n, &children, &whole))
            list = listed(&children, &whole, &n);
    }
    shelf_clear(&whole);
    shelf_clear(&children);
    shelf_clear(&containers);
    shelf_clear(&layers);
    Py_XDECREF(n.parameters);
    Py_XDECREF(n.modules);
    return list;
}

/* --------------------------------------------------------------------- flags */

PyDoc_STRVAR(set_requires_grad_doc,
             "set_requires_grad(parameters, flag, /)\n--\n\n"
             "parameter.requires_grad = flag for each of a list or tuple.\n\n"
             "Raises what setting the attribute raises; those before have their new value then.");

/* The attribute's getset descriptor in a type that sets attributes the ordinary way; NULL without an exception
 * otherwise. */
static PyObject *descriptor_of(PyTypeObject *type, PyObject *name)
{
    if (type->tp_setattro != PyObject_GenericSetAttr)
        return NULL;
    PyObject *descriptor = PyObject_GetAttr((PyObject *)type, name);
    if (descriptor == NULL)
        PyErr_Clear();
    else if (!Py_IS_TYPE(descriptor, &PyGetSetDescr_Type))
        Py_CLEAR(descriptor);
    return descriptor;
}

static PyObject *set_requires_grad(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 2 || !(PyList_Check(args[0]) || PyTuple_Check(args[0]))) {
        PyErr_SetString(PyExc_TypeError, "set_requires_grad() takes a list or tuple of parameters, and a flag");
        return NULL;
    }
    int flag = PyObject_IsTrue(args[1]);
    if (flag < 0)
        return NULL;
    PyObject *name = PyUnicode_InternFromString("requires_grad"), *descriptor = NULL;
    PyObject *value = flag ? Py_True : Py_False;
    PyTypeObject *type = NULL; /* whose descriptor that is; a strong reference */
    bool good = name != NULL;
    for (Py_ssize_t i = 0; good && i < PySequence_Fast_GET_SIZE(args[0]); i++) {
        if (i + 2 * AHEAD < PySequence_Fast_GET_SIZE(args[0]))
            ahead_object(PySequence_Fast_GET_ITEM(args[0], i + 2 * AHEAD));
        if (i + AHEAD < PySequence_Fast_GET_SIZE(args[0]))
            ahead_tensor(PySequence_Fast_GET_ITEM(args[0], i + AHEAD));
        PyObject *parameter = Py_NewRef(PySequence_Fast_GET_ITEM(args[0], i));
        if (Py_TYPE(parameter) != type) {
            Py_XSETREF(type, (PyTypeObject *)Py_NewRef((PyObject *)Py_TYPE(parameter)));
            Py_XSETREF(descriptor, descriptor_of(type, name));
        }
        good = (descriptor != NULL ? Py_TYPE(descriptor)->tp_descr_set(descriptor, parameter, value)
                                   : PyObject_SetAttr(parameter, name, value)) == 0;
        Py_DECREF(parameter);
    }
    Py_XDECREF(name);
    Py_XDECREF(descriptor);
    Py_XDECREF(type);
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"own_parameters", own_parameters, METH_O, own_parameters_doc},
    {"parameters_of", FASTCALL(parameters_of), METH_FASTCALL, parameters_of_doc},
    {"set_requires_grad", FASTCALL(set_requires_grad), METH_FASTCALL, set_requires_grad_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_parameters(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
