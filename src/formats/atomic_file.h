/* Files that are either wholly there or not: write to a temporary file in the
 * same folder, fsync, rename over the target, fsync the folder.  A failure or
 * a kill at any point leaves the old file as it was.
 *
 * A new file gets the mode that the umask leaves.  One that is replaced keeps
 * its mode and, where the process may set it, its owner; it must be a regular
 * file that the process may write to.  Symbolic links are followed: the link
 * stays and the file at its end is replaced.  Hard links to the old file keep
 * the old content. */
#ifndef PEFTC_FORMATS_ATOMIC_FILE_H
#define PEFTC_FORMATS_ATOMIC_FILE_H

#include <stddef.h>

#include "../core/status.h"

typedef struct pc_atomic_file {
    int fd;          /* of the new content */
    char *path;      /* the target, symbolic links followed */
    char *temporary; /* its name for now; NULL while it has none */
} pc_atomic_file;

/* Begin.  On failure *file is as after abort.  Paths are relative to the working folder at each call. */
pc_status pc_atomic_open(const char *path, pc_atomic_file *file, pc_error *err);
pc_status pc_atomic_write(pc_atomic_file *file, const void *bytes, size_t len, pc_error *err); /* short writes, EINTR */
pc_status pc_atomic_commit(pc_atomic_file *file, pc_error *err); /* on failure: as abort */
void pc_atomic_abort(pc_atomic_file *file); /* removes the temporary; harmless after commit */

#ifdef PC_TEST_HOOKS
#include <stdbool.h>
/* Do without files that have no name, as on systems that do not have them. */
void pc_test_named_temporaries(bool on);
#endif

#endif
