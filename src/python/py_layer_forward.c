/* What the layers compute: input to contiguous memory of the compute dtype,
 * one core call without the GIL, result to an array. */
#include "layer.h"

#include <float.h>

#include "../core/memory.h"
#include "../kernels/kernels.h"
#include "../methods/methods.h"
#include "arrays.h"
#include "layer_call.h"

/* Below this many multiply-adds a call takes less time than giving up the GIL is worth. */
#define WORTH_RELEASING 16384

static peftc_layer_object *cast(PyObject *op) { return (peftc_layer_object *)op; }

typedef peftc_layer_call running;

static PyObject *finish(running *r, PyObject *result);

/* `kinds` has a bit for each kind that the method computes: an object can get at another layer's methods, by
 * inheriting from two layer types or by a new __class__. */
static int begin(running *r, peftc_layer_object *layer, unsigned kinds)
{
    *r = (running){.layer = layer, .call.padding_idx = -1};
    pc_pool_init_scratch(&r->kept.pool);
    r->state = peftc_state_of_type(Py_TYPE(layer));
    if (r->state == NULL || peftc_layer_sync(layer) < 0)
        return -1;
    if ((kinds >> layer->core.kind & 1u) == 0) {
        PyErr_Format(PyExc_TypeError, "%s was made as a %s: the forward() of another layer type does not apply to it",
                     peftc_layer_name(layer), pc_kind_name(layer->core.kind));
        return -1;
    }
    r->registry = Py_XNewRef(layer->base.registry);
    r->weight_owner = Py_XNewRef(layer->weight_owner);
    r->bias_owner = Py_XNewRef(layer->bias_owner);
    r->activation = peftc_scope_enter(&r->scope, r->registry);
    r->module = layer->core;
    r->module.name = peftc_layer_name(layer);
    r->module.name_len = strlen(r->module.name);
    r->call.rt = r->state->rt;
    r->call.module = &r->module;
    r->call.module_index = layer->base.index;
    r->call.training = layer->base.training != 0;
    if (r->call.training && r->activation != NULL && r->activation->count != 0)
        r->call.rng = peftc_next_rng(r->state);
    pc_error err;
    pc_module own = r->module;
    if (pc_effective_weights(r->activation, r->call.module_index, &r->module, &err) != PC_OK) {
        peftc_raise(r->state, &err);
        finish(r, NULL);
        return -1;
    }
    if (peftc_recording() && peftc_record_begin(r, &own) < 0) {
        finish(r, NULL);
        return -1;
    }
    return 0;
}

/* Gives everything back; passes `result` through. */
static PyObject *finish(running *r, PyObject *result)
{
    peftc_scope_leave(&r->scope);
    pc_pool_free(&r->kept.pool);
    Py_XDECREF((PyObject *)r->input);
    Py_XDECREF((PyObject *)r->residual);
    Py_XDECREF(r->x);
    Py_XDECREF(r->registry);
    Py_XDECREF(r->weight_owner);
    Py_XDECREF(r->bias_owner);
    return result;
}

