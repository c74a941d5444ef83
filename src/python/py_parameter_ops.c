/* A parameter used as an array: conversion, operators, indexing. */
#include "parameter.h"
#include "tape.h"

static peftc_parameter_object *cast(PyObject *op) { return (peftc_parameter_object *)op; }

/* The array of a parameter, recorded while it is to be trained; anything else as it is. */
PyObject *peftc_parameter_recorded(PyObject *value)
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

/* The same for everything in an argument of a NumPy function. */
static PyObject *unwrap_all(PyObject *value)
{
    if (PyTuple_CheckExact(value) || PyList_CheckExact(value)) {
        PyObject *items = PySequence_List(value);
        for (Py_ssize_t i = 0; items != NULL && i < PyList_GET_SIZE(items); i++) {
            PyObject *item = unwrap_all(PyList_GET_ITEM(items, i));
            if (item == NULL || PyList_SetItem(items, i, item) < 0)
                Py_CLEAR(items);
        }
        PyObject *result = items != NULL && PyTuple_CheckExact(value) ? PySequence_Tuple(items) : Py_XNewRef(items);
        Py_XDECREF(items);
        return result;
    }
    return peftc_parameter_recorded(value);
}

static PyObject *unwrap_dict(PyObject *kwargs)
{
    PyObject *result = PyDict_New(), *name, *value;
    Py_ssize_t at = 0;
    while (result != NULL && kwargs != NULL && PyDict_Next(kwargs, &at, &name, &value)) {
        PyObject *plain = unwrap_all(value);
        if (plain == NULL || PyDict_SetItem(result, name, plain) < 0)
            Py_CLEAR(result);
        Py_XDECREF(plain);
    }
    return result;
}

/* __array_ufunc__(self, ufunc, method, *inputs, **kwargs): the same on arrays. */
PyObject *peftc_parameter_ufunc(PyObject *op, PyObject *args, PyObject *kwargs)
{
    (void)op;
    if (PyTuple_GET_SIZE(args) < 2)
        return PyErr_Format(PyExc_TypeError, "__array_ufunc__() takes a ufunc and the name of a method");
    PyObject *function = PyObject_GetAttr(PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1));
    PyObject *rest = function != NULL ? PyTuple_GetSlice(args, 2, PyTuple_GET_SIZE(args)) : NULL;
    PyObject *inputs = rest != NULL ? unwrap_all(rest) : NULL;
    PyObject *options = inputs != NULL ? unwrap_dict(kwargs) : NULL;
    PyObject *result = options != NULL ? PyObject_Call(function, inputs, options) : NULL;
    Py_XDECREF(options);
    Py_XDECREF(inputs);
    Py_XDECREF(rest);
    Py_XDECREF(function);
    return result;
}

/* __array_function__(self, func, types, args, kwargs) */
PyObject *peftc_parameter_function(PyObject *op, PyObject *args)
{
    (void)op;
    PyObject *function, *types, *positional, *kwargs;
    if (!PyArg_ParseTuple(args, "OOO!O!:__array_function__", &function, &types, &PyTuple_Type, &positional, &PyDict_Type,
                          &kwargs))
        return NULL;
    PyObject *inputs = unwrap_all(positional);
    PyObject *options = inputs != NULL ? unwrap_dict(kwargs) : NULL;
    PyObject *result = options != NULL ? PyObject_Call(function, inputs, options) : NULL;
    Py_XDECREF(options);
    Py_XDECREF(inputs);
    return result;
}

PyObject *peftc_parameter_dunder_array(PyObject *op, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dtype", "copy", NULL};
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OO:__array__", names, &dtype, &copy))
        return NULL;
    PyObject *array = peftc_parameter_recorded(op); /* recorded: what NumPy makes of it without us is then known to have lost its gradient */
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

static PyObject *binary(PyObject *a, PyObject *b, PyObject *(*operation)(PyObject *, PyObject *))
{
    PyObject *left = peftc_parameter_recorded(a);
    PyObject *right = left != NULL ? peftc_parameter_recorded(b) : NULL;
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
    PyObject *array = peftc_parameter_recorded(op);
    PyObject *result = array != NULL ? PyNumber_Negative(array) : NULL;
    Py_XDECREF(array);
    return result;
}

PyObject *peftc_parameter_power(PyObject *a, PyObject *b, PyObject *modulo)
{
    PyObject *left = peftc_parameter_recorded(a);
    PyObject *right = left != NULL ? peftc_parameter_recorded(b) : NULL;
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
    PyObject *array = peftc_parameter_recorded(op);
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
