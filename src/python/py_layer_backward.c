/* Layers on the tape: what a recorded call keeps, and its gradients. */
#include "layer_call.h"

#include "../core/gradients.h"
#include "../core/memory.h"

/* node->kept */
enum { KEPT_X, KEPT_WEIGHT_OWNER, KEPT_BIAS_OWNER, KEPT_REGISTRY, KEPT_ACTIVATED, KEPT_WEIGHT, KEPT_BIAS, KEPT_LAYER };

typedef struct saved_call {
    pc_call call;
    pc_module module;
    pc_activation *activation; /* retained */
    pc_kept kept;
    pc_activation_fn act;
    double eps;
} saved_call;

static void free_saved(void *op)
{
    saved_call *saved = op;
    pc_activation_release(saved->activation);
    pc_pool_free(&saved->kept.pool);
    pc_free(saved);
}

int peftc_record_begin(peftc_layer_call *r, const pc_module *own)
{
    const peftc_layer_object *layer = r->layer;
    r->own_weight = layer->weight != NULL && ((peftc_parameter_object *)layer->weight)->requires_grad &&
                    r->module.weight == own->weight;
    r->own_bias = layer->bias != NULL && ((peftc_parameter_object *)layer->bias)->requires_grad &&
                  r->module.bias == own->bias;
    r->learns = pc_learns(r->activation, r->call.module_index, r->own_weight, &r->needs_x) || r->own_bias;
    if (!r->learns || r->activation == NULL)
        return 0;
    for (size_t i = 0; i < r->activation->count; i++) {
        pc_adapter *adapter = r->activation->adapters[i];
        pc_error err;
        if (adapter->trainable && pc_gradients_prepare(adapter, &err) != PC_OK) {
            peftc_raise(r->state, &err);
            return -1;
        }
    }
    return 0;
}

/* ----------------------------------------------------------------- the way back */

/* Where the gradient of one of the layer's own parameters goes; -1 with an exception. */
static int own_target(PyObject *parameter, pc_target *target)
{
    *target = (pc_target){NULL, PC_F32};
    return parameter != NULL ? peftc_parameter_sum((peftc_parameter_object *)parameter, target) : 0;
}

static void refresh(peftc_node *node, saved_call *saved)
{
    saved->call.module = &saved->module;
    saved->module.name = peftc_layer_name((peftc_layer_object *)node->kept[KEPT_LAYER]);
    saved->module.name_len = strlen(saved->module.name);
}

static void *data_of(PyObject *array) { return array != NULL ? PyArray_DATA((PyArrayObject *)array) : NULL; }

/* Gradients of norms: their weights are those in effect, too. */
static pc_status norm_back(const saved_call *saved, const void *x, const void *dy, void *dx, pc_target weight,
                           pc_target bias, pc_error *err)
{
    const pc_call *call = &saved->call;
    pc_module module = saved->module;
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    pc_effective_targets(saved->activation, call->module_index, &weight, &bias);
    const int64_t n = module.out_features;
    const size_t bytes = (size_t)n * pc_dtype_size(call->compute);
    void *dw = weight.sum != NULL ? pc_pool_alloc(&scratch, bytes) : NULL;
    void *db = bias.sum != NULL ? pc_pool_alloc(&scratch, bytes) : NULL;
    pc_status status = PC_OK;
    if ((weight.sum != NULL && dw == NULL) || (bias.sum != NULL && db == NULL))
        status = pc_fail_nomem(err, "the gradient of a norm's weights");
    if (dw != NULL)
        memset(dw, 0, bytes);
    if (db != NULL)
        memset(db, 0, bytes);
    if (status == PC_OK)
        status = pc_norm_back(call->rt, call->compute, module.kind == PC_LAYERNORM, call->rows, n, x, module.dtype,
                              module.weight, saved->eps, dy, dx, dw, db, err);
    if (status == PC_OK && dw != NULL)
        pc_target_add(call->rt, weight, call->compute, dw, n, 1.0);
    if (status == PC_OK && db != NULL)
        pc_target_add(call->rt, bias, call->compute, db, n, 1.0);
    pc_pool_free(&scratch);
    return status;
}

static int raise(peftc_node *node, const pc_error *err)
{
    peftc_state *state = peftc_state_of_type(Py_TYPE(node));
    if (state != NULL)
        peftc_raise(state, err);
    return -1;
}

/* parents: input, residual */
static int norm_backward(peftc_node *node, PyArrayObject *dy)
{
    saved_call *saved = node->saved;
    peftc_node *input = node->parents[0], *residual = node->parents[1];
    pc_target weight, bias;
    PyArrayObject *dx = NULL;
    pc_error err;
    pc_status status;
    refresh(node, saved);
    if (own_target(node->kept[KEPT_WEIGHT], &weight) < 0 || own_target(node->kept[KEPT_BIAS], &bias) < 0)
        return -1;
    if (input != NULL || residual != NULL) {
        dx = (PyArrayObject *)PyArray_SimpleNew(PyArray_NDIM(dy), PyArray_DIMS(dy), PyArray_TYPE(dy));
        if (dx == NULL)
            return -1;
    }
    const void *x = data_of(node->kept[KEPT_X]), *dy_data = PyArray_DATA(dy);
    void *dx_data = data_of((PyObject *)dx);
    Py_BEGIN_ALLOW_THREADS
    status = norm_back(saved, x, dy_data, dx_data, weight, bias, &err);
    Py_END_ALLOW_THREADS
    if (status != PC_OK) {
        Py_XDECREF(dx);
        return raise(node, &err);
    }
    /* The same gradient for both: whoever adds to it takes a copy. */
    if (residual != NULL && peftc_node_give(residual, (PyArrayObject *)Py_NewRef(dx)) < 0) {
        Py_DECREF(dx);
        return -1;
    }
    if (input != NULL)
        return peftc_node_give(input, dx);
    Py_XDECREF(dx);
    return 0;
}

