/* AdapterRegistry: the module table, filled from the host's modules. */
#include "py_registry.h"

static int is_module(peftc_state *state, PyObject *object)
{
    return state->module_type != NULL && PyObject_TypeCheck(object, state->module_type);
}

static int is_layer(peftc_state *state, PyObject *object)
{
    return state->layer_type != NULL && PyObject_TypeCheck(object, state->layer_type);
}

/* Copy what the core may need from the host's object into its table entry, names aside. */
static void describe(peftc_state *state, PyObject *object, pc_module *entry)
{
    if (!is_layer(state, object))
        return;
    const pc_module *now = &((peftc_layer_object *)object)->core;
    pc_module kept = *entry;
    *entry = *now;
    entry->name = kept.name;
    entry->name_len = kept.name_len;
    entry->class_name = kept.class_name;
    entry->output_embedding = kept.output_embedding;
    entry->input_embedding = kept.input_embedding;
    entry->alias_of = kept.alias_of;
}

static bool same_geometry(const pc_module *a, const pc_module *b)
{
    return a->kind == b->kind && a->in_features == b->in_features && a->out_features == b->out_features &&
           memcmp(a->kernel, b->kernel, sizeof a->kernel) == 0 && a->groups == b->groups;
}

/* Does the module belong to another model with adapters? They would stop applying there. */
static int check_free(const registry_object *self, peftc_state *state, PyObject *object, const char *name)
{
    const peftc_module_object *module = (peftc_module_object *)object;
    if (!is_module(state, object) || module->registry == NULL || module->registry == (PyObject *)self ||
        pc_registry_count(peftc_registry_core(module->registry)) == 0)
        return 0;
    PyErr_Format(PyExc_ValueError,
                 "module %s already belongs to another model that has adapters attached; delete those first or "
                 "attach the adapter to that model",
                 name);
    return -1;
}

/* Is the object in the table already, under the name that it goes by? (Another may have taken that name.) */
static bool is_listed(const registry_object *self, peftc_state *state, PyObject *object)
{
    const peftc_module_object *module = (peftc_module_object *)object;
    return is_module(state, object) && module->registry == (PyObject *)self &&
           PyList_GET_ITEM(self->objects, module->index) == object;
}

/* `old` has lost its place in the table: it goes by the next of its other names, if it has one. */
static void rename_object(registry_object *self, PyObject *old)
{
    pc_module_table *table = pc_registry_modules(self->core);
    int32_t first = -1;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(self->objects); i++) {
        if (PyList_GET_ITEM(self->objects, i) != old)
            continue;
        table->items[i].alias_of = first;
        if (first < 0)
            first = ((peftc_module_object *)old)->index = (int32_t)i;
    }
}

/* A name that the table knows: the same object (nothing to do) or one that took its place. */
static int rebind(registry_object *self, peftc_state *state, pc_module *entry, PyObject *object)
{
    Py_ssize_t index = entry - pc_registry_modules(self->core)->items;
    PyObject *old = PyList_GET_ITEM(self->objects, index);
    if (old == object)
        return 0;
    if (pc_registry_count(self->core) != 0) {
        if (is_layer(state, object) != is_layer(state, old) ||
            (is_layer(state, object) && !same_geometry(entry, &((peftc_layer_object *)object)->core))) {
            PyErr_Format(PyExc_ValueError,
                         "module %s was replaced by a %s of another shape while adapters are attached; delete the "
                         "adapters first",
                         entry->name, Py_TYPE(object)->tp_name);
            return -1;
        }
    }
    if (check_free(self, state, object, entry->name) < 0)
        return -1;
    peftc_module_object *module = is_module(state, object) ? (peftc_module_object *)object : NULL;
    PyObject *registry = NULL; /* the one that the module leaves: let go of last, that may run any code */
    const bool old_listed = is_listed(self, state, old) && ((peftc_module_object *)old)->index == index;
    entry->alias_of = is_listed(self, state, object) ? module->index : -1;
    PyList_SET_ITEM(self->objects, index, Py_NewRef(object));
    if (module != NULL && entry->alias_of < 0) {
        registry = module->registry;
        module->registry = Py_NewRef(self);
        module->index = (int32_t)index;
    }
    if (old_listed)
        rename_object(self, old);
    Py_XDECREF(registry);
    Py_DECREF(old);
    return 0;
}

