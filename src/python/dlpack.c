#define _GNU_SOURCE
#include "dlpack.h"

#include <dlfcn.h>
#include <string.h>

/* ------------------------------------------------- what DLPack 1.x lays down */

#define DEVICE_CPU 1
#define KIND_FLOAT 2
#define KIND_BFLOAT 4

typedef int (*describe_fn)(void *object, peftc_exchange_tensor *out); /* 0, or -1 with an exception set */
typedef int (*make_fn)(peftc_owned_tensor *tensor, void **object);   /* likewise; the tensor is torch's then */

typedef struct exchange_api {
    uint32_t major, minor;
    struct exchange_api *older; /* the table of an earlier major version, or NULL */
    void (*allocate)(void), (*export_owned)(void); /* not called here */
    make_fn make;
    describe_fn describe; /* these two may be NULL */
} exchange_api;

#define CAPSULE_NAME "dlpack_exchange_api"
#define MAJOR_VERSION 1

/* -------------------------------------------------------------- torch, found */

typedef struct peftc_torch {
    PyTypeObject *tensor, *parameter;
    PyObject *capsule; /* keeps the table */
    const exchange_api *api; /* NULL: without one */
    describe_fn describe;
    PyObject *is_neg_method; /* torch.Tensor.is_neg */
    PyCFunction is_neg;      /* and what is behind it, where it is a plain function of C */
    PyObject *get_num_threads;
    pc_runtime *threads; /* torch's, or NULL */
    PyObject *float32, *float64, *float16, *bfloat16;
    PyObject *data_ptr, *shape, *stride, *dtype, *device, *type; /* names */
} peftc_torch;

static void torch_free(peftc_torch *torch)
{
    if (torch == NULL)
        return;
    PyObject **owned[] = {(PyObject **)&torch->tensor, (PyObject **)&torch->parameter, &torch->capsule,
                          &torch->is_neg_method, &torch->get_num_threads, &torch->float32, &torch->float64, &torch->float16,
                          &torch->bfloat16, &torch->data_ptr, &torch->shape, &torch->stride, &torch->dtype,
                          &torch->device, &torch->type};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++)
        Py_CLEAR(*owned[i]);
    pc_runtime_free(torch->threads);
    PyMem_Free(torch);
}

void peftc_forget_torch(peftc_state *state)
{
    peftc_torch *torch = state->torch;
    state->torch = NULL;
    torch_free(torch);
}

int peftc_visit_torch(peftc_state *state, visitproc visit, void *arg)
{
    if (state->torch != NULL) {
        Py_VISIT(state->torch->tensor);
        Py_VISIT(state->torch->parameter);
        Py_VISIT(state->torch->capsule);
        Py_VISIT(state->torch->is_neg_method);
        Py_VISIT(state->torch->get_num_threads);
    }
    return 0;
}

/* The table that the capsule holds, or NULL without an exception. */
static const exchange_api *api_of(PyObject *capsule)
{
    if (capsule == NULL || !PyCapsule_IsValid(capsule, CAPSULE_NAME))
        return NULL;
    const exchange_api *api = PyCapsule_GetPointer(capsule, CAPSULE_NAME);
    while (api != NULL && api->major > MAJOR_VERSION)
        api = api->older;
    return api != NULL && api->major == MAJOR_VERSION ? api : NULL;
}

/* torch's threads, if its OpenMP is one that all of the process can see, as torch arranges for where it can. */
static pc_runtime *borrow_threads(void)
{
    pc_team_fn run;
    pc_number_fn number;
    void *team = dlsym(RTLD_DEFAULT, "GOMP_parallel"), *index = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    pc_runtime *threads = NULL;
    memcpy(&run, &team, sizeof run); /* C has no cast from an object's address to a function's */
    memcpy(&number, &index, sizeof number);
    return team != NULL && index != NULL && pc_runtime_borrow(&threads, run, number, NULL) == PC_OK ? threads : NULL;
}

