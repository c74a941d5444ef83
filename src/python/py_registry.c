/* peftc._core.AdapterRegistry: the mixin-compatible object.
 *
 * Everything here is thin: arguments to C, one core call, results to Python.
 * What is active is read and swapped in the core without the GIL's help; what
 * grows the module table or builds adapters holds `mutation`, a lock of its
 * own, because those release the GIL.
 */
#include "binding.h"

#include <pythread.h>
#include <structmember.h>

#include "../core/memory.h"
#include "../formats/adapter_config.h"
#include "../formats/safetensors.h"
#include "../formats/torch_bin.h"
#include "../methods/methods.h"
#include "array_weights.h"
#include "arrays.h"
#include "layer.h"

typedef struct registry_object {
    PyObject_HEAD
    pc_registry *core;
    PyObject *objects; /* list: the host's module by index */
    PyObject *weakrefs;
    PyThread_type_lock mutation;
} registry_object;

/* Keeps an arena alive under the arrays that view it. */
typedef struct arena_object {
    PyObject_HEAD
    pc_arena *arena;
} arena_object;

pc_registry *peftc_registry_core(PyObject *registry) { return ((registry_object *)registry)->core; }

static peftc_state *state_of(registry_object *self) { return peftc_state_of_type(Py_TYPE(self)); }

static void lock_mutation(registry_object *self)
{
    if (PyThread_acquire_lock(self->mutation, NOWAIT_LOCK))
        return;
    Py_BEGIN_ALLOW_THREADS
    PyThread_acquire_lock(self->mutation, WAIT_LOCK);
    Py_END_ALLOW_THREADS
}

static void unlock_mutation(registry_object *self) { PyThread_release_lock(self->mutation); }

/* ------------------------------------------------------------------ lifetime */

static PyObject *registry_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, ":AdapterRegistry", names))
        return NULL;
    peftc_state *state = peftc_state_of_type(type);
    if (state == NULL)
        return NULL;
    registry_object *self = (registry_object *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    pc_error err;
    self->objects = PyList_New(0);
    self->mutation = PyThread_allocate_lock();
    if (self->objects == NULL || self->mutation == NULL) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
        Py_DECREF(self);
        return NULL;
    }
    if (pc_registry_new(&self->core, &err) != PC_OK) {
        Py_DECREF(self);
        return peftc_raise(state, &err);
    }
    return (PyObject *)self;
}

static int registry_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(((registry_object *)op)->objects);
    return 0;
}

static int registry_clear(PyObject *op)
{
    Py_CLEAR(((registry_object *)op)->objects);
    return 0;
}

static void registry_dealloc(PyObject *op)
{
    registry_object *self = (registry_object *)op;
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (self->weakrefs != NULL)
        PyObject_ClearWeakRefs(op);
    registry_clear(op);
    pc_registry_free(self->core);
    if (self->mutation != NULL)
        PyThread_free_lock(self->mutation);
    type->tp_free(op);
    Py_DECREF(type);
}

static void arena_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    pc_arena_release(((arena_object *)op)->arena);
    type->tp_free(op);
    Py_DECREF(type);
}

static PyObject *arena_wrap(peftc_state *state, pc_arena *arena)
{
    arena_object *self = (arena_object *)state->arena_type->tp_alloc(state->arena_type, 0);
    if (self != NULL)
        self->arena = pc_arena_retain(arena);
    return (PyObject *)self;
}

/* ------------------------------------------------------------------- modules */

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
    entry->alias_of = kept.alias_of;
}

static bool same_geometry(const pc_module *a, const pc_module *b)
{
    return a->kind == b->kind && a->in_features == b->in_features && a->out_features == b->out_features &&
           memcmp(a->kernel, b->kernel, sizeof a->kernel) == 0 && a->groups == b->groups;
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
    peftc_module_object *module = (peftc_module_object *)object;
    if (is_module(state, object) && module->registry != (PyObject *)self) {
        Py_XSETREF(module->registry, Py_NewRef(self));
        module->index = (int32_t)index;
    }
    return PyList_SetItem(self->objects, index, Py_NewRef(object));
}

static int bind_one(registry_object *self, peftc_state *state, PyObject *name_obj, PyObject *object,
                    PyObject *output_embedding)
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
    peftc_module_object *module = is_module(state, object) ? (peftc_module_object *)object : NULL;
    if (module != NULL && module->registry == (PyObject *)self) {
        entry.alias_of = module->index; /* the same object under a second name */
    } else if (module != NULL && module->registry != NULL &&
               pc_registry_count(peftc_registry_core(module->registry)) != 0) {
        PyErr_Format(PyExc_ValueError,
                     "module %s already belongs to another model that has adapters attached; delete those first or "
                     "attach the adapter to that model",
                     name);
        return -1;
    }
    describe(state, object, &entry);
    size_t index;
    pc_error err;
    if (pc_module_table_add(table, &entry, &index, &err) != PC_OK) {
        peftc_raise(state, &err);
        return -1;
    }
    if (PyList_Append(self->objects, object) < 0)
        return -1;
    if (module != NULL && entry.alias_of < 0) {
        Py_XSETREF(module->registry, Py_NewRef(self));
        module->index = (int32_t)index;
    }
    return 0;
}

