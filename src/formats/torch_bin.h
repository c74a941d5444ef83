/* adapter_model.bin: files of torch.save, read without running them.
 *
 * The pickle inside can only build tensors, numbers, strings, dicts, lists and
 * tuples; whatever else it asks for is refused by name.  Both layouts are
 * known: the zip archive and the legacy stream.  Memory is bounded by a small
 * multiple of the file's size, work by the length of the pickle.
 */
#ifndef PEFTC_FORMATS_TORCH_BIN_H
#define PEFTC_FORMATS_TORCH_BIN_H

#include <stddef.h>

#include "../core/status.h"
#include "../core/weights.h"

/* Open a file whose top object is a (possibly nested) dict of tensors.  Content
 * errors are PC_ERR_UNPICKLE.  Nested dicts give dotted names.  Reads copy
 * non-contiguous tensors into row-major order. */
pc_status pc_torch_bin_open(const char *path, pc_weights **out, pc_error *err);

/* The same over bytes in memory, which must outlive the object. */
pc_status pc_torch_bin_parse(const void *bytes, size_t len, const char *label, pc_weights **out, pc_error *err);

#endif
