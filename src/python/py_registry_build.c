/* AdapterRegistry: new adapters, fresh or from weights. */
#include "py_registry.h"

#include "../formats/safetensors.h"
#include "../formats/torch_bin.h"
#include "array_weights.h"

typedef struct new_adapter {
    const char *name;
    Py_ssize_t name_len;
    const char *config;
    Py_ssize_t config_len;
    const char *label;
    unsigned long long seed;
    int trainable;
    int wait;
} new_adapter;

/* An adapter that is listed while its tensors are being filled, and what that needs. */
struct unfinished {
    pc_filling *filling;
    pc_adapter *adapter; /* a reference */
    pc_weights *source;  /* owned; NULL for a fresh adapter */
    PyObject *pins;
};

static void free_unfinished(struct unfinished *u)
{
    if (u == NULL)
        return;
    if (u->source != NULL)
        u->source->close(u->source);
    if (u->adapter != NULL)
        pc_adapter_release(u->adapter);
    Py_XDECREF(u->pins);
    PyMem_Free(u);
}

/* Wait for the adapter that is being filled, if there is one, and unlist it if that failed: -1 with an exception. */
static int finish_filling(registry_object *self, peftc_state *state)
{
    struct unfinished *u = self->unfinished;
    if (u == NULL)
        return 0;
    self->unfinished = NULL;
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_filling_finish(u->filling, true, &err);
    Py_END_ALLOW_THREADS
    if (status != PC_OK) {
        (void)pc_registry_remove(self->core, u->adapter->name, u->adapter->name_len, NULL);
        peftc_raise(state, &err);
    }
    free_unfinished(u);
    return status == PC_OK ? 0 : -1;
}

void registry_give_up(registry_object *self)
{
    struct unfinished *u = self->unfinished;
    if (u == NULL)
        return;
    self->unfinished = NULL;
    (void)pc_filling_finish(u->filling, false, NULL);
    free_unfinished(u);
}

void registry_removed(registry_object *self, const char *name, Py_ssize_t len)
{
    const struct unfinished *u = self->unfinished;
    if (u != NULL && u->adapter->name_len == (size_t)len && memcmp(u->adapter->name, name, (size_t)len) == 0)
        registry_give_up(self);
}

/* Config → built adapter → filled (from source, or initialised when it is NULL), or with `filling`, where that may go on.
 * No GIL needed. */
static pc_status make_adapter(registry_object *self, peftc_state *state, const new_adapter *request,
                              pc_weights *source, pc_load_report *report, pc_filling **filling, pc_adapter **out,
                              pc_error *err)
{
    pc_config *config = NULL;
    pc_adapter *adapter = NULL;
    pc_status status = peftc_parse_config(request->config, request->config_len, request->label, &config, err);
    if (status != PC_OK)
        return status;
    status = pc_adapter_build(self->core, request->name, (size_t)request->name_len, config, source, &adapter, err);
    if (status != PC_OK) {
        pc_config_free(config);
        return status;
    }
    adapter->trainable = request->trainable != 0;
    if (source != NULL && filling != NULL)
        status = pc_adapter_load_begin(state->rt, self->core, adapter, source, request->seed, report, filling, err);
    else if (source != NULL)
        status = pc_adapter_load(state->rt, self->core, adapter, source, request->seed, report, err);
    else if (filling != NULL)
        status = pc_adapter_init_begin(state->rt, self->core, adapter, request->seed, filling, err);
    else
        status = pc_adapter_init(state->rt, self->core, adapter, request->seed, err);
    if (status != PC_OK)
        pc_adapter_release(adapter);
    else
        *out = adapter;
    return status;
}

/* Make an adapter without the GIL and list it.  Listing needs the core's lock and is done with the GIL: a fork cannot
 * come in between then, and leave a child with a lock that nobody gives back.  -1 with an exception.
 *
 * The source is closed; or, where filling goes on, it is `unfinished`'s. */
