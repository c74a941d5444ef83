/* IA³ on torch: the product of rows with a learned vector as a node of autograd, and the forward passes that lead to it, as
 * py_torch_node.c and py_torch_forward.c have them for low-rank sums. */
#include "py_torch_layer.h"
#include "py_torch_operand.h"
#include "py_torch_pieces.h"
#include "py_torch_watch.h"

#include "../kernels/scale.h"

/* Elements below which a call takes less time than giving up the GIL is worth. */
#define WORTH_RELEASING 65536

/* Rows and what they are multiplied with. */
typedef struct scaled {
    operand rows, vector;
} scaled;

/* False, without an exception, for what the kernels do not take: a vector is (n), (1, n) or (n, 1), of the rows' dtype or of
 * float32 where that has 16 bits. */
static bool scaled_take(peftc_state *state, PyObject *x, PyObject *vector, int64_t width, scaled *out)
{
    pc_dtype dtype = PC_DTYPE_NONE, other = PC_DTYPE_NONE;
    if (!operand_take(state, x, &dtype, &out->rows) || !operand_take(state, vector, &other, &out->vector))
        return false;
    const peftc_rows *v = &out->vector.rows;
    bool line = out->vector.ndim <= 2 && out->vector.packed && (v->rows == 1 || v->cols == 1);
    bool half = dtype == PC_F16 || dtype == PC_BF16;
    return line && v->rows * v->cols == (width >= 0 ? width : out->rows.rows.cols) &&
           (other == dtype || (half && other == PC_F32));
}

static bool is_large(const operand *x) { return x->rows.rows * x->rows.cols >= WORTH_RELEASING; }

/* out = x ∘ vector; out may be x. False for what the kernels do not take. */
static bool scale_into(peftc_state *state, PyObject *x, PyObject *vector, PyObject *out)
{
    scaled in;
    operand to;
    pc_dtype dtype = PC_DTYPE_NONE;
    if (!scaled_take(state, x, vector, -1, &in) || !operand_take(state, out, &dtype, &to) || dtype != in.rows.dtype ||
        to.rows.rows != in.rows.rows.rows || to.rows.cols != in.rows.rows.cols || !operand_writable(&to))
        return false;
    pc_runtime *rt = is_large(&to) ? peftc_torch_runtime(state) : NULL;
    PyThreadState *saved = is_large(&to) ? PyEval_SaveThread() : NULL;
    pc_rows_scale(rt, dtype, to.rows.rows, to.rows.cols, in.rows.rows.data, in.rows.rows.stride, in.vector.dtype,
                  in.vector.rows.data, to.rows.data, to.rows.stride);
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    return true;
}

/* ------------------------------------------------------------------ the node */

/* Names, and what `scale_node` is given. */
enum node_piece {
    TO_SAVE = MODULE + 1,
    SAVED,
    NEEDS,
    CONTIGUOUS,
    NODE_GIVEN, /* objects from here on */
    NODE_WATCH = NODE_GIVEN,
    NODE_GRAD_ENABLED, /* torch.is_grad_enabled */
    NODE_LINEAR,       /* torch.nn.functional.linear */
    MATMUL,            /* torch.matmul */
    NODE_EMPTY_LIKE,   /* torch.empty_like */
    PRODUCT,           /* (x, vector) → x ∘ vector, for what the kernels do not take */
    DERIVATIVES,       /* (ctx, grad) → (dx, dvector, None, None), likewise */
    NODE_COUNT,
};

static const char *const node_names[NODE_GIVEN - 1] = {"to_save", "saved_tensors", "needs_input_grad", "contiguous"};

#define OWN(self, i) PyTuple_GET_ITEM(self, i)

/* The arguments of the node, and what its backward pass answers. */
enum { X, VECTOR, BY, ADDED, INPUTS };

PyDoc_STRVAR(forward_doc,
             "forward(ctx, x, vector, weight, bias, /)\n--\n\n"
             "x * vector.flatten(), or (x * vector.flatten()) @ weight.T + bias if there is a weight.\n\n"
             "ctx keeps x, vector and weight.");

