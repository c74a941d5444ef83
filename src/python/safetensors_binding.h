/* What py_safetensors.c and py_safe_open.c share. */
#ifndef PEFTC_PYTHON_SAFETENSORS_BINDING_H
#define PEFTC_PYTHON_SAFETENSORS_BINDING_H

#include "binding.h"

#include "../formats/safetensors.h"

/* Open `path` (str, bytes or os.PathLike) without the GIL. */
pc_safetensors *peftc_safetensors_open(peftc_state *state, PyObject *path);

/* A new, unfilled array for a tensor of this dtype and shape.  `descrs` remembers the NumPy dtypes from
 * call to call (PC_DTYPE_COUNT entries, all NULL at first; the caller drops them). */
PyObject *peftc_empty_tensor(peftc_state *state, PyArray_Descr **descrs, pc_dtype dtype, int ndim,
                             const uint64_t *shape, const char *name, size_t name_len);
void peftc_drop_descrs(PyArray_Descr **descrs);

/* Every tensor, in the order of the file: name → array.  Reads without the GIL; the caller keeps st alive. */
PyObject *peftc_load_all(peftc_state *state, pc_safetensors *st);

PyObject *peftc_name_of(const pc_tensor_info *info);

int peftc_add_safe_open(PyObject *module, peftc_state *state);

#endif