PyDoc_STRVAR(bind_doc,
             "bind($self, modules, output_embedding=None)\n--\n\n"
             "Append (dotted name, module) pairs to the module table, the model itself first under \"\".\n\n"
             "Modules of peftc.nn learn their registry and index. A name that is already bound is skipped, so the call "
             "can be repeated as a model grows. output_embedding is the dotted name of the head that target_modules="
             "\"all-linear\" leaves out.");

static PyObject *registry_bind(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"modules", "output_embedding", NULL};
    PyObject *modules, *output_embedding = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:bind", names, &modules, &output_embedding))
        return NULL;
    peftc_state *state = state_of(self);
    if (output_embedding != Py_None && !PyUnicode_Check(output_embedding))
        return PyErr_Format(PyExc_TypeError, "output_embedding is a dotted name or None, got %R", output_embedding);
    PyObject *fast = PySequence_Fast(modules, "modules must be a sequence of (name, module)");
    if (fast == NULL)
        return NULL;
    PyObject *result = NULL;
    lock_mutation(self);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(fast); i++) {
        PyObject *pair = PySequence_Fast_GET_ITEM(fast, i);
        if (!PyTuple_Check(pair) || PyTuple_GET_SIZE(pair) != 2 || !PyUnicode_Check(PyTuple_GET_ITEM(pair, 0))) {
            PyErr_Format(PyExc_TypeError, "modules[%zd] must be a tuple (name, module), got %R", i, pair);
            goto done;
        }
        if (bind_one(self, state, PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), output_embedding) < 0)
            goto done;
    }
    result = Py_NewRef(Py_None);
done:
    unlock_mutation(self);
    Py_DECREF(fast);
    return result;
}

/* Refresh every entry from its object and return a list that keeps their buffers alive while the GIL is released. */
static PyObject *pin_weights(registry_object *self, peftc_state *state)
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

/* ------------------------------------------------------- adding and loading */

/* A name argument as UTF-8; NULL with an exception. */
static const char *adapter_name(PyObject *obj, Py_ssize_t *len)
{
    if (!PyUnicode_Check(obj)) {
        PyErr_Format(PyExc_TypeError, "an adapter name is a str, got %R", obj);
        return NULL;
    }
    return PyUnicode_AsUTF8AndSize(obj, len);
}

#define MOST_METHODS 64

static pc_status parse_config(const char *text, Py_ssize_t len, const char *label, pc_config **out, pc_error *err)
{
    const pc_schema *schemas[MOST_METHODS];
    size_t count = pc_method_count < MOST_METHODS ? pc_method_count : MOST_METHODS;
    for (size_t i = 0; i < count; i++)
        schemas[i] = &pc_methods[i]->schema;
    return pc_config_parse(text, (size_t)len, label, schemas, count, out, err);
}

typedef struct new_adapter {
    const char *name;
    Py_ssize_t name_len;
    const char *config;
    Py_ssize_t config_len;
    const char *label;
    unsigned long long seed;
    int trainable;
} new_adapter;

/* Config → built adapter → filled (from source, or initialised when it is NULL) → listed.  No GIL needed. */
static pc_status make_adapter(registry_object *self, peftc_state *state, const new_adapter *request,
                              pc_weights *source, pc_load_report *report, pc_error *err)
{
    pc_config *config = NULL;
    pc_adapter *adapter = NULL;
    pc_status status = parse_config(request->config, request->config_len, request->label, &config, err);
    if (status != PC_OK)
        return status;
    status = pc_adapter_build(self->core, request->name, (size_t)request->name_len, config, &adapter, err);
    if (status != PC_OK) {
        pc_config_free(config);
        return status;
    }
    adapter->trainable = request->trainable != 0;
    if (source != NULL)
        status = pc_adapter_load(state->rt, self->core, adapter, source, request->seed, report, err);
    else
        status = pc_adapter_init(state->rt, self->core, adapter, request->seed, err);
    if (status == PC_OK)
        status = pc_registry_insert(self->core, adapter, err);
    if (status != PC_OK)
        pc_adapter_release(adapter);
    return status;
}

PyDoc_STRVAR(add_doc,
             "add($self, name, config, *, label='config', seed=0, trainable=True)\n--\n\n"
             "Plan, allocate and initialise a new adapter from a config in JSON. It is listed but not active.\n\n"
             "seed fixes every random draw, whatever the number of threads. Raises ValueError (a value that cannot work, "
             "no target found, a name that is taken), NotImplementedError or MemoryError; nothing has changed then.");

