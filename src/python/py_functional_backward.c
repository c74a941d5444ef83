#include "functional_tape.h"

#include "../core/memory.h"
#include "layer.h"

/* What an operation has besides arrays. */
typedef struct details {
    pc_activation_fn act;
    double p, eps;
    pc_rng rng;
    pc_attention_shape shape;
} details;

static pc_runtime *runtime_of(peftc_node *node)
{
    peftc_state *state = peftc_state_of_type(Py_TYPE(node));
    return state != NULL ? state->rt : NULL;
}

static void *data_of(PyObject *array) { return array != NULL ? PyArray_DATA((PyArrayObject *)array) : NULL; }

/* `result` with a node that keeps `count` arrays and a copy of `d`. */
static PyObject *record(peftc_state *state, const peftc_node_ops *ops, peftc_node *const *parents, Py_ssize_t parent_count,
                        pc_dtype compute, const details *d, PyArrayObject *const *arrays, int count, PyObject *result)
{
    if (result == NULL)
        return NULL;
    details *saved = pc_malloc(sizeof *saved);
    if (saved == NULL) {
        Py_DECREF(result);
        return PyErr_NoMemory();
    }
    *saved = *d;
    peftc_node *node = peftc_node_new(state, ops, (PyArrayObject *)result, compute, parents, parent_count, saved);
    if (node == NULL) {
        Py_DECREF(result);
        return NULL;
    }
    for (int i = 0; i < count; i++)
        peftc_node_keep(node, i, arrays[i]);
    return peftc_tensor_new(state, result, node);
}

static PyArrayObject *new_like(PyArrayObject *array)
{
    return (PyArrayObject *)PyArray_SimpleNew(PyArray_NDIM(array), PyArray_DIMS(array), PyArray_TYPE(array));
}

static int raise(peftc_node *node, const pc_error *err)
{
    peftc_state *state = peftc_state_of_type(Py_TYPE(node));
    if (state != NULL)
        peftc_raise(state, err);
    return -1;
}

/* ------------------------------------------------- one input of the same shape */

static int activation_backward(peftc_node *node, PyArrayObject *dy)
{
    const details *d = node->saved;
    PyArrayObject *dx = peftc_gradient_place(dy);
    if (dx == NULL)
        return -1;
    void *data = PyArray_DATA(dx);
    const void *from = PyArray_DATA(dy);
    const void *kept = data_of(node->kept[0]);
    const int64_t n = PyArray_SIZE(dx);
    pc_runtime *rt = runtime_of(node);
    Py_BEGIN_ALLOW_THREADS
    pc_activate_back(rt, node->compute, d->act, n, kept, from, data);
    Py_END_ALLOW_THREADS
    return peftc_node_give(node->parents[0], dx);
}

static int softmax_backward(peftc_node *node, PyArrayObject *dy)
{
    PyArrayObject *dx = peftc_gradient_place(dy);
    if (dx == NULL)
        return -1;
    void *data = PyArray_DATA(dx);
    const void *from = PyArray_DATA(dy);
    const void *y = data_of(node->kept[0]);
    const int64_t width = PyArray_DIM(dx, PyArray_NDIM(dx) - 1), rows = width != 0 ? PyArray_SIZE(dx) / width : 0;
    pc_runtime *rt = runtime_of(node);
    Py_BEGIN_ALLOW_THREADS
    pc_softmax_back(rt, node->compute, rows, width, y, from, data);
    Py_END_ALLOW_THREADS
    return peftc_node_give(node->parents[0], dx);
}

static int dropout_backward(peftc_node *node, PyArrayObject *dy)
{
    const details *d = node->saved;
    PyArrayObject *dx = peftc_gradient_place(dy);
    if (dx == NULL)
        return -1;
    void *data = PyArray_DATA(dx);
    const void *from = PyArray_DATA(dy);
    const int64_t n = PyArray_SIZE(dx);
    pc_runtime *rt = runtime_of(node);
    Py_BEGIN_ALLOW_THREADS
    if (d->p >= 1.0)
        memset(data, 0, (size_t)n * pc_dtype_size(node->compute));
    else
        pc_dropout(rt, node->compute, n, from, d->p, d->rng.seed, d->rng.stream, data);
    Py_END_ALLOW_THREADS
    return peftc_node_give(node->parents[0], dx);
}

