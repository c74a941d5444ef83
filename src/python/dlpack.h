/* torch tensors as plain memory, without torch's headers.
 *
 * torch publishes a table of C functions (DLPack's exchange interface) as a capsule on its tensor type: one tells where a
 * tensor's memory is in tens of nanoseconds, one makes a tensor.  A torch that has no such table is asked attribute
 * by attribute, with the same results, and does not make tensors here.
 */
#ifndef PEFTC_PYTHON_DLPACK_H
#define PEFTC_PYTHON_DLPACK_H

#include "binding.h"

#include "../core/dtype.h"

/* More dimensions than any activation has; a tensor with more is left to torch. */
#define PEFTC_MAX_DIMS 8

/* A tensor as DLPack 1.x describes it. */
typedef struct peftc_exchange_tensor {
    void *data;
    int32_t device_type, device_index;
    int32_t ndim;
    uint8_t kind, bits; /* kind of number, and its size */
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} peftc_exchange_tensor;

typedef struct peftc_tensor {
    char *data;
    pc_dtype dtype;
    int ndim;
    /* Of the tensor itself or in `room`: valid until the GIL is released or other Python code runs. */
    const int64_t *shape, *strides; /* in elements */
    int64_t room[2 * PEFTC_MAX_DIMS];
} peftc_tensor;

/* A tensor as rows: the last dimension, whose elements are neighbours, and all others taken together. */
typedef struct peftc_rows {
    char *data;
    int64_t rows, cols, stride; /* from row to row, in elements; cols if there is only one row */
} peftc_rows;

/* Describe obj.  False, and no exception, for whatever is not memory that our kernels may use as it stands: not
 * a torch.Tensor or torch.nn.Parameter (subclasses may mean anything), not on the CPU, no float dtype, no memory of
 * its own (meta, fake, sparse, freed, wrapped by functorch, …), memory that is to be read with the sign turned
 * (torch's negative bit; of Parameters, which are made from what has been computed, this is not asked), misaligned.
 * torch's modes (autocast, dispatch modes, forward-mode AD) are not visible here: callers look at them. */
bool peftc_read_tensor(peftc_state *state, PyObject *obj, peftc_tensor *out);

/* Begin to read what peftc_read_tensor will, behind a tensor whose own memory and torch's part of it (py_torch_dicts.h,
 * ahead_tensor) have been fetched. Nothing for what is no tensor. */
void peftc_ahead_of_storage(peftc_state *state, PyObject *obj);

/* What torch keeps of memory that it was given: DLPack's managed tensor. The caller provides it, and sets the first two. */
typedef struct peftc_owned_tensor {
    uint32_t major, minor;
    void *context;                                        /* the caller's */
    void (*delete)(struct peftc_owned_tensor *tensor); /* called when torch is done with the memory: in any thread, without the GIL */
    uint64_t flags;
    peftc_exchange_tensor tensor;
} peftc_owned_tensor;

/* Can tensors be made? */
bool peftc_makes_tensors(peftc_state *state);

/* A torch.Tensor over `data`, contiguous; a new reference. NULL with an exception: `delete` has been called then, too.
 * shape and strides (in elements) are read in the call only. */
PyObject *peftc_make_tensor(peftc_state *state, peftc_owned_tensor *owned, void *data, pc_dtype dtype, int ndim,
                            const int64_t *shape, const int64_t *strides);

/* The same tensor as rows; false if the rows are not evenly spaced or their elements are not neighbours. */
bool peftc_tensor_rows(const peftc_tensor *tensor, peftc_rows *out);

/* Whether the tensor's elements lie one after the other in the order of its dimensions. */
bool peftc_tensor_packed(const peftc_tensor *tensor);

/* The threads that a kernel on torch's tensors may use: torch's own, where its OpenMP can be found, since they look out for
 * work on every core between torch's operations; else ours. No more than torch is told to use and than we are told to:
 * NULL, no others than the caller's, in workers of a DataLoader and in servers with a process per core. */
pc_runtime *peftc_torch_runtime(peftc_state *state);

/* What is remembered about torch; in the module's state. */
void peftc_forget_torch(peftc_state *state);
int peftc_visit_torch(peftc_state *state, visitproc visit, void *arg);

#endif
