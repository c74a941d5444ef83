/* peftc._core.Parameter: an array with .grad and .requires_grad.
 *
 * It is an object of its own, not an ndarray, because its values can be
 * replaced (p.data = …) while layers and optimizers hold it.  Otherwise it
 * behaves like its array: operators, indexing, NumPy functions and the array's
 * own attributes all work on it.
 */
#include "parameter.h"

#include <structmember.h>

#include "../kernels/kernels.h"
#include "arrays.h"

static peftc_parameter_object *cast(PyObject *op) { return (peftc_parameter_object *)op; }

static void parameter_dealloc(PyObject *op);

/* NumPy's type number for storing a dtype. */
static int storage_typenum(pc_dtype dtype)
{
    switch (dtype) {
    case PC_F64:
        return NPY_FLOAT64;
    case PC_F16:
        return NPY_FLOAT16;
    case PC_BF16:
        return NPY_UINT16;
    default:
        return NPY_FLOAT32;
    }
}

static int check_dtype(pc_dtype dtype)
{
    if (pc_dtype_get(dtype)->is_float)
        return 0;
    PyErr_Format(PyExc_TypeError, "a parameter is float32, float64, float16 or bfloat16, not %s",
                 pc_dtype_get(dtype)->name);
    return -1;
}

/* ------------------------------------------------------------------- values */

PyObject *peftc_parameter_new(peftc_state *state, pc_dtype dtype, int ndim, const npy_intp *shape,
                              const peftc_fill *fill)
{
    size_t bytes = pc_dtype_size(dtype);
    for (int d = 0; d < ndim; d++) {
        if (shape[d] < 0 || __builtin_mul_overflow(bytes, (size_t)shape[d], &bytes) || bytes > PY_SSIZE_T_MAX) {
            PyErr_SetString(PyExc_ValueError, "the weight is too large for this machine");
            return NULL;
        }
    }
    peftc_parameter_object *self = cast(state->parameter_type->tp_alloc(state->parameter_type, 0));
    if (self == NULL)
        return NULL;
    self->dtype = dtype;
    self->ndim = ndim;
    memcpy(self->shape, shape, (size_t)ndim * sizeof *shape);
    self->fill = *fill;
    self->requires_grad = 1;
    return (PyObject *)self;
}

static void draw(pc_runtime *rt, const peftc_fill *fill, pc_dtype dtype, void *data, int64_t count)
{
    switch (fill->kind) {
    case PEFTC_FILL_ZEROS:
        break; /* the array is made zeroed */
    case PEFTC_FILL_ONES:
        for (int64_t i = 0; i < count; i++)
            pc_put_double(dtype, data, i, 1.0);
        break;
    case PEFTC_FILL_UNIFORM:
        pc_fill_uniform(rt, fill->rng, dtype, data, count, fill->a, fill->b);
        break;
    case PEFTC_FILL_NORMAL:
        pc_fill_normal(rt, fill->rng, dtype, data, count, fill->a, fill->b);
        break;
    }
}

/* The array is in the hands of users, who can change its dtype, strides or size in place. */
static int check_storage(const peftc_parameter_object *self)
{
    PyArrayObject *array = (PyArrayObject *)self->storage;
    if (PyArray_TYPE(array) == storage_typenum(self->dtype) && PyArray_ISCARRAY_RO(array))
        return 0;
    PyErr_SetString(PyExc_RuntimeError, "the array of a parameter was given another dtype or memory layout in place; "
                                        "put a new Parameter in its place");
    return -1;
}

PyArrayObject *peftc_parameter_storage(peftc_parameter_object *self)
{
    if (self->storage != NULL)
        return check_storage(self) == 0 ? (PyArrayObject *)self->storage : NULL;
    peftc_state *state = peftc_state_of_type(Py_TYPE(self));
    if (state == NULL)
        return NULL;
    PyObject *array = PyArray_ZEROS(self->ndim, self->shape, storage_typenum(self->dtype), 0);
    if (array == NULL)
        return NULL;
    void *data = PyArray_DATA((PyArrayObject *)array);
    int64_t count = (int64_t)PyArray_SIZE((PyArrayObject *)array);
    const peftc_fill fill = self->fill;
    const pc_dtype dtype = self->dtype;
    Py_BEGIN_ALLOW_THREADS
    draw(state->rt, &fill, dtype, data, count);
    Py_END_ALLOW_THREADS
    if (fill.zero_row >= 0) {
        size_t row = (size_t)(count / self->shape[0]) * pc_dtype_size(dtype);
        memset((char *)data + (size_t)fill.zero_row * row, 0, row);
    }
    if (self->storage == NULL && self->dtype == dtype) {
        self->storage = array;
        return (PyArrayObject *)array;
    }
    Py_DECREF(array); /* another thread was first: it drew the same, or asked for another dtype */
    return peftc_parameter_storage(self);
}

