/* The forward pass of adapted linear layers on torch: from the layer to the sum in one call.
 *
 * For one token a layer's low-rank sum takes under a microsecond; looking the factors up in Python would take several.
 * Whatever is not the plain case is left to the caller, who has torch's operations for it. */
#include "py_torch_layer.h"
#include "py_torch_operand.h"
#include "py_torch_pieces.h"
#include "py_torch_watch.h"

/* Names, and what `lowrank_adder` is given; the items of the tuple that is the made functions' `self`. */
enum piece {
    LORA_A = LAYER_PIECES,
    LORA_B,
    LORA_E,
    LORA_DROPOUT,
    SCALING,
    RANKNUM,
    USE_DORA,
    INITIAL,
    P,
    INPLACE,
    TRAINING,
    GIVEN,          /* objects from here on */
    FACTOR = GIVEN, /* the class of A and B */
    IDENTITY,       /* the class of a dropout that drops nothing */
    DROPOUT,        /* torch.nn.Dropout */
    FRESH,          /* the class of base layers whose output is nobody else's: nn.Linear */
    WATCH,          /* see py_torch_watch.h */
    GRAD_ENABLED,   /* torch.is_grad_enabled */
    EMPTY_LIKE,     /* torch.empty_like */
    LINEAR,         /* torch.nn.functional.linear */
    NOISE,          /* (x, p) → what dropout multiplies x with, or None where it is torch's to do */
    RECORD,         /* (x, y, W, bias, A, B, E, scale, noise) → y + scale · (((x ∘ noise) Aᵀ) ∘ E) Bᵀ, which autograd
                       knows of; with x Wᵀ + bias for y if that is None */
    COUNT,
};

static const char *const names[GIVEN - 1] = {
    LAYER_NAMES, "lora_A",   "lora_B",   "lora_E", "lora_dropout", "scaling",
    "ranknum",   "use_dora", "_initial", "p",      "inplace",      "training",
};

/* object._modules[field]._modules, borrowed. */
static PyObject *children_of(call *c, PyObject *layer, int field)
{
    return layer_own(c, layer_item(c, layer_own(c, layer, MODULES), PIECE(c, field)), MODULES);
}

typedef struct factors {
    PyObject *a, *b, *e, *bias, *initial_a, *initial_b; /* held; e and the last two may be NULL */
    double scale;
    PyObject *p; /* of the dropout on x, held; NULL when nothing is dropped */
} factors;

static void forget(factors *all, int count)
{
    for (int i = 0; i < count; i++) {
        Py_XDECREF(all[i].a);
        Py_XDECREF(all[i].b);
        Py_XDECREF(all[i].e);
        Py_XDECREF(all[i].bias);
        Py_XDECREF(all[i].initial_a);
        Py_XDECREF(all[i].initial_b);
        Py_XDECREF(all[i].p);
    }
}

/* What the adapter's dropout does now. False for what is not the plain case. */
static bool read_dropout(call *c, PyObject *layer, PyObject *name, factors *out)
{
    PyObject *dropout = layer_item(c, children_of(c, layer, LORA_DROPOUT), name);
    if (dropout == NULL)
        return false;
    if ((PyObject *)Py_TYPE(dropout) == PIECE(c, IDENTITY) || layer_own(c, dropout, TRAINING) == Py_False)
        return true;
    if ((PyObject *)Py_TYPE(dropout) != PIECE(c, DROPOUT) || layer_own(c, dropout, INPLACE) != Py_False || layer_has_hooks(c, dropout))
        return false;
    out->p = Py_XNewRef(layer_own(c, dropout, P));
    return out->p != NULL;
}

/* What an AdaLora adapter has here. False for what is not the plain case. */
static bool read_triplet(call *c, PyObject *layer, PyObject *name, factors *out)
{
    peftc_tensor ranknum;
    out->a = Py_XNewRef(layer_parameter(c, layer, LORA_A, name));
    out->b = Py_XNewRef(layer_parameter(c, layer, LORA_B, name));
    out->e = Py_XNewRef(layer_parameter(c, layer, LORA_E, name));
    out->bias = Py_NewRef(Py_None);
    PyObject *count = layer_parameter(c, layer, RANKNUM, name), *scale = layer_item(c, layer_own(c, layer, SCALING), name);
    if (out->a == NULL || out->b == NULL || out->e == NULL || count == NULL || scale == NULL || !read_dropout(c, layer, name, out) ||
        !operand_number(scale, &out->scale) || !peftc_read_tensor(c->state, count, &ranknum))
        return false;
    for (int i = 0; i < ranknum.ndim; i++)
        if (ranknum.shape[i] != 1)
            return false;
    out->scale /= pc_get_double(ranknum.dtype, ranknum.data, 0) + 1e-5; /* as in the authors' code */
    return true;
}

