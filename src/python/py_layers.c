/* peftc._core.Layer: a module with a weight.  The types that people use are in
 * py_layer_types.c, what they compute in py_layer_forward.c. */
#include "layer.h"

#include <structmember.h>

static peftc_layer_object *cast(PyObject *op) { return (peftc_layer_object *)op; }

/* ------------------------------------------------------------------ lifetime */

static PyObject *layer_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args; /* __init__ checks them */
    (void)kwargs;
    peftc_layer_object *self = cast(type->tp_alloc(type, 0));
    if (self != NULL) {
        self->base.training = 1;
        self->core.alias_of = -1;
        self->core.groups = 1;
        self->padding_idx = -1;
    }
    return (PyObject *)self;
}

static int layer_init(PyObject *op, PyObject *args, PyObject *kwargs)
{
    (void)args;
    (void)kwargs;
    PyErr_Format(PyExc_TypeError, "%s cannot be made directly; use one of the layers of peftc.nn", Py_TYPE(op)->tp_name);
    return -1;
}

static int layer_traverse(PyObject *op, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(op));
    Py_VISIT(cast(op)->base.dict);
    Py_VISIT(cast(op)->base.registry);
    Py_VISIT(cast(op)->base.outputs);
    Py_VISIT(cast(op)->weight);
    Py_VISIT(cast(op)->bias);
    Py_VISIT(cast(op)->weight_owner);
    Py_VISIT(cast(op)->bias_owner);
    return 0;
}

static int layer_clear(PyObject *op)
{
    peftc_layer_object *self = cast(op);
    Py_CLEAR(self->base.dict);
    Py_CLEAR(self->base.registry);
    Py_CLEAR(self->base.outputs);
    Py_CLEAR(self->weight);
    Py_CLEAR(self->bias);
    self->core.weight = NULL;
    self->core.bias = NULL;
    Py_CLEAR(self->weight_owner);
    Py_CLEAR(self->bias_owner);
    self->ready = false;
    return 0;
}

static void layer_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    PyObject_GC_UnTrack(op);
    if (cast(op)->base.weakrefs != NULL)
        PyObject_ClearWeakRefs(op);
    layer_clear(op);
    type->tp_free(op);
    Py_DECREF(type);
}

/* ---------------------------------------------------------------- parameters */

/* Have the values of a parameter drawn.  That gives up the GIL: other code may put another parameter in its place. */
static int draw(PyObject **place)
{
    while (*place != NULL && ((peftc_parameter_object *)*place)->storage == NULL) {
        PyObject *parameter = Py_NewRef(*place);
        bool drawn = peftc_parameter_storage((peftc_parameter_object *)parameter) != NULL;
        Py_DECREF(parameter);
        if (!drawn)
            return -1;
    }
    return 0;
}

static bool to_be_drawn(const PyObject *parameter)
{
    return parameter != NULL && ((const peftc_parameter_object *)parameter)->storage == NULL;
}

/* The storage of a drawn parameter (borrowed) into *out, NULL for none.  Users can resize the array in place, so its
 * shape is looked at each time. */
static int storage_of(const peftc_layer_object *layer, PyObject *parameter, int ndim, const npy_intp *shape,
                      const char *which, PyArrayObject **out)
{
    *out = NULL;
    if (parameter == NULL)
        return 0;
    PyArrayObject *storage = peftc_parameter_storage((peftc_parameter_object *)parameter);
    if (storage == NULL)
        return -1;
    if (PyArray_NDIM(storage) != ndim || !PyArray_CompareLists(PyArray_DIMS(storage), shape, ndim)) {
        PyErr_Format(PyExc_RuntimeError, "the array of %s of %s was given another shape in place; put a new Parameter there",
                     which, peftc_layer_name(layer));
        return -1;
    }
    *out = storage;
    return 0;
}

