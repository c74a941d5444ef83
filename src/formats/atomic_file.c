/* Saving a file all at once.
 *
 * Where the system has it (Linux, most file systems), the new content goes to a
 * file without a name (O_TMPFILE), which gets one only when it is complete: a
 * process that is killed leaves nothing behind.  Elsewhere it is a named
 * temporary file beside the target.  Either way the last step is a rename.
 */
#define _GNU_SOURCE
#include "atomic_file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../core/memory.h"

#define LINKS_AT_MOST 40 /* Linux's own limit for symbolic links in a path */
#define TRIES 64         /* for a temporary name that is not taken */
#define WRITE_AT_ONCE ((size_t)1 << 30)

/* "dir/" of a path, or "" when it has none, with `name` appended; pc_malloc'ed. */
static char *beside(const char *path, const char *name, size_t name_len)
{
    const char *slash = strrchr(path, '/');
    size_t dir = slash != NULL ? (size_t)(slash - path) + 1 : 0;
    char *joined = pc_malloc(dir + name_len + 1);
    if (joined == NULL)
        return NULL;
    memcpy(joined, path, dir);
    memcpy(joined + dir, name, name_len);
    joined[dir + name_len] = '\0';
    return joined;
}

/* Where writing to `path` would really write: the end of a chain of symbolic links, which may not
 * exist yet.  Renaming over the link itself would cut it. */
static pc_status follow_links(const char *path, char **out, pc_error *err)
{
    char *current = pc_strndup(path, strlen(path));
    char *target = pc_malloc(PATH_MAX);
    pc_status status = PC_OK;
    if (current == NULL || target == NULL)
        status = pc_fail_nomem(err, "a path");
    for (int links = 0; status == PC_OK; links++) {
        ssize_t len = readlink(current, target, PATH_MAX);
        if (len < 0)
            break; /* not a link, or not there: open and rename will tell */
        if (len >= PATH_MAX || links == LINKS_AT_MOST) {
            status = pc_fail_errno(err, len >= PATH_MAX ? ENAMETOOLONG : ELOOP, "cannot write \"%s\"", path);
            break;
        }
        char *next = target[0] == '/' ? pc_strndup(target, (size_t)len) : beside(current, target, (size_t)len);
        if (next == NULL) {
            status = pc_fail_nomem(err, "a path");
            break;
        }
        pc_free(current);
        current = next;
    }
    pc_free(target);
    if (status != PC_OK) {
        pc_free(current);
        current = NULL;
    }
    *out = current;
    return status;
}

