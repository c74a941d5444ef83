/* The extension module peftc._core: state, set-up, and the few functions that
 * belong to no other file. */
#define PEFTC_IMPORTS_NUMPY
#include "binding.h"

#include "../kernels/kernels.h"
#include "../core/background.h"
#include "../core/memory.h"
#include "dlpack.h"

PyDoc_STRVAR(set_num_threads_doc,
             "set_num_threads(n, /)\n--\n\n"
             "Use n threads (the calling one included) for every kernel of peftc from now on. On torch tensors these are\n"
             "torch's own, where its OpenMP can be found, and no more than torch.get_num_threads().\n\n"
             "Raises ValueError unless 1 <= n <= 256.");

static PyObject *set_num_threads(PyObject *module, PyObject *arg)
{
    peftc_state *state = peftc_get_state(module);
    long n = PyLong_AsLong(arg);
    if (n == -1 && PyErr_Occurred())
        return NULL;
    pc_error err;
    int threads = n < 0 ? -1 : n > PC_MAX_THREADS ? PC_MAX_THREADS + 1 : (int)n;
    if (pc_runtime_set_threads(state->rt, threads, &err) != PC_OK)
        return peftc_raise(state, &err);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(get_num_threads_doc,
             "get_num_threads()\n--\n\nThe number of threads that peftc's kernels use. Initially the number of CPUs "
             "that the process may run on.");

static PyObject *get_num_threads(PyObject *module, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(pc_runtime_threads(peftc_get_state(module)->rt));
}

PyDoc_STRVAR(build_info_doc,
             "build_info()\n--\n\nA dict of facts about this build: 'isa' (the kernels in use), 'blas', 'threads', "
             "'test_hooks', 'sanitized'.");

static PyObject *build_info(PyObject *module, PyObject *unused)
{
    (void)unused;
#ifdef PC_TEST_HOOKS
    PyObject *hooks = Py_True;
#else
    PyObject *hooks = Py_False;
#endif
#ifdef __SANITIZE_ADDRESS__
    PyObject *sanitized = Py_True;
#else
    PyObject *sanitized = Py_False;
#endif
    return Py_BuildValue("{s:s,s:s,s:i,s:O,s:O}", "isa", pc_kernels_isa(), "blas", pc_kernels_blas(), "threads",
                         pc_runtime_threads(peftc_get_state(module)->rt), "test_hooks", hooks, "sanitized", sanitized);
}

#ifdef PC_TEST_HOOKS
static PyObject *fail_allocation(PyObject *module, PyObject *arg)
{
    (void)module;
    long nth = PyLong_AsLong(arg);
    if (nth == -1 && PyErr_Occurred())
        return NULL;
    pc_test_fail_allocation(nth);
    Py_RETURN_NONE;
}

static PyObject *fail_allocation_elsewhere(PyObject *module, PyObject *arg)
{
    (void)module;
    long nth = PyLong_AsLong(arg);
    if (nth == -1 && PyErr_Occurred())
        return NULL;
    pc_test_fail_allocation_elsewhere(nth);
    Py_RETURN_NONE;
}

static PyObject *no_threads(PyObject *module, PyObject *arg)
{
    (void)module;
    const int none = PyObject_IsTrue(arg);
    return none < 0 ? NULL : PyLong_FromLong(pc_test_no_threads(none != 0));
}

static PyObject *allocation_failed(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyBool_FromLong(pc_test_allocation_failed());
}

static PyObject *live_allocations(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromLong(pc_test_live_allocations());
}
#endif

static PyMethodDef functions[] = {
    {"set_num_threads", set_num_threads, METH_O, set_num_threads_doc},
    {"get_num_threads", get_num_threads, METH_NOARGS, get_num_threads_doc},
    {"build_info", build_info, METH_NOARGS, build_info_doc},
#ifdef PC_TEST_HOOKS
    {"_fail_allocation", fail_allocation, METH_O, "Make the n-th allocation of the core on this thread fail."},
    {"_fail_allocation_elsewhere", fail_allocation_elsewhere, METH_O,
     "Make the n-th allocation of the core on any other thread fail."},
    {"_no_threads", no_threads, METH_O, "Whether no thread is to be had in the background; returns how many were wanted."},
    {"_allocation_failed", allocation_failed, METH_NOARGS, "Whether the armed failure happened."},
    {"_live_allocations", live_allocations, METH_NOARGS, "Allocations of the core not yet freed."},
#endif
    {NULL, NULL, 0, NULL},
};

static int (*const parts[])(PyObject *module, peftc_state *state) = {
    peftc_add_safetensors,
    peftc_add_config,
    peftc_add_torch_bin,
    peftc_add_registry,
    peftc_add_layers,
    peftc_add_functional,
    peftc_add_tape,
    peftc_add_optimizers,
    peftc_add_adalora,
    peftc_add_torch,
    peftc_add_torch_modules,
    peftc_add_torch_walk,
    peftc_add_torch_eval,
    peftc_add_torch_slots,
    peftc_add_torch_tensors,
    peftc_add_torch_places,
    peftc_add_torch_parameters,
    peftc_add_torch_drop,
    peftc_add_torch_forward,
    peftc_add_torch_node,
    peftc_add_torch_call,
    peftc_add_torch_scale,
};

static int exec_module(PyObject *module)
{
    if (PyArray_ImportNumPyAPI() < 0)
        return -1;
    peftc_state *state = peftc_get_state(module);
    pc_kernels_init();
    pc_error err;
    if (pc_runtime_new(&state->rt, &err) != PC_OK) {
        peftc_raise(state, &err);
        return -1;
    }
    state->safetensor_error = PyErr_NewExceptionWithDoc(
        "peftc.safetensors.SafetensorError",
        "The content of a safetensors file, or what was asked to be written to one, is wrong.", NULL, NULL);
    if (state->safetensor_error == NULL ||
        PyModule_AddObjectRef(module, "SafetensorError", state->safetensor_error) < 0)
        return -1;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (parts[i](module, state) < 0)
            return -1;
    return 0;
}

static int traverse_module(PyObject *module, visitproc visit, void *arg)
{
    peftc_state *state = peftc_get_state(module);
    Py_VISIT(state->safetensor_error);
    Py_VISIT(state->unpickling_error);
    Py_VISIT(state->registry_type);
    Py_VISIT(state->module_type);
    Py_VISIT(state->layer_type);
    Py_VISIT(state->parameter_type);
    Py_VISIT(state->arena_type);
    Py_VISIT(state->node_type);
    Py_VISIT(state->tensor_type);
    Py_VISIT(state->safe_open_type);
    Py_VISIT(state->safe_slice_type);
    return peftc_visit_torch(state, visit, arg);
}

static int clear_module(PyObject *module)
{
    peftc_state *state = peftc_get_state(module);
    Py_CLEAR(state->safetensor_error);
    Py_CLEAR(state->unpickling_error);
    Py_CLEAR(state->registry_type);
    Py_CLEAR(state->module_type);
    Py_CLEAR(state->layer_type);
    Py_CLEAR(state->parameter_type);
    Py_CLEAR(state->arena_type);
    Py_CLEAR(state->node_type);
    Py_CLEAR(state->tensor_type);
    Py_CLEAR(state->node_name);
    Py_CLEAR(state->safe_open_type);
    Py_CLEAR(state->safe_slice_type);
    peftc_forget_torch(state);
    return 0;
}

static void free_module(void *module)
{
    peftc_state *state = peftc_get_state((PyObject *)module);
    clear_module((PyObject *)module);
    pc_runtime_free(state->rt);
    state->rt = NULL;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
    {0, NULL},
};

struct PyModuleDef peftc_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "peftc._core",
    .m_doc = "The C core of peftc.",
    .m_size = sizeof(peftc_state),
    .m_methods = functions,
    .m_slots = slots,
    .m_traverse = traverse_module,
    .m_clear = clear_module,
    .m_free = free_module,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&peftc_module); }
