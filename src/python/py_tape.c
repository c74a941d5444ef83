#include "tape.h"

#include <stdlib.h>

#include "../kernels/gradients.h"
#include "arrays.h"
#include "layer.h"

/* ------------------------------------------------------------------- recording */

/* How deep this thread is in modules' calls, whether the outermost one is in train mode, how many no_grad it is in. */
static _Thread_local int depth, gradients_off;
static _Thread_local bool training_call;

bool peftc_gradients_on(void) { return gradients_off == 0; }
bool peftc_recording(void) { return depth > 0 && training_call && gradients_off == 0; }

peftc_tape_scope peftc_tape_enter(bool training)
{
    peftc_tape_scope scope = {.outermost = depth == 0};
    if (scope.outermost)
        training_call = training;
    depth++;
    scope.recording = peftc_recording();
    return scope;
}

void peftc_tape_leave(peftc_tape_scope scope)
{
    (void)scope;
    depth--;
}

static PyObject *set_gradients(PyObject *module, PyObject *arg)
{
    (void)module;
    int on = PyObject_IsTrue(arg);
    if (on < 0)
        return NULL;
    gradients_off += on ? -1 : 1;
    Py_RETURN_NONE;
}

/* ------------------------------------------------------------------------ nodes */

static peftc_node *cast(PyObject *op) { return (peftc_node *)op; }

/* Give back what the way back needed; the node stays as a mark that the gradient has passed. */
static void forget(peftc_node *node)
{
    if (node->saved != NULL && node->ops->free_saved != NULL)
        node->ops->free_saved(node->saved);
    node->saved = NULL;
    Py_CLEAR(node->grad);
    for (int i = 0; i < PEFTC_NODE_KEPT; i++)
        Py_CLEAR(node->kept[i]);
    peftc_node **parents = node->parents;
    const Py_ssize_t count = node->parent_count;
    node->parents = NULL;
    node->parent_count = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        Py_XDECREF((PyObject *)parents[i]);
    PyMem_Free(parents);
}

static int node_traverse(PyObject *op, visitproc visit, void *arg)
{
    peftc_node *node = cast(op);
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(node->shape);
    Py_VISIT(node->grad);
    for (int i = 0; i < PEFTC_NODE_KEPT; i++)
        Py_VISIT(node->kept[i]);
    for (Py_ssize_t i = 0; i < node->parent_count; i++)
        Py_VISIT((PyObject *)node->parents[i]);
    return 0;
}

static int node_clear(PyObject *op)
{
    forget(cast(op));
    Py_CLEAR(cast(op)->shape);
    return 0;
}

static void node_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    Py_TRASHCAN_BEGIN(op, node_dealloc) /* a deep model is a long chain */
    node_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
    Py_TRASHCAN_END
}

static PyObject *node_repr(PyObject *op)
{
    const peftc_node *node = cast(op);
    return PyUnicode_FromFormat("<%s of shape %R%s>", node->ops->name, node->shape != NULL ? node->shape : Py_None,
                                node->used ? ", used" : "");
}

static PyObject *node_get_shape(PyObject *op, void *unused)
{
    (void)unused;
    return Py_NewRef(cast(op)->shape);
}

