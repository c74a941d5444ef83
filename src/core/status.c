#include "status.h"

#include <stdio.h>
#include <string.h>

#include "utf8.h"

/* The text becomes a Python str, so it must be UTF-8 whatever was formatted into it: a path may hold any
 * bytes, and vsnprintf may cut a character in two.  A cut character is dropped, other bytes become '?'. */
static void make_utf8(char *text)
{
    size_t len = strlen(text);
    if (len == PC_ERROR_TEXT - 1) {
        size_t bad = pc_utf8_valid(text, len);
        if (len - bad < 4 && (unsigned char)text[bad] >= 0xC2u)
            text[bad] = '\0';
    }
    pc_utf8_repair(text, strlen(text));
}

pc_status pc_vfail(pc_error *err, pc_status code, const char *fmt, va_list args)
{
    if (err != NULL) {
        err->code = code;
        err->sys_errno = 0;
        if (vsnprintf(err->text, sizeof err->text, fmt, args) < 0)
            err->text[0] = '\0';
        make_utf8(err->text);
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
