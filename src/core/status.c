#include "status.h"

#include <stdio.h>
#include <string.h>

/* vsnprintf may cut a multi-byte character in two; the text must stay UTF-8
 * because it becomes a Python str.  Drops a trailing incomplete sequence. */
static void trim_partial_utf8(char *text)
{
    size_t len = strlen(text);
    size_t back = 0;
    while (back < 4 && back < len && ((unsigned char)text[len - 1 - back] & 0xC0u) == 0x80u)
        back++;
    if (back == len)
        return;
    unsigned char lead = (unsigned char)text[len - 1 - back];
    size_t need = lead >= 0xF0u ? 3 : lead >= 0xE0u ? 2 : lead >= 0xC0u ? 1 : 0;
    if (need > back)
        text[len - 1 - back] = '\0';
}

pc_status pc_vfail(pc_error *err, pc_status code, const char *fmt, va_list args)
{
    if (err != NULL) {
        err->code = code;
        err->sys_errno = 0;
        if (vsnprintf(err->text, sizeof err->text, fmt, args) < 0)
            err->text[0] = '\0';
        trim_partial_utf8(err->text);
    }
    return code;
}

pc_status pc_fail(pc_error *err, pc_status code, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    pc_vfail(err, code, fmt, args);
    va_end(args);
    return code;
}

pc_status pc_fail_errno(pc_error *err, int sys_errno, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    pc_vfail(err, PC_ERR_IO, fmt, args);
    va_end(args);
    if (err != NULL) {
        size_t used = strlen(err->text);
        snprintf(err->text + used, sizeof err->text - used, ": %s", strerror(sys_errno));
        err->sys_errno = sys_errno;
    }
    return PC_ERR_IO;
}

pc_status pc_fail_nomem(pc_error *err, const char *what)
{
    return pc_fail(err, PC_ERR_NOMEM, "out of memory while allocating %s", what);
}
