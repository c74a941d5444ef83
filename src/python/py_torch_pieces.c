#include "py_torch_pieces.h"

PyObject *peftc_pieces_functions(PyObject *module, const char *const *names, int named, PyObject *const *given, int count,
                                 PyMethodDef *first, PyMethodDef *second)
{
    PyObject *self = PyTuple_New(1 + named + count), *one = NULL, *other = NULL, *both = NULL;
    bool good = self != NULL;
    for (int i = 0; good && i < 1 + named + count; i++) {
        PyObject *piece = i == 0       ? Py_NewRef(module)
                          : i <= named ? PyUnicode_InternFromString(names[i - 1])
                                       : Py_NewRef(given[i - 1 - named]);
        good = piece != NULL;
        if (good)
            PyTuple_SET_ITEM(self, i, piece);
    }
    if (good)
        one = PyCFunction_New(first, self);
    if (one != NULL)
        other = PyCFunction_New(second, self);
    if (other != NULL)
        both = PyTuple_Pack(2, one, other);
    Py_XDECREF(one);
    Py_XDECREF(other);
    Py_XDECREF(self);
    return both;
}
