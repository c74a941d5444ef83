#include "array_weights.h"

#include "../core/memory.h"
#include "arrays.h"

typedef struct array_weights {
    pc_weights base;
    PyObject *names;  /* tuple of str: owns the UTF-8 that the infos point to */
    PyObject *arrays; /* list of contiguous arrays */
    pc_tensor_info *infos;
    uint64_t *shapes;
} array_weights;

static pc_status read_array(pc_weights *base, size_t i, void *dst, pc_error *err)
{
    array_weights *self = (array_weights *)base;
    PyArrayObject *array = (PyArrayObject *)PyList_GET_ITEM(self->arrays, (Py_ssize_t)i);
    if ((uint64_t)PyArray_NBYTES(array) != self->infos[i].nbytes || !PyArray_ISCARRAY_RO(array))
        return pc_fail(err, PC_ERR_VALUE, "state_dict: the array %.*s was resized while it was read",
                       self->infos[i].name_len < 256 ? (int)self->infos[i].name_len : 256, self->infos[i].name);
    memcpy(dst, PyArray_DATA(array), self->infos[i].nbytes);
    return PC_OK;
}

static void close_arrays(pc_weights *base)
{
    array_weights *self = (array_weights *)base;
    Py_XDECREF(self->names);
    Py_XDECREF(self->arrays);
    pc_free(self->infos);
    pc_free(self->shapes);
    pc_free(self);
}

/* One value as a contiguous, aligned, native-order array; NULL with an exception that names the key. */
static PyArrayObject *as_array(PyObject *key, PyObject *value)
{
    PyArrayObject *array = peftc_native_array(value, NPY_ARRAY_CARRAY_RO);
    if (array == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError))
            return NULL; /* KeyboardInterrupt and the like */
        PyObject *type, *reason, *trace;
        PyErr_Fetch(&type, &reason, &trace);
        PyErr_Format(PyExc_TypeError, "state_dict[%R] cannot be read as an array: %S", key,
                     reason != NULL ? reason : Py_None);
        Py_XDECREF(type);
        Py_XDECREF(reason);
        Py_XDECREF(trace);
        return NULL;
    }
    if (peftc_dtype_of(PyArray_DESCR(array)) == PC_DTYPE_NONE) {
        PyErr_Format(PyExc_TypeError, "state_dict[%R] has dtype %S, which adapter weights cannot have", key,
                     (PyObject *)PyArray_DESCR(array));
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

static int fill(array_weights *self, PyObject *dict)
{
    Py_ssize_t count = PyDict_GET_SIZE(dict);
    self->names = PyTuple_New(count);
    self->arrays = PyList_New(count);
    self->infos = pc_calloc((size_t)count, sizeof *self->infos);
    self->shapes = pc_calloc((size_t)count, PC_MAX_DIMS * sizeof *self->shapes);
    if (self->names == NULL || self->arrays == NULL)
        return -1;
    if (self->infos == NULL || self->shapes == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    /* Converting a value can run any code, so the dict is read once before that. */
    PyObject *items = PyDict_Items(dict);
    if (items == NULL)
        return -1;
    int result = -1;
    if (PyList_GET_SIZE(items) != count) {
        PyErr_SetString(PyExc_RuntimeError, "state_dict changed while it was read");
        goto done;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *key = PyTuple_GET_ITEM(PyList_GET_ITEM(items, i), 0);
        PyObject *value = PyTuple_GET_ITEM(PyList_GET_ITEM(items, i), 1);
        if (!PyUnicode_Check(key)) {
            PyErr_Format(PyExc_TypeError, "state_dict keys are names (str), got %R", key);
            goto done;
        }
        Py_ssize_t len;
        const char *name = PyUnicode_AsUTF8AndSize(key, &len);
        if (name == NULL)
            goto done;
        PyArrayObject *array = as_array(key, value);
        if (array == NULL)
            goto done;
        PyTuple_SET_ITEM(self->names, i, Py_NewRef(key));
        PyList_SET_ITEM(self->arrays, i, (PyObject *)array);
        pc_tensor_info *info = &self->infos[i];
        uint64_t *shape = self->shapes + (size_t)i * PC_MAX_DIMS;
        info->name = name;
        info->name_len = (size_t)len;
        info->dtype = peftc_dtype_of(PyArray_DESCR(array));
        info->ndim = PyArray_NDIM(array);
        for (int d = 0; d < info->ndim && d < PC_MAX_DIMS; d++)
            shape[d] = (uint64_t)PyArray_DIM(array, d);
        info->shape = shape;
        info->nbytes = (uint64_t)PyArray_NBYTES(array);
    }
    self->base.count = (size_t)count;
    self->base.tensors = self->infos;
    result = 0;
done:
    Py_DECREF(items);
    return result;
}

pc_weights *peftc_array_weights(PyObject *dict)
{
    if (!PyDict_Check(dict)) {
        PyErr_Format(PyExc_TypeError, "a state_dict is a dict of name -> array, got %s", Py_TYPE(dict)->tp_name);
        return NULL;
    }
    array_weights *self = pc_calloc(1, sizeof *self);
    if (self == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    self->base.label = "state_dict";
    self->base.read = read_array;
    self->base.concurrent = true;
    self->base.close = close_arrays;
    if (fill(self, dict) < 0) {
        close_arrays(&self->base);
        return NULL;
    }
    return &self->base;
}
