/* Functions in C that know torch by what they are given of it: functions, classes, and names of attributes. */
#ifndef PEFTC_PYTHON_PY_TORCH_PIECES_H
#define PEFTC_PYTHON_PY_TORCH_PIECES_H

#include "binding.h"

/* (first, second): two functions whose `self` is a tuple of `count` pieces: the module, the objects args[0 … given - 2], and
 * names[0 … count - given - 1] as interned strings.  NULL with an exception. */
PyObject *peftc_pieces_functions(PyObject *module, PyObject *const *args, int given, const char *const *names, int count,
                                 PyMethodDef *first, PyMethodDef *second);

#endif