static PyGetSetDef node_getset[] = {
    {"shape", node_get_shape, NULL, "The shape of the operation's result.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot node_slots[] = {
    {Py_tp_doc, (void *)"A recorded operation: how the gradient of its result reaches its inputs."},
    {Py_tp_dealloc, node_dealloc},
    {Py_tp_traverse, node_traverse},
    {Py_tp_clear, node_clear},
    {Py_tp_repr, node_repr},
    {Py_tp_getset, node_getset},
    {0, NULL},
};

static PyType_Spec node_spec = {
    .name = "peftc._core.Node",
    .basicsize = sizeof(peftc_node),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = node_slots,
};

peftc_node *peftc_node_new(peftc_state *state, const peftc_node_ops *ops, PyArrayObject *y, pc_dtype compute,
                           peftc_node *const *parents, Py_ssize_t parent_count, void *saved)
{
    peftc_node *node = cast(state->node_type->tp_alloc(state->node_type, 0));
    if (node == NULL) {
        if (saved != NULL && ops->free_saved != NULL)
            ops->free_saved(saved);
        return NULL;
    }
    node->ops = ops;
    node->saved = saved;
    node->sequence = ++state->next_node;
    node->compute = compute;
    node->shape = PyArray_IntTupleFromIntp(PyArray_NDIM(y), PyArray_DIMS(y));
    node->parents = PyMem_Calloc((size_t)parent_count + 1, sizeof(peftc_node *));
    if (node->shape == NULL || node->parents == NULL) {
        if (node->parents == NULL)
            PyErr_NoMemory();
        Py_DECREF(node);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < parent_count; i++)
        node->parents[i] = (peftc_node *)Py_XNewRef((PyObject *)parents[i]);
    node->parent_count = parent_count;
    return node;
}

void peftc_node_keep(peftc_node *node, int slot, void *object)
{
    Py_XSETREF(node->kept[slot], Py_XNewRef((PyObject *)object));
}

/* ---------------------------------------------------------------------- tensors */

static bool is_tensor(peftc_state *state, PyObject *object)
{
    return state->tensor_type != NULL && PyObject_TypeCheck(object, (PyTypeObject *)state->tensor_type);
}

/* The node of a Tensor, NULL for none (new reference); -1 with an exception. */
static int node_of(peftc_state *state, PyObject *tensor, peftc_node **out)
{
    *out = NULL;
    PyObject *node = PyObject_GetAttr(tensor, state->node_name);
    if (node == NULL)
        return -1;
    if (Py_IS_TYPE(node, state->node_type))
        *out = cast(node);
    else
        Py_DECREF(node);
    return 0;
}

/* A parameter as an input: its gradient is its own. */
static int parameter_backward(peftc_node *node, PyArrayObject *dy)
{
    pc_target target;
    if (peftc_parameter_sum((peftc_parameter_object *)node->kept[0], &target) < 0)
        return -1;
    peftc_state *state = peftc_state_of_type(Py_TYPE(node));
    if (state == NULL)
        return -1;
    pc_target_add(state->rt, target, node->compute, PyArray_DATA(dy), PyArray_SIZE(dy), 1.0);
    return 0;
}

static const peftc_node_ops parameter_ops = {"parameter", parameter_backward, NULL};

int peftc_parameter_node(peftc_state *state, PyObject *parameter, peftc_node **out)
{
    *out = NULL;
    if (!peftc_recording())
        return 0;
    PyObject *learns = PyObject_GetAttrString(parameter, "requires_grad"); /* a subclass computes it */
    if (learns == NULL)
        return -1;
    const int on = PyObject_IsTrue(learns);
    Py_DECREF(learns);
    if (on <= 0)
        return on;
    PyArrayObject *values = peftc_parameter_storage((peftc_parameter_object *)parameter);
    if (values == NULL)
        return -1;
    *out = peftc_node_new(state, &parameter_ops, values, pc_compute_dtype(((peftc_parameter_object *)parameter)->dtype),
                          NULL, 0, NULL);
    if (*out == NULL)
        return -1;
    peftc_node_keep(*out, 0, parameter);
    return 0;
}

int peftc_input_node(peftc_state *state, PyObject *input, peftc_node **out)
{
    *out = NULL;
    if (state->tensor_type == NULL)
        return 0;
    if (PyObject_TypeCheck(input, state->parameter_type))
        return peftc_parameter_node(state, input, out);
    bool direct = is_tensor(state, input);
    if (direct) {
        if (node_of(state, input, out) < 0 || *out != NULL)
            return *out != NULL ? 0 : -1;
        PyObject *lost = PyObject_GetAttrString(input, "_lost");
        if (lost == NULL)
            return -1;
        direct = lost == Py_True;
        Py_DECREF(lost);
        if (!direct)
            return 0;
    } else { /* np.asarray of a Tensor, or a view of its memory */
        PyObject *base = input;
        while (!direct && base != NULL && PyArray_Check(base)) {
            base = PyArray_BASE((PyArrayObject *)base);
            peftc_node *node = NULL;
            if (base != NULL && is_tensor(state, base) && node_of(state, base, &node) < 0)
                return -1;
            direct = node != NULL;
            Py_XDECREF((PyObject *)node);
        }
        if (!direct)
            return 0;
    }
    PyErr_SetString(PyExc_RuntimeError,
                    "an array in a forward pass in train mode was made from a recorded one by an operation that peftc does "
                    "not differentiate (np.asarray, or a NumPy function that peftc.nn.Tensor does not list), so that its "
                    "gradient would be lost; use the functions of peftc.nn.functional, operators or the methods of the "
                    "array, or cut the gradient on purpose with .detach()");
    return -1;
}

static void let_go(PyObject *capsule) { Py_XDECREF((PyObject *)PyCapsule_GetPointer(capsule, NULL)); }

/* A Tensor over the array's memory.  Its base is no array, so that NumPy cannot look through it: whatever is made from
 * the Tensor has the Tensor as its base, by which peftc_input_node knows it. */
static PyObject *tensor_over(peftc_state *state, PyArrayObject *array)
{
    PyObject *capsule = PyCapsule_New(array, NULL, let_go);
    if (capsule == NULL)
        return NULL;
    Py_INCREF(array); /* the capsule's */
    PyArray_Descr *descr = PyArray_DESCR(array);
    Py_INCREF(descr);
    const int flags = PyArray_FLAGS(array) & (NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_F_CONTIGUOUS | NPY_ARRAY_ALIGNED);
    PyObject *tensor = PyArray_NewFromDescr((PyTypeObject *)state->tensor_type, descr, PyArray_NDIM(array),
                                            PyArray_DIMS(array), PyArray_STRIDES(array), PyArray_DATA(array), flags, NULL);
    if (tensor == NULL)
        Py_DECREF(capsule);
    else if (PyArray_SetBaseObject((PyArrayObject *)tensor, capsule) < 0) /* takes the capsule over in any case */
        Py_CLEAR(tensor);
    return tensor;
}

PyObject *peftc_tensor_new(peftc_state *state, PyObject *array, peftc_node *node)
{
    PyObject *tensor = NULL;
    if (array != NULL && node != NULL) {
        PyArray_CLEARFLAGS((PyArrayObject *)array, NPY_ARRAY_WRITEABLE); /* others may have saved it */
        tensor = tensor_over(state, (PyArrayObject *)array);
        if (tensor != NULL && PyObject_SetAttr(tensor, state->node_name, (PyObject *)node) < 0)
            Py_CLEAR(tensor);
    }
    Py_XDECREF(array);
    Py_XDECREF((PyObject *)node);
    return tensor;
}

static int collect_nodes(peftc_state *state, PyObject *result, PyObject *list, int level)
{
    if (is_tensor(state, result)) {
        peftc_node *node;
        if (node_of(state, result, &node) < 0)
            return -1;
        int status = 0;
        if (node != NULL && PySequence_Contains(list, (PyObject *)node) == 0)
            status = PyList_Append(list, (PyObject *)node);
        Py_XDECREF((PyObject *)node);
        return status;
    }
    if (level > 8 || result == Py_None || PyArray_Check(result))
        return 0;
    PyObject *items = NULL;
    if (PyTuple_Check(result) || PyList_Check(result)) {
        items = PySequence_Tuple(result);
    } else if (PyDict_Check(result)) {
        PyObject *values = PyDict_Values(result);
        items = values != NULL ? PySequence_Tuple(values) : NULL;
        Py_XDECREF(values);
    } else {
        PyObject *method = PyObject_GetAttrString(result, "to_tuple");
        if (method == NULL) {
            PyErr_Clear();
            return 0;
        }
        items = PyObject_CallNoArgs(method);
        Py_DECREF(method);
        if (items != NULL && !PyTuple_Check(items)) {
            Py_DECREF(items);
            return 0;
        }
    }
    int status = items != NULL ? 0 : -1;
    for (Py_ssize_t i = 0; status == 0 && i < PyTuple_GET_SIZE(items); i++)
        status = collect_nodes(state, PyTuple_GET_ITEM(items, i), list, level + 1);
    Py_XDECREF(items);
    return status;
}

PyObject *peftc_result_nodes(peftc_state *state, PyObject *result)
{
    PyObject *list = PyList_New(0);
    if (list != NULL && state->tensor_type != NULL && collect_nodes(state, result, list, 0) < 0)
        Py_CLEAR(list);
    return list;
}

/* -------------------------------------------------------------------- gradients */

static PyArrayObject *like_node(const peftc_node *node)
{
    npy_intp dims[NPY_MAXDIMS];
    const Py_ssize_t ndim = PyTuple_GET_SIZE(node->shape);
    for (Py_ssize_t d = 0; d < ndim; d++)
        dims[d] = (npy_intp)PyLong_AsSsize_t(PyTuple_GET_ITEM(node->shape, d));
    return (PyArrayObject *)PyArray_SimpleNew((int)ndim, dims, peftc_compute_type(node->compute));
}

PyArrayObject *peftc_own_gradient(PyArrayObject *dy)
{
    /* one reference is the caller's; a view shares its memory */
    if (Py_REFCNT(dy) == 1 && PyArray_BASE(dy) == NULL && PyArray_ISWRITEABLE(dy))
        return (PyArrayObject *)Py_NewRef(dy);
    return (PyArrayObject *)PyArray_NewCopy(dy, NPY_CORDER);
}

int peftc_node_sum(peftc_node *parent, pc_sum *sum)
{
    *sum = (pc_sum){NULL, false};
    if (parent == NULL)
        return 0;
    PyArrayObject *mine;
    if (parent->grad == NULL) {
        mine = like_node(parent);
    } else {
        mine = peftc_own_gradient(parent->grad);
        sum->filled = true;
    }
    if (mine == NULL)
        return -1;
    Py_XSETREF(parent->grad, mine);
    sum->data = PyArray_DATA(mine);
    return 0;
}

int peftc_node_give(peftc_node *parent, PyArrayObject *gradient)
{
    if (gradient == NULL)
        return -1;
    int status = 0;
    if (parent == NULL) {
        Py_DECREF(gradient);
        return 0;
    }
    if (parent->grad == NULL) {
        parent->grad = gradient;
        return 0;
    }
    pc_sum sum;
    status = peftc_node_sum(parent, &sum);
    if (status == 0) {
        peftc_state *state = peftc_state_of_type(Py_TYPE(parent));
        const void *values = PyArray_DATA(gradient);
        const int64_t n = PyArray_SIZE(gradient);
        Py_BEGIN_ALLOW_THREADS
        pc_add(state->rt, parent->compute, n, values, 1.0, sum.data);
        Py_END_ALLOW_THREADS
    }
    Py_DECREF(gradient);
    return status;
}

/* Every node that the gradient of `root` reaches, latest first. */
typedef struct reached {
    peftc_node **nodes; /* new references */
    size_t count, capacity;
} reached;

static int reach(reached *r, peftc_node *node, uint64_t pass)
{
    if (node == NULL || node->visited == pass)
        return 0;
    node->visited = pass;
    if (r->count == r->capacity) {
        size_t capacity = r->capacity != 0 ? 2 * r->capacity : 64;
        peftc_node **nodes = PyMem_Realloc(r->nodes, capacity * sizeof *nodes);
        if (nodes == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        r->nodes = nodes;
        r->capacity = capacity;
    }
    r->nodes[r->count++] = cast(Py_NewRef((PyObject *)node));
    return 0;
}

static int later_first(const void *a, const void *b)
{
    const peftc_node *x = *(peftc_node *const *)a, *y = *(peftc_node *const *)b;
    return x->sequence < y->sequence ? 1 : x->sequence > y->sequence ? -1 : 0;
}

static int refuse_used(const peftc_node *node)
{
    if (!node->used)
        return 0;
    PyErr_SetString(PyExc_RuntimeError, "backward was called a second time for the same forward pass, whose saved results "
                                        "are gone; call the model again first");
    return -1;
}

/* The gradients (a tuple of arrays) start at the roots (a tuple of nodes). */
static int run_pass(peftc_state *state, PyObject *roots, PyObject *gradients)
{
    reached r = {0};
    const uint64_t pass = ++state->next_node;
    int status = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(roots) && status == 0; i++)
        status = reach(&r, cast(PyTuple_GET_ITEM(roots, i)), pass);
    for (size_t i = 0; i < r.count && status == 0; i++) {
        status = refuse_used(r.nodes[i]);
        for (Py_ssize_t p = 0; p < r.nodes[i]->parent_count && status == 0; p++)
            status = reach(&r, r.nodes[i]->parents[p], pass);
    }
    bool started = status == 0;
    if (started)
        qsort(r.nodes, r.count, sizeof *r.nodes, later_first);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(roots) && status == 0; i++)
        status = peftc_node_give(cast(PyTuple_GET_ITEM(roots, i)),
                                 (PyArrayObject *)Py_NewRef(PyTuple_GET_ITEM(gradients, i)));
    for (size_t i = 0; i < r.count && status == 0; i++) {
        peftc_node *node = r.nodes[i];
        PyArrayObject *dy = node->grad;
        node->grad = NULL;
        node->used = true;
        if (dy != NULL)
            status = node->ops->backward(node, dy);
        Py_XDECREF(dy);
        forget(node);
    }
    for (size_t i = 0; i < r.count; i++) {
        if (status != 0 && started) /* some gradients may be there: nobody shall go through here again */
            r.nodes[i]->used = true;
        Py_CLEAR(r.nodes[i]->grad);
        Py_DECREF((PyObject *)r.nodes[i]);
    }
    PyMem_Free(r.nodes);
    return status;
}