const npy_intp *peftc_parameter_shape(const peftc_parameter_object *self, int *ndim)
{
    if (self->storage == NULL) {
        *ndim = self->ndim;
        return self->shape;
    }
    *ndim = PyArray_NDIM((PyArrayObject *)self->storage);
    return PyArray_DIMS((PyArrayObject *)self->storage);
}

/* Any array-like as contiguous storage of a float dtype; NULL with an exception. */
static PyArrayObject *as_storage(PyObject *value, pc_dtype *dtype, const char *what)
{
    PyArrayObject *array = peftc_native_array(value, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_ENSUREARRAY);
    if (array == NULL)
        return NULL;
    *dtype = peftc_dtype_of(PyArray_DESCR(array));
    if (!pc_dtype_get(*dtype)->is_float) {
        PyErr_Format(PyExc_TypeError, "%s must be an array of float32, float64, float16 or bfloat16, not of %S", what,
                     (PyObject *)PyArray_DESCR(array));
        Py_DECREF(array);
        return NULL;
    }
    if (*dtype == PC_BF16) {
        PyObject *raw = PyArray_View(array, PyArray_DescrFromType(NPY_UINT16), &PyArray_Type);
        Py_DECREF(array);
        return (PyArrayObject *)raw;
    }
    return array;
}

static PyObject *shape_tuple(const npy_intp *shape, int ndim) { return PyArray_IntTupleFromIntp(ndim, shape); }

int peftc_parameter_assign(peftc_parameter_object *self, PyObject *value, const char *what)
{
    pc_dtype dtype;
    PyArrayObject *array;
    if (PyObject_TypeCheck(value, Py_TYPE(self)) && value != (PyObject *)self) {
        array = peftc_parameter_storage(cast(value));
        Py_XINCREF(array);
        dtype = cast(value)->dtype;
    } else {
        array = as_storage(value, &dtype, what);
    }
    if (array == NULL)
        return -1;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(self, &ndim);
    if (ndim != PyArray_NDIM(array) || !PyArray_CompareLists(shape, PyArray_DIMS(array), ndim)) {
        PyObject *want = shape_tuple(shape, ndim);
        PyObject *got = shape_tuple(PyArray_DIMS(array), PyArray_NDIM(array));
        if (want != NULL && got != NULL)
            PyErr_Format(PyExc_ValueError, "%s has shape %R; an array of shape %R cannot take its place", what, want,
                         got);
        Py_XDECREF(want);
        Py_XDECREF(got);
        Py_DECREF(array);
        return -1;
    }
    self->dtype = dtype;
    Py_XSETREF(self->storage, (PyObject *)array);
    return 0;
}

PyObject *peftc_parameter_array(peftc_parameter_object *self)
{
    PyArrayObject *storage = peftc_parameter_storage(self);
    if (storage == NULL)
        return NULL;
    if (self->dtype != PC_BF16)
        return Py_NewRef(storage);
    peftc_state *state = peftc_state_of_type(Py_TYPE(self));
    PyArray_Descr *descr = state != NULL ? peftc_descr_of(state, PC_BF16) : NULL;
    return descr != NULL ? PyArray_View(storage, descr, &PyArray_Type) : NULL;
}

bool peftc_is_parameter(PyObject *object)
{
    for (const PyTypeObject *type = Py_TYPE(object); type != NULL; type = type->tp_base)
        if (type->tp_dealloc == parameter_dealloc)
            return true;
    return false;
}

/* ------------------------------------------------------------------ lifetime */

PyDoc_STRVAR(parameter_doc,
             "Parameter(data, requires_grad=True)\n--\n\n"
             "An array that a module computes with and an optimizer may change.\n\n"
             "data is a float32, float64, float16 or bfloat16 array; it is shared when it is C-contiguous and copied "
             "otherwise. `.data` gives the array and can be set to another one of the same shape; `.grad` is None or an "
             "array; `.requires_grad` says whether training changes it. Operators, indexing, NumPy functions and the "
             "array's attributes work on it directly. Raises TypeError for another dtype.");

