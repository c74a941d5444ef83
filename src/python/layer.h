/* The C base of every peftc.nn module, and the forward scope. */
#ifndef PEFTC_PYTHON_LAYER_H
#define PEFTC_PYTHON_LAYER_H

#include "binding.h"

#include "../core/module.h"
#include "../core/registry.h"

/* peftc._core.Module: the base of every module of the NumPy host, containers included. */
typedef struct peftc_module_object {
    PyObject_HEAD
    PyObject *dict;
    PyObject *weakrefs;
    PyObject *registry; /* the AdapterRegistry that the model is bound to, or NULL */
    int32_t index;      /* in its module table */
    char training;
} peftc_module_object;

/* peftc._core.Layer: a module with a weight.  `core` holds kind, dims, dtype and the current buffers;
 * its name fields are unused.  weight/bias own the buffers (any object that keeps the memory alive). */
typedef struct peftc_layer_object {
    peftc_module_object base;
    pc_module core;
    PyObject *weight_owner, *bias_owner;
    double eps;          /* normalisation layers */
    int64_t padding_idx; /* Embedding; -1 when none */
} peftc_layer_object;

/* py_registry.c: the core registry of an AdapterRegistry object (borrowed). */
pc_registry *peftc_registry_core(PyObject *registry);

/* Forward scope (scope.c).  The outermost call of a bound module on a thread takes the activation; every
 * layer call inside uses that one, so that a forward pass is entirely old or entirely new. */
typedef struct peftc_scope {
    struct peftc_scope *outer;
    PyObject *registry;         /* borrowed: the calling module holds it */
    pc_activation *activation;  /* owned by the scope that was entered first */
} peftc_scope;

/* Enter: if this thread is not inside a scope of `registry`, acquire its activation. Returns the activation
 * in effect (borrowed until leave). Nested calls are cheap. */
pc_activation *peftc_scope_enter(peftc_scope *scope, PyObject *registry);
void peftc_scope_leave(peftc_scope *scope);

#endif