/* A gradient as an array of its own for a root; NULL with an exception. */
static PyArrayObject *take_gradient(const peftc_node *root, PyObject *obj)
{
    PyArrayObject *gradient = (PyArrayObject *)PyArray_FROM_OTF(
        obj, peftc_compute_type(root->compute),
        NPY_ARRAY_CARRAY | NPY_ARRAY_FORCECAST | NPY_ARRAY_ENSUREARRAY | NPY_ARRAY_ENSURECOPY);
    if (gradient == NULL)
        return NULL;
    PyObject *shape = PyArray_IntTupleFromIntp(PyArray_NDIM(gradient), PyArray_DIMS(gradient));
    int same = shape != NULL ? PyObject_RichCompareBool(shape, root->shape, Py_EQ) : -1;
    if (same == 0)
        PyErr_Format(PyExc_ValueError, "the gradient has shape %R and the result that it is the gradient of %R", shape,
                     root->shape);
    int64_t bad = same > 0 ? pc_first_not_finite(root->compute, PyArray_DATA(gradient), PyArray_SIZE(gradient)) : -1;
    if (bad >= 0)
        PyErr_Format(PyExc_FloatingPointError,
                     "the gradient of the loss is NaN or infinite (element %lld of shape %R): nothing was changed; look at the "
                     "loss, the learning rate and the data of this batch",
                     (long long)bad, root->shape);
    Py_XDECREF(shape);
    if (same <= 0 || bad >= 0)
        Py_CLEAR(gradient);
    return gradient;
}