int peftc_layer_sync(peftc_layer_object *layer)
{
    if (!layer->ready) {
        PyErr_Format(PyExc_RuntimeError, "%s was not initialised: its __init__ must call super().__init__(...)",
                     Py_TYPE(layer)->tp_name);
        return -1;
    }
    do {
        if (draw(&layer->weight) < 0 || draw(&layer->bias) < 0)
            return -1;
    } while (to_be_drawn(layer->weight) || to_be_drawn(layer->bias));
    /* From here on no other code runs until the layer is whole again. */
    npy_intp shape[4], bias_shape[1] = {(npy_intp)layer->core.out_features};
    int ndim = peftc_layer_weight_shape(layer, shape);
    PyArrayObject *weight, *bias;
    if (storage_of(layer, layer->weight, ndim, shape, "the weight", &weight) < 0 ||
        storage_of(layer, layer->bias, 1, bias_shape, "the bias", &bias) < 0)
        return -1;
    if (weight != NULL) {
        pc_dtype dtype = ((peftc_parameter_object *)layer->weight)->dtype;
        pc_dtype bias_dtype = bias != NULL ? ((peftc_parameter_object *)layer->bias)->dtype : dtype;
        if (bias_dtype != dtype) {
            PyErr_Format(PyExc_TypeError, "%s has a weight of %s and a bias of %s; give both the same dtype",
                         peftc_layer_name(layer), pc_dtype_get(dtype)->name, pc_dtype_get(bias_dtype)->name);
            return -1;
        }
        layer->core.dtype = dtype;
    }
    layer->core.weight = weight != NULL ? PyArray_DATA(weight) : NULL;
    layer->core.bias = bias != NULL ? PyArray_DATA(bias) : NULL;
    PyObject *old_weight = layer->weight_owner, *old_bias = layer->bias_owner;
    layer->weight_owner = Py_XNewRef(weight);
    layer->bias_owner = Py_XNewRef(bias);
    Py_XDECREF(old_weight);
    Py_XDECREF(old_bias);
    return 0;
}

static PyObject *layer_get_weight(PyObject *op, void *unused)
{
    (void)unused;
    PyObject *weight = cast(op)->weight;
    return Py_NewRef(weight != NULL ? weight : Py_None);
}

static PyObject *layer_get_bias(PyObject *op, void *unused)
{
    (void)unused;
    PyObject *bias = cast(op)->bias;
    return Py_NewRef(bias != NULL ? bias : Py_None);
}

static int same_shape(const peftc_parameter_object *parameter, int ndim, const npy_intp *shape)
{
    int have;
    const npy_intp *dims = peftc_parameter_shape(parameter, &have);
    return have == ndim && PyArray_CompareLists(dims, shape, ndim);
}

/* layer.weight = value: a Parameter takes the place of the old one (so that two layers can share it); anything
 * else becomes the old one's value. */
static int set_parameter(peftc_layer_object *self, PyObject **place, PyObject *value, int ndim, const npy_intp *shape,
                         const char *which)
{
    peftc_state *state = peftc_state_of_type(Py_TYPE(self));
    if (state == NULL)
        return -1;
    if (!PyObject_TypeCheck(value, state->parameter_type)) {
        if (*place != NULL) {
            PyObject *parameter = Py_NewRef(*place); /* reading the value can run any code */
            int result = peftc_parameter_assign((peftc_parameter_object *)parameter, value, which);
            Py_DECREF(parameter);
            return result;
        }
        PyObject *made = PyObject_CallOneArg((PyObject *)state->parameter_type, value);
        if (made == NULL)
            return -1;
        int result = set_parameter(self, place, made, ndim, shape, which);
        Py_DECREF(made);
        return result;
    }
    if (!same_shape((peftc_parameter_object *)value, ndim, shape)) {
        PyObject *got = PyObject_GetAttrString(value, "shape");
        PyObject *want = PyArray_IntTupleFromIntp(ndim, shape);
        if (got != NULL && want != NULL)
            PyErr_Format(PyExc_ValueError, "%s of %s has shape %R; a parameter of shape %R cannot take its place",
                         which, peftc_layer_name(self), want, got);
        Py_XDECREF(got);
        Py_XDECREF(want);
        return -1;
    }
    Py_XSETREF(*place, Py_NewRef(value));
    return 0;
}

int peftc_layer_weight_shape(const peftc_layer_object *self, npy_intp shape[4])
{
    int64_t dims[PC_TENSOR_DIMS]; /* layers of ours have at most 4 */
    int ndim = pc_module_weight_shape(&self->core, dims);
    for (int d = 0; d < ndim; d++)
        shape[d] = (npy_intp)dims[d];
    return ndim;
}

