/* Optimizer steps over parameters and their gradients, and the loss that the gradients start from. */
#include "binding.h"

#include <math.h>

#include "../core/memory.h"
#include "../kernels/gradients.h"
#include "arrays.h"
#include "parameter.h"
#include "tape.h"

/* Parameters with gradients, their memory pinned while the GIL is gone. */
typedef struct pinned {
    size_t count;
    pc_update *updates;
    PyObject *owners; /* list */
} pinned;

static void unpin(pinned *p)
{
    pc_free(p->updates);
    Py_XDECREF(p->owners);
}

static bool is_adapter_tensor(const peftc_parameter_object *parameter) { return parameter->adapter != NULL; }

/* Memory that can be written to: weights that are mapped from a file get a copy of their own. */
static PyArrayObject *own_storage(peftc_parameter_object *parameter)
{
    PyArrayObject *storage = peftc_parameter_storage(parameter);
    if (storage == NULL || PyArray_ISWRITEABLE(storage) || is_adapter_tensor(parameter))
        return storage;
    PyArrayObject *copy = (PyArrayObject *)PyArray_NewCopy(storage, NPY_CORDER);
    if (copy == NULL)
        return NULL;
    Py_XSETREF(parameter->storage, (PyObject *)copy);
    return copy;
}

static int wrong_state(PyObject *state, Py_ssize_t i)
{
    PyErr_Format(PyExc_ValueError, "the optimizer's state of parameter %zd does not fit: %R", i, state);
    return -1;
}

/* The state array of a parameter: of its compute dtype and size. */
static int take_state(PyObject *item, const peftc_parameter_object *parameter, int64_t n, Py_ssize_t i, void **out)
{
    *out = NULL;
    if (item == Py_None)
        return 0;
    const int type = pc_compute_dtype(parameter->dtype) == PC_F64 ? NPY_FLOAT64 : NPY_FLOAT32;
    if (!PyArray_Check(item) || PyArray_TYPE((PyArrayObject *)item) != type || !PyArray_ISCARRAY((PyArrayObject *)item) ||
        PyArray_SIZE((PyArrayObject *)item) != n)
        return wrong_state(item, i);
    *out = PyArray_DATA((PyArrayObject *)item);
    return 0;
}

/* One item: (parameter, state or None, state or None, first). */
static int pin_one(pinned *p, peftc_state *state, PyObject *item, Py_ssize_t i, bool with_states)
{
    PyObject *parameter_obj = item, *states[2] = {Py_None, Py_None};
    int first = 0;
    if (with_states && !PyArg_ParseTuple(item, "OOOp", &parameter_obj, &states[0], &states[1], &first))
        return -1;
    if (!PyObject_TypeCheck(parameter_obj, state->parameter_type)) {
        PyErr_Format(PyExc_TypeError, "expected a Parameter, got %s", Py_TYPE(parameter_obj)->tp_name);
        return -1;
    }
    peftc_parameter_object *parameter = (peftc_parameter_object *)parameter_obj;
    pc_update update = {.first = first != 0};
    void *grad;
    if (peftc_parameter_gradient(parameter, &grad, &update.grad_dtype) < 0)
        return -1;
    if (grad == NULL)
        return 0;
    PyArrayObject *storage = own_storage(parameter);
    if (storage == NULL)
        return -1;
    update.n = PyArray_SIZE(storage);
    update.dtype = parameter->dtype;
    update.data = PyArray_DATA(storage);
    update.grad = grad;
    for (int s = 0; s < 2; s++)
        if (take_state(states[s], parameter, update.n, i, &update.state[s]) < 0)
            return -1;
    if (PyList_Append(p->owners, (PyObject *)storage) < 0 || PyList_Append(p->owners, parameter_obj) < 0 ||
        (parameter->grad != NULL && PyList_Append(p->owners, parameter->grad) < 0))
        return -1;
    p->updates[p->count++] = update;
    return 0;
}

static int pin(pinned *p, peftc_state *state, PyObject *items, bool with_states)
{
    *p = (pinned){.owners = PyList_New(0)};
    PyObject *list = p->owners != NULL ? PySequence_Tuple(items) : NULL;
    if (list == NULL)
        goto failed;
    p->updates = pc_calloc((size_t)PyTuple_GET_SIZE(list) + 1, sizeof *p->updates);
    if (p->updates == NULL) {
        PyErr_NoMemory();
        goto failed;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(list); i++)
        if (pin_one(p, state, PyTuple_GET_ITEM(list, i), i, with_states) < 0)
            goto failed;
    Py_DECREF(list);
    return 0;
failed:
    Py_XDECREF(list);
    unpin(p);
    return -1;
}

static char *end_of(const void *start, int64_t n, pc_dtype dtype) { return (char *)(uintptr_t)start + (size_t)n * pc_dtype_size(dtype); }

