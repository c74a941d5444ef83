/* torch's module tree: listing it, and telling the core what is in it.
 *
 * Modules are what py_torch_dicts.h says, and are fetched before they are looked at (py_torch_ahead.h). */
#include "dlpack.h"
#include "py_torch_ahead.h"

/* ------------------------------------------------------------------- listing */

/* A module that is still to be listed; strong references. */
typedef struct waiting {
    PyObject *module, *name;
    int depth;
} waiting;

typedef struct walk {
    PyObject *leads; /* class → the names that lead to what a wrapper is around, or () */
    PyObject *find;  /* … asked of classes that it lacks */
    PyObject *list, *modules_name;
    address_set seen;
    ahead ahead;
    waiting *stack; /* the next one last */
    Py_ssize_t count, room;
} walk;

/* The dict of children, a new reference. own: the module's __dict__, or NULL. */
static PyObject *children_of(const walk *w, PyObject *module, PyObject *own, PyObject *name)
{
    PyObject *children = own != NULL ? Py_XNewRef(PyDict_GetItemWithError(own, w->modules_name)) : NULL;
    if (children == NULL && !PyErr_Occurred())
        children = PyObject_GetAttr(module, w->modules_name);
    if (children == NULL && PyErr_ExceptionMatches(PyExc_AttributeError))
        PyErr_Format(PyExc_TypeError, "%R is no torch module: %.200s has no _modules", name, Py_TYPE(module)->tp_name);
    if (children != NULL && !PyDict_Check(children)) {
        PyErr_Format(PyExc_TypeError, "module %R: _modules must be a dict, not %.200s", name,
                     Py_TYPE(children)->tp_name);
        Py_CLEAR(children);
    }
    return children;
}

/* The names that lead from a module to what it is around: a tuple, a new reference. */
static PyObject *leads_of(const walk *w, PyObject *module, PyObject *name)
{
    PyObject *cls = (PyObject *)Py_TYPE(module), *leads = PyDict_GetItemWithError(w->leads, cls);
    if (leads != NULL)
        Py_INCREF(leads);
    else if (!PyErr_Occurred())
        leads = PyObject_CallOneArg(w->find, cls);
    if (leads != NULL && !PyTuple_Check(leads)) {
        PyErr_Format(PyExc_TypeError, "module %R: what leads from a %.200s must be a tuple, not %.200s", name,
                     Py_TYPE(module)->tp_name, Py_TYPE(leads)->tp_name);
        Py_CLEAR(leads);
    }
    return leads;
}

/* The module's child called `key`, a new reference. */
static PyObject *child_of(const walk *w, PyObject *module, PyObject *key, PyObject *name)
{
    PyObject *children = children_of(w, module, NULL, name), *child = NULL;
    if (children != NULL && (child = PyDict_GetItemWithError(children, key)) == NULL && !PyErr_Occurred())
        PyErr_Format(PyExc_KeyError, "module %R: %.200s has lost its %S", name, Py_TYPE(module)->tp_name, key);
    Py_XINCREF(child);
    Py_XDECREF(children);
    return child;
}

/* The module without its wrappers, a new reference. */
static PyObject *unwrapped(const walk *w, PyObject *module, PyObject *name)
{
    PyObject *inner = Py_NewRef(module), *leads;
    for (int depth = 0; inner != NULL; depth++) {
        leads = leads_of(w, inner, name);
        if (leads == NULL || PyTuple_GET_SIZE(leads) == 0) {
            if (leads == NULL)
                Py_CLEAR(inner);
            Py_XDECREF(leads);
            break;
        }
        for (Py_ssize_t i = 0; inner != NULL && i < PyTuple_GET_SIZE(leads); i++)
            Py_SETREF(inner, child_of(w, inner, PyTuple_GET_ITEM(leads, i), name));
        Py_DECREF(leads);
        if (depth == 1000) {
            PyErr_Format(PyExc_RecursionError, "module %R: its wrappers contain each other", name);
            Py_CLEAR(inner);
        }
    }
    return inner;
}