/* What one adapter has here, of LoRA or AdaLora. False for what is not the plain case. */
static bool read_factors(call *c, PyObject *layer, PyObject *name, factors *out)
{
    PyObject *down = layer_item(c, children_of(c, layer, LORA_A), name), *up = layer_item(c, children_of(c, layer, LORA_B), name);
    if (down == NULL)
        return !c->failed && read_triplet(c, layer, name, out);
    PyObject *class = PIECE(c, FACTOR), *initial = layer_item(c, layer_own(c, layer, INITIAL), name);
    if (up == NULL || (PyObject *)Py_TYPE(down) != class || (PyObject *)Py_TYPE(up) != class ||
        layer_item(c, layer_own(c, layer, USE_DORA), name) != Py_False || !read_dropout(c, layer, name, out) || layer_has_hooks(c, down) ||
        layer_has_hooks(c, up))
        return false;
    out->a = Py_XNewRef(layer_item(c, layer_own(c, down, PARAMETERS), PIECE(c, WEIGHT)));
    out->b = Py_XNewRef(layer_item(c, layer_own(c, up, PARAMETERS), PIECE(c, WEIGHT)));
    out->bias = Py_XNewRef(layer_item(c, layer_own(c, up, PARAMETERS), PIECE(c, BIAS)));
    if (initial != NULL && PyTuple_Check(initial) && PyTuple_GET_SIZE(initial) == 2) {
        out->initial_a = Py_NewRef(PyTuple_GET_ITEM(initial, 0));
        out->initial_b = Py_NewRef(PyTuple_GET_ITEM(initial, 1));
    }
    PyObject *scale = layer_item(c, layer_own(c, layer, SCALING), name);
    return out->a != NULL && out->b != NULL && out->bias != NULL && scale != NULL && operand_number(scale, &out->scale);
}

/* layer.lora_A, borrowed. */
static PyObject *downs_of(call *c, PyObject *layer)
{
    return layer_item(c, layer_own(c, layer, MODULES), PIECE(c, LORA_A));
}

/* Has the layer, whose lora_A is `downs`, anything of the adapter? */
static bool holds(call *c, PyObject *downs, PyObject *name)
{
    return layer_item(c, layer_own(c, downs, MODULES), name) != NULL ||
           layer_item(c, layer_own(c, downs, PARAMETERS), name) != NULL;
}

/* Of the adapters in `live`, those that the layer has; false for what is not the plain case. */
static bool read_all(call *c, PyObject *layer, PyObject *live, factors *all, int *count)
{
    PyObject *downs = downs_of(c, layer);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(live); i++) {
        PyObject *name = PyTuple_GET_ITEM(live, i);
        if (!holds(c, downs, name))
            continue;
        if (*count == MOST_TERMS / 2 || !read_factors(c, layer, name, &all[(*count)++]))
            return false;
    }
    return downs != NULL && !c->failed;
}

static bool any_requires_grad(call *c, const factors *all, int count)
{
    for (int i = 0; i < count; i++)
        if (layer_is_true(c, all[i].a, REQUIRES_GRAD) || layer_is_true(c, all[i].b, REQUIRES_GRAD) ||
            (all[i].e != NULL && layer_is_true(c, all[i].e, REQUIRES_GRAD)) ||
            (all[i].bias != Py_None && layer_is_true(c, all[i].bias, REQUIRES_GRAD)))
            return true;
    return false;
}

/* Does autograd have to know of the sum? y may be NULL. */
static bool needs_grad(call *c, PyObject *x, PyObject *y, const factors *all, int count)
{
    return layer_grad_enabled(c, PIECE(c, GRAD_ENABLED)) && !c->failed &&
           (layer_is_true(c, x, REQUIRES_GRAD) || (y != NULL && layer_is_true(c, y, REQUIRES_GRAD)) || any_requires_grad(c, all, count));
}

