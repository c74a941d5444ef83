/* peftc.safetensors: whole files to dicts of arrays and back. */
#include "arrays.h"
#include "safetensors_binding.h"

#include "../core/memory.h"
#include "../formats/atomic_file.h"

/* ---------------------------------------------------------------- reading */

pc_safetensors *peftc_safetensors_open(peftc_state *state, PyObject *path)
{
    PyObject *bytes;
    if (!PyUnicode_FSConverter(path, &bytes))
        return NULL;
    pc_safetensors *st;
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_safetensors_open(PyBytes_AS_STRING(bytes), &st, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(bytes);
    if (status != PC_OK) {
        peftc_raise(state, &err);
        return NULL;
    }
    return st;
}

PyObject *peftc_name_of(const pc_tensor_info *info)
{
    return PyUnicode_DecodeUTF8(info->name, (Py_ssize_t)info->name_len, "strict");
}

void peftc_drop_descrs(PyArray_Descr **descrs)
{
    for (int i = 0; i < PC_DTYPE_COUNT; i++)
        Py_CLEAR(descrs[i]);
}

/* "tensor "x": …" as a SafetensorError, in place of what is set if that is a ValueError. */
static void too_large(peftc_state *state, const char *name, size_t name_len)
{
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_ValueError))
        return;
    PyErr_Clear();
    PyObject *text = PyUnicode_DecodeUTF8(name, (Py_ssize_t)name_len, "replace");
    if (text != NULL) {
        PyErr_Format(state->safetensor_error, "tensor %.200R: its shape is too large for NumPy", text);
        Py_DECREF(text);
    }
}

PyObject *peftc_empty_tensor(peftc_state *state, PyArray_Descr **descrs, pc_dtype dtype, int ndim,
                             const uint64_t *shape, const char *name, size_t name_len)
{
    if (descrs[dtype] == NULL) {
        descrs[dtype] = peftc_descr_of(state, dtype);
        if (descrs[dtype] == NULL)
            return NULL;
    }
    npy_intp dims[NPY_MAXDIMS];
    bool fits = ndim <= NPY_MAXDIMS;
    for (int d = 0; fits && d < ndim; d++) {
        fits = shape[d] <= (uint64_t)NPY_MAX_INTP;
        dims[d] = (npy_intp)shape[d];
    }
    PyObject *array = NULL;
    if (fits) {
        Py_INCREF(descrs[dtype]); /* the call takes a reference */
        array = PyArray_NewFromDescr(&PyArray_Type, descrs[dtype], ndim, dims, NULL, NULL, 0, NULL);
    }
    if (array == NULL)
        too_large(state, name, name_len);
    return array;
}

PyObject *peftc_load_all(peftc_state *state, pc_safetensors *st)
{
    const pc_weights *weights = pc_safetensors_weights(st);
    PyArray_Descr *descrs[PC_DTYPE_COUNT] = {NULL};
    void **dst = PyMem_New(void *, weights->count + 1);
    PyObject *result = PyDict_New();
    if (dst == NULL || result == NULL) {
        PyErr_NoMemory();
        goto fail;
    }
    for (size_t i = 0; i < weights->count; i++) {
        const pc_tensor_info *info = &weights->tensors[i];
        PyObject *array = peftc_empty_tensor(state, descrs, info->dtype, info->ndim, info->shape, info->name,
                                             info->name_len);
        PyObject *name = array != NULL ? peftc_name_of(info) : NULL;
        int failed = name == NULL || PyDict_SetItem(result, name, array) < 0;
        if (!failed)
            dst[i] = PyArray_DATA((PyArrayObject *)array); /* the dict keeps it alive */
        Py_XDECREF(name);
        Py_XDECREF(array);
        if (failed)
            goto fail;
    }
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_safetensors_read_all(st, dst, state->rt, &err);
    Py_END_ALLOW_THREADS
    if (status != PC_OK) {
        peftc_raise(state, &err);
        goto fail;
    }
    PyMem_Free(dst);
    peftc_drop_descrs(descrs);
    return result;

fail:
    PyMem_Free(dst);
    peftc_drop_descrs(descrs);
    Py_XDECREF(result);
    return NULL;
}

PyDoc_STRVAR(load_file_doc, "safetensors_load_file(path, /)\n--\n\nAll tensors of a file: dict of name -> array.");