static PyObject *registry_add(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"name", "config", "label", "seed", "trainable", NULL};
    PyObject *name;
    new_adapter request = {.label = "config", .trainable = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os#|$sKp:add", names, &name, &request.config, &request.config_len,
                                     &request.label, &request.seed, &request.trainable) ||
        (request.name = adapter_name(name, &request.name_len)) == NULL)
        return NULL;
    peftc_state *state = state_of(self);
    pc_error err;
    pc_status status = PC_ERR_CALLBACK;
    lock_mutation(self);
    PyObject *pins = pin_weights(self, state);
    if (pins != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = make_adapter(self, state, &request, NULL, NULL, &err);
        Py_END_ALLOW_THREADS
        Py_DECREF(pins);
    }
    unlock_mutation(self);
    if (pins == NULL)
        return NULL;
    if (status != PC_OK)
        return peftc_raise(state, &err);
    Py_RETURN_NONE;
}

/* Open the weights that load() was given: a dict, or a file whose format its name tells. */
static pc_weights *open_source(peftc_state *state, PyObject *source)
{
    if (PyDict_Check(source))
        return peftc_array_weights(source);
    PyObject *path = NULL;
    if (!PyUnicode_FSConverter(source, &path))
        return NULL;
    const char *file = PyBytes_AS_STRING(path);
    size_t len = strlen(file);
    static const char extension[] = ".safetensors";
    const size_t extension_len = sizeof extension - 1;
    pc_weights *weights = NULL;
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    if (len >= extension_len && strcmp(file + len - extension_len, extension) == 0) {
        pc_safetensors *st = NULL;
        status = pc_safetensors_open(file, &st, &err);
        if (status == PC_OK)
            weights = pc_safetensors_weights(st);
    } else {
        status = pc_torch_bin_open(file, &weights, &err);
    }
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (status != PC_OK) {
        peftc_raise(state, &err);
        return NULL;
    }
    return weights;
}

static PyObject *list_of_strings(const pc_strings *strings)
{
    PyObject *list = PyList_New((Py_ssize_t)strings->count);
    for (size_t i = 0; list != NULL && i < strings->count; i++) {
        PyObject *text = PyUnicode_DecodeUTF8(strings->items[i].text, (Py_ssize_t)strings->items[i].len, "replace");
        if (text == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, text);
    }
    return list;
}

PyDoc_STRVAR(load_doc,
             "load($self, name, config, source, *, label='config', seed=0, trainable=False)\n--\n\n"
             "Plan, allocate and fill a new adapter from source: the path of a .safetensors or .bin file, or a dict of "
             "name -> array.\n\n"
             "Tensors are read straight into the adapter's arena and converted to the base layer's dtype. Names may "
             "start with \"base_model.model.\". Returns (missing, unexpected): keys that source lacks, which were "
             "initialised as add() would, and keys that the adapter does not know. The adapter is listed but not active. "
             "Raises as add() does, ValueError for a wrong shape, KeyError for a missing modules_to_save tensor, and "
             "the reader's errors; nothing has changed then.");

static PyObject *registry_load(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"name", "config", "source", "label", "seed", "trainable", NULL};
    PyObject *name, *source_obj;
    new_adapter request = {.label = "config"};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os#O|$sKp:load", names, &name, &request.config,
                                     &request.config_len, &source_obj, &request.label, &request.seed,
                                     &request.trainable) ||
        (request.name = adapter_name(name, &request.name_len)) == NULL)
        return NULL;
    peftc_state *state = state_of(self);
    pc_weights *source = open_source(state, source_obj);
    if (source == NULL)
        return NULL;
    pc_load_report report = {0};
    pc_pool_init(&report.pool);
    pc_error err;
    pc_status status = PC_ERR_CALLBACK;
    lock_mutation(self);
    PyObject *pins = pin_weights(self, state);
    if (pins != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = make_adapter(self, state, &request, source, &report, &err);
        Py_END_ALLOW_THREADS
        Py_DECREF(pins);
    }
    unlock_mutation(self);
    source->close(source);
    PyObject *result = NULL;
    if (pins != NULL && status != PC_OK) {
        peftc_raise(state, &err);
    } else if (pins != NULL) {
        PyObject *missing = list_of_strings(&report.missing);
        PyObject *unexpected = list_of_strings(&report.unexpected);
        if (missing != NULL && unexpected != NULL)
            result = PyTuple_Pack(2, missing, unexpected);
        Py_XDECREF(missing);
        Py_XDECREF(unexpected);
    }
    pc_load_report_free(&report);
    return result;
}

