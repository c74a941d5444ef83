/* Status codes and error text.
 *
 * Every core call that can fail returns a pc_status and takes a pc_error to
 * write the reason to.  The core never prints, exits or keeps an error for
 * later; the binding turns a pc_error into a Python exception in one place
 * (src/python/errors.c).
 */
#ifndef PEFTC_CORE_STATUS_H
#define PEFTC_CORE_STATUS_H

#include <stdarg.h>
#include <stddef.h>

typedef enum pc_status {
    PC_OK = 0,
    PC_ERR_NOMEM,       /* MemoryError */
    PC_ERR_VALUE,       /* ValueError: a value that cannot work, named in the text */
    PC_ERR_TYPE,        /* TypeError */
    PC_ERR_KEY,         /* KeyError */
    PC_ERR_INDEX,       /* IndexError */
    PC_ERR_IO,          /* OSError, with pc_error.sys_errno */
    PC_ERR_FORMAT,      /* SafetensorError: the content of a file is wrong */
    PC_ERR_UNPICKLE,    /* pickle.UnpicklingError: the content of a .bin is wrong or refused */
    PC_ERR_UNSUPPORTED, /* NotImplementedError: valid, but not something peftc can do */
    PC_ERR_RUNTIME,     /* RuntimeError */
    PC_ERR_CALLBACK     /* a caller's callback failed and has recorded the reason itself */
} pc_status;

#define PC_ERROR_TEXT 2048

typedef struct pc_error {
    pc_status code;
    int sys_errno;            /* errno of the failed system call, else 0 */
    char text[PC_ERROR_TEXT]; /* UTF-8, NUL-terminated, possibly cut at a character */
} pc_error;

#if defined(__GNUC__)
#define PC_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define PC_PRINTF(fmt, args)
#endif

/* Record `code` and a printf-style text in *err (err may be NULL); returns
 * `code`, so that a check reads `return pc_fail(err, PC_ERR_VALUE, ...)`. */
pc_status pc_fail(pc_error *err, pc_status code, const char *fmt, ...) PC_PRINTF(3, 4);
pc_status pc_vfail(pc_error *err, pc_status code, const char *fmt, va_list args);

/* The same for a failed system call: appends ": " and strerror(sys_errno). */
pc_status pc_fail_errno(pc_error *err, int sys_errno, const char *fmt, ...) PC_PRINTF(3, 4);

/* PC_ERR_NOMEM with a text that names what did not fit. */
pc_status pc_fail_nomem(pc_error *err, const char *what);

#endif
