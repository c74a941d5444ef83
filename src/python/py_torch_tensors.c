/* torch tensors over an adapter's arena, made through the table of functions that torch publishes (dlpack.h).
 *
 * Each has a storage of its own over its part of the arena, and a version of its own: what writes a state dict takes tensors
 * with one storage for one tensor under several names. Letting go of one needs no GIL. */
#include "dlpack.h"

#include <stdatomic.h>

#include "../core/arena.h"
#include "../core/memory.h"
#include "py_registry.h"

/* What torch is given of all tensors of an adapter, in one piece that goes with the last of them. */
typedef struct lot {
    atomic_size_t left;
    pc_arena *arena;
    peftc_owned_tensor tensors[];
} lot;

static void let_go(lot *all, size_t count)
{
    if (atomic_fetch_sub_explicit(&all->left, count, memory_order_acq_rel) == count) {
        pc_arena_release(all->arena);
        pc_free(all);
    }
}

/* Called twice if torch fails after it has taken a tensor: the lot is still held by the function that makes it then. */
static void delete_tensor(peftc_owned_tensor *tensor)
{
    lot *all = tensor->context;
    tensor->context = NULL;
    if (all != NULL)
        let_go(all, 1);
}

/* A group of layout(): tensors that are alike. */
typedef struct group {
    pc_dtype dtype;
    int ndim;
    int64_t shape[PC_TENSOR_DIMS], strides[PC_TENSOR_DIMS];
    size_t bytes; /* of one tensor */
    PyObject *offsets, *indices;
} group;

static bool read_group(PyObject *row, group *out)
{
    const char *dtype;
    PyObject *parameter, *shape;
    if (!PyTuple_Check(row)) {
        PyErr_Format(PyExc_TypeError, "a group must be a tuple, not %R", row);
        return false;
    }
    if (!PyArg_ParseTuple(row, "OsO!O!O!", &parameter, &dtype, &PyTuple_Type, &shape, &PyList_Type, &out->offsets, &PyList_Type,
                          &out->indices))
        return false;
    out->dtype = pc_dtype_from_name(dtype, strlen(dtype));
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape);
    bool good = pc_dtype_get(out->dtype)->is_float && ndim <= PC_TENSOR_DIMS &&
                PyList_GET_SIZE(out->offsets) == PyList_GET_SIZE(out->indices);
    out->ndim = (int)ndim;
    out->bytes = pc_dtype_size(out->dtype);
    int64_t stride = 1;
    for (int d = (int)ndim - 1; good && d >= 0; d--) {
        out->shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, d));
        out->strides[d] = stride;
        good = out->shape[d] >= 0 && pc_mul_size(out->bytes, (size_t)out->shape[d], &out->bytes) &&
               !__builtin_mul_overflow(stride, out->shape[d] != 0 ? out->shape[d] : 1, &stride);
    }
    if (!good && !PyErr_Occurred())
        PyErr_Format(PyExc_ValueError, "%R is no group of layout()", row);
    return good;
}

/* Put the group's tensors in their places in the list; *used of the lot's tensors have been given away. */
static bool make_group(peftc_state *state, const group *g, lot *all, size_t most, size_t *used, PyObject *list)
{
    const size_t bytes = pc_arena_size(all->arena);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(g->offsets); i++) {
        const size_t offset = PyLong_AsSize_t(PyList_GET_ITEM(g->offsets, i));
        const Py_ssize_t index = PyErr_Occurred() ? -1 : PyLong_AsSsize_t(PyList_GET_ITEM(g->indices, i));
        if (PyErr_Occurred())
            return false;
        if (*used == most || index < 0 || index >= PyList_GET_SIZE(list) || PyList_GET_ITEM(list, index) != Py_None ||
            offset > bytes || g->bytes > bytes - offset) {
            PyErr_SetString(PyExc_ValueError, "the groups are not those of layout()");
            return false;
        }
        peftc_owned_tensor *owned = &all->tensors[(*used)++];
        owned->context = all;
        owned->delete = delete_tensor;
        PyObject *tensor = peftc_make_tensor(state, owned, (char *)pc_arena_data(all->arena) + offset, g->dtype, g->ndim, g->shape,
                                             g->strides);
        if (tensor == NULL)
            return false;
        PyList_SetItem(list, index, tensor);
    }
    return true;
}

/* The list with every tensor in its place, or NULL with an exception. */
static PyObject *make_all(peftc_state *state, pc_arena *arena, PyObject *groups, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    lot *all = NULL;
    size_t bytes;
    if (list != NULL && pc_mul_size((size_t)count, sizeof *all->tensors, &bytes) && pc_add_size(bytes, sizeof *all, &bytes))
        all = pc_calloc(1, bytes);
    if (all == NULL) {
        Py_XDECREF(list);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++)
        PyList_SET_ITEM(list, i, Py_NewRef(Py_None));
    all->arena = pc_arena_retain(arena);
    atomic_init(&all->left, (size_t)count + 1); /* one is this function's */
    size_t used = 0;
    bool good = true;
    for (Py_ssize_t i = 0; good && i < PyList_GET_SIZE(groups); i++) {
        group g;
        PyObject *row = Py_NewRef(PyList_GET_ITEM(groups, i)); /* making a tensor may run a finalizer */
        good = read_group(row, &g) && make_group(state, &g, all, (size_t)count, &used, list);
        Py_DECREF(row);
    }
    if (good && used != (size_t)count) {
        PyErr_Format(PyExc_ValueError, "the groups have %zu tensors, not %zd", used, count);
        good = false;
    }
    let_go(all, (size_t)count - used + 1);
    if (!good)
        Py_CLEAR(list);
    return list;
}

PyDoc_STRVAR(tensors_over_doc,
             "tensors_over(arena, groups, count, /)\n--\n\n"
             "A list of `count` torch tensors over an adapter's memory, from the arena and the groups of AdapterRegistry.layout.\n\n"
             "Each has a storage of its own; all of them keep the arena alive. Values are not looked at.\n\n"
             "Returns None where torch has no table of functions that makes tensors (before 2.10): use torch.from_numpy then.\n"
             "Raises TypeError or ValueError for anything else than layout() returned, and MemoryError.");

static PyObject *tensors_over(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    peftc_state *state = peftc_get_state(module);
    const Py_ssize_t count = nargs == 3 && PyLong_Check(args[2]) ? PyLong_AsSsize_t(args[2]) : -1;
    if (PyErr_Occurred())
        return NULL;
    pc_arena *arena = count >= 0 && PyList_Check(args[1]) ? registry_arena_under(state, args[0]) : NULL;
    if (arena == NULL) {
        PyErr_SetString(PyExc_TypeError, "tensors_over() takes layout()'s arena and groups, and how many tensors there are");
        return NULL;
    }
    if (!peftc_makes_tensors(state))
        Py_RETURN_NONE;
    return make_all(state, arena, args[1], count);
}

static PyMethodDef functions[] = {
    {"tensors_over", (PyCFunction)(void (*)(void))tensors_over, METH_FASTCALL, tensors_over_doc},
    {NULL, NULL, 0, NULL},
};

int peftc_add_torch_tensors(PyObject *module, peftc_state *state)
{
    (void)state;
    return PyModule_AddFunctions(module, functions);
}
