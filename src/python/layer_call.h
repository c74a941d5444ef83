/* One forward call of a layer, and how it is recorded (py_layer_backward.c). */
#ifndef PEFTC_PYTHON_LAYER_CALL_H
#define PEFTC_PYTHON_LAYER_CALL_H

#include "layer.h"
#include "../kernels/gradients.h"
#include "tape.h"

/* Everything that the call needs, held for as long as the GIL may be gone. */
typedef struct peftc_layer_call {
    peftc_state *state;
    peftc_layer_object *layer; /* borrowed */
    peftc_scope scope;
    pc_activation *activation; /* NULL for a layer that is not bound */
    pc_module module;          /* a copy with the weights in effect: others may assign new ones meanwhile */
    PyObject *registry, *weight_owner, *bias_owner;
    PyArrayObject *x; /* contiguous, of dtype `compute` */
    pc_dtype in, compute, out;
    pc_call call;
    double eps; /* norms: as it is for this call */
    /* What follows is for recording. */
    bool learns;       /* something trainable is used */
    bool needs_x;      /* and its gradient is computed from the input */
    bool own_weight, own_bias; /* the layer's own parameters are in effect and to be trained */
    peftc_node *input, *residual;
    pc_kept kept;
} peftc_layer_call;

/* Find out what is trainable; `own` is the module before weights of adapters took the place of its own. */
int peftc_record_begin(peftc_layer_call *r, const pc_module *own);
/* Is there a gradient to pass on, or a parameter to get one? */
static inline bool peftc_records(const peftc_layer_call *r)
{
    return r->learns || r->input != NULL || r->residual != NULL;
}
/* `result` (taken over, may be NULL) as a Tensor.  act was applied to the layer's result; y is what came out of it and z
 * what went in, in the compute dtype, each NULL when not there. */
PyObject *peftc_record_layer(peftc_layer_call *r, pc_activation_fn act, PyArrayObject *y, PyArrayObject *z,
                             PyObject *result);

#endif