/* Float input of `obj`, as an array of the compute dtype; sets r->x, in, compute, out. */
static int take_input(running *r, PyObject *obj)
{
    pc_dtype wanted = pc_compute_dtype(r->module.dtype);
    if (peftc_recording() && peftc_input_node(r->state, obj, &r->input) < 0)
        return -1;
    PyArrayObject *array;
    bool given = PyArray_Check(obj);
    if (given) {
        array = (PyArrayObject *)Py_NewRef(obj);
    } else {
        array = (PyArrayObject *)PyArray_FROM_O(obj);
        if (array == NULL)
            return -1;
    }
    pc_dtype in = peftc_dtype_of(PyArray_DESCR(array));
    if (in == PC_DTYPE_NONE && PyTypeNum_ISFLOAT(PyArray_TYPE(array)) && PyArray_ISBYTESWAPPED(array)) {
        PyArrayObject *native = (PyArrayObject *)PyArray_FROM_OF((PyObject *)array, NPY_ARRAY_NOTSWAPPED);
        Py_DECREF(array);
        if (native == NULL)
            return -1;
        array = native;
        in = peftc_dtype_of(PyArray_DESCR(array));
    }
    if (!pc_dtype_get(in)->is_float && !(!given && PyArray_SIZE(array) == 0)) {
        PyErr_Format(PyExc_TypeError, "%s: expected an input of float32, float64, float16 or bfloat16, got %S%s",
                     r->module.name, (PyObject *)PyArray_DESCR(array),
                     PyTypeNum_ISINTEGER(PyArray_TYPE(array)) ? "; convert it with .astype(\"float32\")" : "");
        Py_DECREF(array);
        return -1;
    }
    /* A list has no dtype of its own: it takes the weight's, as it would in torch. */
    r->in = given && pc_dtype_get(in)->is_float ? in : wanted;
    r->compute = r->in == PC_F64 ? PC_F64 : wanted;
    r->out = r->compute == PC_F64 ? PC_F64 : r->in;
    r->call.compute = r->compute;
    int type = r->compute == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
    if (PyArray_TYPE(array) == type && PyArray_IS_C_CONTIGUOUS(array) && PyArray_ISALIGNED(array)) {
        r->x = array;
        return 0;
    }
    r->x = (PyArrayObject *)PyArray_FromArray(array, PyArray_DescrFromType(type),
                                              NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    return r->x != NULL ? 0 : -1;
}

/* A fresh result of the compute dtype. */
static PyArrayObject *new_result(const running *r, int ndim, const npy_intp *shape)
{
    return (PyArrayObject *)PyArray_SimpleNew(ndim, shape, r->compute == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32);
}

/* The result as the caller gets it: of the input's dtype when that is a short one. */
static PyObject *give_result(const running *r, PyArrayObject *y)
{
    if (r->out == r->compute || y == NULL)
        return (PyObject *)y;
    PyArray_Descr *descr = peftc_descr_of(r->state, r->out);
    PyObject *cast_y = descr != NULL ? PyArray_FromArray(y, descr, NPY_ARRAY_FORCECAST) : NULL;
    Py_DECREF(y);
    return cast_y;
}

static int wrong_width(const running *r, int64_t expected)
{
    PyObject *shape = PyArray_IntTupleFromIntp(PyArray_NDIM(r->x), PyArray_DIMS(r->x));
    if (shape != NULL)
        PyErr_Format(PyExc_ValueError, "%s: expected an input of shape (..., %lld), got %R", r->module.name,
                     (long long)expected, shape);
    Py_XDECREF(shape);
    return -1;
}

/* Rows of x, whose last axis must be `width`; -1 with an exception. */
static int64_t count_rows(const running *r, int64_t width)
{
    int ndim = PyArray_NDIM(r->x);
    if (ndim == 0 || PyArray_DIM(r->x, ndim - 1) != width)
        return wrong_width(r, width);
    return PyArray_MultiplyList(PyArray_DIMS(r->x), ndim - 1);
}

/* Does an active adapter change what the base operation gives? (Its saved copies and biases do not count.) */
static bool is_adapted(const pc_activation *activation, int32_t index)
{
    if (activation == NULL || !activation->enabled)
        return false;
    for (size_t i = 0; i < activation->count; i++) {
        const pc_slot *slot = pc_adapter_slot(activation->adapters[i], index);
        if (slot != NULL && slot->adapts)
            return true;
    }
    return false;
}

/* Base operation or adapted one, as the case may be. */
static pc_status run(running *r, const void *x, void *y, pc_error *err)
{
    if (r->activation != NULL)
        return pc_forward_keeping(&r->call, r->activation, x, y, r->learns ? &r->kept : NULL, err);
    pc_pool scratch;
    pc_pool_init(&scratch);
    pc_status status = pc_base_forward(&r->call, x, y, &scratch, err);
    pc_pool_free(&scratch);
    return status;
}

/* -------------------------------------------------------------------- linear */

/* Linear and Conv1D, then act in place or fused. */
static pc_status run_linear(running *r, pc_activation_fn act, const void *x, void *y, pc_error *err)
{
    const int64_t in = r->module.in_features, out = r->module.out_features;
    if (act == PC_ACT_NONE)
        return run(r, x, y, err);
    if (r->learns || is_adapted(r->activation, r->call.module_index)) {
        pc_status status = run(r, x, y, err);
        if (status == PC_OK)
            pc_activate(r->call.rt, r->compute, act, r->call.rows * out, y, y);
        return status;
    }
    pc_status (*product)(pc_runtime *, pc_dtype, int64_t, int64_t, int64_t, const void *, pc_dtype, const void *,
                         const void *, pc_activation_fn, void *, pc_error *) =
        r->module.kind == PC_CONV1D ? pc_linear_t : pc_linear;
    return product(r->call.rt, r->compute, r->call.rows, out, in, x, r->module.dtype, r->module.weight, r->module.bias,
                   act, y, err);
}

static PyObject *linear(PyObject *op, PyObject *x_obj, pc_activation_fn act)
{
    running r;
    if (begin(&r, cast(op), 1u << PC_LINEAR | 1u << PC_CONV1D) < 0)
        return NULL;
    const int64_t in = r.module.in_features, out = r.module.out_features;
    PyArrayObject *y = NULL, *z = NULL;
    if (take_input(&r, x_obj) < 0 || (r.call.rows = count_rows(&r, in)) < 0)
        return finish(&r, NULL);
    const bool records = peftc_records(&r);
    npy_intp shape[NPY_MAXDIMS];
    int ndim = PyArray_NDIM(r.x);
    memcpy(shape, PyArray_DIMS(r.x), (size_t)ndim * sizeof *shape);
    shape[ndim - 1] = (npy_intp)out;
    /* The way back through some activations starts from their input. */
    const bool keeps_input = records && act != PC_ACT_NONE && !pc_activation_saves_output(act);
    y = new_result(&r, ndim, shape);
    if (y != NULL && keeps_input && (z = new_result(&r, ndim, shape)) == NULL)
        Py_CLEAR(y);
    if (y == NULL)
        return finish(&r, NULL);
    pc_error err;
    const void *x = PyArray_DATA(r.x);
    void *data = PyArray_DATA(y), *before = z != NULL ? PyArray_DATA(z) : NULL;
    PyThreadState *saved = (double)r.call.rows * (double)in * (double)out >= WORTH_RELEASING ? PyEval_SaveThread() : NULL;
    pc_status status = run_linear(&r, keeps_input ? PC_ACT_NONE : act, x, keeps_input ? before : data, &err);
    if (status == PC_OK && keeps_input)
        pc_activate(r.call.rt, r.compute, act, r.call.rows * out, before, data);
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    if (status != PC_OK) {
        Py_DECREF(y);
        Py_XDECREF(z);
        return finish(&r, peftc_raise(r.state, &err));
    }
    PyObject *result = records ? peftc_record_layer(&r, act, y, z, give_result(&r, y)) : give_result(&r, y);
    Py_XDECREF(z);
    return finish(&r, result);
}

PyObject *peftc_linear_forward(PyObject *op, PyObject *x) { return linear(op, x, PC_ACT_NONE); }

PyObject *peftc_linear_forward_act(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "forward_act() takes x and act (%zd given)", nargs);
    pc_activation_fn act;
    return peftc_activation_from_name(args[1], &act) == 0 ? linear(op, args[0], act) : NULL;
}