static PyObject *backward(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *roots, *values;
    if (!PyArg_ParseTuple(args, "O!O!:backward", &PyTuple_Type, &roots, &PyTuple_Type, &values))
        return NULL;
    const Py_ssize_t count = PyTuple_GET_SIZE(roots);
    if (PyTuple_GET_SIZE(values) != count)
        return PyErr_Format(PyExc_ValueError, "%zd gradients for %zd results", PyTuple_GET_SIZE(values), count);
    PyObject *gradients = PyTuple_New(count);
    for (Py_ssize_t i = 0; gradients != NULL && i < count; i++) {
        PyObject *root = PyTuple_GET_ITEM(roots, i);
        PyArrayObject *gradient = NULL;
        if (!Py_IS_TYPE(root, state->node_type))
            PyErr_Format(PyExc_TypeError, "expected a node, got %R", root);
        else if (refuse_used(cast(root)) == 0)
            gradient = take_gradient(cast(root), PyTuple_GET_ITEM(values, i));
        if (gradient == NULL)
            Py_CLEAR(gradients);
        else
            PyTuple_SET_ITEM(gradients, i, (PyObject *)gradient);
    }
    int status = gradients != NULL ? run_pass(state, roots, gradients) : -1;
    Py_XDECREF(gradients);
    return status == 0 ? Py_NewRef(Py_None) : NULL;
}