static PyObject *layer_get_parameters(PyObject *op, void *unused)
{
    (void)unused;
    const peftc_layer_object *self = cast(op);
    PyObject *weight = self->weight != NULL ? self->weight : Py_None;
    PyObject *bias = self->bias != NULL ? self->bias : Py_None;
    if (self->core.kind == PC_EMBEDDING || self->core.kind == PC_RMSNORM)
        return Py_BuildValue("{sO}", "weight", weight);
    return Py_BuildValue("{sOsO}", "weight", weight, "bias", bias);
}

static PyObject *layer_get_kind(PyObject *op, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(pc_kind_name(cast(op)->core.kind));
}

static int has_adapters(const peftc_layer_object *self)
{
    return self->base.registry != NULL && pc_registry_count(peftc_registry_core(self->base.registry)) != 0;
}

static int layer_set_weight(PyObject *op, PyObject *value, void *unused)
{
    (void)unused;
    peftc_layer_object *self = cast(op);
    if (value == NULL || value == Py_None || !self->core.has_weight) {
        PyErr_Format(PyExc_TypeError, "%s %s a weight", peftc_layer_name(self),
                     self->core.has_weight ? "cannot do without" : "was made without");
        return -1;
    }
    npy_intp shape[4];
    int ndim = peftc_layer_weight_shape(self, shape);
    return set_parameter(self, &self->weight, value, ndim, shape, "the weight");
}

static int layer_set_bias(PyObject *op, PyObject *value, void *unused)
{
    (void)unused;
    peftc_layer_object *self = cast(op);
    bool remove = value == NULL || value == Py_None;
    if (!self->ready) {
        PyErr_Format(PyExc_RuntimeError, "%s was not initialised: its __init__ must call super().__init__(...)",
                     Py_TYPE(op)->tp_name);
        return -1;
    }
    if (self->core.kind == PC_EMBEDDING || self->core.kind == PC_RMSNORM) {
        if (remove)
            return 0;
        PyErr_Format(PyExc_TypeError, "%s layers have no bias", Py_TYPE(op)->tp_name);
        return -1;
    }
    if (remove && self->bias == NULL)
        return 0;
    if ((remove || self->bias == NULL) && has_adapters(self)) {
        PyErr_Format(PyExc_RuntimeError, "%s cannot gain or lose its bias while adapters are attached",
                     peftc_layer_name(self));
        return -1;
    }
    if (remove) {
        Py_CLEAR(self->bias);
        self->core.has_bias = false;
        return 0;
    }
    npy_intp shape[1] = {(npy_intp)self->core.out_features};
    if (set_parameter(self, &self->bias, value, 1, shape, "the bias") < 0)
        return -1;
    self->core.has_bias = true;
    return 0;
}

/* ------------------------------------------------------------------- set-up */

static PyGetSetDef layer_getset[] = {
    {"weight", layer_get_weight, layer_set_weight,
     "The weight: a Parameter. An array assigned to it becomes its value; a Parameter takes its place.", NULL},
    {"bias", layer_get_bias, layer_set_bias, "The bias: a Parameter or None.", NULL},
    {"_parameters", layer_get_parameters, NULL, "A new dict name -> Parameter or None.", NULL},
    {"kind", layer_get_kind, NULL, "What the layer computes, whatever its class is called: 'Linear', 'Conv1D' and so on", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef layer_members[] = {
    {"__dictoffset__", T_PYSSIZET, offsetof(peftc_module_object, dict), READONLY, NULL},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(peftc_module_object, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot layer_slots[] = {
    {Py_tp_doc, (void *)"Layer()\n--\n\nA module with a weight: the base of the layers of peftc.nn."},
    {Py_tp_new, layer_new},
    {Py_tp_init, layer_init},
    {Py_tp_dealloc, layer_dealloc},
    {Py_tp_traverse, layer_traverse},
    {Py_tp_clear, layer_clear},
    {Py_tp_getset, layer_getset},
    {Py_tp_members, layer_members},
    {0, NULL},
};

static PyType_Spec layer_spec = {
    .name = "peftc._core.Layer",
    .basicsize = sizeof(peftc_layer_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = layer_slots,
};

int peftc_add_layer_base(PyObject *module, peftc_state *state)
{
    state->layer_type =
        (PyTypeObject *)PyType_FromModuleAndSpec(module, &layer_spec, (PyObject *)state->module_type);
    return state->layer_type != NULL ? PyModule_AddType(module, state->layer_type) : -1;
}