static int make_and_list(registry_object *self, peftc_state *state, const new_adapter *request, pc_weights *source,
                         pc_load_report *report)
{
    struct unfinished *u = PyMem_Calloc(1, sizeof *u);
    int result = -1;
    if (u == NULL)
        PyErr_NoMemory();
    else
        u->source = source;
    if (u == NULL && source != NULL)
        source->close(source);
    if (u == NULL || registry_lock(self) < 0) {
        free_unfinished(u);
        return -1;
    }
    pc_error err;
    pc_status status = PC_ERR_CALLBACK;
    pc_adapter *adapter = NULL;
    if (finish_filling(self, state) == 0 && (u->pins = registry_pin_weights(self, state)) != NULL) {
        Py_BEGIN_ALLOW_THREADS
        status = make_adapter(self, state, request, source, report, request->wait ? NULL : &u->filling, &adapter, &err);
        Py_END_ALLOW_THREADS
        if (status == PC_OK && (status = pc_registry_insert(self->core, adapter, &err)) != PC_OK) {
            (void)pc_filling_finish(u->filling, false, NULL);
            pc_adapter_release(adapter);
            u->filling = NULL;
        }
        if (status != PC_OK)
            peftc_raise(state, &err);
        else
            result = 0;
    }
    if (result == 0 && u->filling != NULL) {
        u->adapter = pc_adapter_retain(adapter);
        self->unfinished = u;
        u = NULL;
    }
    registry_unlock(self);
    free_unfinished(u);
    return result;
}

const char registry_finish_doc[] =
    "finish($self, /)\n--\n\n"
    "Wait until the adapter that add() or load() made with wait=False has its values, and help with it.\n\n"
    "Raises what reading them raises; the adapter is not listed then. Nothing happens if there is none.";

PyObject *registry_finish(PyObject *op, PyObject *unused)
{
    (void)unused;
    registry_object *self = (registry_object *)op;
    peftc_state *state = registry_state(self);
    if (state == NULL || registry_lock(self) < 0)
        return NULL;
    const int result = finish_filling(self, state);
    registry_unlock(self);
    return result == 0 ? Py_NewRef(Py_None) : NULL;
}

const char registry_add_doc[] =
    "add($self, name, config, *, label='config', seed=0, trainable=True, wait=True)\n--\n\n"
             "Plan, allocate and initialise a new adapter from a config in JSON. It is listed but not active.\n\n"
             "seed fixes every random draw, whatever the number of threads. With wait=False the values may still be drawn in "
             "another thread when this returns: finish() waits for them, and only layout() may be used before. Raises ValueError (a value that cannot work, "
             "no target found, a name that is taken), NotImplementedError or MemoryError; nothing has changed then.";

PyObject *registry_add(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"name", "config", "label", "seed", "trainable", "wait", NULL};
    PyObject *name;
    new_adapter request = {.label = "config", .trainable = 1, .wait = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os#|$sKpp:add", names, &name, &request.config, &request.config_len,
                                     &request.label, &request.seed, &request.trainable, &request.wait) ||
        (request.name = registry_adapter_name(name, &request.name_len)) == NULL)
        return NULL;
    peftc_state *state = registry_state(self);
    if (state == NULL || make_and_list(self, state, &request, NULL, NULL) < 0)
        return NULL;
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

const char registry_load_doc[] =
    "load($self, name, config, source, *, label='config', seed=0, trainable=False, wait=True)\n--\n\n"
             "Plan, allocate and fill a new adapter from source: the path of a .safetensors or .bin file, or a dict of "
             "name -> array.\n\n"
             "Tensors are read straight into the adapter's arena and converted to the base layer's dtype. Names may "
             "start with \"base_model.model.\". Returns (missing, unexpected): keys that source lacks, which were "
             "initialised as add() would, and keys that the adapter does not know. The adapter is listed but not active; "
             "wait=False is as for add(). "
             "Raises as add() does, ValueError for a wrong shape, KeyError for a missing modules_to_save tensor, and "
             "the reader's errors; nothing has changed then.";

PyObject *registry_load(PyObject *op, PyObject *args, PyObject *kwargs)
{
    registry_object *self = (registry_object *)op;
    static char *names[] = {"name", "config", "source", "label", "seed", "trainable", "wait", NULL};
    PyObject *name, *source_obj;
    new_adapter request = {.label = "config", .wait = 1};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "Os#O|$sKpp:load", names, &name, &request.config,
                                     &request.config_len, &source_obj, &request.label, &request.seed,
                                     &request.trainable, &request.wait) ||
        (request.name = registry_adapter_name(name, &request.name_len)) == NULL)
        return NULL;
    peftc_state *state = registry_state(self);
    pc_weights *source = open_source(state, source_obj);
    if (source == NULL)
        return NULL;
    pc_load_report report = {0};
    pc_pool_init(&report.pool);
    int made = make_and_list(self, state, &request, source, &report);
    PyObject *result = NULL;
    if (made == 0) {
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