/* ------------------------------------------------- operations defined in Python */

/* kept[0] is called with dy and gives a tuple: for each input an array that reaches it, or None. */
static int python_backward(peftc_node *node, PyArrayObject *dy)
{
    PyObject *result = PyObject_CallOneArg(node->kept[0], (PyObject *)dy);
    if (result == NULL)
        return -1;
    int status = 0;
    if (!PyTuple_Check(result) || PyTuple_GET_SIZE(result) != node->parent_count) {
        PyErr_Format(PyExc_TypeError, "the gradient function of a recorded operation must give a tuple of %zd items",
                     node->parent_count);
        status = -1;
    }
    for (Py_ssize_t i = 0; i < node->parent_count && status == 0; i++) {
        peftc_node *parent = node->parents[i];
        PyObject *item = PyTuple_GET_ITEM(result, i);
        if (parent == NULL || item == Py_None)
            continue;
        PyArrayObject *array =
            (PyArrayObject *)PyArray_FROM_OTF(item, peftc_compute_type(parent->compute),
                                              NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST | NPY_ARRAY_ENSUREARRAY);
        PyObject *shape = array != NULL ? PyArray_IntTupleFromIntp(PyArray_NDIM(array), PyArray_DIMS(array)) : NULL;
        int same = shape != NULL ? PyObject_RichCompareBool(shape, parent->shape, Py_EQ) : -1;
        if (same == 0)
            PyErr_Format(PyExc_ValueError, "a gradient of shape %R for an input of shape %R", shape, parent->shape);
        Py_XDECREF(shape);
        if (same > 0) {
            status = peftc_node_give(parent, array);
        } else {
            Py_XDECREF(array);
            status = -1;
        }
    }
    Py_DECREF(result);
    return status;
}