/* Tensors that follow each other in every block are updated as one. */
static void join(pinned *p)
{
    size_t kept = 0;
    for (size_t i = 1; i < p->count; i++) {
        pc_update *a = &p->updates[kept];
        const pc_update *b = &p->updates[i];
        const pc_dtype compute = pc_compute_dtype(a->dtype);
        bool follows = a->dtype == b->dtype && a->grad_dtype == b->grad_dtype && a->first == b->first &&
                       (char *)b->data == end_of(a->data, a->n, a->dtype) &&
                       (const char *)b->grad == end_of(a->grad, a->n, a->grad_dtype);
        for (int s = 0; s < 2; s++)
            follows = follows && (a->state[s] == NULL) == (b->state[s] == NULL) &&
                      (a->state[s] == NULL || (char *)b->state[s] == end_of(a->state[s], a->n, compute));
        if (follows)
            a->n += b->n;
        else
            p->updates[++kept] = *b;
    }
    if (p->count != 0)
        p->count = kept + 1;
}

static PyObject *adamw_step(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *items;
    pc_adamw o;
    double step;
    int maximize;
    if (!PyArg_ParseTuple(args, "Odddddd|p:adamw_step", &items, &o.lr, &o.beta1, &o.beta2, &o.eps, &o.weight_decay, &step,
                          &maximize))
        return NULL;
    o.maximize = maximize != 0;
    o.correction1 = 1.0 - pow(o.beta1, step);
    o.correction2 = 1.0 - pow(o.beta2, step);
    pinned p;
    if (pin(&p, state, items, true) < 0)
        return NULL;
    for (size_t i = 0; i < p.count; i++) {
        if (p.updates[i].state[0] == NULL || p.updates[i].state[1] == NULL) {
            unpin(&p);
            return PyErr_Format(PyExc_ValueError, "AdamW needs two averages per parameter");
        }
    }
    join(&p);
    Py_BEGIN_ALLOW_THREADS
    pc_adamw_step(state->rt, &o, p.updates, p.count);
    Py_END_ALLOW_THREADS
    unpin(&p);
    Py_RETURN_NONE;
}

static PyObject *sgd_step(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *items;
    pc_sgd o;
    int nesterov, maximize;
    if (!PyArg_ParseTuple(args, "Oddddpp:sgd_step", &items, &o.lr, &o.momentum, &o.dampening, &o.weight_decay, &nesterov,
                          &maximize))
        return NULL;
    o.nesterov = nesterov != 0;
    o.maximize = maximize != 0;
    pinned p;
    if (pin(&p, state, items, true) < 0)
        return NULL;
    join(&p);
    Py_BEGIN_ALLOW_THREADS
    pc_sgd_step(state->rt, &o, p.updates, p.count);
    Py_END_ALLOW_THREADS
    unpin(&p);
    Py_RETURN_NONE;
}

static PyObject *first_bad_gradient(PyObject *module, PyObject *items)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *list = PySequence_Tuple(items);
    PyObject *result = list != NULL ? PyLong_FromLong(-1) : NULL;
    for (Py_ssize_t i = 0; result != NULL && i < PyTuple_GET_SIZE(list); i++) {
        pinned p;
        PyObject *one = PyTuple_GetSlice(list, i, i + 1);
        if (one == NULL || pin(&p, state, one, false) < 0) {
            Py_XDECREF(one);
            Py_CLEAR(result);
            break;
        }
        Py_DECREF(one);
        bool bad = p.count != 0 && pc_first_not_finite(p.updates[0].grad_dtype, p.updates[0].grad, p.updates[0].n) >= 0;
        unpin(&p);
        if (bad) {
            Py_SETREF(result, PyLong_FromSsize_t(i));
            break;
        }
    }
    Py_XDECREF(list);
    return result;
}

static PyObject *gradient_norms(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *items;
    double kind;
    if (!PyArg_ParseTuple(args, "Od:gradient_norms", &items, &kind))
        return NULL;
    pinned p;
    if (pin(&p, state, items, false) < 0)
        return NULL;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < p.count; i++) {
        PyObject *value = PyFloat_FromDouble(pc_norm(p.updates[i].grad_dtype, p.updates[i].grad, p.updates[i].n, kind));
        if (value == NULL || PyList_Append(list, value) < 0)
            Py_CLEAR(list);
        Py_XDECREF(value);
    }
    unpin(&p);
    return list;
}

