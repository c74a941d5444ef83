/* The low-rank sum as a node of autograd: what torch.autograd.Function's forward and backward do, without Python code
 * of their own, which would take longer than the sums of a small batch. */
#include "py_torch_kernels.h"

#include "py_torch_operand.h"
#include "py_torch_pieces.h"
#include "py_torch_watch.h"

/* Names, and what `lowrank_node` is given; the items of the tuple that is the made functions' `self`. */
enum piece {
    MODULE, /* peftc._core */
    TO_SAVE,
    SAVED,
    NEEDS,
    SCALING,
    CONTIGUOUS,
    ADDCMUL,
    GIVEN, /* objects from here on */
    WATCH = GIVEN,
    GRAD_ENABLED, /* torch.is_grad_enabled */
    LINEAR,       /* torch.nn.functional.linear */
    MATMUL,       /* torch.matmul */
    EMPTY,        /* shape → a new float32 tensor on the CPU, its values undefined */
    EMPTY_LIKE,   /* torch.empty_like */
    SUM,          /* (x, y, A, B, E, scaling) → the sum, for what the kernels do not take */
    DERIVATIVES,  /* (ctx, grad) → (dx, dy, None, None, dA, dB, dE, None, None), likewise */
    COUNT,
};

static const char *const names[GIVEN - 1] = {
    "to_save", "saved_tensors", "needs_input_grad", "scaling", "contiguous", "addcmul_",
};

#define PIECE(self, i) PyTuple_GET_ITEM(self, i)

/* The arguments of the node, and what its backward pass answers. */
enum { X, Y, WEIGHT, BIAS, A, B, E, SCALE, NOISE, INPUTS };

/* Room for (x Aᵀ)ᵀ, (r, rows): a new tensor; None where the kernels keep none; NULL with an exception. */
static PyObject *hidden_of(PyObject *self, PyObject *x, PyObject *a)
{
    peftc_state *state = peftc_get_state(PIECE(self, MODULE));
    pc_dtype dtype = PC_DTYPE_NONE;
    operand rows, down;
    if (!operand_take(state, x, &dtype, &rows) || !operand_matrix(state, a, &dtype, &down) || dtype == PC_F64)
        Py_RETURN_NONE;
    PyObject *shape = Py_BuildValue("(LL)", (long long)down.rows.rows, (long long)rows.rows.rows), *made = NULL;
    if (shape != NULL)
        made = PyObject_CallOneArg(PIECE(self, EMPTY), shape);
    Py_XDECREF(shape);
    return made;
}

/* What the low-rank part sees of x, a new reference. It is not kept: x and the noise are, which others may share. */
static PyObject *dropped(PyObject *x, PyObject *noise)
{
    return noise == Py_None ? Py_NewRef(x) : PyNumber_Multiply(x, noise);
}

PyDoc_STRVAR(forward_doc,
             "forward(ctx, x, y, weight, bias, A, B, E, scaling, noise, /)\n--\n\n"
             "y + scaling * (((x * noise) @ A.T) * E) @ B.T, with x @ weight.T + bias for y if that is None; no noise is 1.\n\n"
             "ctx keeps x, weight, A, B, E, noise, ((x * noise) @ A.T).T or None, and the scaling.");

