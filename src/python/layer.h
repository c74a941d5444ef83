/* The C base of every peftc.nn module, and the forward scope. */
#ifndef PEFTC_PYTHON_LAYER_H
#define PEFTC_PYTHON_LAYER_H

#include "binding.h"

#include "../core/module.h"
#include "../core/registry.h"
#include "../kernels/kernels.h"
#include "parameter.h"

/* peftc._core.Module: the base of every module of the NumPy host, containers included. */
typedef struct peftc_module_object {
    PyObject_HEAD
    PyObject *dict;
    PyObject *weakrefs;
    PyObject *registry; /* the AdapterRegistry that the model is bound to, or NULL */
    int32_t index;      /* in its module table */
    char training;
    PyObject *outputs; /* after an outermost call: the nodes of its results (tape.h), or None when it recorded nothing */
} peftc_module_object;

/* peftc._core.Layer: a module with a weight.  `core` holds kind, dims, dtype and the current buffers;
 * its name fields are unused.  The owners keep those buffers alive; peftc_layer_sync brings both up to date. */
typedef struct peftc_layer_object {
    peftc_module_object base;
    pc_module core;
    PyObject *weight, *bias; /* Parameter or NULL */
    PyObject *weight_owner, *bias_owner;
    double eps;          /* normalisation layers */
    int64_t padding_idx; /* Embedding; -1 when none */
    bool ready;          /* __init__ has run */
} peftc_layer_object;

/* Make core.weight, core.bias, core.dtype and the owners those of the parameters as they are now.
 * Needs the GIL; -1 with an exception. */
int peftc_layer_sync(peftc_layer_object *layer);

/* The shape of its weight by its dims; returns the number of dimensions. */
int peftc_layer_weight_shape(const peftc_layer_object *layer, npy_intp shape[4]);

/* How messages call a layer: its dotted name, or its class while it is not bound. */
const char *peftc_layer_name(const peftc_layer_object *layer);

/* py_registry.c: the core registry of an AdapterRegistry object (borrowed). */
pc_registry *peftc_registry_core(PyObject *registry);

/* Forward scope (scope.c).  The outermost call of a bound module on a thread takes the activation; every
 * layer call inside uses that one, so that a forward pass is entirely old or entirely new. */
typedef struct peftc_scope {
    struct peftc_scope *outer;
    PyObject *registry;        /* borrowed: the calling module's frame holds it */
    pc_activation *activation; /* NULL when registry is */
    bool owns;                 /* this scope took the activation and gives it back */
} peftc_scope;

/* Enter: if this thread is not inside a scope of `registry`, acquire its activation. Returns the activation
 * in effect (borrowed until leave), NULL for registry == NULL. Nested calls are cheap.  Scopes of a thread are
 * left in the reverse order of entering. */
pc_activation *peftc_scope_enter(peftc_scope *scope, PyObject *registry);
void peftc_scope_leave(peftc_scope *scope);

/* The pieces that peftc_add_layers puts together. */
int peftc_add_layer_base(PyObject *module, peftc_state *state);
int peftc_add_module_type(PyObject *module, peftc_state *state);

int peftc_add_layout(PyObject *module); /* py_layout.c */

/* py_functional.c: "gelu", "gelu_tanh", "relu", "silu", "tanh", "none"; -1 with ValueError for anything else. */
int peftc_activation_from_name(PyObject *name, pc_activation_fn *out);

/* py_layer_forward.c */
PyObject *peftc_linear_forward(PyObject *op, PyObject *x);
PyObject *peftc_linear_forward_act(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *peftc_norm_forward(PyObject *op, PyObject *const *args, Py_ssize_t nargs);
PyObject *peftc_conv2d_forward(PyObject *op, PyObject *x);
PyObject *peftc_embedding_forward(PyObject *op, PyObject *ids);

#endif
