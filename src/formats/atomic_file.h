/* Files that are either wholly there or not: write to a temporary file in the
 * same folder, fsync, rename over the target, fsync the folder.  A failure or
 * a kill at any point leaves the old file as it was. */
#ifndef PEFTC_FORMATS_ATOMIC_FILE_H
#define PEFTC_FORMATS_ATOMIC_FILE_H

#include <stddef.h>

#include "../core/status.h"

typedef struct pc_atomic_file {
    int fd; /* write here */
    char *path, *temporary;
} pc_atomic_file;

pc_status pc_atomic_open(const char *path, pc_atomic_file *file, pc_error *err);
pc_status pc_atomic_write(pc_atomic_file *file, const void *bytes, size_t len, pc_error *err); /* short writes, EINTR */
pc_status pc_atomic_commit(pc_atomic_file *file, pc_error *err); /* on failure: as abort */
void pc_atomic_abort(pc_atomic_file *file); /* removes the temporary; harmless after commit */

#endif
