/* The forward pass of LoRA's linear layers on torch: from the layer to the sum in one call.
 *
 * For one token a layer's low-rank sum takes under a microsecond; looking the factors up in Python would take several.
 * Whatever is not the plain case is left to the caller, who has torch's operations for it. */
#include "py_torch_operand.h"

/* What `lowrank_adder` is given, and names; the items of the tuple that is the made function's `self`. */
enum piece {
    MODULE,   /* peftc._core */
    FACTOR,   /* the class of A and B */
    IDENTITY, /* the class of a dropout that drops nothing */
    FRESH,    /* a tuple of classes whose output is nobody else's */
    WATCHERS, /* a tuple of functions without arguments: True, or anything but None, 0 and False, if somebody watches */
    REGISTRIES, /* a tuple of containers that are empty as long as nobody watches */
    LEVELS,   /* the dict whose "_current_level" is -1 outside forward-mode differentiation */
    GRAD_ENABLED, /* torch.is_grad_enabled */
    EMPTY_LIKE,   /* torch.empty_like */
    RECORD,       /* (x, y, A, B, scale) → y + scale · (x Aᵀ) Bᵀ, which autograd knows of */
    PIECES,       /* names from here on */
    MODULES = PIECES,
    PARAMETERS,
    BASE_LAYER,
    LORA_A,
    LORA_B,
    LORA_DROPOUT,
    SCALING,
    USE_DORA,
    INITIAL,
    WEIGHT,
    BIAS,
    TRAINING,
    REQUIRES_GRAD,
    CURRENT_LEVEL,
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    BACKWARD_HOOKS,
    BACKWARD_PRE_HOOKS,
    COUNT,
};

static const char *const names[COUNT - PIECES] = {
    "_modules", "_parameters", "base_layer", "lora_A", "lora_B", "lora_dropout", "scaling", "use_dora", "_initial",
    "weight", "bias", "training", "requires_grad", "_current_level", "_forward_hooks", "_forward_pre_hooks",
    "_backward_hooks", "_backward_pre_hooks",
};

/* References are borrowed where nothing runs other Python code before their last use; factors are held, because an
 * allocation by torch gives up the GIL, and so do large sums. */
typedef struct call {
    PyObject *self;
    peftc_state *state;
    bool failed; /* an exception is set */
} call;

#define PIECE(c, i) PyTuple_GET_ITEM((c)->self, i)

/* The item of a dict, borrowed; NULL if there is none, or it is no dict. */
static PyObject *item(call *c, PyObject *dict, PyObject *key)
{
    if (dict == NULL || !PyDict_Check(dict) || c->failed)
        return NULL;
    PyObject *found = PyDict_GetItemWithError(dict, key);
    c->failed = found == NULL && PyErr_Occurred();
    return found;
}

/* An instance's attribute that is kept in its __dict__, borrowed from there. */
static PyObject *own(call *c, PyObject *object, int name)
{
    if (object == NULL || c->failed)
        return NULL;
    PyObject *dict = PyObject_GenericGetDict(object, NULL);
    if (dict == NULL) {
        PyErr_Clear();
        return NULL;
    }
    PyObject *found = item(c, dict, PIECE(c, name));
    Py_DECREF(dict); /* the object has it */
    return found;
}

/* object._modules[field]._modules, borrowed. */
static PyObject *children_of(call *c, PyObject *layer, int field)
{
    return own(c, item(c, own(c, layer, MODULES), PIECE(c, field)), MODULES);
}

static bool is_empty(PyObject *container)
{
    if (container == NULL)
        return true;
    Py_ssize_t size = PyDict_Check(container) ? PyDict_Size(container) : PyObject_Size(container);
    if (size < 0)
        PyErr_Clear();
    return size == 0;
}

static bool has_hooks(call *c, PyObject *module)
{
    return !is_empty(own(c, module, FORWARD_HOOKS)) || !is_empty(own(c, module, FORWARD_PRE_HOOKS)) ||
           !is_empty(own(c, module, BACKWARD_HOOKS)) || !is_empty(own(c, module, BACKWARD_PRE_HOOKS));
}