/* "name.key", or "key" at the top. */
static PyObject *child_name(PyObject *name, PyObject *key)
{
    if (!PyUnicode_Check(key)) {
        PyErr_Format(PyExc_TypeError, "module %R: the names of its children must be strings, not %.200s", name,
                     Py_TYPE(key)->tp_name);
        return NULL;
    }
    const Py_ssize_t above = PyUnicode_GET_LENGTH(name), below = PyUnicode_GET_LENGTH(key);
    if (above == 0)
        return Py_NewRef(key);
    if (!PyUnicode_IS_COMPACT_ASCII(name) || !PyUnicode_IS_COMPACT_ASCII(key) || above > PY_SSIZE_T_MAX - below - 1)
        return PyUnicode_FromFormat("%U.%U", name, key);
    PyObject *whole = PyUnicode_New(above + 1 + below, 127);
    if (whole != NULL) {
        char *text = (char *)PyUnicode_1BYTE_DATA(whole);
        memcpy(text, PyUnicode_1BYTE_DATA(name), (size_t)above);
        text[above] = '.';
        memcpy(text + above + 1, PyUnicode_1BYTE_DATA(key), (size_t)below);
    }
    return whole;
}

/* Put a module on the stack; takes the reference to its name, which may be NULL with an exception. */
static bool push(walk *w, PyObject *module, PyObject *name, int depth)
{
    if (name != NULL && w->count == w->room) {
        const Py_ssize_t room = w->room != 0 ? 2 * w->room : 256;
        waiting *stack = PyMem_Realloc(w->stack, (size_t)room * sizeof *stack);
        if (stack == NULL) {
            PyErr_NoMemory();
            Py_CLEAR(name);
        } else {
            w->stack = stack;
            w->room = room;
        }
    }
    if (name != NULL)
        w->stack[w->count++] = (waiting){Py_NewRef(module), name, depth};
    return name != NULL;
}

static bool push_child(walk *w, PyObject *key, PyObject *child, const waiting *parent)
{
    return child == Py_None || push(w, child, child_name(parent->name, key), parent->depth + 1);
}

static bool push_children(walk *w, PyObject *children, const waiting *parent)
{
    const Py_ssize_t first = w->count;
    PyObject *key, *child, *items = NULL;
    Py_ssize_t at = 0;
    bool good = true;
    if (PyDict_GET_SIZE(children) > 0 && parent->depth >= Py_GetRecursionLimit()) {
        PyErr_SetString(PyExc_RecursionError, "modules contain each other, or too deeply, while listing modules");
        return false;
    }
    if (PyDict_CheckExact(children)) {
        while (good && PyDict_Next(children, &at, &key, &child))
            good = push_child(w, key, child, parent);
    } else { /* an OrderedDict has an order of its own */
        items = PyMapping_Items(children);
        good = items != NULL;
        for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(items); i++) {
            PyObject *pair = PyList_GET_ITEM(items, i);
            if (PyTuple_CheckExact(pair) && PyTuple_GET_SIZE(pair) == 2)
                good = push_child(w, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), parent);
        }
        Py_XDECREF(items);
    }
    for (Py_ssize_t low = first, high = w->count - 1; low < high; low++, high--) { /* the first child is to be the next */
        const waiting swapped = w->stack[low];
        w->stack[low] = w->stack[high];
        w->stack[high] = swapped;
    }
    return good;
}

/* What leads from a module, for the walk ahead. */
static PyObject *way_of(const void *ctx, PyObject *module)
{
    PyObject *leads = ahead_of_class(((const walk *)ctx)->leads, module);
    return leads != NULL && PyTuple_Check(leads) ? leads : NULL;
}

/* 1 the first time that it is called with an object, 0 after that, -1 with an exception. */
static int is_new(walk *w, const PyObject *module)
{
    const int added = address_set_add(&w->seen, module);
    if (added < 0)
        PyErr_NoMemory();
    return added;
}

/* List a module if it is new, and let what is below it wait. */
static bool list_one(walk *w, const waiting *next)
{
    PyObject *module = unwrapped(w, next->module, next->name);
    const int fresh = module != NULL ? is_new(w, module) : -1;
    bool good = fresh == 0;
    if (fresh == 1) {
        PyObject *pair = PyTuple_Pack(2, next->name, module), *own = NULL, *children = NULL;
        good = pair != NULL && PyList_Append(w->list, pair) == 0;
        Py_XDECREF(pair);
        if (good && (own = PyObject_GenericGetDict(module, NULL)) == NULL)
            PyErr_Clear(); /* its attribute may be elsewhere */
        if (own != NULL && !PyDict_Check(own))
            Py_CLEAR(own);
        if (good)
            children = children_of(w, module, own, next->name);
        good = children != NULL && push_children(w, children, next);
        Py_XDECREF(children);
        Py_XDECREF(own);
    }
    Py_XDECREF(module);
    return good;
}

