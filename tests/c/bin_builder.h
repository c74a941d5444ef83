/* Files as torch.save makes them, from a pickle and the bytes of its storages:
 * for the test and the fuzz target of the .bin reader. */
#ifndef PEFTC_TESTS_BIN_BUILDER_H
#define PEFTC_TESTS_BIN_BUILDER_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/formats/crc32.h"

typedef struct bytes {
    uint8_t *data;
    size_t len, room;
} bytes;

static inline void put(bytes *b, const void *data, size_t len)
{
    if (b->len + len > b->room) {
        b->room = (b->len + len) * 2 + 256;
        b->data = realloc(b->data, b->room);
        if (b->data == NULL)
            abort();
    }
    if (len != 0)
        memcpy(b->data + b->len, data, len);
    b->len += len;
}

static inline void put_number(bytes *b, uint64_t value, size_t width)
{
    uint8_t raw[8];
    for (size_t i = 0; i < width; i++)
        raw[i] = (uint8_t)(value >> (8 * i));
    put(b, raw, width);
}

/* A literal, with the NUL bytes inside it but not the one behind it. */
#define PUT(b, literal) put((b), (literal), sizeof(literal) - 1)

typedef struct zip_item {
    const char *name;
    const void *data;
    size_t len;
} zip_item;

/* An archive of stored entries; without checksums, they are all zero. */
static inline bytes make_zip(const zip_item *items, size_t count, bool checksums)
{
    pc_crc32 crc;
    pc_crc32_init(&crc);
    bytes out = {0}, directory = {0};
    for (size_t i = 0; i < count; i++) {
        uint64_t sum = checksums ? pc_crc32_update(&crc, 0, items[i].data, items[i].len) : 0;
        size_t name_len = strlen(items[i].name), header = out.len;
        PUT(&out, "PK\3\4\0\0\0\0\0\0\0\0\0\0");
        put_number(&out, sum, 4);
        put_number(&out, items[i].len, 4);
        put_number(&out, items[i].len, 4);
        put_number(&out, name_len, 2);
        put_number(&out, 0, 2);
        put(&out, items[i].name, name_len);
        put(&out, items[i].data, items[i].len);
        PUT(&directory, "PK\1\2\0\0\0\0\0\0\0\0\0\0\0\0");
        put_number(&directory, sum, 4);
        put_number(&directory, items[i].len, 4);
        put_number(&directory, items[i].len, 4);
        put_number(&directory, name_len, 2);
        PUT(&directory, "\0\0\0\0\0\0\0\0\0\0\0\0");
        put_number(&directory, header, 4);
        put(&directory, items[i].name, name_len);
    }
    size_t at = out.len;
    put(&out, directory.data, directory.len);
    PUT(&out, "PK\5\6\0\0\0\0");
    put_number(&out, count, 2);
    put_number(&out, count, 2);
    put_number(&out, directory.len, 4);
    put_number(&out, at, 4);
    put_number(&out, 0, 2);
    free(directory.data);
    return out;
}

/* The archive of a pickle with one storage, "0". */
static inline bytes make_archive(const void *pickle, size_t pickle_len, const void *storage, size_t storage_len,
                                 bool checksums)
{
    const zip_item items[] = {
        {"a/data.pkl", pickle, pickle_len},
        {"a/byteorder", "little", 6},
        {"a/data/0", storage, storage_len},
        {"a/version", "3\n", 2},
    };
    return make_zip(items, sizeof items / sizeof items[0], checksums);
}

/* What a legacy file begins with. */
#define LEGACY_HEAD                                                                                  \
    "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19." /* magic number */                   \
    "\x80\x02M\xe9\x03."                                        /* protocol 1001 */                  \
    "\x80\x02}q\x00X\x0d\x00\x00\x00little_endianq\x01\x88s."

/* The legacy file of a pickle with one storage, "0", of float32. */
static inline bytes make_legacy(const void *pickle, size_t pickle_len, const void *storage, size_t storage_len)
{
    bytes out = {0};
    PUT(&out, LEGACY_HEAD);
    put(&out, pickle, pickle_len);
    PUT(&out, "\x80\x02]X\x01\x00\x00\x00" "0a.");
    put_number(&out, storage_len / 4, 8);
    put(&out, storage, storage_len);
    return out;
}

/* {name: tensor(offset, shape, stride) of a storage "0" of `count` float32}: one entry, without the braces. */
static inline void put_tensor(bytes *b, const char *name, uint64_t count, uint64_t offset, int ndim,
                              const uint64_t *shape, const uint64_t *stride, bool legacy)
{
    PUT(b, "X");
    put_number(b, strlen(name), 4);
    put(b, name, strlen(name));
    PUT(b, "ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x01" "0U\x03" "cpu\x8a\x08");
    put_number(b, count, 8);
    if (legacy)
        PUT(b, "N");
    PUT(b, "tQ\x8a\x08");
    put_number(b, offset, 8);
    for (int which = 0; which < 2; which++) {
        PUT(b, "(");
        for (int d = 0; d < ndim; d++) {
            PUT(b, "\x8a\x08");
            put_number(b, which == 0 ? shape[d] : stride[d], 8);
        }
        PUT(b, "t");
    }
    PUT(b, "\x89" "ccollections\nOrderedDict\n)RtR");
}

#endif
