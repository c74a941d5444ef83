#include "py_torch_pieces.h"

PyObject *peftc_pieces_functions(PyObject *module, PyObject *const *args, int given, const char *const *names, int count,
                                 PyMethodDef *first, PyMethodDef *second)
{
    PyObject *self = PyTuple_New(count), *one = NULL, *other = NULL, *both = NULL;
    bool good = self != NULL;
    for (int i = 0; good && i < count; i++) {
        PyObject *piece = i == 0      ? Py_NewRef(module)
                          : i < given ? Py_NewRef(args[i - 1])
                                      : PyUnicode_InternFromString(names[i - given]);
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
