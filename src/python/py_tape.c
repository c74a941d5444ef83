#include "tape.h"

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

void peftc_node_forget(peftc_node *node)
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
    peftc_node_forget(cast(op));
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

static PyObject *set_tensor_type(PyObject *module, PyObject *type)
{
    peftc_state *state = peftc_get_state(module);
    if (!PyType_Check(type) || !PyType_IsSubtype((PyTypeObject *)type, &PyArray_Type))
        return PyErr_Format(PyExc_TypeError, "expected a subclass of ndarray, got %R", type);
    Py_XSETREF(state->tensor_type, Py_NewRef(type));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
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
    return PyModule_AddFunctions(module, functions) < 0 ? -1 : peftc_add_backward(module);
}