PyDoc_STRVAR(remove_doc,
             "remove($self, name, /)\n--\n\n"
             "Delete an adapter; the others stay active in their order. Its memory is freed once no forward pass and no "
             "array views it. Raises ValueError for an unknown name.");

static PyObject *registry_remove(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    Py_ssize_t len;
    const char *name = adapter_name(arg, &len);
    if (name == NULL)
        return NULL;
    pc_error err;
    lock_mutation(self);
    pc_status status = pc_registry_remove(self->core, name, (size_t)len, &err);
    unlock_mutation(self);
    if (status != PC_OK)
        return peftc_raise(state_of(self), &err);
    Py_RETURN_NONE;
}

/* ---------------------------------------------------------------- activation */

#define NAMES_ON_STACK 16

PyDoc_STRVAR(activate_doc,
             "activate($self, names, /)\n--\n\n"
             "Make exactly these adapters active, in this order; the cost does not depend on the model.\n\n"
             "Raises ValueError for an unknown name or two adapters that replace the same module; nothing has changed "
             "then.");

static PyObject *registry_activate(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    const char *name_stack[NAMES_ON_STACK], **texts = name_stack;
    size_t len_stack[NAMES_ON_STACK], *lens = len_stack;
    PyObject *fast = PySequence_Fast(arg, "activate() takes a sequence of adapter names");
    if (fast == NULL)
        return NULL;
    PyObject *result = NULL;
    Py_ssize_t count = PySequence_Fast_GET_SIZE(fast);
    if (count > NAMES_ON_STACK) {
        texts = PyMem_New(const char *, (size_t)count);
        lens = PyMem_New(size_t, (size_t)count);
        if (texts == NULL || lens == NULL) {
            PyErr_NoMemory();
            goto done;
        }
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t len;
        texts[i] = adapter_name(PySequence_Fast_GET_ITEM(fast, i), &len);
        if (texts[i] == NULL)
            goto done;
        lens[i] = (size_t)len;
    }
    pc_error err;
    if (pc_registry_activate(self->core, texts, lens, (size_t)count, &err) != PC_OK)
        peftc_raise(state_of(self), &err);
    else
        result = Py_NewRef(Py_None);
done:
    if (texts != name_stack)
        PyMem_Free(texts);
    if (lens != len_stack)
        PyMem_Free(lens);
    Py_DECREF(fast);
    return result;
}

static PyObject *list_of_adapters(pc_adapter *const *adapters, size_t count)
{
    PyObject *list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *text = PyUnicode_DecodeUTF8(adapters[i]->name, (Py_ssize_t)adapters[i]->name_len, "strict");
        if (text == NULL)
            Py_CLEAR(list);
        else
            PyList_SET_ITEM(list, (Py_ssize_t)i, text);
    }
    return list;
}

PyDoc_STRVAR(active_doc, "active($self, /)\n--\n\nA new list of the active adapters' names, in the order they apply; "
                         "what would apply, while disabled.");

static PyObject *registry_active(PyObject *op, PyObject *unused)
{
    (void)unused;
    pc_activation *activation = pc_registry_acquire(((registry_object *)op)->core);
    PyObject *list = list_of_adapters(activation->adapters, activation->count);
    pc_activation_release(activation);
    return list;
}

static PyObject *registry_get_enabled(PyObject *op, void *unused)
{
    (void)unused;
    pc_activation *activation = pc_registry_acquire(((registry_object *)op)->core);
    bool enabled = activation->enabled;
    pc_activation_release(activation);
    return PyBool_FromLong(enabled);
}

static int registry_set_enabled(PyObject *op, PyObject *value, void *unused)
{
    (void)unused;
    registry_object *self = (registry_object *)op;
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "enabled cannot be deleted");
        return -1;
    }
    int on = PyObject_IsTrue(value);
    if (on < 0)
        return -1;
    pc_error err;
    if (pc_registry_set_enabled(self->core, on != 0, &err) != PC_OK) {
        peftc_raise(state_of(self), &err);
        return -1;
    }
    return 0;
}

static PyObject *registry_get_version(PyObject *op, void *unused)
{
    (void)unused;
    pc_activation *activation = pc_registry_acquire(((registry_object *)op)->core);
    uint64_t version = activation->version;
    pc_activation_release(activation);
    return PyLong_FromUnsignedLongLong(version);
}

/* ---------------------------------------------------------------- inspection */

/* The adapter called `arg` (borrowed from the registry); NULL with KeyError or TypeError. */
static pc_adapter *find_adapter(registry_object *self, PyObject *arg)
{
    Py_ssize_t len;
    const char *name = adapter_name(arg, &len);
    if (name == NULL)
        return NULL;
    pc_adapter *adapter = pc_registry_find(self->core, name, (size_t)len);
    if (adapter == NULL)
        PyErr_SetObject(PyExc_KeyError, arg);
    return adapter;
}