/* A name in the target's folder that says whose it is; short, because the target's may be 255 bytes long. */
static char *temporary_name(const char *path, int attempt)
{
    struct timespec now = {0};
    clock_gettime(CLOCK_REALTIME, &now);
    uint64_t tag = ((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) * 0x9E3779B97F4A7C15u;
    tag ^= ((uint64_t)getpid() << 32) ^ (uint64_t)(uintptr_t)&now ^ (uint64_t)attempt;
    char name[40];
    int len = snprintf(name, sizeof name, ".peftc-%016llx.tmp", (unsigned long long)tag);
    return beside(path, name, (size_t)len);
}

static pc_status open_named(pc_atomic_file *file, mode_t mode, pc_error *err)
{
    for (int attempt = 0; attempt < TRIES; attempt++) {
        file->temporary = temporary_name(file->path, attempt);
        if (file->temporary == NULL)
            return pc_fail_nomem(err, "a path");
        file->fd = open(file->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
        if (file->fd >= 0)
            return PC_OK;
        int reason = errno;
        pc_free(file->temporary);
        file->temporary = NULL;
        if (reason != EEXIST && reason != EINTR)
            return pc_fail_errno(err, reason, "cannot write \"%s\": cannot create a file in its folder", file->path);
    }
    return pc_fail_errno(err, EEXIST, "cannot write \"%s\": cannot create a file in its folder", file->path);
}

static void open_unnamed(pc_atomic_file *file, mode_t mode)
{
#ifdef O_TMPFILE
    char *folder = beside(file->path, ".", 1);
    if (folder != NULL)
        file->fd = open(folder, O_WRONLY | O_TMPFILE | O_CLOEXEC, mode);
    pc_free(folder);
#else
    (void)file;
    (void)mode;
#endif
}

/* Give an unnamed file a temporary name. */
static bool name_it(pc_atomic_file *file)
{
#ifdef O_TMPFILE
    char self[40];
    snprintf(self, sizeof self, "/proc/self/fd/%d", file->fd);
    for (int attempt = 0; attempt < TRIES; attempt++) {
        char *name = temporary_name(file->path, attempt);
        if (name == NULL) {
            errno = ENOMEM;
            return false;
        }
        if (linkat(AT_FDCWD, self, AT_FDCWD, name, AT_SYMLINK_FOLLOW) == 0) {
            file->temporary = name;
            return true;
        }
        int reason = errno;
        pc_free(name);
        errno = reason;
        if (reason != EEXIST)
            return false;
    }
#else
    (void)file;
#endif
    return false;
}

#ifdef PC_TEST_HOOKS
static bool named_only;
void pc_test_named_temporaries(bool on) { named_only = on; }
#else
#define named_only false
#endif

/* Without /proc an unnamed file cannot be named later, so it is not begun. */
static bool can_name_later(void) { return !named_only && access("/proc/self/fd", X_OK) == 0; }

pc_status pc_atomic_open(const char *path, pc_atomic_file *file, pc_error *err)
{
    *file = (pc_atomic_file){.fd = -1};
    size_t len = strlen(path);
    if (len == 0)
        return pc_fail_errno(err, ENOENT, "cannot write \"\"");
    if (path[len - 1] == '/')
        return pc_fail_errno(err, EISDIR, "cannot write \"%s\"", path);
    pc_status status = follow_links(path, &file->path, err);
    if (status != PC_OK)
        return status;

    struct stat old;
    bool replaces = stat(file->path, &old) == 0;
    mode_t mode = 0666; /* the system takes the umask off */
    if (replaces) {
        if (S_ISDIR(old.st_mode))
            status = pc_fail_errno(err, EISDIR, "cannot write \"%s\"", file->path);
        else if (!S_ISREG(old.st_mode)) /* renaming over /dev/null would be a surprise */
            status = pc_fail(err, PC_ERR_IO, "cannot write \"%s\": it is not a regular file", file->path);
        else if (faccessat(AT_FDCWD, file->path, W_OK, AT_EACCESS) != 0)
            status = pc_fail_errno(err, errno, "cannot replace \"%s\"", file->path);
        mode = 0600; /* nobody sees the content before the old file's mode is set */
    }
    if (status == PC_OK && can_name_later())
        open_unnamed(file, mode);
    if (status == PC_OK && file->fd < 0)
        status = open_named(file, mode, err);
    if (status == PC_OK && replaces) {
        /* The owner first: changing it may clear bits of the mode. Failing to is what plain users expect. */
        struct stat new;
        if (fstat(file->fd, &new) == 0 && (new.st_uid != old.st_uid || new.st_gid != old.st_gid) &&
            fchown(file->fd, old.st_uid, old.st_gid) != 0)
            (void)!fchown(file->fd, (uid_t)-1, old.st_gid);
        if (fchmod(file->fd, old.st_mode & 0777) != 0)
            status = pc_fail_errno(err, errno, "cannot write \"%s\"", file->path);
    }
    if (status != PC_OK)
        pc_atomic_abort(file);
    return status;
}

pc_status pc_atomic_write(pc_atomic_file *file, const void *bytes, size_t len, pc_error *err)
{
    const char *from = bytes;
    while (len > 0) {
        ssize_t put = write(file->fd, from, len < WRITE_AT_ONCE ? len : WRITE_AT_ONCE);
        if (put < 0) {
            if (errno == EINTR)
                continue;
            return pc_fail_errno(err, errno, "cannot write \"%s\"", file->path);
        }
        from += put;
        len -= (size_t)put;
    }
    return PC_OK;
}

/* The folder's entry survives a power cut only once the folder is on disk.  The new file is complete and
 * in place by now, and some file systems cannot sync folders, so a failure here is not reported. */
static void sync_folder(const char *path)
{
    char *folder = beside(path, ".", 1);
    if (folder == NULL)
        return;
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        (void)fsync(fd);
        close(fd);
    }
    pc_free(folder);
}

pc_status pc_atomic_commit(pc_atomic_file *file, pc_error *err)
{
    pc_status status = PC_OK;
    int result;
    do {
        result = fsync(file->fd);
    } while (result != 0 && errno == EINTR);
    if (result != 0 || (file->temporary == NULL && !name_it(file)))
        status = errno == ENOMEM ? pc_fail_nomem(err, "a temporary file's name")
                                 : pc_fail_errno(err, errno, "cannot write \"%s\"", file->path);
    if (status == PC_OK) {
        int fd = file->fd;
        file->fd = -1;
        if (close(fd) != 0 && errno != EINTR)
            status = pc_fail_errno(err, errno, "cannot write \"%s\"", file->path);
    }
    if (status == PC_OK) {
        if (rename(file->temporary, file->path) != 0) {
            status = pc_fail_errno(err, errno, "cannot replace \"%s\"", file->path);
        } else {
            pc_free(file->temporary);
            file->temporary = NULL;
            sync_folder(file->path);
        }
    }
    pc_atomic_abort(file); /* after success there is nothing left to remove */
    return status;
}

void pc_atomic_abort(pc_atomic_file *file)
{
    if (file->fd >= 0)
        close(file->fd);
    if (file->temporary != NULL)
        unlink(file->temporary);
    pc_free(file->temporary);
    pc_free(file->path);
    *file = (pc_atomic_file){.fd = -1};
}
