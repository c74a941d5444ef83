/* The layer types of peftc.nn: their arguments, first values and attributes. */
#include "layer.h"

#include <math.h>
#include <structmember.h>
#include <time.h>
#include <unistd.h>

#include "arrays.h"

static peftc_layer_object *cast(PyObject *op) { return (peftc_layer_object *)op; }

/* What a constructor needs to make its parameters. */
typedef struct maker {
    peftc_layer_object *self;
    peftc_state *state;
    pc_dtype dtype;
} maker;

static int start(PyObject *op, PyObject *dtype, pc_kind kind, maker *out)
{
    out->self = cast(op);
    out->state = peftc_state_of_type(Py_TYPE(op));
    out->dtype = dtype == NULL || dtype == Py_None ? PC_F32 : peftc_dtype_from_object(dtype);
    if (out->state == NULL || out->dtype == PC_DTYPE_NONE)
        return -1;
    if (!pc_dtype_get(out->dtype)->is_float) {
        PyErr_Format(PyExc_TypeError, "a layer's dtype is float32, float64, float16 or bfloat16, not %s",
                     pc_dtype_get(out->dtype)->name);
        return -1;
    }
    if (out->self->ready) {
        PyErr_Format(PyExc_RuntimeError, "%s is initialised already", peftc_layer_name(out->self));
        return -1;
    }
    out->self->core.kind = kind;
    out->self->core.dtype = out->dtype;
    return 0;
}

/* Parameters once dims are set; bias may be NULL for none. */
static int finish(const maker *m, const peftc_fill *weight, const peftc_fill *bias)
{
    peftc_layer_object *self = m->self;
    Py_CLEAR(self->weight); /* of an attempt that failed */
    Py_CLEAR(self->bias);
    self->core.has_weight = weight != NULL;
    self->core.has_bias = bias != NULL;
    npy_intp shape[4], bias_shape[1] = {(npy_intp)self->core.out_features};
    int ndim = peftc_layer_weight_shape(self, shape);
    if (weight != NULL) {
        self->weight = peftc_parameter_new(m->state, m->dtype, ndim, shape, weight);
        if (self->weight == NULL)
            return -1;
    }
    if (bias != NULL) {
        self->bias = peftc_parameter_new(m->state, m->dtype, 1, bias_shape, bias);
        if (self->bias == NULL)
            return -1;
    }
    self->ready = true;
    return 0;
}

static int check_positive(PyObject *op, const char *name, Py_ssize_t value, Py_ssize_t least)
{
    if (value >= least)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s: %s must be at least %zd, got %zd", peftc_layer_name(cast(op)), name, least,
                 value);
    return -1;
}

/* torch's default for linear and convolution: uniform in ±1/√fan_in, for weight and bias. */
static peftc_fill uniform_fill(const maker *m, double fan_in)
{
    double bound = fan_in > 0 ? 1.0 / sqrt(fan_in) : 0.0;
    return (peftc_fill){PEFTC_FILL_UNIFORM, -bound, bound, peftc_next_rng(m->state), -1};
}

static peftc_fill constant_fill(peftc_fill_kind kind) { return (peftc_fill){.kind = kind, .zero_row = -1}; }

/* ------------------------------------------------------------------ the types */

static int linear_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"in_features", "out_features", "bias", "dtype", NULL};
    Py_ssize_t in, out;
    int bias = 1;
    PyObject *dtype = NULL;
    maker m;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nn|pO:Linear", names, &in, &out, &bias, &dtype) ||
        check_positive(op, "in_features", in, 0) < 0 || check_positive(op, "out_features", out, 0) < 0 ||
        start(op, dtype, PC_LINEAR, &m) < 0)
        return -1;
    m.self->core.in_features = in;
    m.self->core.out_features = out;
    peftc_fill weight = uniform_fill(&m, (double)in), shift = uniform_fill(&m, (double)in);
    return finish(&m, &weight, bias ? &shift : NULL);
}

static int conv1d_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"nf", "nx", "dtype", NULL};
    Py_ssize_t in, out;
    PyObject *dtype = NULL;
    maker m;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nn|O:Conv1D", names, &out, &in, &dtype) ||
        check_positive(op, "nx", in, 0) < 0 || check_positive(op, "nf", out, 0) < 0 ||
        start(op, dtype, PC_CONV1D, &m) < 0)
        return -1;
    m.self->core.in_features = in;
    m.self->core.out_features = out;
    peftc_fill weight = {PEFTC_FILL_NORMAL, 0.0, 0.02, peftc_next_rng(m.state), -1};
    peftc_fill shift = constant_fill(PEFTC_FILL_ZEROS);
    return finish(&m, &weight, &shift);
}

