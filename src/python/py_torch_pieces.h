/* Functions in C that know torch by what they are given of it: functions, classes, and names of attributes. */
#ifndef PEFTC_PYTHON_PY_TORCH_PIECES_H
#define PEFTC_PYTHON_PY_TORCH_PIECES_H

#include "binding.h"

/* A tuple of functions, of which `defs` has one each and then NULL, whose `self` is a tuple: the module, the names as interned
 * strings, the objects that are given.  NULL with an exception. */
PyObject *peftc_pieces_functions(PyObject *module, const char *const *names, int named, PyObject *const *given, int count,
                                 PyMethodDef *const *defs);

#endif