/* Do x and the one adapter's A, B and E go with outputs of `width` columns? */
static bool fits(call *c, PyObject *x, const factors *one, int64_t width)
{
    pc_dtype dtype = PC_DTYPE_NONE;
    operand rows, down, up, whole;
    void *e;
    return operand_take(c->state, x, &dtype, &rows) && operand_matrix(c->state, one->a, &dtype, &down) &&
           operand_matrix(c->state, one->b, &dtype, &up) && down.rows.cols == rows.rows.cols && up.rows.rows == width &&
           down.rows.rows == up.rows.cols &&
           operand_vector(c->state, one->e != NULL ? one->e : Py_None, &dtype, down.rows.rows, true, &e, &whole);
}

/* Are they all that the adapter has here? The node of autograd takes no more. */
static bool is_bare(const factors *one) { return one->bias == Py_None && one->initial_a == NULL; }

/* The sum of one adapter such that autograd knows of it, a new reference; NULL without an exception where dropout is
 * torch's to do. */
static PyObject *record(call *c, PyObject *x, PyObject *y, PyObject *weight, PyObject *bias, const factors *one)
{
    PyObject *scale = PyFloat_FromDouble(one->scale), *noise = Py_NewRef(Py_None), *result = NULL;
    if (scale != NULL && one->p != NULL) {
        PyObject *arguments[] = {x, one->p};
        Py_SETREF(noise, PyObject_Vectorcall(PIECE(c, NOISE), arguments, 2, NULL));
    }
    c->failed = scale == NULL || noise == NULL;
    if (!c->failed && (one->p == NULL || noise != Py_None)) {
        PyObject *arguments[] = {x, y, weight, bias, one->a, one->b, one->e != NULL ? one->e : Py_None, scale, noise};
        result = PyObject_Vectorcall(PIECE(c, RECORD), arguments, 9, NULL);
        c->failed = result == NULL;
    }
    Py_XDECREF(scale);
    Py_XDECREF(noise);
    return result;
}

/* Without gradients nobody trains: dropout is left to torch then. */
static bool any_drops(const factors *all, int count)
{
    for (int i = 0; i < count; i++)
        if (all[i].p != NULL)
            return true;
    return false;
}

/* The sum of `count` adapters in `out`, which may be `sum`; false for what is not the plain case. */
static bool sum_rows(call *c, pc_dtype dtype, const operand *rows, const operand *sum, const operand *out,
                     const factors *all, int count)
{
    pc_lowrank_term terms[MOST_TERMS];
    int used = 0;
    bool good = operands_fit(rows, sum, out);
    for (int i = 0; good && i < count; i++) {
        pc_lowrank_term *term = &terms[used++];
        PyObject *e = all[i].e != NULL ? all[i].e : Py_None;
        good = operands_term(c->state, &dtype, rows, out, all[i].a, all[i].b, e, all[i].bias, term);
        term->scale = all[i].scale;
        if (good && all[i].initial_a != NULL) {
            term = &terms[used++];
            good = operands_term(c->state, &dtype, rows, out, all[i].initial_a, all[i].initial_b, Py_None, Py_None, term);
            term->scale = -all[i].scale;
        }
    }
    pc_error err;
    pc_status status = good ? operands_run(c->state, dtype, rows, sum, out, terms, used, NULL, &err) : PC_ERR_UNSUPPORTED;
    if (status == PC_ERR_NOMEM) {
        peftc_raise(c->state, &err);
        c->failed = true;
    }
    return status == PC_OK;
}

/* The same of tensors; result may be y. */
static bool sum_into(call *c, PyObject *x, PyObject *y, PyObject *result, const factors *all, int count)
{
    pc_dtype dtype = PC_DTYPE_NONE;
    operand rows, sum, out;
    return operand_take(c->state, x, &dtype, &rows) && operand_take(c->state, y, &dtype, &sum) &&
           operand_take(c->state, result, &dtype, &out) && sum_rows(c, dtype, &rows, &sum, &out, all, count);
}