/* An int for both axes or a pair (height, width). */
static int parse_pair(PyObject *obj, const char *name, int64_t least, int64_t pair[2])
{
    PyObject *items[2] = {obj, obj};
    if (PyTuple_Check(obj) || PyList_Check(obj)) {
        if (PySequence_Fast_GET_SIZE(obj) != 2) {
            PyErr_Format(PyExc_ValueError, "Conv2d: %s is an int or a pair (height, width), got %R", name, obj);
            return -1;
        }
        items[0] = PySequence_Fast_GET_ITEM(obj, 0);
        items[1] = PySequence_Fast_GET_ITEM(obj, 1);
    }
    for (int i = 0; i < 2; i++) {
        pair[i] = PyLong_AsLongLong(items[i]);
        if (pair[i] == -1 && PyErr_Occurred())
            return -1;
        if (pair[i] < least || pair[i] > INT32_MAX) {
            PyErr_Format(PyExc_ValueError, "Conv2d: %s must be at least %lld, got %R", name, (long long)least, obj);
            return -1;
        }
    }
    return 0;
}

static int parse_padding(PyObject *obj, pc_module *core)
{
    if (obj == NULL)
        return 0;
    if (!PyUnicode_Check(obj))
        return parse_pair(obj, "padding", 0, core->padding);
    if (PyUnicode_CompareWithASCIIString(obj, "valid") == 0)
        return 0;
    if (PyUnicode_CompareWithASCIIString(obj, "same") != 0) {
        PyErr_Format(PyExc_ValueError, "Conv2d: padding is an int, a pair, 'valid' or 'same', got %R", obj);
        return -1;
    }
    for (int i = 0; i < 2; i++) {
        int64_t total = core->dilation[i] * (core->kernel[i] - 1);
        if (core->stride[i] != 1 || total % 2 != 0) {
            PyErr_SetString(PyExc_ValueError, "Conv2d: padding='same' needs stride 1 and an odd kernel");
            return -1;
        }
        core->padding[i] = total / 2;
    }
    return 0;
}

static int conv2d_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
                            "groups",      "bias",         "dtype",       NULL};
    Py_ssize_t in, out, groups = 1;
    int bias = 1;
    PyObject *kernel, *stride = NULL, *padding = NULL, *dilation = NULL, *dtype = NULL;
    maker m;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nnO|OOOnpO:Conv2d", names, &in, &out, &kernel, &stride, &padding,
                                     &dilation, &groups, &bias, &dtype) ||
        check_positive(op, "in_channels", in, 1) < 0 || check_positive(op, "out_channels", out, 1) < 0 ||
        check_positive(op, "groups", groups, 1) < 0)
        return -1;
    pc_module shape = {0}; /* not the layer's own yet: reading the arguments can run any code */
    if (in % groups != 0 || out % groups != 0) {
        PyErr_Format(PyExc_ValueError, "Conv2d: in_channels (%zd) and out_channels (%zd) must be multiples of groups "
                                       "(%zd)", in, out, groups);
        return -1;
    }
    shape.stride[0] = shape.stride[1] = shape.dilation[0] = shape.dilation[1] = 1;
    if (parse_pair(kernel, "kernel_size", 1, shape.kernel) < 0 ||
        (stride != NULL && parse_pair(stride, "stride", 1, shape.stride) < 0) ||
        (dilation != NULL && parse_pair(dilation, "dilation", 1, shape.dilation) < 0) ||
        parse_padding(padding, &shape) < 0 || start(op, dtype, PC_CONV2D, &m) < 0)
        return -1;
    pc_module *core = &m.self->core;
    core->in_features = in;
    core->out_features = out;
    core->groups = groups;
    memcpy(core->kernel, shape.kernel, sizeof core->kernel);
    memcpy(core->stride, shape.stride, sizeof core->stride);
    memcpy(core->padding, shape.padding, sizeof core->padding);
    memcpy(core->dilation, shape.dilation, sizeof core->dilation);
    double fan_in = (double)(in / groups) * (double)core->kernel[0] * (double)core->kernel[1];
    peftc_fill weight = uniform_fill(&m, fan_in), shift = uniform_fill(&m, fan_in);
    return finish(&m, &weight, bias ? &shift : NULL);
}