/* What torch has, or NULL with an exception if it lacks something. */
static peftc_torch *torch_learn(PyObject *module)
{
    peftc_torch *torch = PyMem_Calloc(1, sizeof *torch);
    PyObject *nn = NULL;
    if (torch == NULL)
        return (peftc_torch *)(void *)PyErr_NoMemory();
    torch->tensor = (PyTypeObject *)PyObject_GetAttrString(module, "Tensor");
    nn = PyObject_GetAttrString(module, "nn");
    if (torch->tensor == NULL || nn == NULL)
        goto failed;
    torch->parameter = (PyTypeObject *)PyObject_GetAttrString(nn, "Parameter");
    torch->is_neg_method = PyObject_GetAttrString((PyObject *)torch->tensor, "is_neg");
    torch->get_num_threads = PyObject_GetAttrString(module, "get_num_threads");
    torch->float32 = PyObject_GetAttrString(module, "float32");
    torch->float64 = PyObject_GetAttrString(module, "float64");
    torch->float16 = PyObject_GetAttrString(module, "float16");
    torch->bfloat16 = PyObject_GetAttrString(module, "bfloat16");
    torch->data_ptr = PyUnicode_InternFromString("data_ptr");
    torch->shape = PyUnicode_InternFromString("shape");
    torch->stride = PyUnicode_InternFromString("stride");
    torch->dtype = PyUnicode_InternFromString("dtype");
    torch->device = PyUnicode_InternFromString("device");
    torch->type = PyUnicode_InternFromString("type");
    if (PyErr_Occurred())
        goto failed;
    if (!PyType_Check((PyObject *)torch->tensor) || !PyType_Check((PyObject *)torch->parameter)) {
        PyErr_SetString(PyExc_TypeError, "torch.Tensor and torch.nn.Parameter must be types");
        goto failed;
    }
    if (Py_IS_TYPE(torch->is_neg_method, &PyMethodDescr_Type)) {
        const PyMethodDef *method = ((PyMethodDescrObject *)torch->is_neg_method)->d_method;
        if ((method->ml_flags & METH_NOARGS) != 0)
            torch->is_neg = method->ml_meth;
    }
    torch->capsule = PyObject_GetAttrString((PyObject *)torch->tensor, "__dlpack_c_exchange_api__");
    PyErr_Clear(); /* without one: attribute by attribute */
    torch->api = api_of(torch->capsule);
    torch->describe = torch->api != NULL ? torch->api->describe : NULL;
    torch->threads = borrow_threads();
    Py_DECREF(nn);
    return torch;
failed:
    Py_XDECREF(nn);
    torch_free(torch);
    return NULL;
}

/* torch if it has been imported, by whomever; NULL otherwise, without an exception. */
static peftc_torch *torch_find(peftc_state *state)
{
    PyObject *modules = PyImport_GetModuleDict(); /* borrowed */
    PyObject *module = modules != NULL ? PyMapping_GetItemString(modules, "torch") : NULL;
    peftc_torch *torch = module != NULL ? torch_learn(module) : NULL;
    Py_XDECREF(module);
    PyErr_Clear(); /* not imported, or only half so far: nothing can be a tensor yet */
    if (state->torch == NULL) {
        state->torch = torch;
    } else { /* other Python code ran in between and came here first */
        torch_free(torch);
    }
    return state->torch;
}

pc_runtime *peftc_torch_runtime(peftc_state *state)
{
    PyObject *count = state->torch != NULL ? PyObject_CallNoArgs(state->torch->get_num_threads) : NULL;
    long most = count != NULL && PyLong_Check(count) ? PyLong_AsLong(count) : -1;
    int ours = pc_runtime_threads(state->rt);
    Py_XDECREF(count);
    PyErr_Clear();
    if (most == 1)
        return NULL;
    pc_runtime *threads = state->torch != NULL ? state->torch->threads : NULL;
    if (threads == NULL)
        return state->rt;
    /* Set anew each time: both numbers may have changed. */
    return pc_runtime_set_threads(threads, most > 1 && most < ours ? (int)most : ours, NULL) == PC_OK ? threads : NULL;
}

/* ------------------------------------------------------------------- reading */

static pc_dtype dtype_of_attribute(const peftc_torch *torch, PyObject *dtype)
{
    return dtype == torch->float32    ? PC_F32
           : dtype == torch->float64  ? PC_F64
           : dtype == torch->float16  ? PC_F16
           : dtype == torch->bfloat16 ? PC_BF16
                                      : PC_DTYPE_NONE;
}