static const peftc_node_ops python_ops = {"operation", python_backward, NULL};

static PyObject *record(PyObject *module, PyObject *args)
{
    peftc_state *state = peftc_get_state(module);
    PyObject *inputs, *result, *function;
    if (!PyArg_ParseTuple(args, "O!O!O:record", &PyTuple_Type, &inputs, &PyArray_Type, &result, &function))
        return NULL;
    pc_dtype dtype = peftc_dtype_of(PyArray_DESCR((PyArrayObject *)result));
    const Py_ssize_t count = PyTuple_GET_SIZE(inputs);
    if (gradients_off != 0 || !pc_dtype_get(dtype)->is_float)
        return Py_NewRef(result);
    peftc_node **parents = PyMem_Calloc((size_t)count + 1, sizeof *parents);
    if (parents == NULL)
        return PyErr_NoMemory();
    int status = 0;
    bool any = false;
    for (Py_ssize_t i = 0; i < count && status == 0; i++) {
        status = peftc_input_node(state, PyTuple_GET_ITEM(inputs, i), &parents[i]);
        any = any || parents[i] != NULL;
    }
    PyObject *tensor = NULL;
    if (status == 0 && !any) {
        tensor = Py_NewRef(result);
    } else if (status == 0) {
        peftc_node *node = peftc_node_new(state, &python_ops, (PyArrayObject *)result, pc_compute_dtype(dtype), parents,
                                          count, NULL);
        if (node != NULL) {
            peftc_node_keep(node, 0, function);
            tensor = peftc_tensor_new(state, Py_NewRef(result), node);
        }
    }
    for (Py_ssize_t i = 0; i < count; i++)
        Py_XDECREF((PyObject *)parents[i]);
    PyMem_Free(parents);
    return tensor;
}

static PyObject *set_tensor_type(PyObject *module, PyObject *type)
{
    peftc_state *state = peftc_get_state(module);
    if (!PyType_Check(type) || !PyType_IsSubtype((PyTypeObject *)type, &PyArray_Type))
        return PyErr_Format(PyExc_TypeError, "expected a subclass of ndarray, got %R", type);
    Py_XSETREF(state->tensor_type, Py_NewRef(type));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"backward", backward, METH_VARARGS,
     "backward(nodes, gradients, /)\n--\n\nSend the gradients of recorded results (tuples) back to the parameters.\n\n"
     "Raises RuntimeError when it passed already, ValueError for another shape, FloatingPointError for NaN or infinity."},
    {"record", record, METH_VARARGS,
     "record(inputs, result, function, /)\n--\n\nresult as a Tensor that `function` leads back from: it is called with the "
     "gradient of the result and gives a tuple with one gradient (or None) per input. result itself when no input is "
     "recorded."},
    {"set_gradients", set_gradients, METH_O,
     "set_gradients(on, /)\n--\n\nTurn recording off, or on again, on this thread; calls nest."},
    {"set_tensor_type", set_tensor_type, METH_O,
     "set_tensor_type(type, /)\n--\n\nThe class of recorded arrays; peftc.nn.tensor calls it once."},
    {NULL, NULL, 0, NULL},
};

int peftc_add_tape(PyObject *module, peftc_state *state)
{
    state->node_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &node_spec, NULL);
    state->node_name = PyUnicode_InternFromString("_node");
    if (state->node_type == NULL || state->node_name == NULL || PyModule_AddType(module, state->node_type) < 0)
        return -1;
    return PyModule_AddFunctions(module, functions);
}
