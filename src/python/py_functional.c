/* Functions of peftc.nn.functional: the pieces of a model that have no weights
 * of their own, and linear and layer_norm over weights given as arrays.
 *
 * Floating input of float16 or bfloat16 is computed in float32 and given back
 * in its own dtype.  Results are always new arrays. */
#include "layer.h"

#include <math.h>

#include "../kernels/kernels.h"
#include "arrays.h"
#include "functional_tape.h"

/* Below this many elements a call takes less time than giving up the GIL is worth. */
#define WORTH_RELEASING 4096

int peftc_activation_from_name(PyObject *name, pc_activation_fn *out)
{
    static const struct {
        const char *name;
        pc_activation_fn act;
    } known[] = {{"gelu", PC_ACT_GELU}, {"gelu_tanh", PC_ACT_GELU_TANH}, {"relu", PC_ACT_RELU},
                 {"silu", PC_ACT_SILU}, {"tanh", PC_ACT_TANH},           {"none", PC_ACT_NONE}};
    if (PyUnicode_Check(name)) {
        for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
            if (PyUnicode_CompareWithASCIIString(name, known[i].name) == 0) {
                *out = known[i].act;
                return 0;
            }
        }
    }
    PyErr_Format(PyExc_ValueError, "unknown activation %R; known are gelu, gelu_tanh, relu, silu, tanh and none", name);
    return -1;
}

/* ---------------------------------------------------------------- in and out */

typedef struct operand {
    PyArrayObject *array; /* contiguous, of the compute dtype */
    pc_dtype in, compute;
    peftc_node *node; /* NULL when nothing is recorded of it */
} operand;

static int typenum_of(pc_dtype compute) { return compute == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32; }