static PyObject *node_forward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 1 + INPUTS) {
        PyErr_Format(PyExc_TypeError, "forward() takes ctx and %d inputs, got %zd arguments", INPUTS, nargs);
        return NULL;
    }
    PyObject *ctx = args[0], *const *in = args + 1;
    PyObject *x = dropped(in[X], in[NOISE]), *y = Py_NewRef(in[Y]);
    PyObject *out = NULL, *hidden = NULL, *terms = NULL, *done = NULL, *saved = NULL;
    if (y == Py_None) {
        PyObject *arguments[] = {in[X], in[WEIGHT], in[BIAS]};
        Py_SETREF(y, PyObject_Vectorcall(PIECE(self, LINEAR), arguments, 3, NULL));
        out = Py_XNewRef(y); /* nobody else's */
    } else {
        out = PyObject_CallOneArg(PIECE(self, EMPTY_LIKE), y);
    }
    if (out != NULL && x != NULL)
        hidden = hidden_of(self, x, in[A]);
    if (hidden != NULL)
        terms = Py_BuildValue("((OOOOO))", in[A], in[B], in[SCALE], in[E], Py_None);
    if (terms != NULL) {
        PyObject *arguments[] = {x, y, out, terms, hidden};
        done = peftc_lowrank_forward(PIECE(self, MODULE), arguments, 5);
    }
    if (done == Py_False) {
        PyObject *arguments[] = {x, y, in[A], in[B], in[E], in[SCALE]};
        Py_SETREF(out, PyObject_Vectorcall(PIECE(self, SUM), arguments, 6, NULL));
        Py_SETREF(hidden, Py_NewRef(Py_None));
    }
    bool good = done != NULL && out != NULL && PyObject_SetAttr(ctx, PIECE(self, SCALING), in[SCALE]) == 0;
    if (good) { /* what ctx.save_for_backward does */
        saved = PyTuple_Pack(7, in[X], in[WEIGHT], in[A], in[B], in[E], in[NOISE], hidden);
        good = saved != NULL && PyObject_SetAttr(ctx, PIECE(self, TO_SAVE), saved) == 0;
    }
    if (!good)
        Py_CLEAR(out);
    Py_XDECREF(saved);
    Py_XDECREF(done);
    Py_XDECREF(terms);
    Py_XDECREF(hidden);
    Py_XDECREF(y);
    Py_XDECREF(x);
    return out;
}

/* What ctx kept, borrowed from the tuples that are held. */
typedef struct kept {
    PyObject *saved, *needs, *scaling; /* held */
    PyObject *x, *weight, *a, *b, *e, *noise, *hidden;
} kept;

static bool kept_read(PyObject *self, PyObject *ctx, kept *k)
{
    k->saved = PyObject_GetAttr(ctx, PIECE(self, SAVED));
    k->needs = k->saved != NULL ? PyObject_GetAttr(ctx, PIECE(self, NEEDS)) : NULL;
    k->scaling = k->needs != NULL ? PyObject_GetAttr(ctx, PIECE(self, SCALING)) : NULL;
    if (k->scaling == NULL)
        return false;
    if (!PyArg_ParseTuple(k->saved, "OOOOOOO", &k->x, &k->weight, &k->a, &k->b, &k->e, &k->noise, &k->hidden))
        return false;
    if (PyTuple_Check(k->needs) && PyTuple_GET_SIZE(k->needs) == INPUTS)
        return true;
    PyErr_Format(PyExc_TypeError, "needs_input_grad must be a tuple of %d", INPUTS);
    return false;
}

/* A tensor like `of` to be written to if it is needed, else None; NULL with an exception. */
static PyObject *room_for(PyObject *self, const kept *k, int input, PyObject *of)
{
    return PyTuple_GET_ITEM(k->needs, input) == Py_True ? PyObject_CallOneArg(PIECE(self, EMPTY_LIKE), of)
                                                        : Py_NewRef(Py_None);
}

/* Into the tensor `base`, unless it is None, the part of dx that came through the noise is added; a new reference. */
static PyObject *through_noise(PyObject *self, PyObject *base, PyObject *dx, PyObject *noise)
{
    if (base == Py_None)
        return PyNumber_InPlaceMultiply(dx, noise);
    PyObject *arguments[] = {base, dx, noise};
    return PyObject_VectorcallMethod(PIECE(self, ADDCMUL), arguments, 3, NULL);
}