/* Does nothing see or change the operations of this thread? */
static bool nobody_watches(call *c)
{
    PyObject *registries = PIECE(c, REGISTRIES), *watchers = PIECE(c, WATCHERS);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(registries); i++)
        if (!is_empty(PyTuple_GET_ITEM(registries, i)))
            return false;
    PyObject *level = item(c, PIECE(c, LEVELS), PIECE(c, CURRENT_LEVEL));
    if (level == NULL || !PyLong_Check(level) || PyLong_AsLong(level) >= 0)
        return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(watchers); i++) {
        PyObject *seen = PyObject_CallNoArgs(PyTuple_GET_ITEM(watchers, i));
        int watched = seen == NULL ? -1 : PyObject_IsTrue(seen);
        Py_XDECREF(seen);
        c->failed = c->failed || watched < 0;
        if (watched != 0)
            return false;
    }
    return true;
}

/* Is the attribute's value the object True? */
static bool is_true(call *c, PyObject *object, int name)
{
    PyObject *value = PyObject_GetAttr(object, PIECE(c, name));
    c->failed = c->failed || value == NULL;
    Py_XDECREF(value);
    return value != Py_False;
}

typedef struct factors {
    PyObject *a, *b, *bias, *initial_a, *initial_b; /* the last two may be NULL */
    double scale;
} factors;

static void forget(factors *all, int count)
{
    for (int i = 0; i < count; i++) {
        Py_XDECREF(all[i].a);
        Py_XDECREF(all[i].b);
        Py_XDECREF(all[i].bias);
        Py_XDECREF(all[i].initial_a);
        Py_XDECREF(all[i].initial_b);
    }
}

/* What one adapter has here. False for what is not the plain case. */
static bool read_factors(call *c, PyObject *layer, PyObject *name, PyObject *a_modules, factors *out)
{
    PyObject *down = item(c, a_modules, name), *up = item(c, children_of(c, layer, LORA_B), name);
    PyObject *dropout = item(c, children_of(c, layer, LORA_DROPOUT), name);
    PyObject *class = PIECE(c, FACTOR), *initial = item(c, own(c, layer, INITIAL), name);
    if (down == NULL || up == NULL || dropout == NULL || (PyObject *)Py_TYPE(down) != class ||
        (PyObject *)Py_TYPE(up) != class || item(c, own(c, layer, USE_DORA), name) != Py_False ||
        ((PyObject *)Py_TYPE(dropout) != PIECE(c, IDENTITY) && own(c, dropout, TRAINING) != Py_False) ||
        has_hooks(c, down) || has_hooks(c, up))
        return false;
    out->a = Py_XNewRef(item(c, own(c, down, PARAMETERS), PIECE(c, WEIGHT)));
    out->b = Py_XNewRef(item(c, own(c, up, PARAMETERS), PIECE(c, WEIGHT)));
    out->bias = Py_XNewRef(item(c, own(c, up, PARAMETERS), PIECE(c, BIAS)));
    if (initial != NULL && PyTuple_Check(initial) && PyTuple_GET_SIZE(initial) == 2) {
        out->initial_a = Py_NewRef(PyTuple_GET_ITEM(initial, 0));
        out->initial_b = Py_NewRef(PyTuple_GET_ITEM(initial, 1));
    }
    PyObject *scale = item(c, own(c, layer, SCALING), name);
    return out->a != NULL && out->b != NULL && out->bias != NULL && scale != NULL && operand_number(scale, &out->scale);
}

