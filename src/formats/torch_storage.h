/* Reading the tensors of an opened adapter_model.bin: private to torch_bin.c and torch_storage.c. */
#ifndef PEFTC_FORMATS_TORCH_STORAGE_H
#define PEFTC_FORMATS_TORCH_STORAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../core/memory.h"
#include "../core/weights.h"
#include "byte_source.h"
#include "zip_reader.h"

/* Bytes that tensors lie in.  A zip archive has one entry for each, a legacy file one run of bytes. */
typedef struct pc_bin_storage {
    uint64_t offset; /* in the source */
    uint64_t nbytes; /* that tensors may use */
    size_t entry;    /* of the zip archive; SIZE_MAX in a legacy file */
    size_t parent;   /* legacy view: the storage it is a part of; else SIZE_MAX */
    pc_dtype dtype;  /* that it was first asked for as */
    bool placed;     /* legacy: offset is known */
    bool verified;   /* its checksum was found right, or it has none */
    uint8_t *cache;  /* all of it, while strided tensors are gathered from it */
    size_t gathers;  /* strided tensors not yet read */
} pc_bin_storage;

typedef struct pc_bin_layout {
    uint32_t storage;
    bool contiguous;
    bool gathered;          /* read once already */
    uint64_t start;         /* byte in the storage */
    const uint64_t *stride; /* in elements; NULL when contiguous */
} pc_bin_layout;

typedef struct pc_torch_bin {
    pc_weights base;
    char *label;
    pc_byte_source source;
    pc_zip zip;      /* source == NULL in a legacy file */
    bool big_endian; /* the file's tensors */
    pc_bin_storage *storages;
    size_t storage_count, storage_room;
    pc_bin_layout *layouts;
    pc_pool pool; /* names, shapes, strides, layouts */
} pc_torch_bin;

/* pc_weights.read */
pc_status pc_bin_read(pc_weights *self, size_t i, void *dst, pc_error *err);

#endif