static const peftc_node_ops activation_ops = {"activation", activation_backward, pc_free};
static const peftc_node_ops softmax_ops = {"softmax", softmax_backward, pc_free};
static const peftc_node_ops dropout_ops = {"dropout", dropout_backward, pc_free};

PyObject *peftc_record_activation(peftc_state *state, peftc_node *x, pc_dtype compute, pc_activation_fn act,
                                  PyArrayObject *kept, PyObject *result)
{
    const details d = {.act = act};
    return record(state, &activation_ops, &x, 1, compute, &d, &kept, 1, result);
}

PyObject *peftc_record_softmax(peftc_state *state, peftc_node *x, pc_dtype compute, PyArrayObject *y, PyObject *result)
{
    const details d = {0};
    return record(state, &softmax_ops, &x, 1, compute, &d, &y, 1, result);
}

PyObject *peftc_record_dropout(peftc_state *state, peftc_node *x, pc_dtype compute, double p, pc_rng rng,
                               PyObject *result)
{
    const details d = {.p = p, .rng = rng};
    return record(state, &dropout_ops, &x, 1, compute, &d, NULL, 0, result);
}

/* ------------------------------------------------------- weights given as arrays */

/* A zeroed or empty array of a parent's shape when it is wanted. */
static int make_gradient(peftc_node *parent, PyArrayObject *like, int type, int ndim, bool zeroed, PyArrayObject **out)
{
    *out = NULL;
    if (parent == NULL)
        return 0;
    *out = (PyArrayObject *)(zeroed ? PyArray_ZEROS(ndim, PyArray_DIMS(like), type, 0)
                                    : PyArray_SimpleNew(ndim, PyArray_DIMS(like), type));
    return *out != NULL ? 0 : -1;
}

/* Give gradients, all or those up to a failure; each is taken over. */
static int give_all(peftc_node *node, PyArrayObject **gradients, int count, int status)
{
    for (int i = 0; i < count; i++) {
        if (gradients[i] == NULL)
            continue;
        if (status == 0)
            status = peftc_node_give(node->parents[i], gradients[i]);
        else
            Py_DECREF(gradients[i]);
    }
    return status;
}

static int layer_norm_backward(peftc_node *node, PyArrayObject *dy)
{
    const details *d = node->saved;
    const int ndim = PyArray_NDIM(dy), type = PyArray_TYPE(dy);
    npy_intp width = PyArray_DIM(dy, ndim - 1);
    const int64_t rows = width != 0 ? PyArray_SIZE(dy) / width : 0;
    PyArrayObject *g[4] = {NULL, NULL, NULL, NULL};
    if ((node->parents[0] != NULL || node->parents[1] != NULL) && (g[0] = new_like(dy)) == NULL)
        return -1;
    for (int i = 2; i < 4; i++)
        if (node->parents[i] != NULL && (g[i] = (PyArrayObject *)PyArray_ZEROS(1, &width, type, 0)) == NULL)
            return give_all(node, g, 4, -1);
    const void *x = data_of(node->kept[0]), *weight = data_of(node->kept[1]), *dy_data = PyArray_DATA(dy);
    void *dx = data_of((PyObject *)g[0]), *dw = data_of((PyObject *)g[2]), *db = data_of((PyObject *)g[3]);
    pc_runtime *rt = runtime_of(node);
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_norm_back(rt, node->compute, true, rows, width, x, node->compute, weight, d->eps, dy_data, dx, dw, db,
                          &err);
    Py_END_ALLOW_THREADS
    if (status != PC_OK)
        return give_all(node, g, 4, raise(node, &err));
    if (node->parents[1] != NULL)
        g[1] = (PyArrayObject *)Py_NewRef(g[0]);
    if (node->parents[0] == NULL)
        Py_CLEAR(g[0]);
    return give_all(node, g, 4, 0);
}

