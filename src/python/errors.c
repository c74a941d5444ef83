#include "binding.h"

static PyObject *unpickling_error(peftc_state *state)
{
    if (state->unpickling_error == NULL) {
        PyObject *pickle = PyImport_ImportModule("_pickle");
        if (pickle == NULL)
            return NULL;
        state->unpickling_error = PyObject_GetAttrString(pickle, "UnpicklingError");
        Py_DECREF(pickle);
    }
    return state->unpickling_error;
}

PyObject *peftc_raise(peftc_state *state, const pc_error *err)
{
    PyObject *type = NULL;
    switch (err->code) {
    case PC_ERR_CALLBACK: /* the callback has set the exception */
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_SystemError, "a callback failed without an exception");
        return NULL;
    case PC_ERR_NOMEM:
        type = PyExc_MemoryError;
        break;
    case PC_ERR_VALUE:
        type = PyExc_ValueError;
        break;
    case PC_ERR_TYPE:
        type = PyExc_TypeError;
        break;
    case PC_ERR_KEY:
        type = PyExc_KeyError;
        break;
    case PC_ERR_INDEX:
        type = PyExc_IndexError;
        break;
    case PC_ERR_FORMAT:
        type = state->safetensor_error;
        break;
    case PC_ERR_UNPICKLE:
        type = unpickling_error(state);
        break;
    case PC_ERR_UNSUPPORTED:
        type = PyExc_NotImplementedError;
        break;
    case PC_ERR_IO:
        if (err->sys_errno != 0) {
            /* OSError(errno, text) is a FileNotFoundError and so on; until Python 3.11 `except` goes by the type that is named here */
            PyObject *error = PyObject_CallFunction(PyExc_OSError, "is", err->sys_errno, err->text);
            if (error != NULL) {
                PyErr_SetObject((PyObject *)Py_TYPE(error), error);
                Py_DECREF(error);
            }
            return NULL;
        }
        type = PyExc_OSError;
        break;
    case PC_OK:
    case PC_ERR_RUNTIME:
        type = PyExc_RuntimeError;
        break;
    }
    if (type != NULL)
        PyErr_SetString(type, err->text);
    return NULL;
}
