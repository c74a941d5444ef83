/* The tape: what a forward pass in train mode leaves behind so that gradients can go back.
 *
 * Each recorded operation makes a node.  A node knows the nodes of its inputs, and so the tape is a graph that the
 * results hold: when a result that nobody took the gradient of is let go, what was saved for it goes, too.  Arrays with
 * a node are peftc.nn.Tensor, a subclass of ndarray; operations on them are recorded (peftc/nn/tensor.py).
 */
#ifndef PEFTC_PYTHON_TAPE_H
#define PEFTC_PYTHON_TAPE_H

#include "binding.h"

#include "../methods/methods.h"

typedef struct peftc_node peftc_node;

#define PEFTC_NODE_KEPT 8

typedef struct peftc_node_ops {
    const char *name; /* for messages */
    /* dy, the gradient of the node's result, is whole: add to the gradients of the parents and of parameters.  dy is of
     * the node's shape and compute dtype, contiguous, borrowed.  The GIL is held.  0, or -1 with an exception. */
    int (*backward)(peftc_node *node, PyArrayObject *dy);
    void (*free_saved)(void *saved); /* NULL: there is none */
} peftc_node_ops;

struct peftc_node {
    PyObject_HEAD
    const peftc_node_ops *ops;
    uint64_t sequence; /* later nodes never are inputs of earlier ones */
    PyObject *shape;   /* a tuple */
    pc_dtype compute;  /* PC_F32 or PC_F64: of gradients */
    PyArrayObject *grad; /* while a backward pass is on its way */
    Py_ssize_t parent_count;
    peftc_node **parents; /* NULL where an input has no node */
    PyObject *kept[PEFTC_NODE_KEPT]; /* what the operation needs: arrays, parameters */
    void *saved;                     /* likewise, in C */
    bool used;                       /* the gradient has passed, what was saved is gone */
    uint64_t visited;                /* the last pass that saw it */
};

/* Is this thread inside a call of a module in train mode, and not under no_grad? */
bool peftc_recording(void);
/* Are gradients on for this thread (no_grad turns them off)? */
bool peftc_gradients_on(void);

/* Entering and leaving a module's call; the outermost one decides whether to record. */
typedef struct peftc_tape_scope {
    bool outermost, recording;
} peftc_tape_scope;
peftc_tape_scope peftc_tape_enter(bool training);
void peftc_tape_leave(peftc_tape_scope scope);

/* The nodes of a call's results, in order: a new list, or NULL with an exception.  Looks into tuples, lists, dicts and
 * objects with to_tuple(). */
PyObject *peftc_result_nodes(peftc_state *state, PyObject *result);

/* The node of an input, NULL when it has none (a new reference); -1 with RuntimeError when the input came out of a
 * recorded array by an operation that is not recorded. */
int peftc_input_node(peftc_state *state, PyObject *input, peftc_node **out);

/* The node of a parameter that is to be trained, while this thread records; else NULL.  -1 with an exception. */
int peftc_parameter_node(peftc_state *state, PyObject *parameter, peftc_node **out);

/* A new node for the result `y`; takes over `saved`, also when it fails.  The parents' references are copied. */
peftc_node *peftc_node_new(peftc_state *state, const peftc_node_ops *ops, PyArrayObject *y, pc_dtype compute,
                           peftc_node *const *parents, Py_ssize_t parent_count, void *saved);
/* Give back what the way back needed; the node stays as a mark that the gradient has passed. */
void peftc_node_forget(peftc_node *node);
void peftc_node_keep(peftc_node *node, int slot, void *object); /* a new reference is taken; NULL is allowed */

/* The array as a Tensor with the node; both references are taken over.  NULL with an exception. */
PyObject *peftc_tensor_new(peftc_state *state, PyObject *array, peftc_node *node);

/* Where to add to a parent's gradient; -1 with an exception.  parent may be NULL: then *sum has no data. */
int peftc_node_sum(peftc_node *parent, pc_sum *sum);
/* Add an array of the parent's shape (taken over, may be shared with other nodes) to its gradient. */
int peftc_node_give(peftc_node *parent, PyArrayObject *gradient);
/* dy itself when nobody else has it, else a copy; a new reference, NULL with an exception. */
PyArrayObject *peftc_own_gradient(PyArrayObject *dy);
/* Memory for a gradient that is made from dy element by element: dy itself when nobody else has it, else new. */
PyArrayObject *peftc_gradient_place(PyArrayObject *dy);
/* NPY_FLOAT32 or NPY_FLOAT64. */
static inline int peftc_compute_type(pc_dtype compute) { return compute == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32; }

/* py_backward.c: what peftc_add_tape adds besides its own. */
int peftc_add_backward(PyObject *module);
int peftc_add_tape(PyObject *module, peftc_state *state);

#endif