static int linear_backward(peftc_node *node, PyArrayObject *dy)
{
    PyArrayObject *x = (PyArrayObject *)node->kept[0], *weight = (PyArrayObject *)node->kept[1], *g[3];
    const int type = PyArray_TYPE(dy);
    const int64_t n = PyArray_DIM(weight, 0), k = PyArray_DIM(weight, 1), rows = n != 0 ? PyArray_SIZE(dy) / n : 0;
    if (make_gradient(node->parents[0], x, type, PyArray_NDIM(x), false, &g[0]) < 0)
        return -1;
    g[1] = g[2] = NULL;
    if (make_gradient(node->parents[1], weight, type, 2, true, &g[1]) < 0 ||
        make_gradient(node->parents[2], weight, type, 1, true, &g[2]) < 0)
        return give_all(node, g, 3, -1);
    const void *x_data = PyArray_DATA(x), *w = PyArray_DATA(weight), *dy_data = PyArray_DATA(dy);
    void *dx = data_of((PyObject *)g[0]), *dw = data_of((PyObject *)g[1]), *db = data_of((PyObject *)g[2]);
    pc_runtime *rt = runtime_of(node);
    pc_error err;
    pc_status status = PC_OK;
    Py_BEGIN_ALLOW_THREADS
    if (dx != NULL)
        status = pc_linear_dx(rt, node->compute, false, false, rows, n, k, dy_data, node->compute, w, dx, &err);
    if (status == PC_OK && dw != NULL)
        status = pc_linear_dw(rt, node->compute, false, rows, n, k, dy_data, x_data, dw, &err);
    if (status == PC_OK && db != NULL)
        pc_sum_rows(rt, node->compute, rows, n, dy_data, NULL, 1.0, db);
    Py_END_ALLOW_THREADS
    return give_all(node, g, 3, status == PC_OK ? 0 : raise(node, &err));
}

static const peftc_node_ops layer_norm_ops = {"layer_norm", layer_norm_backward, pc_free};
static const peftc_node_ops linear_ops = {"linear", linear_backward, pc_free};

PyObject *peftc_record_layer_norm(peftc_state *state, peftc_node *const *parents, pc_dtype compute, double eps,
                                  PyArrayObject *sum, PyArrayObject *weight, PyObject *result)
{
    const details d = {.eps = eps};
    PyArrayObject *const arrays[2] = {sum, weight};
    return record(state, &layer_norm_ops, parents, 4, compute, &d, arrays, 2, result);
}

PyObject *peftc_record_linear(peftc_state *state, peftc_node *const *parents, pc_dtype compute, PyArrayObject *x,
                              PyArrayObject *weight, PyObject *result)
{
    const details d = {0};
    PyArrayObject *const arrays[2] = {x, weight};
    return record(state, &linear_ops, parents, 3, compute, &d, arrays, 2, result);
}

/* -------------------------------------------------------------------- attention */

static int attention_backward(peftc_node *node, PyArrayObject *dy)
{
    const details *d = node->saved;
    PyArrayObject *g[3] = {NULL, NULL, NULL};
    const void *in[3];
    void *out[3];
    for (int i = 0; i < 3; i++) {
        in[i] = data_of(node->kept[i]);
        if (node->parents[i] != NULL && (g[i] = new_like((PyArrayObject *)node->kept[i])) == NULL)
            return give_all(node, g, 3, -1);
        out[i] = data_of((PyObject *)g[i]);
    }
    const void *dy_data = PyArray_DATA(dy), *mask = data_of(node->kept[3]);
    pc_runtime *rt = runtime_of(node);
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_attention_back(rt, node->compute, &d->shape, in[0], in[1], in[2], mask, dy_data, out[0], out[1], out[2],
                               &err);
    Py_END_ALLOW_THREADS
    return give_all(node, g, 3, status == PC_OK ? 0 : raise(node, &err));
}

static const peftc_node_ops attention_ops = {"attention", attention_backward, pc_free};

PyObject *peftc_record_attention(peftc_state *state, peftc_node *const *parents, pc_dtype compute,
                                 const pc_attention_shape *shape, PyArrayObject *const *arrays, PyObject *result)
{
    const details d = {.shape = *shape};
    return record(state, &attention_ops, parents, 3, compute, &d, arrays, 4, result);
}
