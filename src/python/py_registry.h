/* What the files of AdapterRegistry's binding share.
 *
 *   py_registry.c          the type: lifetime, names, what is active
 *   py_registry_modules.c  the module table
 *   py_registry_build.c    adding and loading adapters
 *   py_registry_state.c    an adapter's tensors as arrays and as a file
 *   py_registry_merge.c    merged weights
 *   py_registry_foreign.c  modules of another library, and tensors for it
 */
#ifndef PEFTC_PYTHON_PY_REGISTRY_H
#define PEFTC_PYTHON_PY_REGISTRY_H

#include "binding.h"

#include <pythread.h>
#include <sys/types.h>

#include "../methods/methods.h"
#include "layer.h"

typedef struct registry_object {
    PyObject_HEAD
    pc_registry *core;
    PyObject *objects; /* list: the host's module by index */
    PyObject *weakrefs;
    PyThread_type_lock mutation; /* held by whatever grows the module table or builds adapters: those release the GIL */
    unsigned long holder;        /* the thread that holds it, 0 when it is free; and that thread's process */
    pid_t holder_process;
    struct unfinished *unfinished; /* py_registry_build.c: an adapter that is still being filled; NULL mostly */
} registry_object;

static inline peftc_state *registry_state(registry_object *self) { return peftc_state_of_type(Py_TYPE(self)); }

/* Take and give back `mutation`; the GIL is held before and after, not while waiting.  -1 with RuntimeError when this
 * thread holds it: something that it called while changing the registry (a finalizer) wants to change it, too. */
int registry_lock(registry_object *self);
void registry_unlock(registry_object *self);

/* A name argument as UTF-8; NULL with an exception. */
const char *registry_adapter_name(PyObject *obj, Py_ssize_t *len);
/* The adapter called `arg` (borrowed from the registry); NULL with KeyError or TypeError. */
pc_adapter *registry_find_adapter(registry_object *self, PyObject *arg);
/* A new list of adapters' names. */
PyObject *registry_name_list(pc_adapter *const *adapters, size_t count);

/* Refresh every entry of the module table from its object, and return a list that keeps their buffers alive while
 * the GIL is released; NULL with an exception. */
PyObject *registry_pin_weights(registry_object *self, peftc_state *state);

/* An object that keeps an arena alive under the arrays that view it. */
PyObject *registry_arena(peftc_state *state, pc_arena *arena);
/* The arena (borrowed) that such an object keeps alive under this array; NULL, without an exception, for anything else. */
pc_arena *registry_arena_under(peftc_state *state, PyObject *array);
extern PyType_Spec registry_arena_spec;

/* Methods, with their docstrings, by the file that holds them. */
extern const char registry_bind_doc[], registry_add_doc[], registry_load_doc[];
PyObject *registry_bind(PyObject *op, PyObject *args, PyObject *kwargs);
PyObject *registry_add(PyObject *op, PyObject *args, PyObject *kwargs);
PyObject *registry_load(PyObject *op, PyObject *args, PyObject *kwargs);
extern const char registry_finish_doc[];
PyObject *registry_finish(PyObject *op, PyObject *unused);
/* Give up an adapter that is still being filled, without an exception: the registry is going. */
void registry_give_up(registry_object *self);
/* The same if it is the one of this name, which is not listed any more. */
void registry_removed(registry_object *self, const char *name, Py_ssize_t len);

extern const char registry_tensors_doc[], registry_state_dict_doc[], registry_saved_modules_doc[],
    registry_adapted_modules_doc[], registry_save_doc[];
PyObject *registry_tensors(PyObject *op, PyObject *arg);
PyObject *registry_state_dict(PyObject *op, PyObject *arg);
PyObject *registry_saved_modules(PyObject *op, PyObject *arg);
PyObject *registry_adapted_modules(PyObject *op, PyObject *arg);
PyObject *registry_save(PyObject *op, PyObject *args, PyObject *kwargs);

/* Rows that were read already, by their address. */
#define FOREIGN_ROWS 32
typedef struct foreign_rows {
    PyObject *rows[FOREIGN_ROWS]; /* borrowed */
    pc_module entries[FOREIGN_ROWS];
} foreign_rows;

/* Fill a table entry from a tuple that describes a module of another library; -1 with an exception. `seen` begins with
 * zeros and is for one call that keeps all rows alive. */
int registry_describe_foreign(PyObject *row, foreign_rows *seen, pc_module *entry);
extern const char registry_layout_doc[];
PyObject *registry_layout(PyObject *op, PyObject *arg);

extern const char registry_merge_doc[], registry_unmerge_doc[], registry_merged_doc[];
PyObject *registry_merge(PyObject *op, PyObject *args, PyObject *kwargs);
PyObject *registry_unmerge(PyObject *op, PyObject *unused);
PyObject *registry_merged(PyObject *op, PyObject *unused);

#endif
