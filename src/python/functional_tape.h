/* The functions of py_functional.c on the tape.
 *
 * Each takes over `result` and gives it as a Tensor, NULL with an exception.  Nodes and arrays are borrowed; arrays are
 * contiguous and of the compute dtype. */
#ifndef PEFTC_PYTHON_FUNCTIONAL_TAPE_H
#define PEFTC_PYTHON_FUNCTIONAL_TAPE_H

#include "../kernels/gradients.h"
#include "tape.h"

/* kept: the output for activations that save it, else the input. */
PyObject *peftc_record_activation(peftc_state *state, peftc_node *x, pc_dtype compute, pc_activation_fn act,
                                  PyArrayObject *kept, PyObject *result);
PyObject *peftc_record_softmax(peftc_state *state, peftc_node *x, pc_dtype compute, PyArrayObject *y, PyObject *result);
PyObject *peftc_record_dropout(peftc_state *state, peftc_node *x, pc_dtype compute, double p, pc_rng rng,
                               PyObject *result);
/* parents: x, residual, weight, bias; sum: x with the residual added; weight may be NULL. */
PyObject *peftc_record_layer_norm(peftc_state *state, peftc_node *const *parents, pc_dtype compute, double eps,
                                  PyArrayObject *sum, PyArrayObject *weight, PyObject *result);
/* parents: x, weight, bias. */
PyObject *peftc_record_linear(peftc_state *state, peftc_node *const *parents, pc_dtype compute, PyArrayObject *x,
                              PyArrayObject *weight, PyObject *result);
/* parents: q, k, v; arrays: q, k, v, mask (or NULL). */
PyObject *peftc_record_attention(peftc_state *state, peftc_node *const *parents, pc_dtype compute,
                                 const pc_attention_shape *shape, PyArrayObject *const *arrays, PyObject *result);

#endif