static PyObject *add_all(call *c, PyObject *layer, PyObject *x, PyObject *y, const factors *all, int count)
{
    peftc_tensor tensor;
    if (count == 0)
        return Py_NewRef(y);
    if (!peftc_nobody_watches(PIECE(c, WATCH), &c->failed) || !peftc_read_tensor(c->state, y, &tensor))
        return NULL;
    int64_t width = tensor.ndim > 0 ? tensor.shape[tensor.ndim - 1] : 0;
    if (needs_grad(c, x, y, all, count))
        return count == 1 && is_bare(&all[0]) && fits(c, x, &all[0], width) ? record(c, x, y, Py_None, Py_None, &all[0]) : NULL;
    if (c->failed || any_drops(all, count) || !peftc_read_tensor(c->state, x, &tensor))
        return NULL;
    PyObject *result = layer_fresh_base(c, layer, PIECE(c, FRESH)) != NULL ? Py_NewRef(y) : PyObject_CallOneArg(PIECE(c, EMPTY_LIKE), y);
    c->failed = c->failed || result == NULL;
    if (result != NULL && !sum_into(c, x, y, result, all, count))
        Py_CLEAR(result);
    return result;
}

/* The base layer's output and the sum in one. */
static PyObject *whole(call *c, PyObject *layer, PyObject *x, const factors *all, int count)
{
    PyObject *base = count > 0 ? layer_fresh_base(c, layer, PIECE(c, FRESH)) : NULL;
    PyObject *weight, *bias, *result = NULL;
    peftc_tensor tensor;
    if (base == NULL || !peftc_nobody_watches(PIECE(c, WATCH), &c->failed) || !layer_linear(c, base, x, &weight, &bias))
        return NULL;
    int64_t width = peftc_read_tensor(c->state, weight, &tensor) ? tensor.shape[0] : 0;
    bool grad = needs_grad(c, x, NULL, all, count);
    if (!c->failed && layer_is_trained(c, weight, bias)) {
        /* a base layer that is trained, too, is autograd's */
    } else if (!c->failed && grad) {
        if (count == 1 && is_bare(&all[0]) && fits(c, x, &all[0], width))
            result = record(c, x, Py_None, weight, bias, &all[0]);
    } else if (!c->failed) {
        bool good = !any_drops(all, count);
        for (int i = 0; good && i < count; i++)
            good = fits(c, x, &all[i], width);
        PyObject *arguments[] = {x, weight, bias};
        if (good)
            result = PyObject_Vectorcall(PIECE(c, LINEAR), arguments, 3, NULL);
        c->failed = good && result == NULL;
        if (result != NULL && !sum_into(c, x, result, result, all, count))
            Py_CLEAR(result);
    }
    Py_DECREF(weight);
    Py_DECREF(bias);
    return result;
}

/* With y, the sum of it and of the adapters; with NULL, of the base layer's output and them. */
static PyObject *answer(PyObject *self, PyObject *layer, PyObject *x, PyObject *y, PyObject *live)
{
    call c = {.self = self, .state = peftc_get_state(PyTuple_GET_ITEM(self, MODULE))};
    factors all[MOST_TERMS / 2] = {{0}}; /* initial factors take a term of their own */
    int count = 0;
    PyObject *result = NULL;
    if (read_all(&c, layer, live, all, &count))
        result = y != NULL ? add_all(&c, layer, x, y, all, count) : whole(&c, layer, x, all, count);
    forget(all, count);
    return layer_answer(&c, result);
}

/* -------------------------------------------------- rows of several adapters */

/* What one adapter has here, and whose rows it is for: [begin, end) of the first dimension. */
typedef struct part {
    factors own;
    long long begin, end;
} part;

/* Those of the parts (name, begin, end) that the layer has something for; false for what is not the plain case, with an
 * exception for what is no part. */
