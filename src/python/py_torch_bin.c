/* adapter_model.bin → arrays. */
#include "arrays.h"

#include "../formats/torch_bin.h"

/* All tensors of an opened file as a dict of arrays. */
static PyObject *read_arrays(peftc_state *state, pc_weights *weights)
{
    PyObject *dict = PyDict_New();
    if (dict == NULL)
        return NULL;
    void **data = PyMem_Calloc(weights->count != 0 ? weights->count : 1, sizeof *data);
    if (data == NULL) {
        Py_DECREF(dict);
        return PyErr_NoMemory();
    }
    bool ok = true;
    for (size_t i = 0; i < weights->count && ok; i++) {
        const pc_tensor_info *info = &weights->tensors[i];
        npy_intp shape[PC_MAX_DIMS];
        for (int d = 0; d < info->ndim; d++)
            shape[d] = (npy_intp)info->shape[d]; /* the reader checked that it fits */
        PyObject *name = PyUnicode_DecodeUTF8(info->name, (Py_ssize_t)info->name_len, NULL);
        PyArray_Descr *descr = name != NULL ? peftc_descr_of(state, info->dtype) : NULL;
        PyObject *array = descr != NULL ? PyArray_Empty(info->ndim, shape, descr, 0) : NULL;
        ok = array != NULL && PyDict_SetItem(dict, name, array) == 0;
        if (ok)
            data[i] = PyArray_DATA((PyArrayObject *)array);
        Py_XDECREF(array); /* the dict holds it */
        Py_XDECREF(name);
    }
    if (ok) {
        pc_error err;
        pc_status status = PC_OK;
        Py_BEGIN_ALLOW_THREADS
        for (size_t i = 0; i < weights->count && status == PC_OK; i++)
            status = weights->read(weights, i, data[i], &err);
        Py_END_ALLOW_THREADS
        if (status != PC_OK) {
            peftc_raise(state, &err);
            ok = false;
        }
    }
    PyMem_Free(data);
    if (!ok)
        Py_CLEAR(dict);
    return dict;
}

/* All tensors as (dtype name, shape, bytes): for types that NumPy does not have. */
static PyObject *read_raw(peftc_state *state, pc_weights *weights)
{
    PyObject *dict = PyDict_New();
    if (dict == NULL)
        return NULL;
    for (size_t i = 0; i < weights->count; i++) {
        const pc_tensor_info *info = &weights->tensors[i];
        PyObject *shape = PyTuple_New(info->ndim);
        PyObject *bytes = shape != NULL ? PyBytes_FromStringAndSize(NULL, (Py_ssize_t)info->nbytes) : NULL;
        PyObject *name = bytes != NULL ? PyUnicode_DecodeUTF8(info->name, (Py_ssize_t)info->name_len, NULL) : NULL;
        bool ok = name != NULL;
        for (int d = 0; d < info->ndim && ok; d++) {
            PyObject *size = PyLong_FromUnsignedLongLong(info->shape[d]);
            ok = size != NULL;
            if (ok)
                PyTuple_SET_ITEM(shape, d, size);
        }
        pc_error err;
        if (ok && weights->read(weights, i, PyBytes_AS_STRING(bytes), &err) != PC_OK) {
            peftc_raise(state, &err);
            ok = false;
        }
        PyObject *entry = ok ? Py_BuildValue("(sOO)", pc_dtype_get(info->dtype)->name, shape, bytes) : NULL;
        ok = entry != NULL && PyDict_SetItem(dict, name, entry) == 0;
        Py_XDECREF(entry);
        Py_XDECREF(name);
        Py_XDECREF(bytes);
        Py_XDECREF(shape);
        if (!ok) {
            Py_DECREF(dict);
            return NULL;
        }
    }
    return dict;
}

typedef PyObject *(*read_fn)(peftc_state *state, pc_weights *weights);

static PyObject *load_path(PyObject *module, PyObject *arg, read_fn read)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *path = NULL;
    if (!PyUnicode_FSConverter(arg, &path))
        return NULL;
    pc_weights *weights = NULL;
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_torch_bin_open(PyBytes_AS_STRING(path), &weights, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(path);
    if (status != PC_OK)
        return peftc_raise(state, &err);
    PyObject *result = read(state, weights);
    weights->close(weights);
    return result;
}

static PyObject *load_bytes(PyObject *module, PyObject *arg, read_fn read)
{
    peftc_state *state = peftc_get_state(module);
    Py_buffer view;
    if (PyObject_GetBuffer(arg, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    pc_weights *weights = NULL;
    pc_error err;
    pc_status status;
    Py_BEGIN_ALLOW_THREADS
    status = pc_torch_bin_parse(view.buf, (size_t)view.len, "adapter_model.bin", &weights, &err);
    Py_END_ALLOW_THREADS
    PyObject *result = NULL;
    if (status != PC_OK) {
        peftc_raise(state, &err);
    } else {
        result = read(state, weights);
        weights->close(weights);
    }
    PyBuffer_Release(&view);
    return result;
}

PyDoc_STRVAR(load_torch_bin_doc,
             "load_torch_bin(path, /)\n--\n\n"
             "Read the dict of tensors in a file of torch.save, without running anything in it, as name -> array.\n\n"
             "Names of nested dicts are joined with dots. bfloat16 and float8 tensors need the package ml_dtypes.\n"
             "Raises pickle.UnpicklingError when the content is wrong or asks for more than tensors, OSError when the\n"
             "file cannot be read, TypeError when NumPy has no type for a tensor.");

static PyObject *load_torch_bin(PyObject *module, PyObject *arg) { return load_path(module, arg, read_arrays); }

PyDoc_STRVAR(parse_torch_bin_doc,
             "parse_torch_bin(data, /)\n--\n\nload_torch_bin for a file that is already in memory (bytes-like).");

static PyObject *parse_torch_bin(PyObject *module, PyObject *arg) { return load_bytes(module, arg, read_arrays); }

PyDoc_STRVAR(torch_bin_raw_doc,
             "torch_bin_raw(source, /)\n--\n\n"
             "Read a file of torch.save as name -> (dtype in safetensors' names, shape, bytes in row-major order).\n\n"
             "source: a path, or the file's content as bytes. Needs no type that NumPy does not have.");

static PyObject *torch_bin_raw(PyObject *module, PyObject *arg)
{
    bool content = PyBytes_Check(arg) || PyByteArray_Check(arg) || PyMemoryView_Check(arg);
    return content ? load_bytes(module, arg, read_raw) : load_path(module, arg, read_raw);
}

static PyMethodDef functions[] = {
    {"load_torch_bin", load_torch_bin, METH_O, load_torch_bin_doc},
    {"parse_torch_bin", parse_torch_bin, METH_O, parse_torch_bin_doc},
    {"torch_bin_raw", torch_bin_raw, METH_O, torch_bin_raw_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_bin(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
