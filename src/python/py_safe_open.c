/* safe_open and its slices: one open file, tensors read when they are asked for.
 *
 * The open reader lives in a capsule that safe_open, its slices and every read
 * in progress hold, so that leaving the `with` block while another thread reads
 * closes nothing under it.
 */
#include "arrays.h"
#include "safetensors_binding.h"

#define CAPSULE "peftc.safetensors file"

typedef struct safe_open_object {
    PyObject_HEAD
    PyObject *file; /* the capsule; NULL once closed */
} safe_open_object;

typedef struct safe_slice_object {
    PyObject_HEAD
    PyObject *file;
    size_t tensor;
} safe_slice_object;

static pc_safetensors *reader_of(PyObject *capsule) { return PyCapsule_GetPointer(capsule, CAPSULE); }

static void destroy_capsule(PyObject *capsule) { pc_safetensors_close(reader_of(capsule)); }

/* ------------------------------------------------------------------ slices */

static PyObject *slice_shape(safe_slice_object *self, PyObject *unused)
{
    (void)unused;
    const pc_tensor_info *info = &pc_safetensors_weights(reader_of(self->file))->tensors[self->tensor];
    PyObject *shape = PyList_New(info->ndim);
    for (int d = 0; shape != NULL && d < info->ndim; d++) {
        PyObject *dim = PyLong_FromUnsignedLongLong(info->shape[d]);
        if (dim == NULL)
            Py_CLEAR(shape);
        else
            PyList_SET_ITEM(shape, d, dim);
    }
    return shape;
}

static PyObject *slice_dtype(safe_slice_object *self, PyObject *unused)
{
    (void)unused;
    const pc_tensor_info *info = &pc_safetensors_weights(reader_of(self->file))->tensors[self->tensor];
    return PyUnicode_FromString(pc_dtype_get(info->dtype)->name);
}

/* One index of the tuple onto one axis; *keep tells whether the axis stays in the result. */
static int parse_index(peftc_state *state, PyObject *index, int d, uint64_t size, pc_axis *axis, bool *keep)
{
    if (size > (uint64_t)PY_SSIZE_T_MAX) {
        PyErr_Format(state->safetensor_error, "axis %d is too large for NumPy", d);
        return -1;
    }
    Py_ssize_t length = (Py_ssize_t)size;
    if (PySlice_Check(index)) {
        Py_ssize_t start, stop, step;
        if (PySlice_Unpack(index, &start, &stop, &step) < 0)
            return -1;
        Py_ssize_t count = PySlice_AdjustIndices(length, &start, &stop, step);
        *axis = (pc_axis){.start = count > 0 ? (uint64_t)start : 0, .step = count > 1 ? step : 1,
                          .count = (uint64_t)count};
        *keep = true;
        return 0;
    }
    if (PyIndex_Check(index) && !PyBool_Check(index) && !PyArray_Check(index)) {
        Py_ssize_t i = PyNumber_AsSsize_t(index, PyExc_IndexError);
        if (i == -1 && PyErr_Occurred())
            return -1;
        if (i < -length || i >= length) {
            PyErr_Format(PyExc_IndexError, "index %zd is out of bounds for axis %d with size %zd", i, d, length);
            return -1;
        }
        *axis = (pc_axis){.start = (uint64_t)(i < 0 ? i + length : i), .step = 1, .count = 1};
        *keep = false;
        return 0;
    }
    PyErr_Format(state->safetensor_error, "unsupported index for axis %d: integers, slices and one \"...\" are, not %.200s",
                 d, Py_TYPE(index)->tp_name);
    return -1;
}