static PyObject *parameter_py_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"data", "requires_grad", NULL};
    PyObject *data;
    int requires_grad = 1;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|p:Parameter", names, &data, &requires_grad))
        return NULL;
    peftc_state *state = peftc_state_of_type(type);
    if (state == NULL)
        return NULL;
    pc_dtype dtype;
    PyArrayObject *array;
    if (PyObject_TypeCheck(data, state->parameter_type)) {
        array = peftc_parameter_storage(cast(data));
        Py_XINCREF(array);
        dtype = cast(data)->dtype;
    } else {
        array = as_storage(data, &dtype, "a parameter");
    }
    if (array == NULL)
        return NULL;
    peftc_parameter_object *self = cast(type->tp_alloc(type, 0));
    if (self == NULL) {
        Py_DECREF(array);
        return NULL;
    }
    self->storage = (PyObject *)array;
    self->dtype = dtype;
    self->requires_grad = requires_grad != 0;
    self->fill.zero_row = -1;
    return (PyObject *)self;
}

PyDoc_STRVAR(from_raw_doc,
             "_from_raw($type, data, dtype, /)\n--\n\n"
             "A parameter over stored elements: like Parameter(data), but bfloat16 comes as an array of uint16, which "
             "needs no ml_dtypes.");

static PyObject *parameter_from_raw(PyObject *type, PyObject *args)
{
    PyArrayObject *data;
    PyObject *dtype_obj;
    if (!PyArg_ParseTuple(args, "O!O:_from_raw", &PyArray_Type, &data, &dtype_obj))
        return NULL;
    pc_dtype dtype = peftc_dtype_from_object(dtype_obj);
    if (dtype == PC_DTYPE_NONE || check_dtype(dtype) < 0)
        return NULL;
    if (!PyArray_EquivTypenums(PyArray_TYPE(data), storage_typenum(dtype)) || !PyArray_ISNOTSWAPPED(data))
        return PyErr_Format(PyExc_TypeError, "an array of %S does not hold %s", (PyObject *)PyArray_DESCR(data),
                            pc_dtype_get(dtype)->name);
    PyObject *storage = PyArray_FROM_OF((PyObject *)data, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_ENSUREARRAY);
    if (storage == NULL)
        return NULL;
    PyTypeObject *cls = (PyTypeObject *)type;
    peftc_parameter_object *self = cast(cls->tp_alloc(cls, 0));
    if (self == NULL) {
        Py_DECREF(storage);
        return NULL;
    }
    self->storage = storage;
    self->dtype = dtype;
    self->requires_grad = 1;
    self->fill.zero_row = -1;
    return (PyObject *)self;
}

PyDoc_STRVAR(convert_doc, "_convert($self, dtype, /)\n--\n\nStore the values in another float dtype, in place.");