static PyObject *node_forward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 1 + INPUTS) {
        PyErr_Format(PyExc_TypeError, "forward() takes ctx and %d inputs, got %zd arguments", INPUTS, nargs);
        return NULL;
    }
    PyObject *ctx = args[0], *const *in = args + 1;
    PyObject *out = PyObject_CallOneArg(OWN(self, NODE_EMPTY_LIKE), in[X]);
    if (out != NULL && !scale_into(peftc_get_state(OWN(self, MODULE)), in[X], in[VECTOR], out)) {
        PyObject *arguments[] = {in[X], in[VECTOR]};
        Py_SETREF(out, PyObject_Vectorcall(OWN(self, PRODUCT), arguments, 2, NULL));
    }
    if (out != NULL && in[BY] != Py_None) {
        PyObject *arguments[] = {out, in[BY], in[ADDED]};
        Py_SETREF(out, PyObject_Vectorcall(OWN(self, NODE_LINEAR), arguments, 3, NULL));
    }
    PyObject *saved = out != NULL ? PyTuple_Pack(3, in[X], in[VECTOR], in[BY]) : NULL;
    if (saved == NULL || PyObject_SetAttr(ctx, OWN(self, TO_SAVE), saved) != 0) /* what ctx.save_for_backward does */
        Py_CLEAR(out);
    Py_XDECREF(saved);
    return out;
}

/* dx = grad ∘ vector, which may be grad, and dvector = Σ over rows of grad ∘ x; each None when not wanted.
 * 1, 0 for what the kernels do not take, -1 with an exception. */
static int scale_back(peftc_state *state, PyObject *grad, PyObject *x, PyObject *vector, PyObject *dx, PyObject *dvector)
{
    scaled in;
    operand to = {.dtype = PC_DTYPE_NONE}, sums, g;
    pc_dtype dtype = PC_DTYPE_NONE, other;
    if (!scaled_take(state, x, vector, -1, &in) || !operand_take(state, grad, &dtype, &g) || dtype != in.rows.dtype ||
        g.rows.rows != in.rows.rows.rows || g.rows.cols != in.rows.rows.cols)
        return 0;
    other = in.vector.dtype;
    if (dx != Py_None && (!operand_take(state, dx, &dtype, &to) || to.rows.rows != g.rows.rows ||
                          to.rows.cols != g.rows.cols || !operand_writable(&to)))
        return 0;
    if (dvector != Py_None && (!operand_take(state, dvector, &other, &sums) || !sums.packed))
        return 0;
    pc_error err;
    pc_runtime *rt = is_large(&g) ? peftc_torch_runtime(state) : NULL;
    PyThreadState *saved = is_large(&g) ? PyEval_SaveThread() : NULL;
    pc_status status = pc_rows_scale_back(rt, dtype, g.rows.rows, g.rows.cols, g.rows.data, g.rows.stride, in.rows.rows.data,
                                          in.rows.rows.stride, other, in.vector.rows.data,
                                          dx != Py_None ? to.rows.data : NULL, dx != Py_None ? to.rows.stride : 0,
                                          dvector != Py_None ? sums.rows.data : NULL, &err);
    if (saved != NULL)
        PyEval_RestoreThread(saved);
    if (status == PC_OK)
        return 1;
    peftc_raise(state, &err);
    return -1;
}

/* A tensor like `of` to be written to if it is needed, else None; NULL with an exception. */
static PyObject *room_for(PyObject *self, PyObject *needs, int input, PyObject *of)
{
    return PyTuple_GET_ITEM(needs, input) == Py_True ? PyObject_CallOneArg(OWN(self, NODE_EMPTY_LIKE), of)
                                                     : Py_NewRef(Py_None);
}