/* The derivatives in C, a new tuple; NULL without an exception for what the kernels do not take. */
static PyObject *derivatives(PyObject *self, const kept *k, PyObject *grad)
{
    const bool noisy = k->noise != Py_None;
    PyObject *base = Py_NewRef(Py_None), *made[4] = {NULL}, *done = NULL, *result = NULL;
    PyObject *packed = PyObject_CallMethodNoArgs(grad, PIECE(self, CONTIGUOUS)), *x = dropped(k->x, k->noise);
    bool good = packed != NULL && x != NULL;
    if (good && k->weight != Py_None && PyTuple_GET_ITEM(k->needs, X) == Py_True) {
        PyObject *arguments[] = {packed, k->weight};
        Py_SETREF(base, PyObject_Vectorcall(PIECE(self, MATMUL), arguments, 2, NULL));
        good = base != NULL;
    }
    if (good) {
        made[0] = base != Py_None && !noisy ? Py_NewRef(base) : room_for(self, k, X, k->x);
        made[1] = made[0] != NULL ? room_for(self, k, A, k->a) : NULL;
        made[2] = made[1] != NULL ? room_for(self, k, B, k->b) : NULL;
        made[3] = made[2] != NULL ? room_for(self, k, E, k->e) : NULL;
    }
    if (made[3] != NULL) {
        PyObject *arguments[] = {packed,    x,       k->a,    k->b, k->e, k->scaling, k->hidden, noisy ? Py_None : base,
                                 made[0], made[1], made[2], made[3]};
        done = peftc_lowrank_backward(PIECE(self, MODULE), arguments, 12);
    }
    if (done == Py_True && noisy && made[0] != Py_None)
        Py_SETREF(made[0], through_noise(self, base, made[0], k->noise));
    if (done == Py_True && made[0] != NULL) {
        PyObject *dy = PyTuple_GET_ITEM(k->needs, Y) == Py_True ? grad : Py_None;
        result = PyTuple_Pack(INPUTS, made[0], dy, Py_None, Py_None, made[1], made[2], made[3], Py_None, Py_None);
    }
    Py_XDECREF(packed);
    Py_XDECREF(x);
    Py_XDECREF(base);
    for (int i = 0; i < 4; i++)
        Py_XDECREF(made[i]);
    Py_XDECREF(done);
    return result;
}

PyDoc_STRVAR(backward_doc,
             "backward(ctx, grad, /)\n--\n\n"
             "(dx, dy, None, None, dA, dB, dE, None, None), None too for what ctx.needs_input_grad does not ask for.");

static PyObject *node_backward(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2) {
        PyErr_Format(PyExc_TypeError, "backward() takes ctx and a gradient, got %zd arguments", nargs);
        return NULL;
    }
    bool failed = false;
    PyObject *result = NULL, *enabled = PyObject_CallNoArgs(PIECE(self, GRAD_ENABLED));
    /* With gradients of gradients, autograd has to see every operation. */
    if (enabled == Py_False && peftc_nobody_watches(PIECE(self, WATCH), &failed)) {
        kept k = {NULL};
        if (kept_read(self, args[0], &k))
            result = derivatives(self, &k, args[1]);
        Py_XDECREF(k.saved);
        Py_XDECREF(k.needs);
        Py_XDECREF(k.scaling);
    }
    Py_XDECREF(enabled);
    if (result == NULL && !PyErr_Occurred())
        result = PyObject_Vectorcall(PIECE(self, DERIVATIVES), args, 2, NULL);
    return result;
}

static PyMethodDef forward_def = {"forward", (PyCFunction)(void (*)(void))node_forward, METH_FASTCALL, forward_doc};
static PyMethodDef backward_def = {"backward", (PyCFunction)(void (*)(void))node_backward, METH_FASTCALL, backward_doc};

PyDoc_STRVAR(lowrank_node_doc,
             "lowrank_node(watch, grad_enabled, linear, matmul, empty, empty_like, sum, derivatives, /)\n--\n\n"
             "(forward, backward) of the torch.autograd.Function that is the low-rank sum.\n\n"
             "What they need of torch is given to them: who may watch the operations (see lowrank_adder); functions of these\n"
             "names of torch, `empty` such that it makes float32. What the kernels do not take is asked of sum(x, y, A, B, E, scaling) and of\n"
             "derivatives(ctx, grad).");

static PyObject *lowrank_node(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != COUNT - GIVEN || !peftc_watch_check(args[WATCH - GIVEN])) {
        PyErr_SetString(PyExc_TypeError, "lowrank_node() takes a tuple that says who watches, and seven functions");
        return NULL;
    }
    static PyMethodDef *const made[] = {&forward_def, &backward_def, NULL};
    return peftc_pieces_functions(module, names, GIVEN - 1, args, COUNT - GIVEN, made);
}

static PyMethodDef functions[] = {
    {"lowrank_node", (PyCFunction)(void (*)(void))lowrank_node, METH_FASTCALL, lowrank_node_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_node(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
