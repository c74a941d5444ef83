/* Taking one adapter out of all layers of a torch model. */
#include "py_torch_shelf.h"

/* So many containers before its turn one is fetched. */
#define AHEAD 8

/* The dicts that an adapter's things are in. */
typedef struct places {
    shelf own, children; /* a row for each layer: its __dict__, and its dict of children */
    shelf values;        /* … a column for each field: the dict of that name in the layer's __dict__ */
    shelf containers;    /* … the child of that name */
    shelf modules, parameters, keys; /* the dicts in each container that there is, in their order */
} places;

typedef struct names {
    PyObject *modules, *parameters, *keys;
} names;

/* s ← the dicts called `key` in the dicts. */
static bool find_in(shelf *s, const shelf *dicts, PyObject *key)
{
    const bool good = shelf_of_shelf(s, dicts) && shelf_to_items(s, key);
    if (good)
        shelf_keep_dicts(s);
    return good;
}

static bool find_places(places *p, PyObject *layers, PyObject *fields, const names *n)
{
    shelf homes = {.items = NULL};
    bool good = shelf_of_list(&p->own, layers) && shelf_to_dicts(&p->own) && find_in(&p->children, &p->own, n->modules) &&
                shelf_of_items(&p->values, &p->own, fields);
    if (good)
        shelf_keep_dicts(&p->values);
    good = good && shelf_of_items(&p->containers, &p->children, fields) && shelf_of_shelf(&homes, &p->containers);
    if (good)
        shelf_close_up(&homes);
    good = good && shelf_to_dicts(&homes) && find_in(&p->modules, &homes, n->modules) &&
           find_in(&p->parameters, &homes, n->parameters) && find_in(&p->keys, &homes, n->keys);
    shelf_clear(&homes);
    return good;
}

static void forget_places(places *p)
{
    shelf *const all[] = {&p->own, &p->children, &p->values, &p->containers, &p->modules, &p->parameters, &p->keys};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        shelf_clear(all[i]);
}

/* Take `key` out of the dict, if both are there; what it was is kept until after the caller's loop. */
static bool pop_item(PyObject *dict, PyObject *key, PyObject *kept)
{
    PyObject *value = dict != NULL && PyDict_GET_SIZE(dict) > 0 ? PyDict_GetItemWithError(dict, key) : NULL;
    if (value == NULL)
        return !PyErr_Occurred();
    return PyList_Append(kept, value) == 0 &&
           (PyDict_CheckExact(dict) ? PyDict_DelItem(dict, key) : PyObject_DelItem(dict, key)) == 0;
}

static bool is_empty(PyObject *dict)
{
    return dict == NULL || PyDict_GET_SIZE(dict) == 0;
}

/* What drop_adapter is asked for. */
typedef struct dropping {
    PyObject *fields; /* tuple */
    size_t holding;   /* the first so many of them hold tensors */
    PyObject *later;  /* tuple of fields whose containers go when they are empty */
    PyObject *name;
} dropping;

/* Take the adapter out of a container, which is the k-th; `empty` tells whether nothing is left in it. */
static bool drop_from(const dropping *d, const places *p, size_t k, PyObject *kept, bool *empty)
{
    PyObject *const dicts[] = {p->modules.items[k], p->parameters.items[k], p->keys.items[k]};
    if (k + AHEAD < p->modules.count)
        ahead_table(p->modules.items[k + AHEAD], 2);
    for (int i = 0; i < 3; i++)
        if (!pop_item(dicts[i], d->name, kept))
            return false;
    *empty = is_empty(dicts[0]) && is_empty(dicts[1]);
    return true;
}

/* Take the adapter out of a layer, whose first container is the *next-th; `bare` tells whether nothing is left in the fields
 * that hold tensors. */
static bool drop_from_layer(const dropping *d, const places *p, size_t row, size_t *next, PyObject *kept, bool *bare)
{
    *bare = true;
    for (size_t f = 0; f < p->values.columns; f++) {
        const size_t i = row * p->values.columns + f, later = i + p->values.columns;
        if (later < p->values.count)
            ahead_table(p->values.items[later], 2);
        if (!pop_item(p->values.items[i], d->name, kept))
            return false;
        if (p->containers.items[i] == NULL)
            continue;
        bool empty;
        if (!drop_from(d, p, (*next)++, kept, &empty))
            return false;
        *bare = *bare && (f >= d->holding || empty);
        PyObject *field = PyTuple_GET_ITEM(d->fields, (Py_ssize_t)f);
        const int goes = empty ? PySequence_Contains(d->later, field) : 0;
        if (goes < 0 || (goes > 0 && !pop_item(p->children.items[row], field, kept)))
            return false;
    }
    return true;
}

/* The indices of the layers that are bare now, a list. */
static PyObject *drop_all(const dropping *d, const places *p, PyObject *kept)
{
    PyObject *bare_ones = PyList_New(0);
    size_t next = 0;
    for (size_t row = 0; bare_ones != NULL && row < p->own.rows; row++) {
        bool bare;
        PyObject *index = NULL;
        bool good = drop_from_layer(d, p, row, &next, kept, &bare);
        if (good && bare)
            good = (index = PyLong_FromSize_t(row)) != NULL && PyList_Append(bare_ones, index) == 0;
        Py_XDECREF(index);
        if (!good)
            Py_CLEAR(bare_ones);
    }
    return bare_ones;
}

PyDoc_STRVAR(drop_adapter_doc,
             "drop_adapter(layers, holding, other, later, name, /)\n--\n\n"
             "Take one adapter out of each of a list of layers: out of what the tuples of fields `holding` and `other` name,\n"
             "which are dicts in the layer's __dict__, or children with the dicts _modules, _parameters and _keys. Children\n"
             "that the tuple `later` names go when they are empty.\n\n"
             "Returns the indices of the layers that have nothing left in `holding`. What was taken out goes at the end.");

static PyObject *drop_adapter(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    if (nargs != 5 || !PyList_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2]) || !PyTuple_Check(args[3])) {
        PyErr_SetString(PyExc_TypeError, "drop_adapter() takes a list of layers, three tuples of fields, and a name");
        return NULL;
    }
    const names n = {PyUnicode_InternFromString("_modules"), PyUnicode_InternFromString("_parameters"),
                     PyUnicode_InternFromString("_keys")};
    const dropping d = {PySequence_Concat(args[1], args[2]), (size_t)PyTuple_GET_SIZE(args[1]), args[3], args[4]};
    places p = {.own = {.items = NULL}};
    PyObject *kept = PyList_New(0), *bare = NULL;
    if (n.modules != NULL && n.parameters != NULL && n.keys != NULL && d.fields != NULL && kept != NULL &&
        find_places(&p, args[0], d.fields, &n))
        bare = drop_all(&d, &p, kept);
    forget_places(&p);
    Py_XDECREF(kept);
    Py_XDECREF(d.fields);
    Py_XDECREF(n.keys);
    Py_XDECREF(n.parameters);
    Py_XDECREF(n.modules);
    return bare;
}

static PyMethodDef functions[] = {
    {"drop_adapter", (PyCFunction)(void (*)(void))drop_adapter, METH_FASTCALL, drop_adapter_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_drop(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
