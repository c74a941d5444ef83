/* Reading and writing the same place of hundreds of torch's modules in one call.
 *
 * Nothing here knows torch: a module is an object with a __dict__, in which `_modules` and `_parameters` are the dicts of
 * its children and its parameters.  A *path* is a tuple of names, each the key of a dict or, where the thing reached is
 * an object, of its __dict__: ("_modules", "lora_A", "_modules", "default"). */
#include "py_torch_dicts.h"

/* -------------------------------------------------------------------- places */

/* What is at the end of the path; a new reference. NULL without an exception if there is nothing. */
static PyObject *follow(PyObject *start, PyObject *path)
{
    PyObject *here = Py_NewRef(start);
    for (Py_ssize_t i = 0; here != NULL && i < PyTuple_GET_SIZE(path); i++) {
        PyObject *dict = torch_dict_of(here);
        PyObject *next = dict != NULL ? PyDict_GetItemWithError(dict, PyTuple_GET_ITEM(path, i)) : NULL;
        Py_XINCREF(next);
        Py_XDECREF(dict);
        Py_SETREF(here, next);
    }
    return here;
}

static bool check_call(const char *name, bool good, const char *takes)
{
    if (!good)
        PyErr_Format(PyExc_TypeError, "%s() takes %s", name, takes);
    return good;
}

/* One of put_items' puts, checked: (path, key, values). */
static bool check_put(PyObject *put, Py_ssize_t count)
{
    const bool good = PyTuple_Check(put) && PyTuple_GET_SIZE(put) == 3 && PyTuple_Check(PyTuple_GET_ITEM(put, 0)) &&
                      (!PyList_Check(PyTuple_GET_ITEM(put, 2)) || PyList_GET_SIZE(PyTuple_GET_ITEM(put, 2)) == count);
    return check_call("put_items", good, "puts (path, key, values), where values are a list as long as the objects', or one value");
}

static bool put_item(PyObject *object, PyObject *path, PyObject *key, PyObject *value)
{
    PyObject *holder = follow(object, path), *dict = NULL;
    if (holder != NULL)
        dict = torch_dict_of(holder);
    else if (!PyErr_Occurred())
        PyErr_Format(PyExc_KeyError, "%.200s has nothing at %R", Py_TYPE(object)->tp_name, path);
    const bool good = dict != NULL &&
                      (PyDict_CheckExact(dict) ? PyDict_SetItem(dict, key, value) : PyObject_SetItem(dict, key, value)) == 0;
    Py_XDECREF(dict);
    Py_XDECREF(holder);
    return good;
}

PyDoc_STRVAR(put_items_doc,
             "put_items(objects, puts, /)\n--\n\n"
             "Set items in each of a list of objects. puts is a tuple of (path, key, values): the item `key` of what is at the\n"
             "end of the path becomes the object's value of a list as long, or, if values is no list, that.\n\n"
             "Raises KeyError if there is nothing at the end of a path; what came before is done then.");

static PyObject *put_items(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (!check_call("put_items", nargs == 2 && PyList_Check(args[0]) && PyTuple_Check(args[1]),
                    "a list of objects, and a tuple of puts"))
        return NULL;
    const Py_ssize_t count = PyList_GET_SIZE(args[0]), puts = PyTuple_GET_SIZE(args[1]);
    for (Py_ssize_t p = 0; p < puts; p++)
        if (!check_put(PyTuple_GET_ITEM(args[1], p), count))
            return NULL;
    bool good = true;
    for (Py_ssize_t i = 0; good && i < count && i < PyList_GET_SIZE(args[0]); i++) {
        PyObject *object = Py_NewRef(PyList_GET_ITEM(args[0], i));
        for (Py_ssize_t p = 0; good && p < puts; p++) {
            PyObject *put = PyTuple_GET_ITEM(args[1], p), *value = PyTuple_GET_ITEM(put, 2);
            if (PyList_Check(value) && i >= PyList_GET_SIZE(value)) /* a finalizer has changed it */
                break;
            value = Py_NewRef(PyList_Check(value) ? PyList_GET_ITEM(value, i) : value);
            good = put_item(object, PyTuple_GET_ITEM(put, 0), PyTuple_GET_ITEM(put, 1), value);
            Py_DECREF(value);
        }
        Py_DECREF(object);
    }
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"put_items", FASTCALL(put_items), METH_FASTCALL, put_items_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_places(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