static int parse_indices(peftc_state *state, PyObject *key, const pc_tensor_info *info, pc_axis *axes, bool *keep)
{
    bool is_tuple = PyTuple_Check(key);
    Py_ssize_t given = is_tuple ? PyTuple_GET_SIZE(key) : 1;
    Py_ssize_t ellipsis = -1;
    for (Py_ssize_t k = 0; k < given; k++) {
        if ((is_tuple ? PyTuple_GET_ITEM(key, k) : key) != Py_Ellipsis)
            continue;
        if (ellipsis >= 0) {
            PyErr_SetString(PyExc_IndexError, "an index can only have a single ellipsis ('...')");
            return -1;
        }
        ellipsis = k;
    }
    Py_ssize_t indices = given - (ellipsis >= 0 ? 1 : 0);
    if (indices > info->ndim) {
        PyErr_Format(PyExc_IndexError, "too many indices: the tensor has %d dimensions, but %zd were indexed",
                     info->ndim, indices);
        return -1;
    }
    Py_ssize_t before = ellipsis >= 0 ? ellipsis : given; /* indices in front of the axes that are left whole */
    for (int d = 0; d < info->ndim; d++) {
        Py_ssize_t k;
        if (d < before)
            k = d;
        else if (d >= info->ndim - (indices - before))
            k = d - (info->ndim - (indices - before)) + before + 1;
        else {
            axes[d] = (pc_axis){.start = 0, .step = 1, .count = info->shape[d]};
            keep[d] = true;
            continue;
        }
        PyObject *index = is_tuple ? PyTuple_GET_ITEM(key, k) : key;
        if (parse_index(state, index, d, info->shape[d], &axes[d], &keep[d]) < 0)
            return -1;
    }
    return 0;
}