static Py_ssize_t registry_len(PyObject *op) { return (Py_ssize_t)pc_registry_count(((registry_object *)op)->core); }

static int registry_contains(PyObject *op, PyObject *arg)
{
    if (!PyUnicode_Check(arg))
        return 0;
    Py_ssize_t len;
    const char *name = PyUnicode_AsUTF8AndSize(arg, &len);
    if (name == NULL)
        return -1;
    return pc_registry_find(((registry_object *)op)->core, name, (size_t)len) != NULL;
}

PyDoc_STRVAR(names_doc, "names($self, /)\n--\n\nThe names of all adapters, in the order they were added.");

static PyObject *registry_names(PyObject *op, PyObject *unused)
{
    (void)unused;
    pc_registry *core = ((registry_object *)op)->core;
    size_t count = pc_registry_count(core);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < count; i++) {
        const pc_adapter *adapter = pc_registry_at(core, i);
        PyObject *text = PyUnicode_DecodeUTF8(adapter->name, (Py_ssize_t)adapter->name_len, "strict");
        if (text == NULL || PyList_Append(list, text) < 0)
            Py_CLEAR(list);
        Py_XDECREF(text);
    }
    return list;
}

PyDoc_STRVAR(peft_type_doc, "peft_type($self, name, /)\n--\n\nThe adapter's method: \"LORA\", \"IA3\", \"ADALORA\".");

static PyObject *registry_peft_type(PyObject *op, PyObject *arg)
{
    const pc_adapter *adapter = find_adapter((registry_object *)op, arg);
    return adapter != NULL ? PyUnicode_FromString(adapter->method->schema.peft_type) : NULL;
}

PyDoc_STRVAR(trainable_doc, "trainable($self, name, /)\n--\n\nWhether the adapter's tensors receive gradients while it "
                            "is active.");

static PyObject *registry_trainable(PyObject *op, PyObject *arg)
{
    const pc_adapter *adapter = find_adapter((registry_object *)op, arg);
    return adapter != NULL ? PyBool_FromLong(adapter->trainable) : NULL;
}

PyDoc_STRVAR(set_trainable_doc, "set_trainable($self, name, trainable, /)\n--\n\nFreeze or unfreeze an adapter.");

static PyObject *registry_set_trainable(PyObject *op, PyObject *args)
{
    PyObject *name;
    int trainable;
    if (!PyArg_ParseTuple(args, "Op:set_trainable", &name, &trainable))
        return NULL;
    pc_adapter *adapter = find_adapter((registry_object *)op, name);
    if (adapter == NULL)
        return NULL;
    adapter->trainable = trainable != 0;
    Py_RETURN_NONE;
}

static PyObject *tensor_array(peftc_state *state, const pc_adapter *adapter, const pc_tensor *tensor, PyObject *owner)
{
    npy_intp shape[4];
    for (int d = 0; d < tensor->ndim; d++)
        shape[d] = (npy_intp)tensor->shape[d];
    return peftc_array_over(state, tensor->dtype, tensor->ndim, shape, pc_tensor_data(adapter, tensor), owner, 1);
}

static PyObject *tensor_name(registry_object *self, const pc_adapter *adapter, const pc_tensor *tensor,
                             bool with_adapter_name, pc_pool *pool)
{
    pc_string name;
    pc_error err;
    if (pc_tensor_name(self->core, adapter, tensor, with_adapter_name, pool, &name, &err) != PC_OK)
        return peftc_raise(state_of(self), &err);
    return PyUnicode_DecodeUTF8(name.text, (Py_ssize_t)name.len, "strict");
}

PyDoc_STRVAR(tensors_doc,
             "tensors($self, name, /)\n--\n\n"
             "All tensors of an adapter as tuples (state-dict key, name in the model, array, in the state dict?, "
             "trainable?, module's dotted name). The arrays are views of the arena and keep it alive.");