/* The derivatives in C, a new tuple; NULL without an exception for what the kernels do not take. */
static PyObject *derivatives(PyObject *self, PyObject *saved, PyObject *needs, PyObject *grad)
{
    PyObject *x, *vector, *weight, *dx = NULL, *dvector = NULL, *result = NULL;
    if (!PyArg_ParseTuple(saved, "OOO", &x, &vector, &weight))
        return NULL;
    if (!PyTuple_Check(needs) || PyTuple_GET_SIZE(needs) != INPUTS) {
        PyErr_Format(PyExc_TypeError, "needs_input_grad must be a tuple of %d", INPUTS);
        return NULL;
    }
    PyObject *through = PyObject_CallMethodNoArgs(grad, OWN(self, CONTIGUOUS));
    if (through != NULL && weight != Py_None) { /* nobody else's, so that it is overwritten */
        PyObject *arguments[] = {through, weight};
        Py_SETREF(through, PyObject_Vectorcall(OWN(self, MATMUL), arguments, 2, NULL));
        dx = Py_XNewRef(PyTuple_GET_ITEM(needs, X) == Py_True ? through : Py_None);
    } else if (through != NULL) {
        dx = room_for(self, needs, X, x);
    }
    if (through != NULL && dx != NULL)
        dvector = room_for(self, needs, VECTOR, vector);
    if (dvector != NULL && scale_back(peftc_get_state(OWN(self, MODULE)), through, x, vector, dx, dvector) == 1)
        result = PyTuple_Pack(INPUTS, dx, dvector, Py_None, Py_None);
    Py_XDECREF(through);
    Py_XDECREF(dx);
    Py_XDECREF(dvector);
    return result;
}

PyDoc_STRVAR(backward_doc,
             "backward(ctx, grad, /)\n--\n\n"
             "(dx, dvector, None, None), None too for what ctx.needs_input_grad does not ask for.");

static PyObject *node_backward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2) {
        PyErr_Format(PyExc_TypeError, "backward() takes ctx and a gradient, got %zd arguments", nargs);
        return NULL;
    }
    bool failed = false;
    PyObject *result = NULL, *enabled = PyObject_CallNoArgs(OWN(self, NODE_GRAD_ENABLED));
    /* With gradients of gradients, autograd has to see every operation. */
    if (enabled == Py_False && peftc_nobody_watches(OWN(self, NODE_WATCH), &failed)) {
        PyObject *saved = PyObject_GetAttr(args[0], OWN(self, SAVED));
        PyObject *needs = saved != NULL ? PyObject_GetAttr(args[0], OWN(self, NEEDS)) : NULL;
        if (needs != NULL)
            result = derivatives(self, saved, needs, args[1]);
        Py_XDECREF(saved);
        Py_XDECREF(needs);
    }
    Py_XDECREF(enabled);
    if (result == NULL && !PyErr_Occurred())
        result = PyObject_Vectorcall(OWN(self, DERIVATIVES), args, 2, NULL);
    return result;
}

static PyMethodDef forward_def = {"forward", (PyCFunction)(void (*)(void))node_forward, METH_FASTCALL, forward_doc};
static PyMethodDef backward_def = {"backward", (PyCFunction)(void (*)(void))node_backward, METH_FASTCALL, backward_doc};

PyDoc_STRVAR(scale_node_doc,
             "scale_node(watch, grad_enabled, linear, matmul, empty_like, product, derivatives, /)\n--\n\n"
             "(forward, backward) of the torch.autograd.Function that is the product of rows with a vector.\n\n"
             "What they need of torch is given to them: who may watch the operations (see lowrank_adder); functions of these\n"
             "names of torch. What the kernels do not take is asked of product(x, vector) and of derivatives(ctx, grad).");

static PyObject *scale_node(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != NODE_COUNT - NODE_GIVEN || !peftc_watch_check(args[NODE_WATCH - NODE_GIVEN])) {
        PyErr_SetString(PyExc_TypeError, "scale_node() takes a tuple that says who watches, and six functions");
        return NULL;
    }
    static PyMethodDef *const made[] = {&forward_def, &backward_def, NULL};
    return peftc_pieces_functions(module, node_names, NODE_GIVEN - 1, args, NODE_COUNT - NODE_GIVEN, made);
}

/* ------------------------------------------------------------- forward passes */

/* Names, and what `scale_adder` is given. */
enum piece {
    VECTORS = LAYER_PIECES,
    FEEDFORWARD,
    GIVEN,         /* objects from here on */
    FRESH = GIVEN, /* the class of base layers whose output is nobody else's: nn.Linear */
    WATCH,         /* see py_torch_watch.h */
    GRAD_ENABLED,  /* torch.is_grad_enabled */
    EMPTY_LIKE,    /* torch.empty_like */
    LINEAR,        /* torch.nn.functional.linear */
    RECORD,        /* (x, vector, weight, bias) → what the node's forward says, which autograd knows of */
    COUNT,
};

static const char *const names[GIVEN - 1] = {LAYER_NAMES, "ia3_l", "_feedforward"};

