/* Zip archives as torch.save writes them: stored entries inside one top folder.
 *
 * Entries are found by their exact name, from the central directory alone.
 * What has two readings is refused: two entries of one name, entries that
 * overlap, a local header that contradicts the directory.  Compressed and
 * encrypted entries are refused by name.  Zip64 and data descriptors are
 * understood.  The rules are listed in docs/torch-bin.md. */
#ifndef PEFTC_FORMATS_ZIP_READER_H
#define PEFTC_FORMATS_ZIP_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../core/status.h"
#include "../core/strmap.h"
#include "byte_source.h"
#include "crc32.h"

#define PC_ZIP_MAX_DIRECTORY ((uint64_t)64 * 1024 * 1024) /* bytes of the central directory */

typedef struct pc_zip_entry {
    const char *name; /* below the top folder: "data.pkl" */
    uint32_t name_len;
    uint32_t crc;
    uint64_t header; /* offset of the local header */
    uint64_t limit;  /* the entry ends at or before this offset */
    uint64_t size;
    uint64_t data; /* offset of the first byte; 0 until pc_zip_locate */
    uint16_t flags;
} pc_zip_entry;

typedef struct pc_zip {
    const pc_byte_source *source;
    uint8_t *directory; /* the central directory's bytes, to which the names point */
    pc_zip_entry *entries;
    size_t count;
    pc_strmap by_name;
    const char *folder; /* with its slash */
    size_t folder_len;
    bool checked; /* false when the archive was written without checksums: all are zero */
    pc_crc32 crc;
} pc_zip;

/* Read the directory.  The source must stay open and in place. On error nothing needs closing. */
pc_status pc_zip_open(const pc_byte_source *source, pc_zip *out, pc_error *err);
void pc_zip_close(pc_zip *zip); /* also right for a zeroed pc_zip */

/* The index of the entry with exactly this name below the top folder, or SIZE_MAX. */
size_t pc_zip_find(const pc_zip *zip, const char *name, size_t len);

/* Check the entry's local header and set entries[i].data. */
pc_status pc_zip_locate(pc_zip *zip, size_t i, pc_error *err);

/* Read a whole located entry to dst (size bytes), or nowhere if dst is NULL, and check its checksum. */
pc_status pc_zip_read(const pc_zip *zip, size_t i, void *dst, pc_error *err);

#endif