static PyObject *parameter_convert(PyObject *op, PyObject *dtype_obj)
{
    peftc_parameter_object *self = cast(op);
    peftc_state *state = peftc_state_of_type(Py_TYPE(op));
    pc_dtype dtype = peftc_dtype_from_object(dtype_obj);
    if (state == NULL || dtype == PC_DTYPE_NONE || check_dtype(dtype) < 0)
        return NULL;
    if (dtype == self->dtype)
        Py_RETURN_NONE;
    if (self->storage == NULL) { /* not drawn yet: draw it in the new dtype */
        self->dtype = dtype;
        Py_RETURN_NONE;
    }
    if (check_storage(self) < 0)
        return NULL;
    PyArrayObject *old = (PyArrayObject *)Py_NewRef(self->storage);
    const pc_dtype old_dtype = self->dtype;
    PyArrayObject *converted =
        (PyArrayObject *)PyArray_SimpleNew(PyArray_NDIM(old), PyArray_DIMS(old), storage_typenum(dtype));
    if (converted != NULL) {
        Py_BEGIN_ALLOW_THREADS
        pc_convert(state->rt, dtype, PyArray_DATA(converted), old_dtype, PyArray_DATA(old), PyArray_SIZE(old));
        Py_END_ALLOW_THREADS
        self->dtype = dtype;
        Py_XSETREF(self->storage, (PyObject *)converted);
    }
    Py_DECREF(old);
    if (converted == NULL)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(copy_from_doc,
             "_copy_from($self, other, /)\n--\n\n"
             "Take the values of another parameter of the same shape, in this one's dtype and, unless that is read-only, "
             "in its memory.");

static PyObject *parameter_copy_from(PyObject *op, PyObject *other_obj)
{
    peftc_parameter_object *self = cast(op);
    peftc_state *state = peftc_state_of_type(Py_TYPE(op));
    if (state == NULL)
        return NULL;
    if (!PyObject_TypeCheck(other_obj, state->parameter_type))
        return PyErr_Format(PyExc_TypeError, "expected a Parameter, got %s", Py_TYPE(other_obj)->tp_name);
    PyArrayObject *source = peftc_parameter_storage(cast(other_obj));
    if (source == NULL)
        return NULL;
    Py_INCREF(source);
    const pc_dtype source_dtype = cast(other_obj)->dtype, dtype = self->dtype;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(self, &ndim);
    PyArrayObject *target = NULL;
    if (self->storage != NULL && check_storage(self) < 0)
        target = NULL;
    else if (ndim != PyArray_NDIM(source) || !PyArray_CompareLists(shape, PyArray_DIMS(source), ndim))
        PyErr_SetString(PyExc_ValueError, "the parameters have different shapes");
    else if (self->storage != NULL && PyArray_ISWRITEABLE((PyArrayObject *)self->storage))
        target = (PyArrayObject *)Py_NewRef(self->storage);
    else
        target = (PyArrayObject *)PyArray_SimpleNew(ndim, shape, storage_typenum(dtype));
    if (target != NULL && target != source) {
        Py_BEGIN_ALLOW_THREADS
        pc_convert(state->rt, dtype, PyArray_DATA(target), source_dtype, PyArray_DATA(source), PyArray_SIZE(source));
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(source);
    if (target == NULL)
        return NULL;
    self->dtype = dtype; /* another thread may have changed both meanwhile */
    Py_XSETREF(self->storage, (PyObject *)target);
    Py_RETURN_NONE;
}

static PyObject *parameter_share(PyObject *op, PyObject *other_obj)
{
    peftc_state *state = peftc_state_of_type(Py_TYPE(op));
    if (state == NULL)
        return NULL;
    if (!PyObject_TypeCheck(other_obj, state->parameter_type))
        return PyErr_Format(PyExc_TypeError, "expected a Parameter, got %s", Py_TYPE(other_obj)->tp_name);
    if (peftc_parameter_assign(cast(op), other_obj, "the parameter") < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(fill_doc,
             "_fill($self, kind, a, b, /)\n--\n\n"
             "Start again: 'zeros', 'ones', 'uniform' in a … b, or 'normal' with mean a and standard deviation b; drawn when "
             "first looked at. A row that stays zero (padding_idx) does so.");

static PyObject *parameter_fill(PyObject *op, PyObject *args)
{
    static const char *const kinds[] = {"zeros", "ones", "uniform", "normal"}; /* peftc_fill_kind */
    peftc_parameter_object *self = cast(op);
    peftc_state *state = peftc_state_of_type(Py_TYPE(op));
    const char *kind;
    double a, b;
    if (state == NULL || !PyArg_ParseTuple(args, "sdd:_fill", &kind, &a, &b))
        return NULL;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(self, &ndim);
    for (int i = 0; i < 4; i++) {
        if (strcmp(kind, kinds[i]) != 0)
            continue;
        if (ndim > 4)
            return PyErr_Format(PyExc_ValueError, "only parameters of up to 4 dimensions can be drawn");
        if (shape != self->shape)
            memcpy(self->shape, shape, (size_t)ndim * sizeof *shape);
        self->ndim = ndim;
        self->fill.kind = (peftc_fill_kind)i;
        self->fill.a = a;
        self->fill.b = b;
        self->fill.rng = peftc_next_rng(state);
        Py_CLEAR(self->storage);
        Py_RETURN_NONE;
    }
    return PyErr_Format(PyExc_ValueError, "unknown kind %s", kind);
}

static PyObject *parameter_reduce(PyObject *op, PyObject *unused)
{
    (void)unused;
    peftc_parameter_object *self = cast(op);
    PyArrayObject *storage = peftc_parameter_storage(self);
    PyObject *rebuild = storage != NULL ? PyObject_GetAttrString((PyObject *)Py_TYPE(op), "_from_raw") : NULL;
    if (rebuild == NULL)
        return NULL;
    return Py_BuildValue("N(Os)(O)", rebuild, storage, pc_dtype_get(self->dtype)->name,
                         self->requires_grad ? Py_True : Py_False);
}

static PyObject *parameter_setstate(PyObject *op, PyObject *state)
{
    int on;
    if (!PyArg_ParseTuple(state, "p", &on))
        return NULL;
    cast(op)->requires_grad = on != 0;
    Py_RETURN_NONE;
}

static int parameter_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(cast(op)->storage);
    Py_VISIT(cast(op)->grad);
    return 0;
}

static int parameter_clear(PyObject *op)
{
    Py_CLEAR(cast(op)->storage);
    Py_CLEAR(cast(op)->grad);
    return 0;
}

static void parameter_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (cast(op)->weakrefs != NULL)
        PyObject_ClearWeakRefs(op);
    parameter_clear(op);
    pc_adapter_release(cast(op)->adapter);
    type->tp_free(op);
    Py_DECREF(type);
}

/* --------------------------------------------------------------- attributes */

static PyObject *parameter_get_data(PyObject *op, void *unused)
{
    (void)unused;
    return peftc_parameter_array(cast(op));
}

static int parameter_set_data(PyObject *op, PyObject *value, void *unused)
{
    (void)unused;
    if (value == NULL) {
        PyErr_SetString(PyExc_AttributeError, "a parameter's data cannot be deleted");
        return -1;
    }
    return peftc_parameter_assign(cast(op), value, "the parameter");
}

static PyObject *parameter_get_requires_grad(PyObject *op, void *unused)
{
    (void)unused;
    return PyBool_FromLong(cast(op)->requires_grad);
}

static int parameter_set_requires_grad(PyObject *op, PyObject *value, void *unused)
{
    (void)unused;
    int on = value != NULL ? PyObject_IsTrue(value) : -1;
    if (value == NULL)
        PyErr_SetString(PyExc_AttributeError, "requires_grad cannot be deleted");
    if (on < 0)
        return -1;
    cast(op)->requires_grad = on != 0;
    return 0;
}

/* What a loader or a check of names asks for must not draw values that nobody looks at. */
static PyObject *parameter_get_shape(PyObject *op, void *unused)
{
    (void)unused;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(cast(op), &ndim);
    return shape_tuple(shape, ndim);
}

static PyObject *parameter_get_dtype(PyObject *op, void *unused)
{
    (void)unused;
    peftc_state *state = peftc_state_of_type(Py_TYPE(op));
    return state != NULL ? (PyObject *)peftc_descr_of(state, cast(op)->dtype) : NULL;
}

static PyObject *parameter_get_raw(PyObject *op, void *unused)
{
    (void)unused;
    return Py_XNewRef(peftc_parameter_storage(cast(op)));
}

static PyObject *parameter_get_dtype_name(PyObject *op, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(pc_dtype_get(cast(op)->dtype)->name);
}

static PyObject *parameter_get_size(PyObject *op, void *unused)
{
    (void)unused;
    int ndim;
    const npy_intp *shape = peftc_parameter_shape(cast(op), &ndim);
    return PyLong_FromSsize_t(PyArray_MultiplyList(shape, ndim));
}

static PyObject *parameter_get_ndim(PyObject *op, void *unused)
{
    (void)unused;
    int ndim;
    peftc_parameter_shape(cast(op), &ndim);
    return PyLong_FromLong(ndim);
}

/* Everything else is the array's: p.T, p.mean(), p.copy() … */
static PyObject *parameter_getattro(PyObject *op, PyObject *name)
{
    PyObject *found = PyObject_GenericGetAttr(op, name);
    if (found != NULL || !PyErr_ExceptionMatches(PyExc_AttributeError) ||
        (PyUnicode_READ_CHAR(name, 0) == '_' && PyUnicode_GET_LENGTH(name) > 1))
        return found;
    PyErr_Clear();
    PyObject *array = peftc_parameter_recorded(op);
    if (array == NULL)
        return NULL;
    found = PyObject_GetAttr(array, name);
    Py_DECREF(array);
    return found;
}

static PyObject *parameter_repr(PyObject *op)
{
    PyObject *array = peftc_parameter_array(cast(op));
    if (array == NULL)
        return NULL;
    PyObject *learns = PyObject_GetAttrString(op, "requires_grad"); /* a subclass may compute it */
    PyObject *text =
        learns != NULL ? PyUnicode_FromFormat("Parameter containing:\n%R, requires_grad=%R", array, learns) : NULL;
    Py_XDECREF(learns);
    Py_DECREF(array);
    return text;
}

/* ------------------------------------------------------------------- set-up */

static PyMethodDef parameter_methods[] = {
    {"_from_raw", parameter_from_raw, METH_VARARGS | METH_CLASS, from_raw_doc},
    {"_convert", parameter_convert, METH_O, convert_doc},
    {"_share", parameter_share, METH_O,
     "_share($self, other, /)\n--\n\nUse the memory and dtype of another parameter of the same shape."},
    {"_attach", peftc_parameter_attach, METH_VARARGS,
     "_attach($self, registry, adapter, /)\n--\n\nThe values are a tensor of this adapter: its gradient is kept there."},
    {"_fill", parameter_fill, METH_VARARGS, fill_doc},
    {"_copy_from", parameter_copy_from, METH_O, copy_from_doc},
    {"__array__", (PyCFunction)(void (*)(void))peftc_parameter_dunder_array, METH_VARARGS | METH_KEYWORDS,
     "__array__($self, /, dtype=None, copy=None)\n--\n\nThe values as an ndarray."},
    {"__array_ufunc__", (PyCFunction)(void (*)(void))peftc_parameter_ufunc, METH_VARARGS | METH_KEYWORDS,
     "__array_ufunc__($self, ufunc, method, /, *inputs, **kwargs)\n--\n\nThe same on the array, recorded in train mode."},
    {"__array_function__", peftc_parameter_function, METH_VARARGS,
     "__array_function__($self, func, types, args, kwargs, /)\n--\n\nThe same on the array, recorded in train mode."},
    {"__setstate__", parameter_setstate, METH_O, "__setstate__($self, state, /)\n--\n\nUndo __reduce__."},
    {"__reduce__", parameter_reduce, METH_NOARGS,
     "__reduce__($self, /)\n--\n\nValues, dtype and requires_grad; gradients are not kept."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef parameter_getset[] = {
    {"data", parameter_get_data, parameter_set_data, "The values: an ndarray that shares memory.", NULL},
    {"_raw", parameter_get_raw, NULL, "The values as stored: like data, but bfloat16 as uint16.", NULL},
    {"grad", peftc_parameter_get_grad, peftc_parameter_set_grad,
     "The gradient: an ndarray, float64 for a float64 parameter and float32 otherwise, or None.", NULL},
    {"requires_grad", parameter_get_requires_grad, parameter_set_requires_grad, "Whether training changes it.", NULL},
    {"shape", parameter_get_shape, NULL, "Its shape.", NULL},
    {"dtype", parameter_get_dtype, NULL, "Its NumPy dtype.", NULL},
    {"_dtype_name", parameter_get_dtype_name, NULL, "Its dtype's safetensors name.", NULL},
    {"size", parameter_get_size, NULL, "Number of elements.", NULL},
    {"ndim", parameter_get_ndim, NULL, "Number of dimensions.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef parameter_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(peftc_parameter_object, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot parameter_slots[] = {
    {Py_tp_doc, (void *)parameter_doc},
    {Py_tp_new, parameter_py_new},
    {Py_tp_dealloc, parameter_dealloc},
    {Py_tp_traverse, parameter_traverse},
    {Py_tp_clear, parameter_clear},
    {Py_tp_repr, parameter_repr},
    {Py_tp_getattro, parameter_getattro},
    {Py_tp_methods, parameter_methods},
    {Py_tp_getset, parameter_getset},
    {Py_tp_members, parameter_members},
    {Py_nb_add, peftc_parameter_add},
    {Py_nb_subtract, peftc_parameter_subtract},
    {Py_nb_multiply, peftc_parameter_multiply},
    {Py_nb_true_divide, peftc_parameter_divide},
    {Py_nb_matrix_multiply, peftc_parameter_matmul},
    {Py_nb_power, peftc_parameter_power},
    {Py_nb_negative, peftc_parameter_negative},
    {Py_mp_length, peftc_parameter_length},
    {Py_mp_subscript, peftc_parameter_subscript},
    {Py_mp_ass_subscript, peftc_parameter_ass_subscript},
    {0, NULL},
};

static PyType_Spec parameter_spec = {
    .name = "peftc._core.Parameter",
    .basicsize = sizeof(peftc_parameter_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = parameter_slots,
};

int peftc_add_parameter(PyObject *module, peftc_state *state)
{
    state->parameter_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &parameter_spec, NULL);
    return state->parameter_type != NULL ? PyModule_AddType(module, state->parameter_type) : -1;
}
