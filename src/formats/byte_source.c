#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include "byte_source.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

pc_status pc_source_open(const char *path, const char *label, pc_byte_source *out, pc_error *err)
{
    *out = (pc_byte_source){.fd = -1, .label = label};
    /* O_NONBLOCK: opening a pipe that nobody writes to must not hang before we can refuse it. */
    int fd;
    do {
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    } while (fd < 0 && errno == EINTR);
    if (fd < 0)
        return pc_fail_errno(err, errno, "cannot open %s", label);
    struct stat st;
    if (fstat(fd, &st) != 0) {
        int code = errno;
        close(fd);
        return pc_fail_errno(err, code, "cannot examine %s", label);
    }
    if (!S_ISREG(st.st_mode)) {
        close(fd);
        return pc_fail_errno(err, S_ISDIR(st.st_mode) ? EISDIR : EINVAL, "%s is not a regular file", label);
    }
    out->fd = fd;
    out->size = (uint64_t)st.st_size;
    return PC_OK;
}

void pc_source_memory(const void *bytes, size_t len, const char *label, pc_byte_source *out)
{
    static const uint8_t nothing;
    *out = (pc_byte_source){.fd = -1, .bytes = bytes != NULL ? bytes : &nothing, .size = len, .label = label};
}

void pc_source_close(pc_byte_source *source)
{
    if (source->fd >= 0)
        close(source->fd);
    source->fd = -1;
}

pc_status pc_source_read(const pc_byte_source *source, uint64_t offset, void *dst, size_t len, pc_error *err)
{
    if (offset > source->size || len > source->size - offset)
        return pc_fail(err, PC_ERR_UNPICKLE, "%s is cut short: it needs %zu bytes at offset %llu and has %llu",
                       source->label, len, (unsigned long long)offset, (unsigned long long)source->size);
    if (source->fd < 0) {
        if (len != 0)
            memcpy(dst, source->bytes + offset, len);
        return PC_OK;
    }
    char *to = dst;
    while (len != 0) {
        ssize_t got = pread(source->fd, to, len, (off_t)offset);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return pc_fail_errno(err, errno, "cannot read %s", source->label);
        }
        if (got == 0)
            return pc_fail(err, PC_ERR_UNPICKLE, "%s became shorter while it was being read", source->label);
        to += got;
        offset += (uint64_t)got;
        len -= (size_t)got;
    }
    return PC_OK;
}