/* Does autograd have to know of the sum? */
static bool needs_grad(call *c, PyObject *x, PyObject *y, const factors *all, int count)
{
    PyObject *enabled = PyObject_CallNoArgs(PIECE(c, GRAD_ENABLED));
    bool grad = enabled != Py_False;
    c->failed = c->failed || enabled == NULL;
    Py_XDECREF(enabled);
    if (!grad)
        return false;
    grad = is_true(c, x, REQUIRES_GRAD) || is_true(c, y, REQUIRES_GRAD);
    for (int i = 0; i < count && !grad; i++)
        grad = is_true(c, all[i].a, REQUIRES_GRAD) || is_true(c, all[i].b, REQUIRES_GRAD) ||
               (all[i].bias != Py_None && is_true(c, all[i].bias, REQUIRES_GRAD));
    return grad;
}

/* Is the base layer's output nobody else's, so that it can be overwritten? */
static bool is_fresh(call *c, PyObject *layer)
{
    PyObject *base = item(c, own(c, layer, MODULES), PIECE(c, BASE_LAYER)), *classes = PIECE(c, FRESH);
    for (Py_ssize_t i = 0; base != NULL && i < PyTuple_GET_SIZE(classes); i++)
        if ((PyObject *)Py_TYPE(base) == PyTuple_GET_ITEM(classes, i)) {
            peftc_tensor weight; /* a plain tensor: no subclass that may have remembered what it gave */
            PyObject *parameter = item(c, own(c, base, PARAMETERS), PIECE(c, WEIGHT));
            return !has_hooks(c, base) && parameter != NULL && peftc_read_tensor(c->state, parameter, &weight);
        }
    return false;
}

/* The sum of one adapter such that autograd knows of it, a new reference; NULL without an exception for what is not the
 * plain case. */
static PyObject *recorded(call *c, PyObject *x, PyObject *y, const factors *one)
{
    pc_dtype dtype = PC_DTYPE_NONE;
    operand rows, sum;
    pc_lowrank_term term;
    if (one->bias != Py_None || one->initial_a != NULL || !operand_take(c->state, x, &dtype, &rows) ||
        !operand_take(c->state, y, &dtype, &sum) || !operands_fit(&rows, &sum, &sum) ||
        !operands_term(c->state, &dtype, &rows, &sum, one->a, one->b, Py_None, Py_None, &term))
        return NULL;
    PyObject *scale = PyFloat_FromDouble(one->scale), *result = NULL;
    if (scale != NULL) {
        PyObject *arguments[] = {x, y, one->a, one->b, scale};
        result = PyObject_Vectorcall(PIECE(c, RECORD), arguments, 5, NULL);
        Py_DECREF(scale);
    }
    c->failed = result == NULL;
    return result;
}

/* The sum of `count` adapters, a new reference; NULL without an exception for what is not the plain case. */
static PyObject *sum_of(call *c, PyObject *layer, PyObject *x, PyObject *y, const factors *all, int count)
{
    pc_lowrank_term terms[MOST_TERMS];
    int used = 0;
    pc_dtype dtype = PC_DTYPE_NONE;
    operand rows, sum, out;
    peftc_tensor plain;
    if (!peftc_read_tensor(c->state, x, &plain) || !peftc_read_tensor(c->state, y, &plain))
        return NULL;
    PyObject *result = is_fresh(c, layer) ? Py_NewRef(y) : PyObject_CallOneArg(PIECE(c, EMPTY_LIKE), y);
    c->failed = c->failed || result == NULL;
    bool good = result != NULL && operand_take(c->state, x, &dtype, &rows) && operand_take(c->state, y, &dtype, &sum) &&
                operand_take(c->state, result, &dtype, &out) && operands_fit(&rows, &sum, &out);
    for (int i = 0; good && i < count; i++) {
        pc_lowrank_term *term = &terms[used++];
        good = operands_term(c->state, &dtype, &rows, &out, all[i].a, all[i].b, Py_None, all[i].bias, term);
        term->scale = all[i].scale;
        if (good && all[i].initial_a != NULL) {
            term = &terms[used++];
            good = operands_term(c->state, &dtype, &rows, &out, all[i].initial_a, all[i].initial_b, Py_None, Py_None, term);
            term->scale = -all[i].scale;
        }
    }
    pc_error err;
    pc_status status = good ? operands_run(c->state, dtype, &rows, &sum, &out, terms, used, &err) : PC_ERR_UNSUPPORTED;
    if (status == PC_ERR_NOMEM) {
        peftc_raise(c->state, &err);
        c->failed = true;
    }
    if (status != PC_OK)
        Py_CLEAR(result);
    return result;
}