/* Of the adapters in `live` that the layer has and that scale its input, if `before`, or its output: their number, and the
 * vector of the last one, borrowed. */
static int vectors_of(call *c, PyObject *layer, PyObject *live, bool before, PyObject **vector)
{
    int count = 0;
    PyObject *inputs = layer_own(c, layer, FEEDFORWARD);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(live); i++) {
        PyObject *name = PyTuple_GET_ITEM(live, i), *found = layer_parameter(c, layer, VECTORS, name);
        if (found != NULL && (layer_item(c, inputs, name) == Py_True) == before) {
            *vector = found;
            count++;
        }
    }
    return count;
}

static bool needs_grad(call *c, PyObject *const *of, int count)
{
    if (!layer_grad_enabled(c, PIECE(c, GRAD_ENABLED)))
        return false;
    for (int i = 0; i < count && !c->failed; i++)
        if (of[i] != Py_None && layer_is_true(c, of[i], REQUIRES_GRAD))
            return true;
    return false;
}

/* x ∘ vector, a new reference: in x itself if it is `ours`. NULL without an exception for what the kernels do not take. */
static PyObject *product(call *c, PyObject *x, PyObject *vector, bool ours)
{
    PyObject *out = ours ? Py_NewRef(x) : PyObject_CallOneArg(PIECE(c, EMPTY_LIKE), x);
    c->failed = c->failed || out == NULL;
    if (out != NULL && !scale_into(c->state, x, vector, out))
        Py_CLEAR(out);
    return out;
}

static PyObject *record(call *c, PyObject *x, PyObject *vector, PyObject *weight, PyObject *bias)
{
    PyObject *arguments[] = {x, vector, weight, bias};
    PyObject *result = PyObject_Vectorcall(PIECE(c, RECORD), arguments, 4, NULL);
    c->failed = c->failed || result == NULL;
    return result;
}

static PyObject *linear(call *c, PyObject *x, PyObject *weight, PyObject *bias)
{
    PyObject *arguments[] = {x, weight, bias};
    PyObject *result = PyObject_Vectorcall(PIECE(c, LINEAR), arguments, 3, NULL);
    c->failed = c->failed || result == NULL;
    return result;
}

/* The base layer and the one adapter's vector; everything is held by the caller. */
static PyObject *linear_and_vector(call *c, PyObject *x, PyObject *vector, PyObject *weight, PyObject *bias, bool before)
{
    PyObject *of[] = {weight, bias, x, vector}, *part = NULL, *result = NULL;
    peftc_tensor tensor;
    scaled in;
    int64_t width = peftc_read_tensor(c->state, weight, &tensor) ? tensor.shape[before ? 1 : 0] : -1;
    if (width < 0 || !scaled_take(c->state, x, vector, width, &in))
        return NULL;
    bool grad = needs_grad(c, of, 4);
    if (c->failed)
        return NULL;
    if (!before) {
        part = linear(c, x, weight, bias); /* autograd knows of it, if it has to */
        if (part != NULL)
            result = grad ? record(c, part, vector, Py_None, Py_None) : product(c, part, vector, true);
    } else if (!grad) {
        part = product(c, x, vector, false);
        if (part != NULL)
            result = linear(c, part, weight, bias);
    } else if (!layer_is_trained(c, weight, bias) && !c->failed) { /* a base layer that is trained, too, is autograd's */
        result = record(c, x, vector, weight, bias);
    }
    Py_XDECREF(part);
    return result;
}

PyDoc_STRVAR(scaled_linear_doc,
             "scaled_linear(layer, x, live, /)\n--\n\n"
             "The output of the layer's nn.Linear for x (..., in), which the vector of the one IA3 adapter in the tuple `live` that\n"
             "the layer has scales, or the input of which it scales: (..., out_features).\n\n"
             "Returns None, with nothing done, where this is not the plain case: none or several of the adapters, somebody who\n"
             "watches the operations, a base layer of another class, with hooks or with a forward of its own, tensors that the\n"
             "kernels do not take. Raises MemoryError.");