static int embedding_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"num_embeddings", "embedding_dim", "padding_idx", "dtype", NULL};
    Py_ssize_t rows, dim;
    PyObject *padding = Py_None, *dtype = NULL;
    maker m;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "nn|OO:Embedding", names, &rows, &dim, &padding, &dtype) ||
        check_positive(op, "num_embeddings", rows, 0) < 0 || check_positive(op, "embedding_dim", dim, 0) < 0)
        return -1;
    Py_ssize_t index = -1;
    if (padding != Py_None) {
        index = PyNumber_AsSsize_t(padding, PyExc_ValueError);
        if (index == -1 && PyErr_Occurred())
            return -1;
        if (index < -rows || index >= rows) {
            PyErr_Format(PyExc_ValueError, "Embedding: padding_idx %zd is not within its %zd rows", index, rows);
            return -1;
        }
        index = index < 0 ? index + rows : index;
    }
    if (start(op, dtype, PC_EMBEDDING, &m) < 0)
        return -1;
    m.self->core.in_features = rows;
    m.self->core.out_features = dim;
    m.self->padding_idx = index;
    peftc_fill weight = {PEFTC_FILL_NORMAL, 0.0, 1.0, peftc_next_rng(m.state), index};
    return finish(&m, &weight, NULL);
}

/* The one extent of normalized_shape. */
static int parse_normalized(PyObject *obj, Py_ssize_t *out)
{
    if (PyTuple_Check(obj) || PyList_Check(obj)) {
        if (PySequence_Fast_GET_SIZE(obj) != 1) {
            PyErr_Format(PyExc_ValueError, "normalized_shape: only the last axis can be normalised, got %R", obj);
            return -1;
        }
        obj = PySequence_Fast_GET_ITEM(obj, 0);
    }
    *out = PyNumber_AsSsize_t(obj, PyExc_ValueError);
    if (*out == -1 && PyErr_Occurred())
        return -1;
    if (*out < 1) {
        PyErr_Format(PyExc_ValueError, "normalized_shape must be at least 1, got %zd", *out);
        return -1;
    }
    return 0;
}

static int layernorm_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"normalized_shape", "eps", "elementwise_affine", "bias", "dtype", NULL};
    PyObject *normalized, *dtype = NULL;
    double eps = 1e-5;
    int affine = 1, bias = 1;
    Py_ssize_t dim;
    maker m;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|dppO:LayerNorm", names, &normalized, &eps, &affine, &bias,
                                     &dtype) ||
        parse_normalized(normalized, &dim) < 0 || start(op, dtype, PC_LAYERNORM, &m) < 0)
        return -1;
    m.self->core.in_features = m.self->core.out_features = dim;
    m.self->eps = eps;
    peftc_fill weight = constant_fill(PEFTC_FILL_ONES), shift = constant_fill(PEFTC_FILL_ZEROS);
    return finish(&m, affine ? &weight : NULL, affine && bias ? &shift : NULL);
}

static int rmsnorm_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"normalized_shape", "eps", "elementwise_affine", "dtype", NULL};
    PyObject *normalized, *eps = Py_None, *dtype = NULL;
    int affine = 1;
    Py_ssize_t dim;
    maker m;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OpO:RMSNorm", names, &normalized, &eps, &affine, &dtype) ||
        parse_normalized(normalized, &dim) < 0)
        return -1;
    double least = eps != Py_None ? PyFloat_AsDouble(eps) : -1.0; /* negative: of the input's dtype */
    if ((least == -1.0 && PyErr_Occurred()) || start(op, dtype, PC_RMSNORM, &m) < 0)
        return -1;
    m.self->core.in_features = m.self->core.out_features = dim;
    m.self->eps = least;
    peftc_fill weight = constant_fill(PEFTC_FILL_ONES);
    return finish(&m, affine ? &weight : NULL, NULL);
}

/* ---------------------------------------------------------------- attributes */

static PyObject *pair(const int64_t values[2]) { return Py_BuildValue("(LL)", (long long)values[0], (long long)values[1]); }

#define PAIR(name, field)                                                                                              \
    static PyObject *get_##name(PyObject *op, void *unused)                                                            \
    {                                                                                                                  \
        (void)unused;                                                                                                  \
        return pair(cast(op)->core.field);                                                                             \
    }
PAIR(kernel_size, kernel)
PAIR(stride, stride)
PAIR(padding, padding)
PAIR(dilation, dilation)
#undef PAIR

static PyObject *get_normalized_shape(PyObject *op, void *unused)
{
    (void)unused;
    return Py_BuildValue("(L)", (long long)cast(op)->core.out_features);
}

static PyObject *get_eps(PyObject *op, void *unused)
{
    (void)unused;
    if (cast(op)->eps < 0)
        Py_RETURN_NONE;
    return PyFloat_FromDouble(cast(op)->eps);
}