static PyObject *add_all(call *c, PyObject *layer, PyObject *x, PyObject *y, PyObject *live)
{
    factors all[MOST_TERMS / 2] = {{0}}; /* initial factors take a term of their own */
    int count = 0;
    PyObject *a_modules = children_of(c, layer, LORA_A), *result = NULL;
    bool good = a_modules != NULL;
    for (Py_ssize_t i = 0; good && i < PyTuple_GET_SIZE(live); i++) {
        PyObject *name = PyTuple_GET_ITEM(live, i);
        if (item(c, a_modules, name) != NULL) /* else it has nothing on this layer */
            good = count < MOST_TERMS / 2 && read_factors(c, layer, name, a_modules, &all[count++]);
    }
    if (good && count == 0)
        result = Py_NewRef(y);
    else if (good && nobody_watches(c)) {
        bool grad = needs_grad(c, x, y, all, count);
        if (!c->failed && !grad)
            result = sum_of(c, layer, x, y, all, count);
        else if (!c->failed && count == 1)
            result = recorded(c, x, y, &all[0]);
    }
    forget(all, count);
    return result;
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
    call c = {.self = self, .state = peftc_get_state(PyTuple_GET_ITEM(self, MODULE))};
    PyObject *result = add_all(&c, args[0], args[1], args[2], args[3]);
    if (c.failed || PyErr_Occurred()) {
        Py_XDECREF(result);
        return NULL;
    }
    return result != NULL ? result : Py_NewRef(Py_None);
}

static PyMethodDef add_lowrank_def = {"add_lowrank", (PyCFunction)(void (*)(void))add_lowrank, METH_FASTCALL,
                                      add_lowrank_doc};

PyDoc_STRVAR(lowrank_adder_doc,
             "lowrank_adder(factor, identity, fresh, watchers, registries, levels, grad_enabled, empty_like, record, /)\n--\n\n"
             "The function add_lowrank(layer, x, y, live, /) for layers whose A and B are of the class `factor`.\n\n"
             "What it needs of torch is given to it: nn.Identity; a tuple of the classes of base layers whose output is\n"
             "nobody else's; a tuple of functions that say whether somebody watches the operations, and one of containers\n"
             "that have items then; forward_ad's dict; torch.is_grad_enabled and torch.empty_like; a function\n"
             "(x, y, A, B, scaling) that computes the sum such that autograd knows of it.");

static PyObject *lowrank_adder(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != PIECES - 1 || !PyType_Check(args[FACTOR - 1]) || !PyType_Check(args[IDENTITY - 1]) ||
        !PyTuple_Check(args[FRESH - 1]) || !PyTuple_Check(args[WATCHERS - 1]) || !PyTuple_Check(args[REGISTRIES - 1]) ||
        !PyDict_Check(args[LEVELS - 1])) {
        PyErr_SetString(PyExc_TypeError, "lowrank_adder() takes two types, three tuples, a dict and three functions");
        return NULL;
    }
    PyObject *self = PyTuple_New(COUNT);
    if (self == NULL)
        return NULL;
    PyTuple_SET_ITEM(self, MODULE, Py_NewRef(module));
    for (int i = 1; i < PIECES; i++)
        PyTuple_SET_ITEM(self, i, Py_NewRef(args[i - 1]));
    for (int i = PIECES; i < COUNT; i++) {
        PyObject *name = PyUnicode_InternFromString(names[i - PIECES]);
        if (name == NULL) {
            Py_DECREF(self);
            return NULL;
        }
        PyTuple_SET_ITEM(self, i, name);
    }
    PyObject *made = PyCFunction_New(&add_lowrank_def, self);
    Py_DECREF(self);
    return made;
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