static PyObject *scale_gradients(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *items;
    double factor;
    if (!PyArg_ParseTuple(args, "Od:scale_gradients", &items, &factor))
        return NULL;
    pinned p;
    if (pin(&p, state, items, false) < 0)
        return NULL;
    for (size_t i = 0; i < p.count; i++) {
        void *grad = (void *)(uintptr_t)p.updates[i].grad;
        const float narrow = (float)factor;
        if (p.updates[i].grad_dtype == PC_F64)
            pc_scale_rows(state->rt, PC_F64, 1, p.updates[i].n, grad, PC_F64, &factor, grad);
        else
            pc_scale_rows(state->rt, PC_F32, 1, p.updates[i].n, grad, PC_F32, &narrow, grad);
    }
    unpin(&p);
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------ loss */

static int check_labels(PyArrayObject *labels, int64_t classes, int64_t ignore)
{
    const int64_t *values = PyArray_DATA(labels);
    for (npy_intp i = 0; i < PyArray_SIZE(labels); i++) {
        if (values[i] == ignore || (values[i] >= 0 && values[i] < classes))
            continue;
        PyErr_Format(PyExc_IndexError, "cross_entropy: label %lld of row %zd is not one of %lld classes",
                     (long long)values[i], (Py_ssize_t)i, (long long)classes);
        return -1;
    }
    return 0;
}

static PyObject *cross_entropy(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *logits_obj, *labels_obj, *weight_obj;
    pc_cross_entropy_options o = {0};
    long long ignore;
    int mean;
    if (!PyArg_ParseTuple(args, "OOOLdp:cross_entropy", &logits_obj, &labels_obj, &weight_obj, &ignore, &o.smoothing,
                          &mean))
        return NULL;
    o.ignore = ignore;
    o.mean = mean != 0;
    PyArrayObject *logits = (PyArrayObject *)PyArray_FROM_OF(logits_obj, NPY_ARRAY_ENSUREARRAY);
    PyArrayObject *labels = NULL, *weight = NULL, *grad = NULL;
    PyObject *result = NULL;
    double *rows = NULL, loss;
    if (logits == NULL)
        return NULL;
    const int type = PyArray_TYPE(logits) == NPY_FLOAT64 ? NPY_FLOAT64 : NPY_FLOAT32;
    const pc_dtype dt = type == NPY_FLOAT64 ? PC_F64 : PC_F32;
    Py_SETREF(logits, (PyArrayObject *)PyArray_FROM_OTF((PyObject *)logits, type, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST));
    labels = (PyArrayObject *)PyArray_FROM_OTF(labels_obj, NPY_INT64, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_ENSURECOPY);
    if (logits == NULL || labels == NULL)
        goto done;
    if (PyArray_NDIM(logits) != 2 || PyArray_NDIM(labels) != 1 || PyArray_DIM(labels, 0) != PyArray_DIM(logits, 0)) {
        PyErr_SetString(PyExc_ValueError, "cross_entropy: logits must be (rows, classes) and labels (rows,)");
        goto done;
    }
    const int64_t m = PyArray_DIM(logits, 0), n = PyArray_DIM(logits, 1);
    if (weight_obj != Py_None) {
        weight = (PyArrayObject *)PyArray_FROM_OTF(weight_obj, type, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST);
        if (weight == NULL)
            goto done;
        if (PyArray_NDIM(weight) != 1 || PyArray_DIM(weight, 0) != n) {
            PyErr_Format(PyExc_ValueError, "cross_entropy: weight must have one number for each of %lld classes",
                         (long long)n);
            goto done;
        }
        o.weight = PyArray_DATA(weight);
    }
    if (check_labels(labels, n, o.ignore) < 0)
        goto done;
    grad = (PyArrayObject *)PyArray_SimpleNew(2, PyArray_DIMS(logits), type);
    rows = pc_calloc((size_t)m + 1, sizeof *rows);
    if (grad == NULL || rows == NULL) {
        if (rows == NULL)
            PyErr_NoMemory();
        goto done;
    }
    const void *x = PyArray_DATA(logits);
    const int64_t *y = PyArray_DATA(labels);
    void *g = PyArray_DATA(grad);
    Py_BEGIN_ALLOW_THREADS
    pc_cross_entropy(state->rt, dt, m, n, x, y, &o, rows, &loss, g);
    Py_END_ALLOW_THREADS
    result = Py_BuildValue("dO", loss, grad);
done:
    pc_free(rows);
    Py_XDECREF(logits);
    Py_XDECREF(labels);
    Py_XDECREF(weight);
    Py_XDECREF(grad);
    return result;
}

#define SIGNATURE(text) text "\n--\n\n"
static PyMethodDef functions[] = {
    {"adamw_step", adamw_step, METH_VARARGS,
     SIGNATURE("adamw_step(items, lr, beta1, beta2, eps, weight_decay, step, maximize=False, /)")},
    {"sgd_step", sgd_step, METH_VARARGS,
     SIGNATURE("sgd_step(items, lr, momentum, dampening, weight_decay, nesterov, maximize, /)")},
    {"first_bad_gradient", first_bad_gradient, METH_O,
     SIGNATURE("first_bad_gradient(parameters, /)") "The index of the first whose gradient has NaN or infinity, or -1."},
    {"gradient_norms", gradient_norms, METH_VARARGS,
     SIGNATURE("gradient_norms(parameters, kind, /)") "The norm of each gradient that is there."},
    {"scale_gradients", scale_gradients, METH_VARARGS, SIGNATURE("scale_gradients(parameters, factor, /)")},
    {"cross_entropy", cross_entropy, METH_VARARGS,
     SIGNATURE("cross_entropy(logits, labels, weight, ignore_index, smoothing, mean, /)")},
    {NULL, NULL, 0, NULL},
};

int peftc_add_optimizers(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
