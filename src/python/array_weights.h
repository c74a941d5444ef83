/* Adapter tensors from arrays that a caller passes in (adapter_state_dict=…). */
#ifndef PEFTC_PYTHON_ARRAY_WEIGHTS_H
#define PEFTC_PYTHON_ARRAY_WEIGHTS_H

#include "binding.h"

#include "../core/weights.h"

/* A source over a dict of str → array (anything NumPy can turn into one).  Holds contiguous arrays, copying
 * only those that are not; NULL with an exception that names the key.  Opening and closing need the GIL. */
pc_weights *peftc_array_weights(PyObject *dict);

#endif
