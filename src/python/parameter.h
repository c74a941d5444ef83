/* peftc._core.Parameter: what a layer computes with and an optimizer changes. */
#ifndef PEFTC_PYTHON_PARAMETER_H
#define PEFTC_PYTHON_PARAMETER_H

#include "binding.h"

#include "../core/adapter.h"
#include "../core/dtype.h"
#include "../core/rng.h"

/* How a parameter starts.  The values are drawn when they are first looked at, so that a layer whose weights
 * come from a file never draws any; the stream is taken when the parameter is made, so that they do not
 * depend on when that is. */
typedef enum peftc_fill_kind { PEFTC_FILL_ZEROS, PEFTC_FILL_ONES, PEFTC_FILL_UNIFORM, PEFTC_FILL_NORMAL } peftc_fill_kind;

typedef struct peftc_fill {
    peftc_fill_kind kind;
    double a, b;      /* low and high, or mean and standard deviation */
    pc_rng rng;
    int64_t zero_row; /* a row that is zero whatever the rest is (padding_idx); -1 for none */
} peftc_fill;

/* peftc._core.Parameter: an array that a layer computes with. */
typedef struct peftc_parameter_object {
    PyObject_HEAD
    PyObject *weakrefs;
    PyObject *storage; /* contiguous ndarray (uint16 for BF16, which NumPy has no type for); NULL: see fill */
    PyObject *grad;    /* or NULL */
    pc_dtype dtype;
    int ndim; /* shape as long as storage is NULL */
    npy_intp shape[4];
    peftc_fill fill;
    char requires_grad;
    pc_adapter *adapter; /* retained: the parameter is one of its tensors, whose gradient is there; or NULL */
    int32_t tensor;
} peftc_parameter_object;

/* A new parameter whose values are drawn later; NULL with an exception. */
PyObject *peftc_parameter_new(peftc_state *state, pc_dtype dtype, int ndim, const npy_intp *shape,
                              const peftc_fill *fill);
/* Replace the values: any float array-like of the same shape; 0, or -1 with an exception that starts with `what`. */
int peftc_parameter_assign(peftc_parameter_object *self, PyObject *value, const char *what);
/* The storage, drawn if need be (borrowed); NULL with an exception. */
PyArrayObject *peftc_parameter_storage(peftc_parameter_object *self);
/* The values as an ndarray that shares memory (new reference); BF16 needs ml_dtypes. */
PyObject *peftc_parameter_array(peftc_parameter_object *self);
/* Its shape; the array is valid until the next assignment. */
const npy_intp *peftc_parameter_shape(const peftc_parameter_object *self, int *ndim);

struct pc_target;

/* py_parameter_gradient.c.  Where a backward pass adds to the gradient (zeros at first); -1 with an exception. */

int peftc_parameter_sum(peftc_parameter_object *self, struct pc_target *target);
/* The gradient as it is: *values NULL when there is none; -1 with an exception.  Valid while the GIL is held. */
int peftc_parameter_gradient(peftc_parameter_object *self, void **values, pc_dtype *dtype);
/* p.grad (new reference), p.grad = value. */
PyObject *peftc_parameter_get_grad(PyObject *op, void *unused);
int peftc_parameter_set_grad(PyObject *op, PyObject *value, void *unused);
PyObject *peftc_parameter_attach(PyObject *op, PyObject *args);

/* Is it a Parameter or of a subclass? (Without the module's state; a subclass may have its own methods.) */
bool peftc_is_parameter(PyObject *object);

/* A fresh stream of the calling thread's generator, if it has one of its own (thread_seed), else of the process's
 * (manual_seed). Needs the GIL. */
pc_rng peftc_next_rng(peftc_state *state);

int peftc_add_parameter(PyObject *module, peftc_state *state);

/* py_parameter_ops.c: the array of a parameter, recorded while it is to be trained; anything else as it is. */
PyObject *peftc_parameter_recorded(PyObject *value);
/* The array protocols. */
PyObject *peftc_parameter_dunder_array(PyObject *op, PyObject *args, PyObject *kwargs);
PyObject *peftc_parameter_ufunc(PyObject *op, PyObject *args, PyObject *kwargs);
PyObject *peftc_parameter_function(PyObject *op, PyObject *args);
PyObject *peftc_parameter_add(PyObject *a, PyObject *b);
PyObject *peftc_parameter_subtract(PyObject *a, PyObject *b);
PyObject *peftc_parameter_multiply(PyObject *a, PyObject *b);
PyObject *peftc_parameter_divide(PyObject *a, PyObject *b);
PyObject *peftc_parameter_matmul(PyObject *a, PyObject *b);
PyObject *peftc_parameter_power(PyObject *a, PyObject *b, PyObject *modulo);
PyObject *peftc_parameter_negative(PyObject *op);
Py_ssize_t peftc_parameter_length(PyObject *op);
PyObject *peftc_parameter_subscript(PyObject *op, PyObject *key);
int peftc_parameter_ass_subscript(PyObject *op, PyObject *key, PyObject *value);

#endif
