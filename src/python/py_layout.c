/* Where the tensors of a safetensors file are, for readers that map it. */
#include "layer.h"

#include "../formats/safetensors.h"

static PyObject *shape_of(const pc_tensor_info *info)
{
    PyObject *shape = PyTuple_New(info->ndim);
    for (int d = 0; shape != NULL && d < info->ndim; d++) {
        PyObject *extent = PyLong_FromUnsignedLongLong(info->shape[d]);
        if (extent == NULL)
            Py_CLEAR(shape);
        else
            PyTuple_SET_ITEM(shape, d, extent);
    }
    return shape;
}

PyDoc_STRVAR(layout_doc, "safetensors_layout(data, label, /)\n--\n\n"
                         "Check the header of a safetensors file given as a buffer: list of (name, dtype, shape, offset, "
                         "bytes), the offset from the start of data. label names the file in messages.");

static PyObject *layout(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    Py_buffer buffer;
    const char *label;
    if (!PyArg_ParseTuple(args, "y*s:safetensors_layout", &buffer, &label))
        return NULL;
    pc_safetensors *st = NULL;
    pc_error err;
    if (pc_safetensors_parse(buffer.buf, (size_t)buffer.len, &st, &err) != PC_OK) {
        PyBuffer_Release(&buffer);
        if (err.code == PC_ERR_FORMAT)
            return PyErr_Format(state->safetensor_error, "%s: %s", label, err.text);
        return peftc_raise(state, &err);
    }
    const pc_weights *weights = pc_safetensors_weights(st);
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < weights->count; i++) {
        const pc_tensor_info *info = &weights->tensors[i];
        PyObject *name = PyUnicode_DecodeUTF8(info->name, (Py_ssize_t)info->name_len, "strict");
        PyObject *shape = name != NULL ? shape_of(info) : NULL;
        PyObject *row = shape != NULL
                            ? Py_BuildValue("(OsOKK)", name, pc_dtype_get(info->dtype)->name, shape,
                                            (unsigned long long)pc_safetensors_offset(st, i),
                                            (unsigned long long)info->nbytes)
                            : NULL;
        if (row == NULL || PyList_Append(list, row) < 0)
            Py_CLEAR(list);
        Py_XDECREF(row);
        Py_XDECREF(shape);
        Py_XDECREF(name);
    }
    pc_safetensors_close(st);
    PyBuffer_Release(&buffer);
    return list;
}

static PyMethodDef functions[] = {
    {"safetensors_layout", layout, METH_VARARGS, layout_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_layout(PyObject *module) { return PyModule_AddFunctions(module, functions); }
