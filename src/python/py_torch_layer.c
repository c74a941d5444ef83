#include "py_torch_layer.h"

#include "py_torch_watch.h"

PyObject *layer_item(call *c, PyObject *dict, PyObject *key)
{
    if (dict == NULL || !PyDict_Check(dict) || c->failed)
        return NULL;
    PyObject *found = PyDict_GetItemWithError(dict, key);
    c->failed = found == NULL && PyErr_Occurred();
    return found;
}

PyObject *layer_own(call *c, PyObject *object, int name)
{
    if (object == NULL || c->failed)
        return NULL;
    PyObject *dict = PyObject_GenericGetDict(object, NULL);
    if (dict == NULL) {
        PyErr_Clear();
        return NULL;
    }
    PyObject *found = layer_item(c, dict, PIECE(c, name));
    Py_DECREF(dict); /* the object has it */
    return found;
}

PyObject *layer_parameter(call *c, PyObject *layer, int field, PyObject *name)
{
    PyObject *children = layer_own(c, layer, MODULES);
    return layer_item(c, layer_own(c, layer_item(c, children, PIECE(c, field)), PARAMETERS), name);
}

bool layer_has_hooks(call *c, PyObject *module)
{
    return !peftc_is_empty(layer_own(c, module, FORWARD_HOOKS)) || !peftc_is_empty(layer_own(c, module, FORWARD_PRE_HOOKS)) ||
           !peftc_is_empty(layer_own(c, module, BACKWARD_HOOKS)) || !peftc_is_empty(layer_own(c, module, BACKWARD_PRE_HOOKS));
}

bool layer_is_true(call *c, PyObject *object, int name)
{
    PyObject *value = PyObject_GetAttr(object, PIECE(c, name));
    c->failed = c->failed || value == NULL;
    Py_XDECREF(value);
    return value != Py_False;
}

bool layer_grad_enabled(call *c, PyObject *asked)
{
    PyObject *enabled = PyObject_CallNoArgs(asked);
    c->failed = c->failed || enabled == NULL;
    Py_XDECREF(enabled);
    return enabled != Py_False;
}

PyObject *layer_fresh_base(call *c, PyObject *layer, PyObject *fresh)
{
    peftc_tensor weight; /* a plain tensor: no subclass that may have remembered what it gave */
    PyObject *base = layer_item(c, layer_own(c, layer, MODULES), PIECE(c, BASE_LAYER)), *parameter = NULL;
    if (base == NULL || (PyObject *)Py_TYPE(base) != fresh || layer_has_hooks(c, base) || layer_own(c, base, FORWARD) != NULL ||
        (parameter = layer_item(c, layer_own(c, base, PARAMETERS), PIECE(c, WEIGHT))) == NULL ||
        !peftc_read_tensor(c->state, parameter, &weight))
        return NULL;
    return base;
}

bool layer_linear(call *c, PyObject *base, PyObject *x, PyObject **weight, PyObject **bias)
{
    PyObject *parameters = layer_own(c, base, PARAMETERS);
    PyObject *w = layer_item(c, parameters, PIECE(c, WEIGHT)), *b = layer_item(c, parameters, PIECE(c, BIAS));
    peftc_tensor tensor, other;
    if (w == NULL || b == NULL || !peftc_read_tensor(c->state, x, &other) || !peftc_read_tensor(c->state, w, &tensor) ||
        tensor.ndim != 2 || tensor.dtype != other.dtype || other.ndim == 0 ||
        tensor.shape[1] != other.shape[other.ndim - 1] || (b != Py_None && !peftc_read_tensor(c->state, b, &other)))
        return false;
    *weight = Py_NewRef(w);
    *bias = Py_NewRef(b);
    return true;
}

bool layer_is_trained(call *c, PyObject *weight, PyObject *bias)
{
    return layer_is_true(c, weight, REQUIRES_GRAD) || (bias != Py_None && layer_is_true(c, bias, REQUIRES_GRAD));
}

PyObject *layer_answer(const call *c, PyObject *result)
{
    if (c->failed || PyErr_Occurred()) {
        Py_XDECREF(result);
        return NULL;
    }
    return result != NULL ? result : Py_NewRef(Py_None);
}