static bool read_parts(call *c, PyObject *layer, PyObject *x, PyObject *parts, long long rows, int64_t width, part *all,
                       Py_ssize_t *count)
{
    PyObject *downs = downs_of(c, layer);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parts); i++) {
        part *next = &all[*count];
        PyObject *name, *given = PyTuple_GET_ITEM(parts, i);
        if (!PyTuple_Check(given)) {
            PyErr_Format(PyExc_TypeError, "a part must be (name, begin, end), got %.200s", Py_TYPE(given)->tp_name);
            return false;
        }
        if (!PyArg_ParseTuple(given, "OLL", &name, &next->begin, &next->end))
            return false;
        if (next->begin < 0 || next->end < next->begin || next->end > rows)
            return false;
        if (!holds(c, downs, name))
            continue;
        ++*count;
        if (!read_factors(c, layer, name, &next->own) || next->own.p != NULL)
            return false;
        if (!fits(c, x, &next->own, width) || needs_grad(c, x, NULL, &next->own, 1))
            return false;
    }
    return downs != NULL && !c->failed;
}

/* Rows [begin, end) of an operand whose first dimension has `each` rows per index. */
static operand rows_of(const operand *all, long long begin, long long end, int64_t each)
{
    operand some = *all;
    some.rows.data += (size_t)(begin * each * all->rows.stride) * pc_dtype_size(all->dtype);
    some.rows.rows = (end - begin) * each;
    return some;
}

/* The base layer's output, with what each part's adapter adds to its rows; NULL for what is not the plain case. */
static PyObject *whole_of_parts(call *c, PyObject *layer, PyObject *x, PyObject *parts, part *all, Py_ssize_t *count)
{
    PyObject *base = layer_fresh_base(c, layer, PIECE(c, FRESH)), *weight, *bias, *result = NULL;
    peftc_tensor tensor;
    if (base == NULL || !peftc_nobody_watches(PIECE(c, WATCH), &c->failed) || !peftc_read_tensor(c->state, x, &tensor) ||
        tensor.ndim < 2 || !layer_linear(c, base, x, &weight, &bias))
        return NULL;
    const int64_t indices = tensor.shape[0];
    const int64_t width = peftc_read_tensor(c->state, weight, &tensor) ? tensor.shape[0] : 0;
    pc_dtype dtype = PC_DTYPE_NONE;
    operand rows, out;
    bool good = indices > 0 && read_parts(c, layer, x, parts, indices, width, all, count) &&
                !(layer_grad_enabled(c, PIECE(c, GRAD_ENABLED)) && layer_is_trained(c, weight, bias));
    if (good && !c->failed) {
        PyObject *arguments[] = {x, weight, bias};
        result = PyObject_Vectorcall(PIECE(c, LINEAR), arguments, 3, NULL);
        c->failed = result == NULL;
    }
    good = result != NULL && operand_take(c->state, x, &dtype, &rows) && operand_take(c->state, result, &dtype, &out) &&
           rows.rows.rows == out.rows.rows;
    const int64_t each = good ? rows.rows.rows / indices : 0;
    for (Py_ssize_t i = 0; good && i < *count; i++) {
        const operand given = rows_of(&rows, all[i].begin, all[i].end, each);
        const operand made = rows_of(&out, all[i].begin, all[i].end, each);
        good = sum_rows(c, dtype, &given, &made, &made, &all[i].own, 1);
    }
    if (!good)
        Py_CLEAR(result);
    Py_DECREF(weight);
    Py_DECREF(bias);
    return result;
}

PyDoc_STRVAR(mixed_linear_doc,
             "mixed_linear(layer, x, parts, /)\n--\n\n"
             "As adapted_linear for a batch x (n, ..., in) whose rows have adapters of their own: `parts` has (name, begin, end) for\n"
             "x[begin:end], and the rows that it leaves out are the base layer's.\n\n"
             "Returns None, with nothing done, where adapted_linear would for one of them, and where there are gradients.\n"
             "Raises MemoryError.");

static PyObject *mixed_linear(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3 || !PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "mixed_linear() takes a layer, x, and a tuple of (name, begin, end)");
        return NULL;
    }
    call c = {.self = self, .state = peftc_get_state(PyTuple_GET_ITEM(self, MODULE))};
    Py_ssize_t count = 0;
    part *all = PyMem_Calloc((size_t)PyTuple_GET_SIZE(args[2]) + 1, sizeof *all);
    if (all == NULL)
        return PyErr_NoMemory();
    PyObject *result = whole_of_parts(&c, args[0], args[1], args[2], all, &count);
    for (Py_ssize_t i = 0; i < count; i++)
        forget(&all[i].own, 1);
    PyMem_Free(all);
    return layer_answer(&c, result);
}