static pc_dtype dtype_of_exchange(const peftc_exchange_tensor *tensor)
{
    if (tensor->lanes != 1)
        return PC_DTYPE_NONE;
    if (tensor->kind == KIND_BFLOAT)
        return tensor->bits == 16 ? PC_BF16 : PC_DTYPE_NONE;
    if (tensor->kind != KIND_FLOAT)
        return PC_DTYPE_NONE;
    return tensor->bits == 32 ? PC_F32 : tensor->bits == 64 ? PC_F64 : tensor->bits == 16 ? PC_F16 : PC_DTYPE_NONE;
}

/* The integers of a tuple; their number, or -1 with or without an exception. */
static int integers(PyObject *tuple, int64_t *out)
{
    if (tuple == NULL || !PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) > PEFTC_MAX_DIMS)
        return -1;
    int count = (int)PyTuple_GET_SIZE(tuple);
    for (int i = 0; i < count; i++) {
        out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
        if (out[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return count;
}

/* Without the table; true on success, an exception may be set otherwise. */
static bool read_attributes(const peftc_torch *torch, PyObject *obj, peftc_tensor *out)
{
    bool good = false;
    PyObject *device = PyObject_GetAttr(obj, torch->device), *type = NULL, *dtype = NULL, *shape = NULL,
             *strides = NULL, *pointer = NULL;
    if (device == NULL || (type = PyObject_GetAttr(device, torch->type)) == NULL || !PyUnicode_Check(type) ||
        PyUnicode_CompareWithASCIIString(type, "cpu") != 0)
        goto done;
    if ((dtype = PyObject_GetAttr(obj, torch->dtype)) == NULL)
        goto done;
    out->dtype = dtype_of_attribute(torch, dtype);
    shape = PyObject_GetAttr(obj, torch->shape);
    out->ndim = integers(shape, out->room);
    if (out->dtype == PC_DTYPE_NONE || out->ndim < 0)
        goto done;
    strides = PyObject_CallMethodNoArgs(obj, torch->stride);
    if (integers(strides, out->room + PEFTC_MAX_DIMS) != out->ndim)
        goto done;
    pointer = PyObject_CallMethodNoArgs(obj, torch->data_ptr);
    if (pointer == NULL)
        goto done;
    out->data = PyLong_AsVoidPtr(pointer);
    out->shape = out->room;
    out->strides = out->room + PEFTC_MAX_DIMS;
    good = !PyErr_Occurred();
done:
    Py_XDECREF(device);
    Py_XDECREF(type);
    Py_XDECREF(dtype);
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    Py_XDECREF(pointer);
    return good;
}

static bool read_exchange(const peftc_torch *torch, PyObject *obj, peftc_tensor *out)
{
    peftc_exchange_tensor tensor = {.data = NULL};
    if (torch->describe(obj, &tensor) != 0 || tensor.device_type != DEVICE_CPU)
        return false;
    out->dtype = dtype_of_exchange(&tensor);
    out->ndim = tensor.ndim;
    out->shape = tensor.shape;
    out->strides = tensor.strides;
    out->data = tensor.data != NULL ? (char *)tensor.data + tensor.byte_offset : NULL;
    return out->dtype != PC_DTYPE_NONE && tensor.ndim >= 0 && tensor.ndim <= PEFTC_MAX_DIMS &&
           (tensor.ndim == 0 || (tensor.shape != NULL && tensor.strides != NULL));
}

static bool is_negative(const peftc_torch *torch, PyObject *obj)
{
    PyObject *answer = torch->is_neg != NULL ? torch->is_neg(obj, NULL)
                                             : PyObject_CallOneArg(torch->is_neg_method, obj);
    bool yes = answer != Py_False;
    Py_XDECREF(answer);
    return yes;
}

bool peftc_read_tensor(peftc_state *state, PyObject *obj, peftc_tensor *out)
{
    const peftc_torch *torch = state->torch;
    if (torch == NULL && (torch = torch_find(state)) == NULL)
        return false;
    PyTypeObject *type = Py_TYPE(obj);
    if (type != torch->tensor && type != torch->parameter)
        return false;
    /* Asked first: it runs torch's code, and what is described must still hold afterwards. */
    if ((type == torch->tensor && is_negative(torch, obj)) ||
        !(torch->describe != NULL ? read_exchange(torch, obj, out) : read_attributes(torch, obj, out))) {
        PyErr_Clear();
        return false;
    }
    if (out->data == NULL) { /* fine for a tensor without elements only */
        for (int i = 0; i < out->ndim; i++)
            if (out->shape[i] == 0)
                return true;
        return false;
    }
    return ((uintptr_t)out->data & (pc_dtype_size(out->dtype) - 1)) == 0;
}

void peftc_ahead_of_storage(peftc_state *state, PyObject *obj)
{
    const peftc_torch *torch = state->torch; /* looking for it would run code */
    if (torch == NULL || torch->api == NULL || (Py_TYPE(obj) != torch->tensor && Py_TYPE(obj) != torch->parameter))
        return;
    /* Since torch 2.10, which publishes the table, a tensor is its head and the address of torch's part, in which the third
     * word is the address of its storage. */
    const char *part, *storage;
    memcpy(&part, obj + 1, sizeof part);
    if ((uintptr_t)part < 4096 || (uintptr_t)part % sizeof part != 0)
        return;
    memcpy(&storage, part + 2 * sizeof storage, sizeof storage);
    __builtin_prefetch(storage);
    __builtin_prefetch(storage + 64);
}

/* --------------------------------------------------------------------- making */

bool peftc_makes_tensors(peftc_state *state)
{
    const peftc_torch *torch = state->torch != NULL ? state->torch : torch_find(state);
    return torch != NULL && torch->api != NULL && torch->api->make != NULL;
}

PyObject *peftc_make_tensor(peftc_state *state, peftc_owned_tensor *owned, void *data, pc_dtype dtype, int ndim,
                            const int64_t *shape, const int64_t *strides)
{
    const exchange_api *api = state->torch->api;
    void *made = NULL;
    owned->major = api->major;
    owned->minor = api->minor;
    owned->tensor = (peftc_exchange_tensor){.data = data,
                                            .device_type = DEVICE_CPU,
                                            .ndim = ndim,
                                            .kind = dtype == PC_BF16 ? KIND_BFLOAT : KIND_FLOAT,
                                            .bits = (uint8_t)(8 * pc_dtype_size(dtype)),
                                            .lanes = 1,
                                            .shape = (int64_t *)(uintptr_t)shape,
                                            .strides = (int64_t *)(uintptr_t)strides};
    if (api->make(owned, &made) != 0) { /* it stays the caller's */
        owned->delete(owned);
        return NULL;
    }
    return made;
}

/* --------------------------------------------------------------------- as rows */

bool peftc_tensor_rows(const peftc_tensor *t, peftc_rows *out)
{
    if (t->ndim < 1)
        return false;
    int last = t->ndim - 1;
    *out = (peftc_rows){t->data, 1, t->shape[last], t->shape[last]};
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] < 0 || t->strides[i] < 0)
            return false;
        if (t->shape[i] == 0) { /* nothing to read: any strides will do */
            int64_t rows = 1;
            for (int j = 0; j < last; j++)
                if (__builtin_mul_overflow(rows, t->shape[j], &rows))
                    return false;
            out->rows = rows;
            return true;
        }
    }
    if (t->strides[last] != 1)
        return false;
    int64_t stride = 0;
    bool found = false; /* a dimension with more than one row */
    for (int i = last - 1; i >= 0; i--) {
        if (t->shape[i] == 1)
            continue;
        int64_t expected;
        if (!found)
            stride = t->strides[i];
        else if (__builtin_mul_overflow(stride, out->rows, &expected) || expected != t->strides[i])
            return false;
        if (__builtin_mul_overflow(out->rows, t->shape[i], &out->rows))
            return false;
        found = true;
    }
    if (found)
        out->stride = stride;
    return true;
}

bool peftc_tensor_packed(const peftc_tensor *t)
{
    int64_t expected = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] == 0)
            return true;
        if (t->shape[i] != 1 && t->strides[i] != expected)
            return false;
        if (__builtin_mul_overflow(expected, t->shape[i], &expected))
            return false;
    }
    return true;
}