static void forget(const waiting *one)
{
    Py_DECREF(one->name);
    Py_DECREF(one->module);
}

PyDoc_STRVAR(walk_modules_doc,
             "walk_modules(root, leads, find, /)\n--\n\n"
             "A list of (dotted name, module) of root and of everything below it, each module once.\n\n"
             "leads is a dict: class -> names of children that lead from a wrapper to what it is around, () for a class\n"
             "that is none; find(class) says it of a class that the dict lacks. Wrappers, root too, are looked through: what\n"
             "they are around stands in their place under their name, and nothing else in them is listed. Order and names\n"
             "are otherwise those of torch's named_modules.\n\n"
             "Raises TypeError if something is no torch module, KeyError if a wrapper lacks its child, RecursionError for a\n"
             "tree deeper than Python's own limit.");

static PyObject *walk_modules(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 3 || !PyDict_Check(args[1]) || !PyCallable_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "walk_modules() takes a module, a dict of leads, and a function");
        return NULL;
    }
    walk w = {.leads = args[1], .find = args[2], .list = PyList_New(0)};
    w.modules_name = PyUnicode_InternFromString("_modules");
    w.ahead.modules_name = w.modules_name;
    const int collecting = PyGC_Disable(); /* thousands of tuples that are all alive */
    bool good = w.list != NULL && w.modules_name != NULL && push(&w, args[0], PyUnicode_New(0, 0), 0);
    while (good && w.count > 0) {
        ahead_of_walk(&w.ahead, w.stack, (size_t)w.count, sizeof *w.stack, way_of, &w);
        const waiting next = w.stack[--w.count];
        good = list_one(&w, &next);
        forget(&next);
    }
    if (collecting)
        PyGC_Enable();
    while (w.count > 0)
        forget(&w.stack[--w.count]);
    PyMem_Free(w.stack);
    ahead_clear(&w.ahead);
    address_set_clear(&w.seen);
    Py_XDECREF(w.modules_name);
    if (!good)
        Py_CLEAR(w.list);
    return w.list;
}

/* ---------------------------------------------------------------- describing */

/* Linear layers of a model are of a few forms: one row says it of all that are alike, and is read by the core once. */
#define FORMS 16
typedef struct form {
    int64_t rows, columns;
    pc_dtype dtype;
    bool has_bias;
    PyObject *row; /* held by the list that is being made */
} form;

typedef struct description {
    peftc_state *state;
    PyObject *linear;   /* nn.Linear, whose plain ones are described here */
    PyObject *of_class; /* class → the row of all of its modules */
    PyObject *describe; /* asked of everything else */
    PyObject *parameters, *weight, *bias; /* names */
    form forms[FORMS];
    int count;
} description;

/* Is it a plain linear layer, all in the CPU's memory? */
static bool is_plain_linear(const description *d, PyObject *module, form *out)
{
    peftc_tensor tensor;
    PyObject *own = (PyObject *)Py_TYPE(module) == d->linear ? PyObject_GenericGetDict(module, NULL) : NULL;
    PyObject *parameters = own != NULL && PyDict_Check(own) ? PyDict_GetItemWithError(own, d->parameters) : NULL, *weight = NULL,
             *bias = NULL;
    if (parameters != NULL && PyDict_Check(parameters)) {
        weight = Py_XNewRef(PyDict_GetItemWithError(parameters, d->weight));
        bias = PyDict_GetItemWithError(parameters, d->bias);
    }
    const bool has_bias = bias != NULL && bias != Py_None;
    const bool plain = weight != NULL && bias != NULL && peftc_read_tensor(d->state, weight, &tensor) && tensor.ndim == 2;
    if (plain)
        *out = (form){tensor.shape[0], tensor.shape[1], tensor.dtype, has_bias, NULL};
    Py_XDECREF(weight);
    Py_XDECREF(own);
    PyErr_Clear();
    return plain;
}