PyDoc_STRVAR(adapted_linear_doc,
             "adapted_linear(layer, x, live, /)\n--\n\n"
             "The output of the layer's frozen nn.Linear for x (..., in), and the sum over the adapters in the tuple `live` that\n"
             "the layer has of scaling * B(E * A(x)) added to it where it lies: (..., out_features).\n\n"
             "Returns None, with nothing done, where this is not the plain case: the layer has none of the adapters; what\n"
             "add_lowrank leaves; a base layer of another class, with hooks, with a forward of its own, or that is trained.\n"
             "Raises MemoryError.");

static PyObject *adapted_linear(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 3 || !PyTuple_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "adapted_linear() takes a layer, x, and a tuple of names");
        return NULL;
    }
    return answer(self, args[0], args[1], NULL, args[2]);
}

PyDoc_STRVAR(add_lowrank_doc,
             "add_lowrank(layer, x, y, live, /)\n--\n\n"
             "y + the sum over the adapters in the tuple `live` that the layer has of scaling * B(A(x)), x (..., in), y\n"
             "(..., out_features), which is the base layer's output for x and may be overwritten.\n\n"
             "Returns None, with nothing changed, where this is not the plain case: DoRA, dropout, hooks, gradients of several\n"
             "adapters, somebody who watches the operations, tensors that the kernels do not take. Raises MemoryError.");

static PyObject *add_lowrank(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 4 || !PyTuple_Check(args[3])) {
        PyErr_SetString(PyExc_TypeError, "add_lowrank() takes a layer, x, y, and a tuple of names");
        return NULL;
    }
    return answer(self, args[0], args[1], args[2], args[3]);
}

static PyMethodDef add_lowrank_def = {"add_lowrank", (PyCFunction)(void (*)(void))add_lowrank, METH_FASTCALL,
                                      add_lowrank_doc};
static PyMethodDef adapted_linear_def = {"adapted_linear", (PyCFunction)(void (*)(void))adapted_linear, METH_FASTCALL,
                                         adapted_linear_doc};
static PyMethodDef mixed_linear_def = {"mixed_linear", (PyCFunction)(void (*)(void))mixed_linear, METH_FASTCALL,
                                       mixed_linear_doc};

PyDoc_STRVAR(lowrank_adder_doc,
             "lowrank_adder(factor, identity, dropout, fresh, watch, grad_enabled, empty_like, linear, noise, record, /)\n--\n\n"
             "The functions add_lowrank(layer, x, y, live, /), adapted_linear(layer, x, live, /) and mixed_linear(layer, x, parts, /)\n"
             "for layers whose A and B are of the class `factor` (LoRA) or parameters (AdaLora).\n\n"
             "What they need of torch is given to them: nn.Identity, nn.Dropout, nn.Linear; who may watch the operations, as a tuple of\n"
             "functions that say so, one of containers that have items then, and forward_ad's dict; torch.is_grad_enabled,\n"
             "torch.empty_like, torch.nn.functional.linear; a function (x, p) → what dropout multiplies x with, or None; a\n"
             "function (x, y, W, bias, A, B, E, scaling, noise) that computes the sum such that autograd knows of it, of\n"
             "x @ W.T + bias if y is None.");

static PyObject *lowrank_adder(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != COUNT - GIVEN || !PyType_Check(args[FACTOR - GIVEN]) || !PyType_Check(args[IDENTITY - GIVEN]) ||
        !PyType_Check(args[DROPOUT - GIVEN]) || !PyType_Check(args[FRESH - GIVEN]) || !peftc_watch_check(args[WATCH - GIVEN])) {
        PyErr_SetString(PyExc_TypeError, "lowrank_adder() takes four types, a tuple that says who watches, and five functions");
        return NULL;
    }
    static PyMethodDef *const made[] = {&add_lowrank_def, &adapted_linear_def, &mixed_linear_def, NULL};
    return peftc_pieces_functions(module, names, GIVEN - 1, args, COUNT - GIVEN, made);
}

static PyMethodDef functions[] = {
    {"lowrank_adder", (PyCFunction)(void (*)(void))lowrank_adder, METH_FASTCALL, lowrank_adder_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_forward(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
