/* A parameter's gradient.  That of an adapter's tensor lies beside the adapter's arena (core/gradients.h), that of any
 * other is an array of its own. */
#include "parameter.h"

#include "../core/gradients.h"
#include "../methods/methods.h"
#include "arrays.h"
#include "py_registry.h"

static peftc_parameter_object *cast(PyObject *op) { return (peftc_parameter_object *)op; }

static const pc_tensor *tensor_of(const peftc_parameter_object *self) { return &self->adapter->tensors[self->tensor]; }

PyObject *peftc_parameter_attach(PyObject *op, PyObject *args)
{
    peftc_state *state = peftc_state_of_type(Py_TYPE(op));
    PyObject *registry, *name;
    if (state == NULL || !PyArg_ParseTuple(args, "O!O:_attach", state->registry_type, &registry, &name))
        return NULL;
    pc_adapter *adapter = registry_find_adapter((registry_object *)registry, name);
    PyArrayObject *storage = adapter != NULL ? peftc_parameter_storage(cast(op)) : NULL;
    if (storage == NULL)
        return NULL;
    for (size_t i = 0; i < adapter->tensor_count; i++) {
        if (pc_tensor_data(adapter, &adapter->tensors[i]) != PyArray_DATA(storage) ||
            pc_tensor_count(&adapter->tensors[i]) != PyArray_SIZE(storage))
            continue;
        pc_adapter_release(cast(op)->adapter);
        cast(op)->adapter = pc_adapter_retain(adapter);
        cast(op)->tensor = (int32_t)i;
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "the values are no tensor of adapter %R", name);
}

static bool usable(const peftc_parameter_object *self, PyArrayObject *grad)
{
    const int type = pc_compute_dtype(self->dtype) == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(self, &ndim);
    return PyArray_TYPE(grad) == type && PyArray_ISCARRAY(grad) && PyArray_NDIM(grad) == ndim &&
           PyArray_CompareLists(PyArray_DIMS(grad), shape, ndim);
}

/* Make self->grad an array that can be added to. */
static int own_array(peftc_parameter_object *self)
{
    if (self->grad != NULL && usable(self, (PyArrayObject *)self->grad))
        return 0;
    const int type = pc_compute_dtype(self->dtype) == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(self, &ndim);
    PyObject *made = self->grad == NULL
                         ? PyArray_ZEROS(ndim, shape, type, 0)
                         : PyArray_FROM_OTF(self->grad, type, NPY_ARRAY_CARRAY | NPY_ARRAY_FORCECAST | NPY_ARRAY_ENSURECOPY);
    if (made == NULL)
        return -1;
    Py_XSETREF(self->grad, made);
    if (usable(self, (PyArrayObject *)made))
        return 0;
    PyErr_SetString(PyExc_RuntimeError, "the gradient of a parameter was given another shape in place; set it to None");
    return -1;
}

int peftc_parameter_sum(peftc_parameter_object *self, pc_target *target)
{
    if (self->adapter != NULL) {
        pc_error err;
        peftc_state *state = peftc_state_of_type(Py_TYPE(self));
        if (state == NULL)
            return -1;
        if (pc_gradients_prepare(self->adapter, &err) != PC_OK) {
            peftc_raise(state, &err);
            return -1;
        }
        *target = (pc_target){pc_gradient_sum(self->adapter, tensor_of(self)), pc_gradient_dtype(tensor_of(self))};
        return 0;
    }
    if (own_array(self) < 0)
        return -1;
    *target = (pc_target){PyArray_DATA((PyArrayObject *)self->grad), pc_compute_dtype(self->dtype)};
    return 0;
}

int peftc_parameter_gradient(peftc_parameter_object *self, void **values, pc_dtype *dtype)
{
    *dtype = pc_compute_dtype(self->dtype);
    if (self->adapter != NULL) {
        *values = pc_gradient_now(self->adapter, tensor_of(self));
        return 0;
    }
    *values = NULL;
    if (self->grad == NULL)
        return 0;
    if (own_array(self) < 0)
        return -1;
    *values = PyArray_DATA((PyArrayObject *)self->grad);
    return 0;
}

PyObject *peftc_parameter_get_grad(PyObject *op, void *unused)
{
    (void)unused;
    peftc_parameter_object *self = cast(op);
    if (self->adapter == NULL)
        return Py_NewRef(self->grad != NULL ? self->grad : Py_None);
    void *values = pc_gradient_now(self->adapter, tensor_of(self));
    if (values == NULL)
        Py_RETURN_NONE;
    peftc_state *state = peftc_state_of_type(Py_TYPE(op));
    PyObject *owner = state != NULL ? registry_arena(state, pc_gradients_arena(self->adapter)) : NULL;
    if (owner == NULL)
        return NULL;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(self, &ndim);
    PyObject *array = peftc_array_over(state, pc_gradient_dtype(tensor_of(self)), ndim, shape, values, owner, 1);
    Py_DECREF(owner);
    return array;
}

static int set_tensor_grad(peftc_parameter_object *self, PyArrayObject *value)
{
    pc_target target;
    if (!tensor_of(self)->trainable) {
        PyErr_Format(PyExc_ValueError, "this tensor of adapter %s is not trained and has no gradient", self->adapter->name);
        return -1;
    }
    const int type = pc_gradient_dtype(tensor_of(self)) == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
    PyArrayObject *array =
        (PyArrayObject *)PyArray_FROM_OTF((PyObject *)value, type, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
    int status = array != NULL ? peftc_parameter_sum(self, &target) : -1;
    if (status == 0 && target.sum == NULL) {
        PyErr_Format(PyExc_ValueError, "adapter %s is not trainable, so that its tensors have no gradients",
                     self->adapter->name);
        status = -1;
    }
    if (status == 0)
        memmove(target.sum, PyArray_DATA(array), (size_t)PyArray_NBYTES(array)); /* the value may be a view of it */
    Py_XDECREF(array);
    return status;
}

int peftc_parameter_set_grad(PyObject *op, PyObject *value, void *unused)
{
    (void)unused;
    peftc_parameter_object *self = cast(op);
    if (value == NULL || value == Py_None) {
        if (self->adapter != NULL)
            pc_gradient_clear(self->adapter, tensor_of(self));
        Py_CLEAR(self->grad);
        return 0;
    }
    PyArrayObject *array = (PyArrayObject *)PyArray_FROM_OF(value, NPY_ARRAY_ENSUREARRAY);
    if (array == NULL)
        return -1;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(self, &ndim);
    if (ndim != PyArray_NDIM(array) || !PyArray_CompareLists(shape, PyArray_DIMS(array), ndim)) {
        PyErr_SetString(PyExc_ValueError, "a gradient has the shape of its parameter");
        Py_DECREF(array);
        return -1;
    }
    if (self->adapter != NULL) {
        int status = set_tensor_grad(self, array);
        Py_DECREF(array);
        return status;
    }
    Py_XSETREF(self->grad, (PyObject *)array);
    return 0;
}
