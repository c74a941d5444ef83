/* Where a reader's bytes come from: a file, read with pread, or memory.
 *
 * Nothing is mapped, so a file that shrinks while it is read gives an error
 * and not a signal.  A source is read-only after it is opened; reading one
 * from several threads is safe. */
#ifndef PEFTC_FORMATS_BYTE_SOURCE_H
#define PEFTC_FORMATS_BYTE_SOURCE_H

#include <stddef.h>
#include <stdint.h>

#include "../core/status.h"

typedef struct pc_byte_source {
    int fd;               /* -1 for memory */
    const uint8_t *bytes; /* NULL for a file */
    uint64_t size;
    const char *label; /* for messages; borrowed */
} pc_byte_source;

/* Open a regular file.  Anything else (a folder, a pipe, a device) is PC_ERR_IO. */
pc_status pc_source_open(const char *path, const char *label, pc_byte_source *out, pc_error *err);
void pc_source_memory(const void *bytes, size_t len, const char *label, pc_byte_source *out);
void pc_source_close(pc_byte_source *source); /* a source that was never opened must have fd == -1 */

/* Copy exactly len bytes from offset; PC_ERR_UNPICKLE when the source ends before that. */
pc_status pc_source_read(const pc_byte_source *source, uint64_t offset, void *dst, size_t len, pc_error *err);

#endif
