/* A parameter used as an array: conversion, operators, indexing. */
#include "parameter.h"
#include "tape.h"

static peftc_parameter_object *cast(PyObject *op) { return (peftc_parameter_object *)op; }

PyObject *peftc_parameter_dunder_array(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dtype", "copy", NULL};
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO:__array__", names, &dtype, &copy))
        return NULL;
    PyObject *array = peftc_parameter_array(cast(op));
    if (array == NULL || (dtype == Py_None && copy != Py_True))
        return array;
    PyArray_Descr *descr = NULL;
    if (dtype != Py_None && PyArray_DescrConverter(dtype, &descr) != NPY_SUCCEED) {
        Py_DECREF(array);
        return NULL;
    }
    if (copy == Py_False && descr != NULL && !PyArray_EquivTypes(descr, PyArray_DESCR((PyArrayObject *)array))) {
        PyErr_SetString(PyExc_ValueError, "a parameter cannot be seen as another dtype without a copy");
        Py_DECREF(descr);
        Py_DECREF(array);
        return NULL;
    }
    PyObject *result =
        PyArray_FromArray((PyArrayObject *)array, descr, copy == Py_True ? NPY_ARRAY_ENSURECOPY : NPY_ARRAY_FORCECAST);
    Py_DECREF(array);
    return result;
}

/* The array of a parameter, recorded while it is to be trained; anything else as it is. */
static PyObject *unwrap(PyObject *value)
{
    if (!peftc_is_parameter(value))
        return Py_NewRef(value);
    PyObject *array = peftc_parameter_array(cast(value));
    if (array == NULL || !peftc_recording())
        return array;
    peftc_state *state = peftc_state_of_type(Py_TYPE(value));
    peftc_node *node = NULL;
    if (state == NULL || state->tensor_type == NULL)
        return array;
    if (peftc_parameter_node(state, value, &node) < 0) {
        Py_DECREF(array);
        return NULL;
    }
    if (node == NULL)
        return array;
    PyObject *view = PyArray_View((PyArrayObject *)array, NULL, NULL); /* the array itself stays writeable */
    Py_DECREF(array);
    return peftc_tensor_new(state, view, node);
}

static PyObject *binary(PyObject *a, PyObject *b, PyObject *(*operation)(PyObject *, PyObject *))
{
    PyObject *left = unwrap(a);
    PyObject *right = left != NULL ? unwrap(b) : NULL;
    PyObject *result = right != NULL ? operation(left, right) : NULL;
    Py_XDECREF(left);
    Py_XDECREF(right);
    return result;
}

#define BINARY(name, operation)                                                                                        \
    PyObject *name(PyObject *a, PyObject *b) { return binary(a, b, operation); }
BINARY(peftc_parameter_add, PyNumber_Add)
BINARY(peftc_parameter_subtract, PyNumber_Subtract)
BINARY(peftc_parameter_multiply, PyNumber_Multiply)
BINARY(peftc_parameter_divide, PyNumber_TrueDivide)
BINARY(peftc_parameter_matmul, PyNumber_MatrixMultiply)
#undef BINARY

PyObject *peftc_parameter_negative(PyObject *op)
{
    PyObject *array = unwrap(op);
    PyObject *result = array != NULL ? PyNumber_Negative(array) : NULL;
    Py_XDECREF(array);
    return result;
}

PyObject *peftc_parameter_power(PyObject *a, PyObject *b, PyObject *modulo)
{
    PyObject *left = unwrap(a);
    PyObject *right = left != NULL ? unwrap(b) : NULL;
    PyObject *result = right != NULL ? PyNumber_Power(left, right, modulo) : NULL;
    Py_XDECREF(left);
    Py_XDECREF(right);
    return result;
}

Py_ssize_t peftc_parameter_length(PyObject *op)
{
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(cast(op), &ndim);
    if (ndim != 0)
        return shape[0];
    PyErr_SetString(PyExc_TypeError, "len() of a parameter without dimensions");
    return -1;
}

PyObject *peftc_parameter_subscript(PyObject *op, PyObject *key)
{
    PyObject *array = unwrap(op);
    PyObject *item = array != NULL ? PyObject_GetItem(array, key) : NULL;
    Py_XDECREF(array);
    return item;
}

int peftc_parameter_ass_subscript(PyObject *op, PyObject *key, PyObject *value)
{
    PyObject *array = peftc_parameter_array(cast(op));
    if (array == NULL)
        return -1;
    int result = value != NULL ? PyObject_SetItem(array, key, value) : PyObject_DelItem(array, key);
    Py_DECREF(array);
    return result;
}