/* ----------------------------------------------------------------------- norms */

/* residual as an array like r->x; NULL with an exception. */
static PyArrayObject *take_residual(const running *r, PyObject *obj)
{
    PyArrayObject *residual = (PyArrayObject *)PyArray_FROM_OTF(
        obj, r->compute == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    if (residual == NULL || PyArray_SAMESHAPE(residual, r->x))
        return residual;
    PyErr_Format(PyExc_ValueError, "%s: the residual and the input have different shapes", r->module.name);
    Py_DECREF(residual);
    return NULL;
}

static double effective_eps(const running *r, double eps)
{
    if (eps >= 0)
        return eps;
    return r->in == PC_F64 ? DBL_EPSILON : r->in == PC_F16 ? 0x1p-10 : r->in == PC_BF16 ? 0x1p-7 : (double)FLT_EPSILON;
}

PyObject *peftc_norm_forward(PyObject *op, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs < 1 || nargs > 2)
        return PyErr_Format(PyExc_TypeError, "forward() takes x and an optional residual (%zd given)", nargs);
    running r;
    if (begin(&r, cast(op), 1u << PC_LAYERNORM | 1u << PC_RMSNORM) < 0)
        return NULL;
    const int64_t width = r.module.out_features;
    if (take_input(&r, args[0]) < 0 || (r.call.rows = count_rows(&r, width)) < 0)
        return finish(&r, NULL);
    PyArrayObject *residual = NULL, *sum = NULL;
    if (nargs == 2 && args[1] != Py_None) {
        if ((peftc_recording() && peftc_input_node(r.state, args[1], &r.residual) < 0) ||
            (residual = take_residual(&r, args[1])) == NULL)
            return finish(&r, NULL);
    }
    const bool records = peftc_records(&r);
    PyArrayObject *y = new_result(&r, PyArray_NDIM(r.x), PyArray_DIMS(r.x));
    if (y != NULL && records && residual != NULL) { /* what is normalised is needed for the way back */
        sum = new_result(&r, PyArray_NDIM(r.x), PyArray_DIMS(r.x));
        if (sum == NULL)
            Py_CLEAR(y);
    }
    if (y == NULL) {
        Py_XDECREF(residual);
        return finish(&r, NULL);
    }
    void *sum_data = sum != NULL ? PyArray_DATA(sum) : NULL;
    const void *x = PyArray_DATA(r.x), *added = residual != NULL ? PyArray_DATA(residual) : NULL;
    void *data = PyArray_DATA(y);
    const double eps = effective_eps(&r, cast(op)->eps);
    PyThreadState *saved = r.call.rows * width >= WORTH_RELEASING ? PyEval_SaveThread() : NULL;
    if (sum_data != NULL) {
        pc_sum_two(r.call.rt, r.compute, r.call.rows * width, x, added, sum_data);
        x = sum_data;
        added = NULL;
    }
    if (r.module.kind == PC_LAYERNORM) {
        pc_layer_norm(r.call.rt, r.compute, r.call.rows, width, x, added, r.module.dtype, r.module.weight,
                      r.module.bias, eps, data);
    } else {
        if (added != NULL) {
            memcpy(data, x, (size_t)(r.call.rows * width) * pc_dtype_size(r.compute));
            pc_add(r.call.rt, r.compute, r.call.rows * width, added, 1.0, data);
            x = data;
        }
        pc_rms_norm(r.call.rt, r.compute, r.call.rows, width, x, r.module.dtype, r.module.weight, eps, data);
    }
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    Py_XDECREF(residual);
    PyObject *result = give_result(&r, y);
    if (records) {
        if (sum != NULL)
            Py_SETREF(r.x, (PyArrayObject *)Py_NewRef(sum));
        r.eps = eps;
        result = peftc_record_layer(&r, PC_ACT_NONE, NULL, NULL, result);
    }
    Py_XDECREF(sum);
    return finish(&r, result);
}