static PyObject *get_padding_idx(PyObject *op, void *unused)
{
    (void)unused;
    if (cast(op)->padding_idx < 0)
        Py_RETURN_NONE;
    return PyLong_FromLongLong(cast(op)->padding_idx);
}

#define CORE(field) offsetof(peftc_layer_object, core.field)

static PyMemberDef linear_members[] = {
    {"in_features", T_LONGLONG, CORE(in_features), READONLY, "Width of the input."},
    {"out_features", T_LONGLONG, CORE(out_features), READONLY, "Width of the output."},
    {NULL, 0, 0, 0, NULL},
};
static PyMemberDef conv1d_members[] = {
    {"nx", T_LONGLONG, CORE(in_features), READONLY, "Width of the input."},
    {"nf", T_LONGLONG, CORE(out_features), READONLY, "Width of the output."},
    {NULL, 0, 0, 0, NULL},
};
static PyMemberDef conv2d_members[] = {
    {"in_channels", T_LONGLONG, CORE(in_features), READONLY, "Channels of the input."},
    {"out_channels", T_LONGLONG, CORE(out_features), READONLY, "Channels of the output."},
    {"groups", T_LONGLONG, CORE(groups), READONLY, "Groups of channels that do not mix."},
    {NULL, 0, 0, 0, NULL},
};
static PyGetSetDef conv2d_getset[] = {
    {"kernel_size", get_kernel_size, NULL, "(height, width)", NULL},
    {"stride", get_stride, NULL, "(height, width)", NULL},
    {"padding", get_padding, NULL, "(height, width)", NULL},
    {"dilation", get_dilation, NULL, "(height, width)", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMemberDef embedding_members[] = {
    {"num_embeddings", T_LONGLONG, CORE(in_features), READONLY, "Rows of the table."},
    {"embedding_dim", T_LONGLONG, CORE(out_features), READONLY, "Width of a row."},
    {NULL, 0, 0, 0, NULL},
};
static PyGetSetDef embedding_getset[] = {
    {"padding_idx", get_padding_idx, NULL, "The row that starts as zeros, or None.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyGetSetDef norm_getset[] = {
    {"normalized_shape", get_normalized_shape, NULL, "(width,)", NULL},
    {"eps", get_eps, NULL, "Added to the variance; None means the input dtype's.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

PyDoc_STRVAR(linear_forward_doc,
             "forward($self, x, /)\n--\n\n"
             "x (..., in) -> (..., out): x times the weight, plus the bias, plus what active adapters add.\n\n"
             "x is float32, float64 or float16 (a list becomes the weight's dtype); the result has x's dtype, or float64 "
             "when the weight is float64. Raises TypeError for other dtypes, ValueError for a wrong last axis.");
PyDoc_STRVAR(linear_forward_act_doc,
             "forward_act($self, x, act, /)\n--\n\n"
             "act(forward(x)), in one pass where no adapter comes in between. act is 'gelu', 'gelu_tanh', 'relu', 'silu' "
             "or 'tanh'.");
PyDoc_STRVAR(norm_forward_doc,
             "forward($self, x, residual=None, /)\n--\n\n"
             "x (..., width) normalised over the last axis; residual, of x's shape, is added first.");
PyDoc_STRVAR(conv2d_forward_doc, "forward($self, x, /)\n--\n\nx (batch, in, height, width), or without batch.");
PyDoc_STRVAR(embedding_forward_doc,
             "forward($self, ids, /)\n--\n\n"
             "Integer ids of any shape -> (..., dim), float32, or float64 for such a table. IndexError names an id that "
             "is not in the table.");

static PyMethodDef linear_methods[] = {
    {"forward", peftc_linear_forward, METH_O, linear_forward_doc},
    {"forward_act", FASTCALL(peftc_linear_forward_act), METH_FASTCALL, linear_forward_act_doc},
    {NULL, NULL, 0, NULL},
};
static PyMethodDef norm_methods[] = {
    {"forward", FASTCALL(peftc_norm_forward), METH_FASTCALL, norm_forward_doc},
    {NULL, NULL, 0, NULL},
};
static PyMethodDef conv2d_methods[] = {
    {"forward", peftc_conv2d_forward, METH_O, conv2d_forward_doc},
    {NULL, NULL, 0, NULL},
};
static PyMethodDef embedding_methods[] = {
    {"forward", peftc_embedding_forward, METH_O, embedding_forward_doc},
    {NULL, NULL, 0, NULL},
};

#define LAYER_TYPE(lower, Name, arguments, members_slot, getset_slot, methods)                                         \
    static PyType_Slot lower##_slots[] = {                                                                             \
        {Py_tp_doc, (void *)(#Name "(" arguments ")\n--\n\nThe C half of peftc.nn." #Name ".")},                       \
        {Py_tp_init, lower##_init},                                                                                    \
        {Py_tp_methods, methods},                                                                                      \
        members_slot getset_slot {0, NULL},                                                                            \
    };                                                                                                                 \
    static PyType_Spec lower##_spec = {                                                                                \
        .name = "peftc._core." #Name,                                                                                  \
        .basicsize = sizeof(peftc_layer_object),                                                                       \
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_IMMUTABLETYPE,                                  \
        .slots = lower##_slots,                                                                                        \
    }
#define MEMBERS(table) {Py_tp_members, table},
#define GETSET(table) {Py_tp_getset, table},
#define NOTHING

LAYER_TYPE(linear, Linear,
           "in_features, out_features, bias=True, dtype=None",
           MEMBERS(linear_members), NOTHING, linear_methods);
LAYER_TYPE(conv1d, Conv1D, "nf, nx, dtype=None", MEMBERS(conv1d_members), NOTHING, linear_methods);
LAYER_TYPE(conv2d, Conv2d,
           "in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, dtype=None",
           MEMBERS(conv2d_members), GETSET(conv2d_getset), conv2d_methods);
LAYER_TYPE(embedding, Embedding,
           "num_embeddings, embedding_dim, padding_idx=None, dtype=None",
           MEMBERS(embedding_members), GETSET(embedding_getset), embedding_methods);
LAYER_TYPE(layernorm, LayerNorm,
           "normalized_shape, eps=1e-05, elementwise_affine=True, bias=True, dtype=None",
           NOTHING, GETSET(norm_getset), norm_methods);
LAYER_TYPE(rmsnorm, RMSNorm,
           "normalized_shape, eps=None, elementwise_affine=True, dtype=None",
           NOTHING, GETSET(norm_getset), norm_methods);

/* -------------------------------------------------------------- random numbers */

/* A training that draws from a sequence of its own is not disturbed by what other threads draw meanwhile. */
static _Thread_local struct {
    bool set;
    uint64_t seed, next_stream;
} own;

pc_rng peftc_next_rng(peftc_state *state)
{
    if (own.set)
        return (pc_rng){.seed = own.seed, .stream = own.next_stream++};
    return (pc_rng){.seed = state->seed, .stream = state->next_stream++};
}

static PyObject *thread_seed(PyObject *module, PyObject *arg)
{
    (void)module;
    if (arg == Py_None) {
        own.set = false;
        Py_RETURN_NONE;
    }
    unsigned long long seed = PyLong_AsUnsignedLongLongMask(arg);
    if (PyErr_Occurred())
        return NULL;
    own.set = true;
    own.seed = seed;
    own.next_stream = 0;
    Py_RETURN_NONE;
}

static PyObject *manual_seed(PyObject *module, PyObject *arg)
{
    unsigned long long seed = PyLong_AsUnsignedLongLongMask(arg);
    if (PyErr_Occurred())
        return NULL;
    peftc_state *state = peftc_get_state(module);
    state->seed = seed;
    state->next_stream = 0;
    Py_RETURN_NONE;
}

static PyMethodDef random_functions[] = {
    {"manual_seed", manual_seed, METH_O,
     "manual_seed(seed, /)\n--\n\nStart the generator that fresh weights and dropout draw from, modulo 2**64. Until "
     "then it starts from the system's entropy."},
    {"thread_seed", thread_seed, METH_O,
     "thread_seed(seed, /)\n--\n\nLet this thread draw from a generator of its own, modulo 2**64; None: from the "
     "process's again."},
    {NULL, NULL, 0, NULL},
};

int peftc_add_layers(PyObject *module, peftc_state *state)
{
    if (getentropy(&state->seed, sizeof state->seed) != 0)
        state->seed = (uint64_t)time(NULL);
    static PyType_Spec *const specs[] = {&linear_spec,    &conv1d_spec,    &conv2d_spec,
                                         &embedding_spec, &layernorm_spec, &rmsnorm_spec};
    if (peftc_add_parameter(module, state) < 0 || peftc_add_module_type(module, state) < 0 ||
        peftc_add_layer_base(module, state) < 0 || PyModule_AddFunctions(module, random_functions) < 0 ||
        peftc_add_layout(module) < 0)
        return -1;
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        PyObject *type = PyType_FromModuleAndSpec(module, specs[i], (PyObject *)state->layer_type);
        if (type == NULL)
            return -1;
        int result = PyModule_AddType(module, (PyTypeObject *)type);
        Py_DECREF(type);
        if (result < 0)
            return -1;
    }
    return 0;
}