static int bind_one(registry_object *self, peftc_state *state, PyObject *name_obj, PyObject *object,
                    PyObject *output_embedding, PyObject *input_embedding, foreign_rows *seen)
{
    Py_ssize_t len;
    const char *name = PyUnicode_AsUTF8AndSize(name_obj, &len);
    if (name == NULL)
        return -1;
    pc_module_table *table = pc_registry_modules(self->core);
    pc_module *known = pc_module_table_find(table, name, (size_t)len);
    if (known != NULL)
        return rebind(self, state, known, object);

    pc_module entry = {.name = name, .name_len = (size_t)len, .alias_of = -1, .groups = 1};
    const char *dot = strrchr(Py_TYPE(object)->tp_name, '.');
    entry.class_name = dot != NULL ? dot + 1 : Py_TYPE(object)->tp_name;
    entry.output_embedding = output_embedding != Py_None && PyUnicode_Compare(output_embedding, name_obj) == 0;
    entry.input_embedding = input_embedding != Py_None && PyUnicode_Compare(input_embedding, name_obj) == 0;
    peftc_module_object *module = is_module(state, object) ? (peftc_module_object *)object : NULL;
    if (is_listed(self, state, object)) {
        entry.alias_of = module->index; /* the same object under a second name */
    } else if (check_free(self, state, object, name) < 0) {
        return -1;
    }
    describe(state, object, &entry);
    if (PyTuple_Check(object) && registry_describe_foreign(object, seen, &entry) < 0)
        return -1;
    size_t index;
    pc_error err;
    const Py_ssize_t last = PyList_GET_SIZE(self->objects);
    if (PyList_Append(self->objects, object) < 0)
        return -1;
    if (pc_module_table_add(table, &entry, &index, &err) != PC_OK) {
        (void)PyList_SetSlice(self->objects, last, last + 1, NULL);
        peftc_raise(state, &err);
        return -1;
    }
    if (module != NULL && entry.alias_of < 0) {
        Py_XSETREF(module->registry, Py_NewRef(self));
        module->index = (int32_t)index;
    }
    return 0;
}

const char registry_bind_doc[] =
    "bind($self, modules, output_embedding=None, input_embedding=None)\n--\n\n"
             "Append (dotted name, module) pairs to the module table, the model itself first under \"\".\n\n"
             "Modules of peftc.nn learn their registry and index. A name that is already bound is skipped, so the call "
             "can be repeated as a model grows. output_embedding is the dotted name of the head that target_modules="
             "\"all-linear\" leaves out, input_embedding that of the table of words; the base weights of both are part of "
             "an adapter whose target_modules names them.";

PyObject *registry_bind(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"modules", "output_embedding", "input_embedding", NULL};
    PyObject *modules, *output_embedding = Py_None, *input_embedding = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OO:bind", names, &modules, &output_embedding, &input_embedding))
        return NULL;
    peftc_state *state = registry_state(self);
    if (output_embedding != Py_None && !PyUnicode_Check(output_embedding))
        return PyErr_Format(PyExc_TypeError, "output_embedding is a dotted name or None, got %R", output_embedding);
    if (input_embedding != Py_None && !PyUnicode_Check(input_embedding))
        return PyErr_Format(PyExc_TypeError, "input_embedding is a dotted name or None, got %R", input_embedding);
    PyObject *pairs = PySequence_Check(modules) ? PySequence_Tuple(modules) : NULL; /* a list may change meanwhile */
    if (pairs == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "modules must be a sequence of (name, module)");
        return NULL;
    }
    const Py_ssize_t count = PyTuple_GET_SIZE(pairs);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = PyTuple_GET_ITEM(pairs, i);
        if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 || !PyUnicode_Check(PyTuple_GET_ITEM(pair, 0))) {
            PyErr_Format(PyExc_TypeError, "modules[%zd] must be a tuple (name, module), got %R", i, pair);
            Py_DECREF(pairs);
            return NULL;
        }
    }
    int result = registry_lock(self);
    if (result == 0) {
        pc_error err;
        pc_module_table *table = pc_registry_modules(self->core);
        if (table->count == 0 && pc_module_table_reserve(table, (size_t)count, &err) != PC_OK) {
            peftc_raise(state, &err);
            result = -1;
        }
        foreign_rows seen = {.rows = {NULL}};
        for (Py_ssize_t i = 0; i < count && result == 0; i++) {
            PyObject *pair = PyTuple_GET_ITEM(pairs, i);
            result = bind_one(self, state, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), output_embedding,
                              input_embedding, &seen);
        }
        registry_unlock(self);
    }
    Py_DECREF(pairs);
    return result == 0 ? Py_NewRef(Py_None) : NULL;
}

PyObject *registry_pin_weights(registry_object *self, peftc_state *state)
{
    pc_module_table *table = pc_registry_modules(self->core);
    PyObject *pins = PyList_New(0);
    for (size_t i = 0; pins != NULL && i < table->count; i++) {
        PyObject *object = PyList_GET_ITEM(self->objects, (Py_ssize_t)i);
        if (!is_layer(state, object))
            continue;
        peftc_layer_object *layer = (peftc_layer_object *)object;
        if (peftc_layer_sync(layer) < 0) {
            Py_CLEAR(pins);
            break;
        }
        describe(state, object, &table->items[i]);
        if ((layer->weight_owner != NULL && PyList_Append(pins, layer->weight_owner) < 0) ||
            (layer->bias_owner != NULL && PyList_Append(pins, layer->bias_owner) < 0))
            Py_CLEAR(pins);
    }
    return pins;
}
