/* What the forward passes of adapted layers on torch read of a layer, without running Python code. */
#ifndef PEFTC_PYTHON_PY_TORCH_LAYER_H
#define PEFTC_PYTHON_PY_TORCH_LAYER_H

#include "dlpack.h"

/* The first pieces (py_torch_pieces.h) of these functions: the module, and names of attributes. */
enum layer_piece {
    MODULE, /* peftc._core */
    MODULES,
    PARAMETERS,
    BASE_LAYER,
    WEIGHT,
    BIAS,
    FORWARD,
    REQUIRES_GRAD,
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    BACKWARD_HOOKS,
    BACKWARD_PRE_HOOKS,
    LAYER_PIECES,
};

#define LAYER_NAMES                                                                                                    \
    "_modules", "_parameters", "base_layer", "weight", "bias", "forward", "requires_grad", "_forward_hooks",           \
        "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"

/* References are borrowed where nothing runs other Python code before their last use; an adapter's tensors are held, because
 * an allocation by torch gives up the GIL, and so do large sums. */
typedef struct call {
    PyObject *self;
    peftc_state *state;
    bool failed; /* an exception is set */
} call;

#define PIECE(c, i) PyTuple_GET_ITEM((c)->self, i)

/* The item of a dict, borrowed; NULL if there is none, or it is no dict. */
PyObject *layer_item(call *c, PyObject *dict, PyObject *key);
/* An instance's attribute that is kept in its __dict__, borrowed from there. */
PyObject *layer_own(call *c, PyObject *object, int name);
/* A parameter of a ParameterDict that is a child of the layer, borrowed. */
PyObject *layer_parameter(call *c, PyObject *layer, int field, PyObject *name);
bool layer_has_hooks(call *c, PyObject *module);
/* Is the attribute's value the object True? */
bool layer_is_true(call *c, PyObject *object, int name);
/* Does autograd record operations now? `asked` is torch.is_grad_enabled. */
bool layer_grad_enabled(call *c, PyObject *asked);
/* The base layer, borrowed, if it is of the class `fresh`, whose output is nobody else's, so that it can be overwritten, and
 * nothing changes what it computes; else NULL. */
PyObject *layer_fresh_base(call *c, PyObject *layer, PyObject *fresh);
/* The weight and the bias (None if there is none) of such a base layer, held, if they are plain tensors that go with x; false
 * for what is not the plain case. */
bool layer_linear(call *c, PyObject *base, PyObject *x, PyObject **weight, PyObject **bias);
/* Is such a base layer trained itself? */
bool layer_is_trained(call *c, PyObject *weight, PyObject *bias);
/* What a function answers: the result, which is taken over, None for NULL, or NULL with the exception that there is. */
PyObject *layer_answer(const call *c, PyObject *result);

#endif