/* ---------------------------------------------------------------- convolution */

static int take_image(running *r, pc_conv_shape *s)
{
    int ndim = PyArray_NDIM(r->x);
    const npy_intp *dims = PyArray_DIMS(r->x);
    if ((ndim != 3 && ndim != 4) || dims[ndim - 3] != r->module.in_features) {
        PyObject *shape = PyArray_IntTupleFromIntp(ndim, dims);
        if (shape != NULL)
            PyErr_Format(PyExc_ValueError, "%s: expected an input of shape (batch, %lld, height, width), got %R",
                         r->module.name, (long long)r->module.in_features, shape);
        Py_XDECREF(shape);
        return -1;
    }
    *s = (pc_conv_shape){.batch = ndim == 4 ? dims[0] : 1,
                         .in_channels = dims[ndim - 3],
                         .height = dims[ndim - 2],
                         .width = dims[ndim - 1],
                         .out_channels = r->module.out_features,
                         .groups = r->module.groups};
    memcpy(s->kernel, r->module.kernel, sizeof s->kernel);
    memcpy(s->stride, r->module.stride, sizeof s->stride);
    memcpy(s->padding, r->module.padding, sizeof s->padding);
    memcpy(s->dilation, r->module.dilation, sizeof s->dilation);
    pc_error err;
    if (pc_conv_output(s, &err) != PC_OK) {
        peftc_raise(r->state, &err);
        return -1;
    }
    r->call.rows = s->batch;
    r->call.height = s->height;
    r->call.width = s->width;
    r->call.out_height = s->out_height;
    r->call.out_width = s->out_width;
    return 0;
}