static PyObject *scaled_linear(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3 || !PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "scaled_linear() takes a layer, x, and a tuple of names");
        return NULL;
    }
    call c = {.self = self, .state = peftc_get_state(PyTuple_GET_ITEM(self, MODULE))};
    PyObject *vector = NULL, *weight, *bias, *result = NULL;
    int after = vectors_of(&c, args[0], args[2], false, &vector), before = vectors_of(&c, args[0], args[2], true, &vector);
    PyObject *base = after + before == 1 ? layer_fresh_base(&c, args[0], PIECE(&c, FRESH)) : NULL;
    Py_XINCREF(vector); /* held, because calls of torch let other threads run */
    if (base != NULL && peftc_nobody_watches(PIECE(&c, WATCH), &c.failed) && layer_linear(&c, base, args[1], &weight, &bias)) {
        result = linear_and_vector(&c, args[1], vector, weight, bias, before == 1);
        Py_DECREF(weight);
        Py_DECREF(bias);
    }
    Py_XDECREF(vector);
    return layer_answer(&c, result);
}

PyDoc_STRVAR(scale_rows_doc,
             "scale_rows(layer, x, live, before, /)\n--\n\n"
             "x (..., n) times the vector of the IA3 adapter in the tuple `live` that the layer has: of those that scale its input, if\n"
             "`before` is true, or else its output. x itself if there is none.\n\n"
             "Returns None, with nothing done, where this is not the plain case: several of the adapters, somebody who watches\n"
             "the operations, tensors that the kernels do not take. Raises MemoryError.");

static PyObject *scale_rows(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    int before = nargs == 4 && PyTuple_Check(args[2]) ? PyObject_IsTrue(args[3]) : 0;
    if (before < 0)
        return NULL;
    if (nargs != 4 || !PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "scale_rows() takes a layer, x, a tuple of names, and a truth value");
        return NULL;
    }
    call c = {.self = self, .state = peftc_get_state(PyTuple_GET_ITEM(self, MODULE))};
    PyObject *vector = NULL, *result = NULL;
    int count = vectors_of(&c, args[0], args[2], before == 1, &vector);
    Py_XINCREF(vector);
    PyObject *of[] = {args[1], vector};
    scaled in;
    if (count == 0 && !c.failed) {
        result = Py_NewRef(args[1]);
    } else if (count == 1 && peftc_nobody_watches(PIECE(&c, WATCH), &c.failed) &&
               scaled_take(c.state, args[1], vector, -1, &in)) {
        result = needs_grad(&c, of, 2) ? record(&c, args[1], vector, Py_None, Py_None)
                 : !c.failed           ? product(&c, args[1], vector, false)
                                       : NULL;
    }
    Py_XDECREF(vector);
    return layer_answer(&c, result);
}

static PyMethodDef scaled_linear_def = {"scaled_linear", (PyCFunction)(void (*)(void))scaled_linear, METH_FASTCALL,
                                        scaled_linear_doc};
static PyMethodDef scale_rows_def = {"scale_rows", (PyCFunction)(void (*)(void))scale_rows, METH_FASTCALL, scale_rows_doc};

PyDoc_STRVAR(scale_adder_doc,
             "scale_adder(fresh, watch, grad_enabled, empty_like, linear, record, /)\n--\n\n"
             "The functions scaled_linear(layer, x, live, /) and scale_rows(layer, x, live, before, /) for IA3's layers.\n\n"
             "What they need of torch is given to them: nn.Linear; who may watch the operations (see lowrank_adder);\n"
             "torch.is_grad_enabled, torch.empty_like, torch.nn.functional.linear; a function (x, vector, weight, bias) that computes\n"
             "x * vector.flatten(), and if there is a weight, the linear function of that, such that autograd knows of it.");

static PyObject *scale_adder(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != COUNT - GIVEN || !PyType_Check(args[FRESH - GIVEN]) || !peftc_watch_check(args[WATCH - GIVEN])) {
        PyErr_SetString(PyExc_TypeError, "scale_adder() takes a type, a tuple that says who watches, and four functions");
        return NULL;
    }
    static PyMethodDef *const made[] = {&scaled_linear_def, &scale_rows_def, NULL};
    return peftc_pieces_functions(module, names, GIVEN - 1, args, COUNT - GIVEN, made);
}

static PyMethodDef functions[] = {
    {"scale_node", (PyCFunction)(void (*)(void))scale_node, METH_FASTCALL, scale_node_doc},
    {"scale_adder", (PyCFunction)(void (*)(void))scale_adder, METH_FASTCALL, scale_adder_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_scale(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