static PyObject *registry_tensors(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    peftc_state *state = state_of(self);
    pc_adapter *adapter = find_adapter(self, arg);
    if (adapter == NULL)
        return NULL;
    pc_adapter_retain(adapter);
    pc_pool pool;
    pc_pool_init(&pool);
    PyObject *owner = arena_wrap(state, adapter->arena);
    PyObject *list = owner != NULL ? PyList_New(0) : NULL;
    for (size_t i = 0; list != NULL && i < adapter->tensor_count; i++) {
        const pc_tensor *tensor = &adapter->tensors[i];
        PyObject *key = tensor_name(self, adapter, tensor, false, &pool);
        PyObject *name = key != NULL ? tensor_name(self, adapter, tensor, true, &pool) : NULL;
        PyObject *array = name != NULL ? tensor_array(state, adapter, tensor, owner) : NULL;
        const pc_module *module = &pc_registry_modules(self->core)->items[tensor->module];
        PyObject *row = array != NULL ? Py_BuildValue("(OOOOOs)", key, name, array,
                                                      tensor->in_state_dict ? Py_True : Py_False,
                                                      tensor->trainable ? Py_True : Py_False, module->name)
                                      : NULL;
        if (row == NULL || PyList_Append(list, row) < 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
        Py_XDECREF(array);
        Py_XDECREF(name);
        Py_XDECREF(key);
    }
    Py_XDECREF(owner);
    pc_pool_free(&pool);
    pc_adapter_release(adapter);
    return list;
}

PyDoc_STRVAR(state_dict_doc,
             "state_dict($self, name, /)\n--\n\n"
             "An adapter's state dict: PEFT's keys without the adapter's name -> views of the arena.");

static PyObject *registry_state_dict(PyObject *op, PyObject *arg)
{
    registry_object *self = (registry_object *)op;
    peftc_state *state = state_of(self);
    pc_adapter *adapter = find_adapter(self, arg);
    if (adapter == NULL)
        return NULL;
    pc_adapter_retain(adapter);
    pc_pool pool;
    pc_pool_init(&pool);
    PyObject *owner = arena_wrap(state, adapter->arena);
    PyObject *dict = owner != NULL ? PyDict_New() : NULL;
    for (size_t i = 0; dict != NULL && i < adapter->tensor_count; i++) {
        const pc_tensor *tensor = &adapter->tensors[i];
        if (!tensor->in_state_dict)
            continue;
        PyObject *key = tensor_name(self, adapter, tensor, false, &pool);
        PyObject *array = key != NULL ? tensor_array(state, adapter, tensor, owner) : NULL;
        if (array == NULL || PyDict_SetItem(dict, key, array) < 0)
            Py_CLEAR(dict);
        Py_XDECREF(array);
        Py_XDECREF(key);
    }
    Py_XDECREF(owner);
    pc_pool_free(&pool);
    pc_adapter_release(adapter);
    return dict;
}

/* Dotted names of the modules whose slot satisfies one flag. */
static PyObject *modules_where(registry_object *self, PyObject *arg, bool replaced)
{
    const pc_adapter *adapter = find_adapter(self, arg);
    if (adapter == NULL)
        return NULL;
    const pc_module_table *table = pc_registry_modules(self->core);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < adapter->slot_count; i++) {
        const pc_slot *slot = &adapter->slots[i];
        if (replaced ? !slot->replaces : !slot->adapts)
            continue;
        const pc_module *module = &table->items[slot->module];
        PyObject *name = PyUnicode_DecodeUTF8(module->name, (Py_ssize_t)module->name_len, "strict");
        if (name == NULL || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

PyDoc_STRVAR(saved_modules_doc, "saved_modules($self, name, /)\n--\n\nDotted names of the layers that the adapter "
                                "replaces (modules_to_save).");

static PyObject *registry_saved_modules(PyObject *op, PyObject *arg)
{
    return modules_where((registry_object *)op, arg, true);
}

PyDoc_STRVAR(adapted_modules_doc,
             "adapted_modules($self, name, /)\n--\n\nDotted names of the layers that the adapter's method changes.");

static PyObject *registry_adapted_modules(PyObject *op, PyObject *arg)
{
    return modules_where((registry_object *)op, arg, false);
}

/* -------------------------------------------------------------------- saving */

typedef struct state_views {
    pc_tensor_view *views;
    size_t count;
    pc_pool pool;
} state_views;

/* The adapter's state dict as the writer wants it; names carry `prefix`. */
static pc_status collect_views(registry_object *self, const pc_adapter *adapter, const char *prefix, state_views *out,
                               pc_error *err)
{
    const size_t prefix_len = strlen(prefix);
    out->views = pc_pool_array(&out->pool, adapter->tensor_count, sizeof *out->views);
    if (out->views == NULL)
        return pc_fail_nomem(err, "the list of tensors to save");
    for (size_t i = 0; i < adapter->tensor_count; i++) {
        const pc_tensor *tensor = &adapter->tensors[i];
        if (!tensor->in_state_dict)
            continue;
        pc_string key;
        pc_status status = pc_tensor_name(self->core, adapter, tensor, false, &out->pool, &key, err);
        if (status != PC_OK)
            return status;
        char *name = pc_pool_alloc(&out->pool, prefix_len + key.len + 1);
        uint64_t *shape = pc_pool_array(&out->pool, 4, sizeof *shape);
        if (name == NULL || shape == NULL)
            return pc_fail_nomem(err, "a tensor's name");
        memcpy(name, prefix, prefix_len);
        memcpy(name + prefix_len, key.text, key.len);
        for (int d = 0; d < tensor->ndim; d++)
            shape[d] = (uint64_t)tensor->shape[d];
        pc_tensor_view *view = &out->views[out->count++];
        view->info = (pc_tensor_info){.name = name,
                                      .name_len = prefix_len + key.len,
                                      .dtype = tensor->dtype,
                                      .ndim = tensor->ndim,
                                      .shape = shape,
                                      .nbytes = tensor->nbytes};
        view->data = pc_tensor_data(adapter, tensor);
    }
    return PC_OK;
}

PyDoc_STRVAR(save_doc,
             "save($self, name, path, /, prefix='base_model.model.')\n--\n\n"
             "Write an adapter's state dict to a safetensors file, straight from the arena and atomically. The bytes are "
             "those that PEFT writes for the same tensors.");

static PyObject *registry_save(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"", "", "prefix", NULL};
    PyObject *name, *path;
    const char *prefix = "base_model.model.";
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO&|s:save", names, &name, PyUnicode_FSConverter, &path, &prefix))
        return NULL;
    pc_adapter *adapter = find_adapter(self, name);
    if (adapter == NULL) {
        Py_DECREF(path);
        return NULL;
    }
    static const pc_metadata_item metadata = {"format", 6, "pt", 2};
    state_views collected = {0};
    pc_pool_init(&collected.pool);
    pc_adapter_retain(adapter);
    pc_error err;
    /* Names come from the module table, which only grows under the GIL; the bytes are written without it. */
    pc_status status = collect_views(self, adapter, prefix, &collected, &err);
    if (status == PC_OK) {
        Py_BEGIN_ALLOW_THREADS
        status = pc_safetensors_save(PyBytes_AS_STRING(path), collected.views, collected.count, &metadata, 1, true,
                                     &err);
        Py_END_ALLOW_THREADS
    }
    pc_adapter_release(adapter);
    pc_pool_free(&collected.pool);
    Py_DECREF(path);
    if (status != PC_OK)
        return peftc_raise(state_of(self), &err);
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------- merging */

/* Adapters to merge: those merged already, then the ones asked for that are not.  Returned references are
 * borrowed from `activation` and the registry, both kept by the caller; PyMem_Free the array. */
static pc_adapter **merge_list(registry_object *self, const pc_activation *activation, PyObject *names, size_t *count)
{
    PyObject *fast = names != Py_None ? PySequence_Fast(names, "adapter names must be a sequence of str") : NULL;
    if (names != Py_None && fast == NULL)
        return NULL;
    size_t merged = activation->merged != NULL ? activation->merged->adapter_count : 0;
    size_t asked = fast != NULL ? (size_t)PySequence_Fast_GET_SIZE(fast) : activation->count;
    pc_adapter **list = PyMem_New(pc_adapter *, merged + asked + 1);
    if (list == NULL) {
        PyErr_NoMemory();
        Py_XDECREF(fast);
        return NULL;
    }
    size_t used = 0;
    for (size_t i = 0; i < merged; i++)
        list[used++] = activation->merged->adapters[i];
    for (size_t i = 0; i < asked; i++) {
        pc_adapter *adapter = fast != NULL ? find_adapter(self, PySequence_Fast_GET_ITEM(fast, (Py_ssize_t)i))
                                           : activation->adapters[i];
        if (adapter == NULL) {
            PyMem_Free(list);
            Py_DECREF(fast);
            return NULL;
        }
        bool there = false;
        for (size_t j = 0; j < used; j++)
            there = there || list[j] == adapter;
        if (!there)
            list[used++] = adapter;
    }
    Py_XDECREF(fast);
    *count = used;
    return list;
}

PyDoc_STRVAR(merge_doc,
             "merge($self, names=None, safe_merge=False)\n--\n\n"
             "Fold adapters (the active ones by default) into copies of the base weights, beside what is merged already. "
             "The base weights themselves are not touched, so unmerge() is exact.\n\n"
             "safe_merge refuses a result with NaN or infinity with ValueError. Raises KeyError for an unknown name, "
             "MemoryError; nothing has changed then.");

static PyObject *registry_merge(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"names", "safe_merge", NULL};
    PyObject *wanted = Py_None;
    int safe_merge = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|Op:merge", names, &wanted, &safe_merge))
        return NULL;
    peftc_state *state = state_of(self);
    lock_mutation(self);
    pc_activation *activation = pc_registry_acquire(self->core);
    size_t count = 0;
    pc_adapter **list = merge_list(self, activation, wanted, &count);
    PyObject *pins = list != NULL ? pin_weights(self, state) : NULL;
    pc_merged *merged = NULL;
    pc_error err;
    pc_status status = PC_OK;
    if (pins != NULL && count != 0) {
        Py_BEGIN_ALLOW_THREADS
        status = pc_merge(state->rt, self->core, list, count, safe_merge != 0, &merged, &err);
        if (status == PC_OK)
            status = pc_registry_set_merged(self->core, merged, &err);
        Py_END_ALLOW_THREADS
    }
    pc_activation_release(activation);
    unlock_mutation(self);
    PyMem_Free(list);
    if (pins == NULL)
        return NULL;
    Py_DECREF(pins);
    if (status != PC_OK)
        return peftc_raise(state, &err);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(unmerge_doc, "unmerge($self, /)\n--\n\nGo back to the base weights, bit for bit.");

static PyObject *registry_unmerge(PyObject *op, PyObject *unused)
{
    (void)unused;
    registry_object *self = (registry_object *)op;
    pc_error err;
    lock_mutation(self);
    pc_status status = pc_registry_set_merged(self->core, NULL, &err);
    unlock_mutation(self);
    if (status != PC_OK)
        return peftc_raise(state_of(self), &err);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(merged_doc, "merged($self, /)\n--\n\nThe names of the adapters that are merged, in order.");

static PyObject *registry_merged(PyObject *op, PyObject *unused)
{
    (void)unused;
    pc_activation *activation = pc_registry_acquire(((registry_object *)op)->core);
    const pc_merged *merged = activation->merged;
    PyObject *list = merged != NULL ? list_of_adapters(merged->adapters, merged->adapter_count) : PyList_New(0);
    pc_activation_release(activation);
    return list;
}

/* --------------------------------------------------------------------- types */

static PyMethodDef registry_methods[] = {
    {"bind", (PyCFunction)(void (*)(void))registry_bind, METH_VARARGS | METH_KEYWORDS, bind_doc},
    {"add", (PyCFunction)(void (*)(void))registry_add, METH_VARARGS | METH_KEYWORDS, add_doc},
    {"load", (PyCFunction)(void (*)(void))registry_load, METH_VARARGS | METH_KEYWORDS, load_doc},
    {"remove", registry_remove, METH_O, remove_doc},
    {"activate", registry_activate, METH_O, activate_doc},
    {"active", registry_active, METH_NOARGS, active_doc},
    {"names", registry_names, METH_NOARGS, names_doc},
    {"peft_type", registry_peft_type, METH_O, peft_type_doc},
    {"trainable", registry_trainable, METH_O, trainable_doc},
    {"set_trainable", registry_set_trainable, METH_VARARGS, set_trainable_doc},
    {"tensors", registry_tensors, METH_O, tensors_doc},
    {"state_dict", registry_state_dict, METH_O, state_dict_doc},
    {"saved_modules", registry_saved_modules, METH_O, saved_modules_doc},
    {"adapted_modules", registry_adapted_modules, METH_O, adapted_modules_doc},
    {"save", (PyCFunction)(void (*)(void))registry_save, METH_VARARGS | METH_KEYWORDS, save_doc},
    {"merge", (PyCFunction)(void (*)(void))registry_merge, METH_VARARGS | METH_KEYWORDS, merge_doc},
    {"unmerge", registry_unmerge, METH_NOARGS, unmerge_doc},
    {"merged", registry_merged, METH_NOARGS, merged_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef registry_getset[] = {
    {"enabled", registry_get_enabled, registry_set_enabled,
     "Whether the active adapters apply. Setting it costs the same for any model.", NULL},
    {"version", registry_get_version, NULL, "A number that grows with every change of what is active.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef registry_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(registry_object, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(registry_doc, "AdapterRegistry()\n--\n\n"
                           "One model's modules, its adapters, and which of them are active.");

static PyType_Slot registry_slots[] = {
    {Py_tp_doc, (void *)registry_doc},
    {Py_tp_new, registry_new},
    {Py_tp_dealloc, registry_dealloc},
    {Py_tp_traverse, registry_traverse},
    {Py_tp_clear, registry_clear},
    {Py_tp_methods, registry_methods},
    {Py_tp_getset, registry_getset},
    {Py_tp_members, registry_members},
    {Py_sq_length, registry_len},
    {Py_sq_contains, registry_contains},
    {0, NULL},
};

static PyType_Spec registry_spec = {
    .name = "peftc._core.AdapterRegistry",
    .basicsize = sizeof(registry_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = registry_slots,
};

static PyType_Slot arena_slots[] = {
    {Py_tp_doc, (void *)"The memory of one adapter's tensors; the base of their arrays."},
    {Py_tp_dealloc, arena_dealloc},
    {0, NULL},
};

static PyType_Spec arena_spec = {
    .name = "peftc._core.Arena",
    .basicsize = sizeof(arena_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = arena_slots,
};

int peftc_add_registry(PyObject *module, peftc_state *state)
{
    state->registry_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &registry_spec, NULL);
    state->arena_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &arena_spec, NULL);
    if (state->registry_type == NULL || state->arena_type == NULL)
        return -1;
    return PyModule_AddType(module, state->registry_type);
}
