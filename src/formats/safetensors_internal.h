/* What the files of the safetensors reader and writer share. */
#ifndef PEFTC_FORMATS_SAFETENSORS_INTERNAL_H
#define PEFTC_FORMATS_SAFETENSORS_INTERNAL_H

#include "../core/memory.h"
#include "../core/strmap.h"
#include "safetensors.h"

/* Tensor bytes are little-endian in the file and go to and from memory unchanged. */
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "peftc's safetensors code needs a little-endian machine"
#endif

#define PC_SAFETENSORS_PREFIX 8              /* the header's length, u64 */
#define PC_SAFETENSORS_MAX_HEADER 100000000u /* the official reader's limit */

struct pc_safetensors {
    pc_weights weights; /* first: pc_weights is what callers see */
    char *label;        /* the path, made valid UTF-8, for messages */
    int fd;             /* -1 when the source is memory */
    const unsigned char *bytes;
    uint64_t size;
    uint64_t data_start; /* first byte after the header */
    char *header;        /* names, keys and values point into it, decoded in place */
    size_t header_len;
    pc_tensor_info *tensors;
    uint64_t *begins; /* of each tensor, relative to data_start */
    uint64_t *shapes; /* of all tensors, one after the other */
    pc_metadata_item *metadata;
    size_t metadata_count;
    bool has_metadata;
    pc_strmap index; /* name → tensor */
};

#define PC_QUOTED 120
/* A name from a file, as it may stand in a message: quoted, cut, control characters replaced.
 * Writes to `buffer` and returns it. */
const char *pc_quote_name(char buffer[PC_QUOTED], const char *name, size_t len);

/* Read exactly `len` bytes at `offset` of the file or buffer. */
pc_status pc_safetensors_read_at(const pc_safetensors *st, uint64_t offset, void *dst, size_t len, pc_error *err);

/* Bytes of a tensor, product taken left to right as the official reader does; false when a product
 * does not fit 64 bits or the last byte is not full. */
bool pc_tensor_bytes(pc_dtype dtype, const uint64_t *shape, int ndim, uint64_t *out);

#endif
