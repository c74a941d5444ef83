/* safetensors: reader and writer.
 *
 * The file is an 8-byte little-endian header length, a JSON header that maps
 * tensor names to dtype, shape and byte range, and the tensors' bytes.  The
 * reader is at least as strict as the official one (0.8.0) and trusts no number
 * in the file; docs/file-formats.md lists every rule.
 */
#ifndef PEFTC_FORMATS_SAFETENSORS_H
#define PEFTC_FORMATS_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../core/parallel.h"
#include "../core/status.h"
#include "../core/weights.h"

typedef struct pc_safetensors pc_safetensors;

/* One entry of __metadata__; both may contain NUL, so lengths count. */
typedef struct pc_metadata_item {
    const char *key;
    size_t key_len;
    const char *value;
    size_t value_len;
} pc_metadata_item;

/* Open a file: reads and checks the header only.  Tensors are read with pread
 * straight to where they are wanted; nothing is mapped.  Content errors are
 * PC_ERR_FORMAT and name the file; the file is closed again on error. */
pc_status pc_safetensors_open(const char *path, pc_safetensors **out, pc_error *err);

/* The same over `len` bytes in memory, which must outlive the object. */
pc_status pc_safetensors_parse(const void *bytes, size_t len, pc_safetensors **out, pc_error *err);

void pc_safetensors_close(pc_safetensors *st); /* NULL is allowed */

/* Its tensors, in the order of their data; .close of this view closes the whole. */
pc_weights *pc_safetensors_weights(pc_safetensors *st);
/* Absolute position in the file (or buffer) of tensor i's first byte. */
uint64_t pc_safetensors_offset(const pc_safetensors *st, size_t i);
/* The index of a name, or SIZE_MAX. */
size_t pc_safetensors_find(const pc_safetensors *st, const char *name, size_t len);
/* Metadata in the file's order; false when the header has no __metadata__ (or null). */
bool pc_safetensors_metadata(const pc_safetensors *st, const pc_metadata_item **items, size_t *count);

/* Read every tensor: dst[i] takes tensors[i].nbytes bytes.  Large files are read on several threads of
 * rt (NULL: on this one). */
pc_status pc_safetensors_read_all(const pc_safetensors *st, void *const *dst, pc_runtime *rt, pc_error *err);

/* What is wanted along one axis: count elements from start on, each step further (which may be negative). */
typedef struct pc_axis {
    uint64_t start;
    int64_t step;
    uint64_t count;
} pc_axis;

/* Read part of tensor i: one pc_axis for each of its dimensions, all elements within its shape (else
 * PC_ERR_INDEX).  dst takes the elements in row-major order.  Only the bytes around what is wanted are
 * read.  Dtypes below one byte: PC_ERR_UNSUPPORTED. */
pc_status pc_safetensors_read_slice(const pc_safetensors *st, size_t i, const pc_axis *axes, void *dst, pc_error *err);

/* ------------------------------------------------------------------ writing */

typedef struct pc_tensor_view {
    pc_tensor_info info;
    const void *data; /* row-major, contiguous, little-endian */
} pc_tensor_view;

/* What the writer needs for the header; lay it out once, then write anywhere.
 * Tensors are ordered as the official writer does it: by dtype (its own list, wide ones first), then by name;
 * metadata stays as given (keys must differ). */
typedef struct pc_safetensors_layout {
    char *header;       /* length prefix and padded JSON */
    size_t header_len;
    size_t *order;      /* file position → index of the view */
    size_t count;
    uint64_t file_size;
} pc_safetensors_layout;

pc_status pc_safetensors_plan(const pc_tensor_view *views, size_t count, const pc_metadata_item *metadata,
                              size_t metadata_count, bool has_metadata, pc_safetensors_layout *out, pc_error *err);
void pc_safetensors_layout_free(pc_safetensors_layout *layout);

/* Write a whole file atomically (see atomic_file.h). */
pc_status pc_safetensors_save(const char *path, const pc_tensor_view *views, size_t count,
                              const pc_metadata_item *metadata, size_t metadata_count, bool has_metadata,
                              pc_error *err);

#endif