static PyObject *load_file(PyObject *module, PyObject *path)
{
    peftc_state *state = peftc_get_state(module);
    pc_safetensors *st = peftc_safetensors_open(state, path);
    if (st == NULL)
        return NULL;
    PyObject *result = peftc_load_all(state, st);
    pc_safetensors_close(st);
    return result;
}

PyDoc_STRVAR(load_doc, "safetensors_load(data, /)\n--\n\nAll tensors of a file's bytes: dict of name -> array (copies).");

static PyObject *load(PyObject *module, PyObject *data)
{
    peftc_state *state = peftc_get_state(module);
    Py_buffer buffer;
    if (PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    pc_safetensors *st;
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_safetensors_parse(buffer.buf, (size_t)buffer.len, &st, &err);
    Py_END_ALLOW_THREADS
    PyObject *result = status == PC_OK ? peftc_load_all(state, st) : peftc_raise(state, &err);
    pc_safetensors_close(st);
    PyBuffer_Release(&buffer);
    return result;
}

/* ---------------------------------------------------------------- writing */

/* What is to be written, checked.  The dict may be changed by others while we write, so the job holds its
 * own references. */
typedef struct job {
    Py_ssize_t count;
    PyObject *items;       /* list of (name, array) */
    PyObject *metadata;    /* list of (key, value), or NULL */
    pc_tensor_view *views; /* data is NULL where the array needs a copy first */
    uint64_t *shapes;
    pc_metadata_item *fields;
    Py_ssize_t field_count;
    pc_safetensors_layout layout;
} job;

static void job_free(job *j)
{
    pc_safetensors_layout_free(&j->layout);
    PyMem_Free(j->views);
    PyMem_Free(j->shapes);
    PyMem_Free(j->fields);
    Py_CLEAR(j->items);
    Py_CLEAR(j->metadata);
}

/* A list of (key, value) from any mapping. */
static PyObject *items_of(PyObject *mapping, const char *what)
{
    PyObject *items = PyMapping_Items(mapping);
    if (items == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s must be a dict, not %.200s", what, Py_TYPE(mapping)->tp_name);
    }
    for (Py_ssize_t i = 0; items != NULL && i < PyList_GET_SIZE(items); i++) {
        PyObject *pair = PyList_GET_ITEM(items, i);
        if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2) {
            PyErr_Format(PyExc_TypeError, "%s must be a dict, not %.200s", what, Py_TYPE(mapping)->tp_name);
            Py_CLEAR(items);
        }
    }
    return items;
}

/* The dtype of an array whatever its byte order. */
static pc_dtype dtype_of(PyArray_Descr *descr)
{
    if (PyArray_ISNBO(descr->byteorder))
        return peftc_dtype_of(descr);
    PyArray_Descr *native = PyArray_DescrNewByteorder(descr, NPY_NATIVE);
    if (native == NULL) {
        PyErr_Clear();
        return PC_DTYPE_NONE;
    }
    pc_dtype dtype = peftc_dtype_of(native);
    Py_DECREF(native);
    return dtype;
}

static bool ready_to_write(PyArrayObject *array)
{
    return PyArray_IS_C_CONTIGUOUS(array) && PyArray_ISNBO(PyArray_DESCR(array)->byteorder);
}