static PyObject *slice_get(safe_slice_object *self, PyObject *key)
{
    peftc_state *state = peftc_state_of_type(Py_TYPE(self));
    if (state == NULL)
        return NULL;
    const pc_safetensors *st = reader_of(self->file);
    const pc_tensor_info *info = &pc_safetensors_weights((pc_safetensors *)st)->tensors[self->tensor];
    pc_axis axes[PC_MAX_DIMS];
    bool keep[PC_MAX_DIMS];
    uint64_t shape[PC_MAX_DIMS];
    if (parse_indices(state, key, info, axes, keep) < 0)
        return NULL;
    int ndim = 0;
    for (int d = 0; d < info->ndim; d++)
        if (keep[d])
            shape[ndim++] = axes[d].count;
    PyArray_Descr *descrs[PC_DTYPE_COUNT] = {NULL};
    PyObject *array = peftc_empty_tensor(state, descrs, info->dtype, ndim, shape, info->name, info->name_len);
    peftc_drop_descrs(descrs);
    if (array == NULL)
        return NULL;
    pc_error err;
    pc_status status;
    PyObject *file = Py_NewRef(self->file);
    void *dst = PyArray_DATA((PyArrayObject *)array);
    Py_BEGIN_ALLOW_THREADS
    status = pc_safetensors_read_slice(st, self->tensor, axes, dst, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(file);
    if (status != PC_OK) {
        Py_DECREF(array);
        return peftc_raise(state, &err);
    }
    return array;
}

static void slice_dealloc(safe_slice_object *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->file);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef slice_methods[] = {
    {"get_shape", (PyCFunction)(void (*)(void))slice_shape, METH_NOARGS,
     PyDoc_STR("get_shape($self, /)\n--\n\nThe shape of the whole tensor, a list of int.")},
    {"get_dtype", (PyCFunction)(void (*)(void))slice_dtype, METH_NOARGS,
     PyDoc_STR("get_dtype($self, /)\n--\n\nThe dtype of the tensor as the file names it, such as 'F32'.")},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slice_slots[] = {
    {Py_tp_doc, (void *)PyDoc_STR("One tensor of an open file. Index it with integers, slices and `...` as a NumPy array\n"
                                  "to read that part, and only that part, of the file.")},
    {Py_tp_dealloc, (void *)slice_dealloc},
    {Py_tp_methods, slice_methods},
    {Py_mp_subscript, (void *)slice_get},
    {0, NULL},
};

static PyType_Spec slice_spec = {
    .name = "peftc.safetensors.SafeSlice",
    .basicsize = sizeof(safe_slice_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slice_slots,
};

/* --------------------------------------------------------------- safe_open */

static int known_word(const char *word, const char *const *words)
{
    for (; *words != NULL; words++)
        if (strcmp(word, *words) == 0)
            return 1;
    return 0;
}

static int check_options(peftc_state *state, PyObject *framework, PyObject *device, PyObject *backend)
{
    static const char *const numpy[] = {"np", "numpy", NULL};
    static const char *const others[] = {"pt",   "torch", "pytorch", "tf",     "tensorflow",
                                         "flax", "jax",   "mlx",     "paddle", NULL};
    const char *word = PyUnicode_Check(framework) ? PyUnicode_AsUTF8(framework) : "";
    if (word == NULL)
        return -1;
    if (!PyUnicode_Check(framework)) {
        PyErr_Format(PyExc_TypeError, "framework must be str, not %.200s", Py_TYPE(framework)->tp_name);
        return -1;
    }
    if (!known_word(word, numpy)) {
        if (known_word(word, others))
            PyErr_Format(state->safetensor_error,
                         "framework %R is not supported: peftc.safetensors gives NumPy arrays (framework=\"np\"); for "
                         "other frameworks use the safetensors package",
                         framework);
        else
            PyErr_Format(state->safetensor_error, "framework %.200R is invalid (expected \"np\" or \"numpy\")",
                         framework);
        return -1;
    }
    if (!PyUnicode_Check(device) || PyUnicode_CompareWithASCIIString(device, "cpu") != 0) {
        PyErr_Format(state->safetensor_error, "device %.200R is not supported for framework numpy (only \"cpu\" is)",
                     device);
        return -1;
    }
    if (!PyUnicode_Check(backend)) {
        PyErr_Format(PyExc_TypeError, "backend must be str, not %.200s", Py_TYPE(backend)->tp_name);
        return -1;
    }
    if (PyUnicode_CompareWithASCIIString(backend, "mmap") != 0 &&
        PyUnicode_CompareWithASCIIString(backend, "pread") != 0) {
        PyErr_Format(state->safetensor_error, "backend %.200R is invalid (expected \"mmap\" or \"pread\")", backend);
        return -1;
    }
    return 0;
}

static PyObject *open_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"filename", "framework", "device", "backend", NULL};
    peftc_state *state = peftc_state_of_type(type);
    if (state == NULL)
        return NULL;
    PyObject *filename, *framework, *device = NULL, *backend = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|O$O:safe_open", names, &filename, &framework, &device,
                                     &backend))
        return NULL;
    PyObject *cpu = PyUnicode_FromString("cpu");
    PyObject *pread = PyUnicode_FromString("pread");
    int bad = cpu == NULL || pread == NULL ||
              check_options(state, framework, device != NULL ? device : cpu, backend != NULL ? backend : pread) < 0;
    Py_XDECREF(cpu);
    Py_XDECREF(pread);
    if (bad)
        return NULL;
    pc_safetensors *st = peftc_safetensors_open(state, filename);
    if (st == NULL)
        return NULL;
    PyObject *file = PyCapsule_New(st, CAPSULE, destroy_capsule);
    if (file == NULL) {
        pc_safetensors_close(st);
        return NULL;
    }
    safe_open_object *self = (safe_open_object *)type->tp_alloc(type, 0);
    if (self == NULL) {
        Py_DECREF(file);
        return NULL;
    }
    self->file = file;
    return (PyObject *)self;
}

/* The capsule (new reference), or NULL with an error once the file is closed. */
static PyObject *open_file_of(safe_open_object *self, peftc_state **state)
{
    *state = peftc_state_of_type(Py_TYPE(self));
    if (*state == NULL)
        return NULL;
    if (self->file == NULL) {
        PyErr_SetString((*state)->safetensor_error, "File is closed");
        return NULL;
    }
    return Py_NewRef(self->file);
}

static PyObject *open_offset_keys(safe_open_object *self, PyObject *unused)
{
    (void)unused;
    peftc_state *state;
    PyObject *file = open_file_of(self, &state);
    if (file == NULL)
        return NULL;
    const pc_weights *weights = pc_safetensors_weights(reader_of(file));
    PyObject *names = PyList_New((Py_ssize_t)weights->count);
    for (size_t i = 0; names != NULL && i < weights->count; i++) {
        PyObject *name = peftc_name_of(&weights->tensors[i]);
        if (name == NULL)
            Py_CLEAR(names);
        else
            PyList_SET_ITEM(names, (Py_ssize_t)i, name);
    }
    Py_DECREF(file);
    return names;
}

