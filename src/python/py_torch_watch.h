/* Whether anybody watches or rewrites torch's operations: then they are torch's to do. */
#ifndef PEFTC_PYTHON_PY_TORCH_WATCH_H
#define PEFTC_PYTHON_PY_TORCH_WATCH_H

#include "binding.h"

/* What is asked: a tuple (watchers, registries, levels), where
 *   watchers is a tuple of functions without arguments, which give True, or anything but None, 0 and False, if somebody
 *       watches the operations of this thread,
 *   registries is a tuple of containers that have items then,
 *   levels is the dict whose "_current_level" is -1 outside forward-mode differentiation. */
bool peftc_watch_check(PyObject *watch);

/* Does nothing see or change the operations of this thread? False with *failed set if a watcher raised. */
bool peftc_nobody_watches(PyObject *watch, bool *failed);

/* The length of a dict or another container is 0; no container (NULL) is empty. */
bool peftc_is_empty(PyObject *container);

#endif