static int describe(peftc_state *state, job *j)
{
    size_t dims = 0;
    for (Py_ssize_t i = 0; i < j->count; i++) {
        PyObject *pair = PyList_GET_ITEM(j->items, i);
        PyObject *name = PyTuple_GET_ITEM(pair, 0), *value = PyTuple_GET_ITEM(pair, 1);
        if (!PyUnicode_Check(name)) {
            PyErr_Format(PyExc_TypeError, "tensor names must be str, not %.200s (%.200R)", Py_TYPE(name)->tp_name,
                         name);
            return -1;
        }
        if (!PyArray_Check(value)) {
            PyErr_Format(PyExc_TypeError,
                         "tensor %.200R must be a numpy.ndarray, not %.200s; convert it first (numpy.asarray)", name,
                         Py_TYPE(value)->tp_name);
            return -1;
        }
        dims += (size_t)PyArray_NDIM((PyArrayObject *)value);
    }
    j->views = PyMem_New(pc_tensor_view, (size_t)j->count + 1);
    j->shapes = PyMem_New(uint64_t, dims + 1);
    if (j->views == NULL || j->shapes == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    uint64_t *shape = j->shapes;
    for (Py_ssize_t i = 0; i < j->count; i++) {
        PyObject *pair = PyList_GET_ITEM(j->items, i);
        PyArrayObject *array = (PyArrayObject *)PyTuple_GET_ITEM(pair, 1);
        pc_tensor_info *info = &j->views[i].info;
        Py_ssize_t name_len;
        info->name = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(pair, 0), &name_len);
        if (info->name == NULL)
            return -1;
        info->name_len = (size_t)name_len;
        info->dtype = dtype_of(PyArray_DESCR(array));
        if (info->dtype == PC_DTYPE_NONE) {
            PyErr_Format(state->safetensor_error, "tensor %.200R: safetensors has no dtype for NumPy's %.200S",
                         PyTuple_GET_ITEM(pair, 0), (PyObject *)PyArray_DESCR(array));
            return -1;
        }
        info->ndim = PyArray_NDIM(array);
        info->shape = shape;
        for (int d = 0; d < info->ndim; d++)
            *shape++ = (uint64_t)PyArray_DIM(array, d);
        info->nbytes = (uint64_t)PyArray_NBYTES(array);
        j->views[i].data = ready_to_write(array) ? PyArray_DATA(array) : NULL;
    }
    return 0;
}

static int describe_metadata(job *j, PyObject *metadata)
{
    if (metadata == Py_None)
        return 0;
    j->metadata = items_of(metadata, "metadata");
    if (j->metadata == NULL)
        return -1;
    j->field_count = PyList_GET_SIZE(j->metadata);
    j->fields = PyMem_New(pc_metadata_item, (size_t)j->field_count + 1);
    if (j->fields == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < j->field_count; i++) {
        PyObject *pair = PyList_GET_ITEM(j->metadata, i);
        const char *text[2];
        Py_ssize_t len[2];
        for (int k = 0; k < 2; k++) {
            PyObject *part = PyTuple_GET_ITEM(pair, k);
            if (!PyUnicode_Check(part)) {
                PyErr_Format(PyExc_TypeError, "metadata must be str -> str: the %s of %.200R is %.200s",
                             k == 0 ? "key" : "value", PyTuple_GET_ITEM(pair, 0), Py_TYPE(part)->tp_name);
                return -1;
            }
            text[k] = PyUnicode_AsUTF8AndSize(part, &len[k]);
            if (text[k] == NULL)
                return -1;
        }
        j->fields[i] = (pc_metadata_item){
            .key = text[0], .key_len = (size_t)len[0], .value = text[1], .value_len = (size_t)len[1]};
    }
    return 0;
}

static int job_init(peftc_state *state, job *j, PyObject *tensors, PyObject *metadata)
{
    *j = (job){0};
    j->items = items_of(tensors, "tensor_dict");
    if (j->items == NULL)
        return -1;
    j->count = PyList_GET_SIZE(j->items);
    if (describe(state, j) < 0 || describe_metadata(j, metadata) < 0) {
        job_free(j);
        return -1;
    }
    pc_error err;
    if (pc_safetensors_plan(j->views, (size_t)j->count, j->fields, (size_t)j->field_count, metadata != Py_None,
                            &j->layout, &err) != PC_OK) {
        peftc_raise(state, &err);
        job_free(j);
        return -1;
    }
    return 0;
}

/* A contiguous array in native byte order with the values that view i's array shows.  Made one at a time,
 * so that saving a model of transposed arrays does not need it twice in memory. */
static PyObject *plain_copy(const job *j, size_t i)
{
    PyArrayObject *array = (PyArrayObject *)PyTuple_GET_ITEM(PyList_GET_ITEM(j->items, (Py_ssize_t)i), 1);
    PyArray_Descr *native = PyArray_DescrNewByteorder(PyArray_DESCR(array), NPY_NATIVE);
    if (native == NULL)
        return NULL;
    PyObject *copy = PyArray_FromArray(array, native, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_ENSURECOPY |
                                                          NPY_ARRAY_ENSUREARRAY);
    if (copy != NULL && (uint64_t)PyArray_NBYTES((PyArrayObject *)copy) != j->views[i].info.nbytes) {
        /* Another thread has given the array another shape meanwhile. */
        PyErr_SetString(PyExc_RuntimeError, "an array changed its shape while it was being saved");
        Py_CLEAR(copy);
    }
    return copy;
}