static PyObject *open_keys(safe_open_object *self, PyObject *unused)
{
    PyObject *names = open_offset_keys(self, unused);
    if (names != NULL && PyList_Sort(names) < 0) /* by code point, which is the order of the UTF-8 bytes */
        Py_CLEAR(names);
    return names;
}

static PyObject *open_metadata(safe_open_object *self, PyObject *unused)
{
    (void)unused;
    peftc_state *state;
    PyObject *file = open_file_of(self, &state);
    if (file == NULL)
        return NULL;
    const pc_metadata_item *items;
    size_t count;
    PyObject *result;
    if (!pc_safetensors_metadata(reader_of(file), &items, &count)) {
        Py_DECREF(file);
        Py_RETURN_NONE;
    }
    result = PyDict_New();
    for (size_t i = 0; result != NULL && i < count; i++) {
        PyObject *key = PyUnicode_DecodeUTF8(items[i].key, (Py_ssize_t)items[i].key_len, "strict");
        PyObject *value = PyUnicode_DecodeUTF8(items[i].value, (Py_ssize_t)items[i].value_len, "strict");
        if (key == NULL || value == NULL || PyDict_SetItem(result, key, value) < 0)
            Py_CLEAR(result);
        Py_XDECREF(key);
        Py_XDECREF(value);
    }
    Py_DECREF(file);
    return result;
}

/* The index of a name; -1 with an error. */
static Py_ssize_t find_tensor(peftc_state *state, PyObject *file, PyObject *name)
{
    if (!PyUnicode_Check(name)) {
        PyErr_Format(PyExc_TypeError, "a tensor's name must be str, not %.200s", Py_TYPE(name)->tp_name);
        return -1;
    }
    Py_ssize_t len;
    const char *text = PyUnicode_AsUTF8AndSize(name, &len);
    if (text == NULL)
        return -1;
    size_t i = pc_safetensors_find(reader_of(file), text, (size_t)len);
    if (i == SIZE_MAX) {
        PyErr_Format(state->safetensor_error, "File does not contain tensor %S", name);
        return -1;
    }
    return (Py_ssize_t)i;
}

static PyObject *read_tensor(peftc_state *state, PyObject *file, size_t i)
{
    pc_weights *weights = pc_safetensors_weights(reader_of(file));
    const pc_tensor_info *info = &weights->tensors[i];
    PyArray_Descr *descrs[PC_DTYPE_COUNT] = {NULL};
    PyObject *array =
        peftc_empty_tensor(state, descrs, info->dtype, info->ndim, info->shape, info->name, info->name_len);
    peftc_drop_descrs(descrs);
    if (array == NULL)
        return NULL;
    pc_error err;
    pc_status status;
    void *dst = PyArray_DATA((PyArrayObject *)array);
    Py_BEGIN_ALLOW_THREADS
    status = weights->read(weights, i, dst, &err);
    Py_END_ALLOW_THREADS
    if (status != PC_OK) {
        Py_DECREF(array);
        return peftc_raise(state, &err);
    }
    return array;
}

static PyObject *open_get_tensor(safe_open_object *self, PyObject *name)
{
    peftc_state *state;
    PyObject *file = open_file_of(self, &state);
    if (file == NULL)
        return NULL;
    Py_ssize_t i = find_tensor(state, file, name);
    PyObject *array = i >= 0 ? read_tensor(state, file, (size_t)i) : NULL;
    Py_DECREF(file);
    return array;
}

static PyObject *open_get_tensors(safe_open_object *self, PyObject *unused)
{
    (void)unused;
    peftc_state *state;
    PyObject *file = open_file_of(self, &state);
    if (file == NULL)
        return NULL;
    PyObject *result = peftc_load_all(state, reader_of(file));
    Py_DECREF(file);
    return result;
}

