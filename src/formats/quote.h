/* Text from a file, made fit to appear in a message. */
#ifndef PEFTC_FORMATS_QUOTE_H
#define PEFTC_FORMATS_QUOTE_H

#include <stddef.h>

#define PC_QUOTED 224 /* bytes that hold the longest result */

/* 'text' in single quotes, control characters and invalid UTF-8 as \xNN, long text cut with "..."; returns out. */
const char *pc_quote(const char *text, size_t len, char out[PC_QUOTED]);

#endif
