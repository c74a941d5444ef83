#include "py_torch_watch.h"

enum { WATCHERS, REGISTRIES, LEVELS, COUNT };

bool peftc_watch_check(PyObject *watch)
{
    return PyTuple_Check(watch) && PyTuple_GET_SIZE(watch) == COUNT && PyTuple_Check(PyTuple_GET_ITEM(watch, WATCHERS)) &&
           PyTuple_Check(PyTuple_GET_ITEM(watch, REGISTRIES)) && PyDict_Check(PyTuple_GET_ITEM(watch, LEVELS));
}

bool peftc_is_empty(PyObject *container)
{
    if (container == NULL)
        return true;
    Py_ssize_t size = PyDict_Check(container) ? PyDict_Size(container) : PyObject_Size(container);
    if (size < 0)
        PyErr_Clear();
    return size == 0;
}

bool peftc_nobody_watches(PyObject *watch, bool *failed)
{
    PyObject *watchers = PyTuple_GET_ITEM(watch, WATCHERS), *registries = PyTuple_GET_ITEM(watch, REGISTRIES);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(registries); i++)
        if (!peftc_is_empty(PyTuple_GET_ITEM(registries, i)))
            return false;
    PyObject *level = PyDict_GetItemString(PyTuple_GET_ITEM(watch, LEVELS), "_current_level"); /* borrowed */
    if (level == NULL || !PyLong_Check(level) || PyLong_AsLong(level) >= 0)
        return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watchers); i++) {
        PyObject *seen = PyObject_CallNoArgs(PyTuple_GET_ITEM(watchers, i));
        int watched = seen == NULL ? -1 : PyObject_IsTrue(seen);
        Py_XDECREF(seen);
        *failed = *failed || watched < 0;
        if (watched != 0)
            return false;
    }
    return true;
}