static PyObject *open_get_slice(safe_open_object *self, PyObject *name)
{
    peftc_state *state;
    PyObject *file = open_file_of(self, &state);
    if (file == NULL)
        return NULL;
    Py_ssize_t i = find_tensor(state, file, name);
    safe_slice_object *slice =
        i >= 0 ? (safe_slice_object *)state->safe_slice_type->tp_alloc(state->safe_slice_type, 0) : NULL;
    if (slice == NULL) {
        Py_DECREF(file);
        return NULL;
    }
    slice->file = file;
    slice->tensor = (size_t)i;
    return (PyObject *)slice;
}

static PyObject *open_enter(PyObject *self, PyObject *unused)
{
    (void)unused;
    return Py_NewRef(self);
}

static PyObject *open_exit(safe_open_object *self, PyObject *args)
{
    (void)args;
    Py_CLEAR(self->file);
    Py_RETURN_NONE;
}

static void open_dealloc(safe_open_object *self)
{
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->file);
    type->tp_free(self);
    Py_DECREF(type);
}

#define METHOD(name, function, flags, doc) {name, (PyCFunction)(void (*)(void))function, flags, PyDoc_STR(doc)}

static PyMethodDef open_methods[] = {
    METHOD("keys", open_keys, METH_NOARGS, "keys($self, /)\n--\n\nThe names of the tensors, sorted: list of str."),
    METHOD("offset_keys", open_offset_keys, METH_NOARGS,
           "offset_keys($self, /)\n--\n\nThe names of the tensors in the order of their data: list of str."),
    METHOD("metadata", open_metadata, METH_NOARGS,
           "metadata($self, /)\n--\n\nThe file's __metadata__, a dict of str; None when it has none."),
    METHOD("get_tensor", open_get_tensor, METH_O,
           "get_tensor($self, name, /)\n--\n\nRead one tensor as a new array.\n\nRaises SafetensorError when there is none of that name."),
    METHOD("get_tensors", open_get_tensors, METH_NOARGS,
           "get_tensors($self, /)\n--\n\nRead all tensors: dict of name -> array, in the order of their data."),
    METHOD("get_slice", open_get_slice, METH_O,
           "get_slice($self, name, /)\n--\n\nA handle to one tensor that reads only the part that it is indexed with:\n"
           "f.get_slice(\"weight\")[:, 8:16]. It stays usable after the with block."),
    METHOD("__enter__", open_enter, METH_NOARGS, "__enter__($self, /)\n--\n\nThe file itself."),
    METHOD("__exit__", open_exit, METH_VARARGS, "__exit__($self, /, *args)\n--\n\nClose the file."),
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(open_doc,
             "safe_open(filename, framework, device='cpu', *, backend='mmap')\n--\n\n"
             "Open a safetensors file; tensors are read when they are asked for.\n\n"
             "filename: str, bytes or os.PathLike. framework: \"np\" or \"numpy\". device: \"cpu\".\n"
             "backend: \"mmap\" or \"pread\", accepted for compatibility: tensors are always read with pread into\n"
             "new arrays, so nothing of the file stays mapped.\n\n"
             "Raises OSError when the file cannot be opened or read, SafetensorError when its content is wrong\n"
             "or an option is not supported.");

static PyType_Slot open_slots[] = {
    {Py_tp_doc, (void *)open_doc},
    {Py_tp_new, (void *)open_new},
    {Py_tp_dealloc, (void *)open_dealloc},
    {Py_tp_methods, open_methods},
    {0, NULL},
};

static PyType_Spec open_spec = {
    .name = "peftc.safetensors.safe_open",
    .basicsize = sizeof(safe_open_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = open_slots,
};

int peftc_add_safe_open(PyObject *module, peftc_state *state)
{
    state->safe_open_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &open_spec, NULL);
    if (state->safe_open_type == NULL ||
        PyModule_AddObjectRef(module, "safe_open", (PyObject *)state->safe_open_type) < 0)
        return -1;
    state->safe_slice_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &slice_spec, NULL);
    if (state->safe_slice_type == NULL ||
        PyModule_AddObjectRef(module, "SafeSlice", (PyObject *)state->safe_slice_type) < 0)
        return -1;
    return 0;
}
