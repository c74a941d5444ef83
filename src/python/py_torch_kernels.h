/* The kernels on torch tensors as they are called from C; see py_torch.c. */
#ifndef PEFTC_PYTHON_PY_TORCH_KERNELS_H
#define PEFTC_PYTHON_PY_TORCH_KERNELS_H

#include "binding.h"

PyObject *peftc_lowrank_forward(PyObject *module, PyObject *const *args, Py_ssize_t nargs);
PyObject *peftc_lowrank_backward(PyObject *module, PyObject *const *args, Py_ssize_t nargs);

#endif