/* Do adapters change the gradient of the result on its way to the base operation? */
static bool turns_gradient(const saved_call *saved)
{
    const pc_activation *activation = saved->activation;
    for (size_t i = 0; activation != NULL && activation->enabled && i < activation->count; i++) {
        const pc_slot *slot = pc_adapter_slot(activation->adapters[i], saved->call.module_index);
        if (slot != NULL && slot->adapts)
            return true;
    }
    return false;
}

/* Everything but norms; parents: input. */
static int layer_backward(peftc_node *node, PyArrayObject *dy_shared)
{
    saved_call *saved = node->saved;
    pc_target weight, bias;
    pc_sum dx;
    pc_error err;
    pc_status status;
    refresh(node, saved);
    if (own_target(node->kept[KEPT_WEIGHT], &weight) < 0 || own_target(node->kept[KEPT_BIAS], &bias) < 0 ||
        peftc_node_sum(node->parents[0], &dx) < 0)
        return -1;
    PyArrayObject *dy = saved->act != PC_ACT_NONE ? peftc_gradient_place(dy_shared)
                        : turns_gradient(saved)   ? peftc_own_gradient(dy_shared)
                                                  : (PyArrayObject *)Py_NewRef(dy_shared);
    if (dy == NULL)
        return -1;
    const void *given = PyArray_DATA(dy_shared);
    void *dy_data = PyArray_DATA(dy);
    const void *x = data_of(node->kept[KEPT_X]), *activated = data_of(node->kept[KEPT_ACTIVATED]);
    const int64_t count = PyArray_SIZE(dy);
    Py_BEGIN_ALLOW_THREADS
    if (saved->act != PC_ACT_NONE)
        pc_activate_back(saved->call.rt, saved->call.compute, saved->act, count, activated, given, dy_data);
    status = pc_backward(&saved->call, saved->activation, &saved->kept, x, dy_data, dx.data != NULL ? &dx : NULL, weight,
                         bias, &err);
    Py_END_ALLOW_THREADS
    Py_DECREF(dy);
    return status == PC_OK ? 0 : raise(node, &err);
}

static const peftc_node_ops layer_ops = {"layer", layer_backward, free_saved};
static const peftc_node_ops norm_ops = {"normalisation", norm_backward, free_saved};

/* -------------------------------------------------------------------- recording */

PyObject *peftc_record_layer(peftc_layer_call *r, pc_activation_fn act, PyArrayObject *y, PyArrayObject *z,
                             PyObject *result)
{
    if (result == NULL)
        return NULL;
    const bool norm = r->module.kind == PC_LAYERNORM || r->module.kind == PC_RMSNORM;
    saved_call *saved = pc_calloc(1, sizeof *saved);
    if (saved == NULL) {
        Py_DECREF(result);
        return PyErr_NoMemory();
    }
    saved->call = r->call;
    saved->module = r->module;
    saved->act = act;
    saved->eps = r->eps;
    saved->activation = r->activation != NULL ? pc_activation_retain(r->activation) : NULL;
    saved->kept = r->kept;
    pc_pool_init_scratch(&r->kept.pool); /* it is the node's now */
    peftc_node *parents[2] = {r->input, r->residual};
    peftc_node *node = peftc_node_new(r->state, norm ? &norm_ops : &layer_ops, (PyArrayObject *)result, r->compute,
                                      parents, norm ? 2 : 1, saved);
    if (node == NULL) {
        Py_DECREF(result);
        return NULL;
    }
    /* The input is kept for what is trained here, and for norms, whose slope depends on it. */
    if (norm || (r->learns && r->needs_x))
        peftc_node_keep(node, KEPT_X, r->x);
    if (act != PC_ACT_NONE)
        peftc_node_keep(node, KEPT_ACTIVATED, pc_activation_saves_output(act) ? y : z);
    peftc_node_keep(node, KEPT_WEIGHT_OWNER, r->weight_owner);
    peftc_node_keep(node, KEPT_BIAS_OWNER, r->bias_owner);
    peftc_node_keep(node, KEPT_REGISTRY, r->registry);
    peftc_node_keep(node, KEPT_WEIGHT, r->own_weight ? r->layer->weight : NULL);
    peftc_node_keep(node, KEPT_BIAS, r->own_bias ? r->layer->bias : NULL);
    peftc_node_keep(node, KEPT_LAYER, r->layer);
    return peftc_tensor_new(r->state, result, node);
}
