/* NumPy arrays ↔ core dtypes and memory: the one place that knows both. */
#ifndef PEFTC_PYTHON_ARRAYS_H
#define PEFTC_PYTHON_ARRAYS_H

#include "binding.h"

#include "../core/dtype.h"

/* The core dtype of a NumPy dtype (ml_dtypes' bfloat16 and float8 types included, by name), in native byte
 * order; PC_DTYPE_NONE when there is none. Never sets an exception. */
pc_dtype peftc_dtype_of(PyArray_Descr *descr);

/* Any array-like as an array of native byte order with these NPY_ARRAY flags; NULL with an exception. */
PyArrayObject *peftc_native_array(PyObject *obj, int flags);

/* A new reference to the NumPy dtype. BF16 and F8 need ml_dtypes: without it a TypeError that says so. */
PyArray_Descr *peftc_descr_of(peftc_state *state, pc_dtype dtype);

/* An array over memory that `owner` keeps alive (a new reference to it is taken). */
PyObject *peftc_array_over(peftc_state *state, pc_dtype dtype, int ndim, const npy_intp *shape, void *data,
                           PyObject *owner, int writeable);

/* A dtype argument given as a name ("float32", "F32", "bfloat16"), a NumPy dtype or scalar type → core dtype;
 * PC_DTYPE_NONE with TypeError set. */
pc_dtype peftc_dtype_from_object(PyObject *obj);

#endif
