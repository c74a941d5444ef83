#include "py_torch_pieces.h"

PyObject *peftc_pieces_functions(PyObject *module, const char *const *names, int named, PyObject *const *given, int count,
                                 PyMethodDef *const *defs)
{
    Py_ssize_t wanted = 0;
    while (defs[wanted] != NULL)
        wanted++;
    PyObject *self = PyTuple_New(1 + named + count), *made = PyTuple_New(wanted);
    bool good = self != NULL && made != NULL;
    for (int i = 0; good && i < 1 + named + count; i++) {
        PyObject *piece = i == 0       ? Py_NewRef(module)
                          : i <= named ? PyUnicode_InternFromString(names[i - 1])
                                       : Py_NewRef(given[i - 1 - named]);
        good = piece != NULL;
        if (good)
            PyTuple_SET_ITEM(self, i, piece);
    }
    for (Py_ssize_t i = 0; good && i < wanted; i++) {
        PyObject *function = PyCFunction_New(defs[i], self);
        good = function != NULL;
        if (good)
            PyTuple_SET_ITEM(made, i, function);
    }
    if (!good)
        Py_CLEAR(made);
    Py_XDECREF(self);
    return made;
}
