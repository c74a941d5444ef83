/* What the files of the Python binding share: the module's state, and how C
 * errors become exceptions. */
#ifndef PEFTC_PYTHON_BINDING_H
#define PEFTC_PYTHON_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL peftc_array_api
#ifndef PEFTC_IMPORTS_NUMPY /* module.c alone defines it */
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../core/config.h"
#include "../core/parallel.h"
#include "../core/status.h"

typedef struct peftc_state {
    pc_runtime *rt;
    PyObject *safetensor_error; /* peftc.safetensors.SafetensorError */
    PyObject *unpickling_error; /* pickle.UnpicklingError, imported when first needed */
    PyTypeObject *registry_type;
    PyTypeObject *module_type;  /* peftc._core.Module */
    PyTypeObject *layer_type;   /* peftc._core.Layer: base of the nn layer types */
    PyTypeObject *parameter_type; /* peftc._core.Parameter */
    PyTypeObject *arena_type;   /* keeps an arena alive under its views */
    PyTypeObject *safe_open_type;
    PyTypeObject *safe_slice_type; /* what safe_open.get_slice returns */
    PyTypeObject *node_type;    /* peftc._core.Node */
    PyObject *tensor_type;      /* peftc.nn.Tensor, once peftc.nn is imported */
    PyObject *node_name;        /* "_node" */
    uint64_t next_node;         /* sequence of recorded operations */
    uint64_t seed, next_stream; /* manual_seed; every draw takes the next stream */
    struct peftc_torch *torch;  /* what dlpack.c knows of torch once it is imported, else NULL */
} peftc_state;

extern struct PyModuleDef peftc_module;

static inline peftc_state *peftc_get_state(PyObject *module) { return (peftc_state *)PyModule_GetState(module); }

/* The module that the type, or what it is derived from, was made for; borrowed, NULL with an exception set. */
static inline PyObject *peftc_module_of_type(PyTypeObject *type)
{
#if PY_VERSION_HEX >= 0x030b0000
    return PyType_GetModuleByDef(type, &peftc_module);
#else
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(type->tp_mro); i++) {
        PyTypeObject *base = (PyTypeObject *)PyTuple_GET_ITEM(type->tp_mro, i);
        PyObject *module = PyType_HasFeature(base, Py_TPFLAGS_HEAPTYPE) ? ((PyHeapTypeObject *)base)->ht_module : NULL;
        if (module != NULL && PyModule_GetDef(module) == &peftc_module)
            return module;
    }
    PyErr_Format(PyExc_TypeError, "%.200s is no type of peftc's", type->tp_name);
    return NULL;
#endif
}

/* The state from an instance of one of our heap types; NULL with an exception set. */
static inline peftc_state *peftc_state_of_type(PyTypeObject *type)
{
    PyObject *module = peftc_module_of_type(type);
    return module != NULL ? peftc_get_state(module) : NULL;
}

/* Raise *err as the right exception type; always returns NULL. */
PyObject *peftc_raise(peftc_state *state, const pc_error *err);

/* A config in JSON, checked against the fields of every method that peftc has.  Needs no GIL. */
pc_status peftc_parse_config(const char *text, Py_ssize_t len, const char *label, pc_config **out, pc_error *err);

/* Each binding file adds its functions and types here; 0 on success, -1 with an exception. */
int peftc_add_safetensors(PyObject *module, peftc_state *state);
int peftc_add_config(PyObject *module, peftc_state *state);     /* adapter_config.json */
int peftc_add_torch_bin(PyObject *module, peftc_state *state);  /* adapter_model.bin */
int peftc_add_registry(PyObject *module, peftc_state *state);
int peftc_add_layers(PyObject *module, peftc_state *state);   /* nn layer types */
int peftc_add_tape(PyObject *module, peftc_state *state);     /* gradients */
int peftc_add_optimizers(PyObject *module, peftc_state *state);
int peftc_add_functional(PyObject *module, peftc_state *state);
int peftc_add_adalora(PyObject *module, peftc_state *state);  /* AdaLora's importance and budget */
int peftc_add_torch(PyObject *module, peftc_state *state);    /* kernels on torch tensors */
int peftc_add_torch_modules(PyObject *module, peftc_state *state);
int peftc_add_torch_walk(PyObject *module, peftc_state *state);
int peftc_add_torch_eval(PyObject *module, peftc_state *state);
int peftc_add_torch_slots(PyObject *module, peftc_state *state);
int peftc_add_torch_tensors(PyObject *module, peftc_state *state);
int peftc_add_torch_places(PyObject *module, peftc_state *state);
int peftc_add_torch_parameters(PyObject *module, peftc_state *state);
int peftc_add_torch_drop(PyObject *module, peftc_state *state);
int peftc_add_torch_forward(PyObject *module, peftc_state *state);
int peftc_add_torch_node(PyObject *module, peftc_state *state);
int peftc_add_torch_call(PyObject *module, peftc_state *state);
int peftc_add_torch_scale(PyObject *module, peftc_state *state);

#endif