/* What the core is to know of a module; a new reference. */
static PyObject *row_of(description *d, PyObject *module)
{
    form this = {.row = NULL};
    const bool plain = is_plain_linear(d, module, &this);
    for (int i = 0; plain && i < d->count; i++) {
        const form *like = &d->forms[i];
        if (like->rows == this.rows && like->columns == this.columns && like->dtype == this.dtype &&
            like->has_bias == this.has_bias)
            return Py_NewRef(like->row);
    }
    PyObject *row = NULL;
    if (plain) {
        row = Py_BuildValue("(sssLLOOO)", "Linear", "Linear", pc_dtype_get(this.dtype)->name, (long long)this.columns,
                            (long long)this.rows, Py_None, Py_None, this.has_bias ? Py_True : Py_False);
    } else {
        row = Py_XNewRef(PyDict_GetItemWithError(d->of_class, (PyObject *)Py_TYPE(module)));
        if (row == NULL && !PyErr_Occurred())
            row = PyObject_CallOneArg(d->describe, module);
    }
    if (row != NULL && plain && d->count < FORMS) {
        this.row = row;
        d->forms[d->count++] = this;
    }
    return row;
}

#define AT_A_TIME 128 /* modules of a list */

static void look_ahead(ahead *a, PyObject *pairs, Py_ssize_t begin)
{
    PyObject *modules[AT_A_TIME];
    size_t count = 0;
    for (Py_ssize_t i = begin; i < begin + AT_A_TIME && i < PyList_GET_SIZE(pairs); i++) {
        PyObject *pair = PyList_GET_ITEM(pairs, i);
        if (PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2)
            modules[count++] = PyTuple_GET_ITEM(pair, 1);
    }
    ahead_of_parameters(a, modules, count);
}

PyDoc_STRVAR(describe_modules_doc,
             "describe_modules(modules, linear, of_class, describe, /)\n--\n\n"
             "For each (name, module) of a list (name, row), as AdapterRegistry.bind takes modules of other libraries; and the\n"
             "modules' own parameters: two lists.\n\n"
             "The row is what the dict of_class has of the module's class, else describe(module). Those of the class `linear`\n"
             "(exactly; None for no class) whose weight is a plain one in the CPU's memory are described here, without addresses.\n\n"
             "Raises TypeError for anything else than tuples of two in the list, and what describe raises.");

static PyObject *describe_modules(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 4 || !PyList_Check(args[0]) || !PyDict_Check(args[2]) || !PyCallable_Check(args[3])) {
        PyErr_SetString(PyExc_TypeError,
                        "describe_modules() takes a list of (name, module), a class or None, a dict, and a function");
        return NULL;
    }
    description d = {.state = peftc_get_state(module),
                     .linear = args[1],
                     .of_class = args[2],
                     .describe = args[3],
                     .parameters = PyUnicode_InternFromString("_parameters"),
                     .weight = PyUnicode_InternFromString("weight"),
                     .bias = PyUnicode_InternFromString("bias")};
    ahead later = {.state = d.state, .parameters_name = d.parameters};
    PyObject *rows = PyList_New(0), *parameters = PyList_New(0), *result = NULL;
    bool good = d.parameters != NULL && d.weight != NULL && d.bias != NULL && rows != NULL && parameters != NULL;
    for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(args[0]); i++) {
        if (i % AT_A_TIME == 0)
            look_ahead(&later, args[0], i);
        PyObject *pair = Py_NewRef(PyList_GET_ITEM(args[0], i)), *row = NULL, *named = NULL;
        if (PyTuple_Check(pair) && PyTuple_GET_SIZE(pair) == 2)
            row = row_of(&d, PyTuple_GET_ITEM(pair, 1));
        else
            PyErr_Format(PyExc_TypeError, "modules[%zd] must be a tuple (name, module), got %R", i, pair);
        if (row != NULL)
            named = PyTuple_Pack(2, PyTuple_GET_ITEM(pair, 0), row);
        good = named != NULL && PyList_Append(rows, named) == 0 &&
               torch_append_own(parameters, PyTuple_GET_ITEM(pair, 1), d.parameters);
        Py_XDECREF(named);
        Py_XDECREF(row);
        Py_DECREF(pair);
    }
    ahead_clear(&later);
    if (good)
        result = PyTuple_Pack(2, rows, parameters);
    Py_XDECREF(parameters);
    Py_XDECREF(rows);
    Py_XDECREF(d.bias);
    Py_XDECREF(d.weight);
    Py_XDECREF(d.parameters);
    return result;
}

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef functions[] = {
    {"walk_modules", FASTCALL(walk_modules), METH_FASTCALL, walk_modules_doc},
    {"describe_modules", FASTCALL(describe_modules), METH_FASTCALL, describe_modules_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_walk(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