PyObject *peftc_conv2d_forward(PyObject *op, PyObject *x_obj)
{
    running r;
    if (begin(&r, cast(op), 1u << PC_CONV2D) < 0)
        return NULL;
    pc_conv_shape s;
    if (take_input(&r, x_obj) < 0 || take_image(&r, &s) < 0)
        return finish(&r, NULL);
    npy_intp shape[4] = {(npy_intp)s.batch, (npy_intp)s.out_channels, (npy_intp)s.out_height, (npy_intp)s.out_width};
    int skip = PyArray_NDIM(r.x) == 4 ? 0 : 1;
    PyArrayObject *y = new_result(&r, 4 - skip, shape + skip);
    if (y == NULL)
        return finish(&r, NULL);
    pc_error err;
    const void *x = PyArray_DATA(r.x);
    void *data = PyArray_DATA(y);
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = run(&r, x, data, &err);
    Py_END_ALLOW_THREADS
    if (status != PC_OK) {
        Py_DECREF(y);
        return finish(&r, peftc_raise(r.state, &err));
    }
    if (peftc_records(&r))
        return finish(&r, peftc_record_layer(&r, PC_ACT_NONE, NULL, NULL, give_result(&r, y)));
    return finish(&r, give_result(&r, y));
}

/* ------------------------------------------------------------------ embedding */

/* Integer ids as contiguous int64, every one inside the table; NULL with an exception.  Always a copy: nobody can
 * change an id after the check. */
static PyArrayObject *take_ids(const running *r, PyObject *obj)
{
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_O(obj);
    if (array == NULL)
        return NULL;
    if (!PyTypeNum_ISINTEGER(PyArray_TYPE(array)) && !(PyArray_SIZE(array) == 0 && !PyArray_Check(obj))) {
        PyErr_Format(PyExc_TypeError, "%s: ids must be integers, got an array of %S", r->module.name,
                     (PyObject *)PyArray_DESCR(array));
        Py_DECREF(array);
        return NULL;
    }
    PyArrayObject *ids = (PyArrayObject *)PyArray_FromArray(array, PyArray_DescrFromType(NPY_INT64),
                                                            NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST |
                                                                NPY_ARRAY_ENSURECOPY);
    Py_DECREF(array);
    if (ids == NULL)
        return NULL;
    const int64_t *values = PyArray_DATA(ids);
    const int64_t rows = r->module.in_features, count = (int64_t)PyArray_SIZE(ids);
    for (int64_t i = 0; i < count; i++) {
        if (values[i] < 0 || values[i] >= rows) {
            PyErr_Format(PyExc_IndexError, "%s: id %lld is not in a table of %lld rows", r->module.name,
                         (long long)values[i], (long long)rows);
            Py_DECREF(ids);
            return NULL;
        }
    }
    return ids;
}

PyObject *peftc_embedding_forward(PyObject *op, PyObject *ids_obj)
{
    running r;
    if (begin(&r, cast(op), 1u << PC_EMBEDDING) < 0)
        return NULL;
    const int64_t dim = r.module.out_features;
    r.compute = r.in = r.out = r.call.compute = pc_compute_dtype(r.module.dtype);
    r.call.padding_idx = cast(op)->padding_idx;
    r.x = take_ids(&r, ids_obj);
    if (r.x == NULL)
        return finish(&r, NULL);
    int ndim = PyArray_NDIM(r.x);
    if (ndim >= NPY_MAXDIMS) {
        PyErr_Format(PyExc_ValueError, "%s: ids have too many dimensions", r.module.name);
        return finish(&r, NULL);
    }
    npy_intp shape[NPY_MAXDIMS];
    for (int d = 0; d < ndim; d++) /* of a single index there are no dimensions to copy, not even zero of them */
        shape[d] = PyArray_DIM(r.x, d);
    shape[ndim] = (npy_intp)dim;
    PyArrayObject *y = new_result(&r, ndim + 1, shape);
    if (y == NULL)
        return finish(&r, NULL);
    pc_error err;
    r.call.rows = (int64_t)PyArray_SIZE(r.x);
    const void *x = PyArray_DATA(r.x);
    void *data = PyArray_DATA(y);
    PyThreadState *saved = r.call.rows * dim >= WORTH_RELEASING ? PyEval_SaveThread() : NULL;
    pc_status status = run(&r, x, data, &err);
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    if (status != PC_OK) {
        Py_DECREF(y);
        return finish(&r, peftc_raise(r.state, &err));
    }
    if (peftc_records(&r))
        return finish(&r, peftc_record_layer(&r, PC_ACT_NONE, NULL, NULL, give_result(&r, y)));
    return finish(&r, give_result(&r, y));
}