PyDoc_STRVAR(save_file_doc, "safetensors_save_file(tensors, path, metadata, /)\n--\n\nWrite a file atomically.");

static PyObject *save_file(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    peftc_state *state = peftc_get_state(module);
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "safetensors_save_file takes three arguments");
        return NULL;
    }
    PyObject *path;
    job j;
    if (!PyUnicode_FSConverter(args[1], &path))
        return NULL;
    if (job_init(state, &j, args[0], args[2]) < 0) {
        Py_DECREF(path);
        return NULL;
    }
    pc_error err;
    pc_atomic_file file;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_atomic_open(PyBytes_AS_STRING(path), &file, &err);
    if (status == PC_OK) {
        status = pc_atomic_write(&file, j.layout.header, j.layout.header_len, &err);
        for (size_t i = 0; status == PC_OK && i < j.layout.count; i++) {
            size_t at = j.layout.order[i];
            const pc_tensor_view *view = &j.views[at];
            if (view->data != NULL) {
                status = pc_atomic_write(&file, view->data, (size_t)view->info.nbytes, &err);
                continue;
            }
            PyObject *copy;
            Py_BLOCK_THREADS
            copy = plain_copy(&j, at);
            Py_UNBLOCK_THREADS
            if (copy == NULL)
                status = pc_fail(&err, PC_ERR_CALLBACK, "NumPy could not make a copy");
            else
                status = pc_atomic_write(&file, PyArray_DATA((PyArrayObject *)copy), (size_t)view->info.nbytes, &err);
            Py_BLOCK_THREADS
            Py_XDECREF(copy);
            Py_UNBLOCK_THREADS
        }
        if (status == PC_OK)
            status = pc_atomic_commit(&file, &err);
        else
            pc_atomic_abort(&file);
    }
    Py_END_ALLOW_THREADS
    job_free(&j);
    Py_DECREF(path);
    if (status != PC_OK)
        return peftc_raise(state, &err);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(save_doc, "safetensors_save(tensors, metadata, /)\n--\n\nThe bytes of a file.");

static PyObject *save(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    peftc_state *state = peftc_get_state(module);
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "safetensors_save takes two arguments");
        return NULL;
    }
    job j;
    if (job_init(state, &j, args[0], args[1]) < 0)
        return NULL;
    PyObject *result = NULL;
    if (j.layout.file_size > (uint64_t)PY_SSIZE_T_MAX)
        PyErr_NoMemory();
    else
        result = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)j.layout.file_size);
    if (result != NULL) {
        char *to = PyBytes_AS_STRING(result);
        memcpy(to, j.layout.header, j.layout.header_len);
        to += j.layout.header_len;
        for (size_t i = 0; i < j.layout.count; i++) {
            size_t at = j.layout.order[i];
            const pc_tensor_view *view = &j.views[at];
            PyObject *copy = view->data == NULL ? plain_copy(&j, at) : NULL;
            if (view->data == NULL && copy == NULL) {
                Py_CLEAR(result);
                break;
            }
            const void *from = copy != NULL ? PyArray_DATA((PyArrayObject *)copy) : view->data;
            size_t len = (size_t)view->info.nbytes;
            if (len > 0) {
                Py_BEGIN_ALLOW_THREADS
                memcpy(to, from, len);
                Py_END_ALLOW_THREADS
            }
            to += len;
            Py_XDECREF(copy);
        }
    }
    job_free(&j);
    return result;
}

static PyMethodDef functions[] = {
    {"safetensors_load_file", load_file, METH_O, load_file_doc},
    {"safetensors_load", load, METH_O, load_doc},
    {"safetensors_save_file", (PyCFunction)(void (*)(void))save_file, METH_FASTCALL, save_file_doc},
    {"safetensors_save", (PyCFunction)(void (*)(void))save, METH_FASTCALL, save_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_safetensors(PyObject *module, peftc_state *state)
{
    if (PyModule_AddFunctions(module, functions) < 0)
        return -1;
    return peftc_add_safe_open(module, state);
}