/* Any float array-like; `least` is the compute dtype that another operand asks for. */
static int take(peftc_state *state, PyObject *obj, const char *what, pc_dtype least, operand *out)
{
    out->node = NULL;
    if (peftc_gradients_on() && peftc_input_node(state, obj, &out->node) < 0)
        return -1;
    PyArrayObject *array = peftc_native_array(obj, 0);
    if (array == NULL) {
        Py_CLEAR(out->node);
        return -1;
    }
    out->in = peftc_dtype_of(PyArray_DESCR(array));
    if (!pc_dtype_get(out->in)->is_float) {
        PyErr_Format(PyExc_TypeError, "%s must be an array of float32, float64, float16 or bfloat16, not of %S", what,
                     (PyObject *)PyArray_DESCR(array));
        Py_DECREF(array);
        Py_CLEAR(out->node);
        return -1;
    }
    out->compute = least == PC_F64 ? PC_F64 : pc_compute_dtype(out->in);
    out->array = (PyArrayObject *)PyArray_FromArray(array, PyArray_DescrFromType(typenum_of(out->compute)),
                                                    NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    if (out->array == NULL)
        Py_CLEAR(out->node);
    return out->array != NULL ? 0 : -1;
}

static void drop_operand(operand *x)
{
    Py_CLEAR(x->array);
    Py_CLEAR(x->node);
}

static PyArrayObject *new_like(const operand *x)
{
    return (PyArrayObject *)PyArray_SimpleNew(PyArray_NDIM(x->array), PyArray_DIMS(x->array), typenum_of(x->compute));
}

/* The result in the dtype of the input it came from. */
static PyObject *give(peftc_state *state, const operand *x, PyArrayObject *y)
{
    if (y == NULL || x->in == x->compute || x->compute == PC_F64)
        return (PyObject *)y;
    PyArray_Descr *descr = peftc_descr_of(state, x->in);
    PyObject *narrow = descr != NULL ? PyArray_FromArray(y, descr, NPY_ARRAY_FORCECAST) : NULL;
    Py_DECREF(y);
    return narrow;
}

/* -------------------------------------------------------------- elementwise */

static PyObject *activate(PyObject *module, PyObject *obj, pc_activation_fn act)
{
    peftc_state *state = peftc_get_state(module);
    operand x;
    if (take(state, obj, "the input", PC_F32, &x) < 0)
        return NULL;
    PyArrayObject *y = new_like(&x);
    if (y != NULL) {
        const void *src = PyArray_DATA(x.array);
        void *dst = PyArray_DATA(y);
        int64_t n = PyArray_SIZE(y);
        PyThreadState *saved = n >= WORTH_RELEASING ? PyEval_SaveThread() : NULL;
        pc_activate(state->rt, x.compute, act, n, src, dst);
        if (saved != NULL)
            PyEval_RestoreThread(saved);
    }
    PyArrayObject *kept = (PyArrayObject *)Py_XNewRef(pc_activation_saves_output(act) ? y : x.array);
    PyObject *result = give(state, &x, y);
    if (x.node != NULL)
        result = peftc_record_activation(state, x.node, x.compute, act, kept, result);
    Py_XDECREF(kept);
    drop_operand(&x);
    return result;
}

static PyObject *f_gelu(PyObject *module, PyObject *x) { return activate(module, x, PC_ACT_GELU); }
static PyObject *f_gelu_tanh(PyObject *module, PyObject *x) { return activate(module, x, PC_ACT_GELU_TANH); }
static PyObject *f_relu(PyObject *module, PyObject *x) { return activate(module, x, PC_ACT_RELU); }
static PyObject *f_silu(PyObject *module, PyObject *x) { return activate(module, x, PC_ACT_SILU); }
static PyObject *f_tanh(PyObject *module, PyObject *x) { return activate(module, x, PC_ACT_TANH); }

static PyObject *f_softmax(PyObject *module, PyObject *obj)
{
    peftc_state *state = peftc_get_state(module);
    operand x;
    if (take(state, obj, "the input", PC_F32, &x) < 0)
        return NULL;
    int ndim = PyArray_NDIM(x.array);
    PyArrayObject *y = NULL;
    if (ndim == 0)
        PyErr_SetString(PyExc_ValueError, "softmax needs an axis to go over, and the input has none");
    else
        y = new_like(&x);
    if (y != NULL) {
        int64_t width = PyArray_DIM(y, ndim - 1), rows = PyArray_MultiplyList(PyArray_DIMS(y), ndim - 1);
        const void *src = PyArray_DATA(x.array);
        void *dst = PyArray_DATA(y);
        PyThreadState *saved = rows * width >= WORTH_RELEASING ? PyEval_SaveThread() : NULL;
        pc_softmax(state->rt, x.compute, rows, width, src, dst);
        if (saved != NULL)
            PyEval_RestoreThread(saved);
    }
    PyArrayObject *kept = (PyArrayObject *)Py_XNewRef(y);
    PyObject *result = give(state, &x, y);
    if (x.node != NULL)
        result = peftc_record_softmax(state, x.node, x.compute, kept, result);
    Py_XDECREF(kept);
    drop_operand(&x);
    return result;
}

static PyObject *f_dropout(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *obj;
    double p;
    if (!PyArg_ParseTuple(args, "Od:dropout", &obj, &p))
        return NULL;
    if (!(p >= 0.0 && p <= 1.0))
        return PyErr_Format(PyExc_ValueError, "dropout: p must be between 0 and 1, got %R", PyTuple_GET_ITEM(args, 1));
    operand x;
    if (take(state, obj, "the input", PC_F32, &x) < 0)
        return NULL;
    PyArrayObject *y = new_like(&x);
    pc_rng rng = peftc_next_rng(state);
    if (y != NULL) {
        const void *src = PyArray_DATA(x.array);
        void *dst = PyArray_DATA(y);
        int64_t n = PyArray_SIZE(y);
        Py_BEGIN_ALLOW_THREADS
        if (p >= 1.0)
            memset(dst, 0, (size_t)n * pc_dtype_size(x.compute));
        else
            pc_dropout(state->rt, x.compute, n, src, p, rng.seed, rng.stream, dst);
        Py_END_ALLOW_THREADS
    }
    PyObject *result = give(state, &x, y);
    if (x.node != NULL)
        result = peftc_record_dropout(state, x.node, x.compute, p, rng, result);
    drop_operand(&x);
    return result;
}

/* ------------------------------------------------- with weights given as arrays */

/* An optional vector of `n` elements in the compute dtype; 0, or -1 with an exception. */
static int take_vector(peftc_state *state, PyObject *obj, const char *what, int64_t n, pc_dtype compute,
                       PyArrayObject **out, peftc_node **node)
{
    *out = NULL;
    if (obj == Py_None)
        return 0;
    if (peftc_gradients_on() && peftc_input_node(state, obj, node) < 0)
        return -1;
    *out = (PyArrayObject *)PyArray_FROM_OTF(obj, typenum_of(compute), NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    if (*out == NULL)
        return -1;
    if (PyArray_NDIM(*out) == 1 && PyArray_DIM(*out, 0) == n)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s must have shape (%lld,)", what, (long long)n);
    Py_CLEAR(*out);
    return -1;
}

static const void *data_of(PyArrayObject *array) { return array != NULL ? PyArray_DATA(array) : NULL; }

static PyObject *f_layer_norm(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *obj, *weight_obj, *bias_obj, *residual_obj;
    double eps;
    if (!PyArg_ParseTuple(args, "OOOdO:layer_norm", &obj, &weight_obj, &bias_obj, &eps, &residual_obj))
        return NULL;
    operand x, residual = {0};
    if (take(state, obj, "the input", PC_F32, &x) < 0)
        return NULL;
    PyArrayObject *weight = NULL, *bias = NULL, *y = NULL, *sum = NULL;
    peftc_node *parents[4] = {x.node}; /* x, residual, weight, bias */
    int ndim = PyArray_NDIM(x.array);
    if (ndim == 0) {
        PyErr_SetString(PyExc_ValueError, "layer_norm needs an axis to go over, and the input has none");
        goto done;
    }
    int64_t width = PyArray_DIM(x.array, ndim - 1), rows = PyArray_MultiplyList(PyArray_DIMS(x.array), ndim - 1);
    if (take_vector(state, weight_obj, "the weight", width, x.compute, &weight, &parents[2]) < 0 ||
        take_vector(state, bias_obj, "the bias", width, x.compute, &bias, &parents[3]) < 0)
        goto done;
    if (residual_obj != Py_None) {
        if (peftc_gradients_on() && peftc_input_node(state, residual_obj, &parents[1]) < 0)
            goto done;
        residual.array = (PyArrayObject *)PyArray_FROM_OTF(residual_obj, typenum_of(x.compute),
                                                           NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
        if (residual.array == NULL)
            goto done;
        if (!PyArray_SAMESHAPE(residual.array, x.array)) {
            PyErr_SetString(PyExc_ValueError, "layer_norm: the residual and the input have different shapes");
            goto done;
        }
    }
    const bool records = parents[0] != NULL || parents[1] != NULL || parents[2] != NULL || parents[3] != NULL;
    y = new_like(&x);
    if (y != NULL && records && (sum = residual.array != NULL ? new_like(&x) : (PyArrayObject *)Py_NewRef(x.array)) == NULL)
        Py_CLEAR(y);
    if (y != NULL) {
        const void *in = PyArray_DATA(x.array), *added = data_of(residual.array);
        Py_BEGIN_ALLOW_THREADS
        if (sum != NULL && added != NULL) {
            pc_sum_two(state->rt, x.compute, rows * width, in, added, PyArray_DATA(sum));
            in = PyArray_DATA(sum);
            added = NULL;
        }
        pc_layer_norm(state->rt, x.compute, rows, width, in, added, x.compute, data_of(weight), data_of(bias), eps,
                      PyArray_DATA(y));
        Py_END_ALLOW_THREADS
    }
done:;
    PyObject *result = give(state, &x, y);
    if (result != NULL && sum != NULL)
        result = peftc_record_layer_norm(state, parents, x.compute, eps, sum, weight, result);
    for (int i = 1; i < 4; i++)
        Py_XDECREF((PyObject *)parents[i]);
    Py_XDECREF(sum);
    Py_XDECREF(residual.array);
    Py_XDECREF(weight);
    Py_XDECREF(bias);
    drop_operand(&x);
    return result;
}

static PyObject *f_linear(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *obj, *weight_obj, *bias_obj;
    if (!PyArg_ParseTuple(args, "OOO:linear", &obj, &weight_obj, &bias_obj))
        return NULL;
    operand x = {0}, weight;
    if (take(state, weight_obj, "the weight", PC_F32, &weight) < 0)
        return NULL;
    PyArrayObject *bias = NULL, *y = NULL;
    peftc_node *bias_node = NULL;
    if (take(state, obj, "the input", weight.compute, &x) < 0)
        goto done;
    if (x.compute != weight.compute) { /* a float64 input over a narrower weight */
        PyArrayObject *wide = (PyArrayObject *)PyArray_Cast(weight.array, NPY_FLOAT64);
        if (wide == NULL)
            goto done;
        Py_SETREF(weight.array, wide);
    }
    int ndim = PyArray_NDIM(x.array);
    if (PyArray_NDIM(weight.array) != 2 || ndim == 0 ||
        PyArray_DIM(x.array, ndim - 1) != PyArray_DIM(weight.array, 1)) {
        PyErr_SetString(PyExc_ValueError, "linear: the input must be (..., in) and the weight (out, in)");
        goto done;
    }
    int64_t out = PyArray_DIM(weight.array, 0), in = PyArray_DIM(weight.array, 1);
    int64_t rows = PyArray_MultiplyList(PyArray_DIMS(x.array), ndim - 1);
    if (take_vector(state, bias_obj, "the bias", out, x.compute, &bias, &bias_node) < 0)
        goto done;
    npy_intp shape[NPY_MAXDIMS];
    memcpy(shape, PyArray_DIMS(x.array), (size_t)ndim * sizeof *shape);
    shape[ndim - 1] = (npy_intp)out;
    y = (PyArrayObject *)PyArray_SimpleNew(ndim, shape, typenum_of(x.compute));
    if (y != NULL) {
        pc_error err;
        pc_status status;
        Py_BEGIN_ALLOW_THREADS
        status = pc_linear(state->rt, x.compute, rows, out, in, PyArray_DATA(x.array), x.compute,
                           PyArray_DATA(weight.array), data_of(bias), PC_ACT_NONE, PyArray_DATA(y), &err);
        Py_END_ALLOW_THREADS
        if (status != PC_OK) {
            peftc_raise(state, &err);
            Py_CLEAR(y);
        }
    }
done:;
    PyObject *result = x.array != NULL ? give(state, &x, y) : NULL;
    if (result != NULL && (x.node != NULL || weight.node != NULL || bias_node != NULL)) {
        peftc_node *const parents[3] = {x.node, weight.node, bias_node};
        result = peftc_record_linear(state, parents, x.compute, x.array, weight.array, result);
    }
    Py_XDECREF((PyObject *)bias_node);
    Py_XDECREF(bias);
    drop_operand(&weight);
    drop_operand(&x);
    return result;
}

/* ------------------------------------------------------------------ attention */

/* Which keys count: (batch, keys) of any integer, bool or float dtype → bytes; 0, or -1 with an exception. */
static int take_mask(PyObject *obj, npy_intp batch, npy_intp keys, PyArrayObject **out)
{
    *out = NULL;
    if (obj == Py_None)
        return 0;
    PyArrayObject *mask = (PyArrayObject *)PyArray_FROM_OTF(obj, NPY_BOOL, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    if (mask == NULL)
        return -1;
    if (PyArray_NDIM(mask) != 2 || PyArray_DIM(mask, 0) != batch || PyArray_DIM(mask, 1) != keys) {
        PyErr_Format(PyExc_ValueError, "attention: the mask must have shape (batch, keys) = (%zd, %zd)",
                     (Py_ssize_t)batch, (Py_ssize_t)keys);
        Py_DECREF(mask);
        return -1;
    }
    *out = mask;
    return 0;
}

static PyObject *f_attention(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *q_obj, *k_obj, *v_obj, *mask_obj, *scale_obj;
    Py_ssize_t heads;
    double dropout = 0.0;
    if (!PyArg_ParseTuple(args, "OOOnOO|d:attention", &q_obj, &k_obj, &v_obj, &heads, &mask_obj, &scale_obj, &dropout))
        return NULL;
    if (!(dropout >= 0.0 && dropout <= 1.0))
        return PyErr_Format(PyExc_ValueError, "attention: dropout must be between 0 and 1, got %R",
                            PyTuple_GET_ITEM(args, 6));
    pc_attention_shape shape = {0};
    operand q = {0}, k = {0}, v = {0};
    PyArrayObject *mask = NULL, *y = NULL;
    if (take(state, q_obj, "q", PC_F32, &q) < 0 || take(state, k_obj, "k", q.compute, &k) < 0 ||
        take(state, v_obj, "v", q.compute, &v) < 0)
        goto done;
    if (k.compute != q.compute || v.compute != q.compute) {
        PyErr_SetString(PyExc_TypeError, "attention: q, k and v must have one dtype");
        goto done;
    }
    const npy_intp *qd = PyArray_DIMS(q.array), *kd = PyArray_DIMS(k.array);
    if (PyArray_NDIM(q.array) != 3 || PyArray_NDIM(k.array) != 3 || !PyArray_SAMESHAPE(k.array, v.array) ||
        qd[0] != kd[0] || qd[2] != kd[2]) {
        PyErr_SetString(PyExc_ValueError,
                        "attention: q must be (batch, queries, width), k and v (batch, keys, width)");
        goto done;
    }
    if (heads < 1 || qd[2] % heads != 0) {
        PyErr_Format(PyExc_ValueError, "attention: a width of %zd does not divide into %zd heads", (Py_ssize_t)qd[2],
                     heads);
        goto done;
    }
    int64_t dim = qd[2] / heads;
    double scale = scale_obj == Py_None ? 1.0 / sqrt((double)(dim > 0 ? dim : 1)) : PyFloat_AsDouble(scale_obj);
    if ((scale == -1.0 && PyErr_Occurred()) || take_mask(mask_obj, qd[0], kd[1], &mask) < 0)
        goto done;
    y = new_like(&q);
    if (y != NULL) {
        pc_error err;
        pc_status status;
        shape = (pc_attention_shape){.batch = qd[0], .heads = heads, .tq = qd[1], .tk = kd[1], .dim = dim};
        shape.scale = scale;
        shape.dropout = dropout;
        if (dropout > 0.0)
            shape.rng = peftc_next_rng(state);
        Py_BEGIN_ALLOW_THREADS
        status = pc_attention_train(state->rt, q.compute, &shape, PyArray_DATA(q.array), PyArray_DATA(k.array),
                                    PyArray_DATA(v.array), data_of(mask), PyArray_DATA(y), &err);
        Py_END_ALLOW_THREADS
        if (status != PC_OK) {
            peftc_raise(state, &err);
            Py_CLEAR(y);
        }
    }
done:;
    PyObject *result = q.array != NULL ? give(state, &q, y) : NULL;
    if (result != NULL && (q.node != NULL || k.node != NULL || v.node != NULL)) {
        peftc_node *const parents[3] = {q.node, k.node, v.node};
        PyArrayObject *const arrays[4] = {q.array, k.array, v.array, mask};
        result = peftc_record_attention(state, parents, q.compute, &shape, arrays, result);
    }
    Py_XDECREF(mask);
    drop_operand(&q);
    drop_operand(&k);
    drop_operand(&v);
    return result;
}

/* Defaults and documentation are in peftc/nn/functional.py. */
#define SIGNATURE(text) text "\n--\n\n"
static PyMethodDef functions[] = {
    {"gelu", f_gelu, METH_O, SIGNATURE("gelu(x, /)")},
    {"gelu_tanh", f_gelu_tanh, METH_O, SIGNATURE("gelu_tanh(x, /)")},
    {"relu", f_relu, METH_O, SIGNATURE("relu(x, /)")},
    {"silu", f_silu, METH_O, SIGNATURE("silu(x, /)")},
    {"tanh", f_tanh, METH_O, SIGNATURE("tanh(x, /)")},
    {"softmax", f_softmax, METH_O, SIGNATURE("softmax(x, /)")},
    {"dropout", f_dropout, METH_VARARGS, SIGNATURE("dropout(x, p, /)")},
    {"layer_norm", f_layer_norm, METH_VARARGS, SIGNATURE("layer_norm(x, weight, bias, eps, residual, /)")},
    {"linear", f_linear, METH_VARARGS, SIGNATURE("linear(x, weight, bias, /)")},
    {"attention", f_attention, METH_VARARGS, SIGNATURE("attention(q, k, v, num_heads, mask, scale, dropout=0.0, /)")},
    {NULL, NULL, 0, NULL},
};

int peftc_add_functional(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
