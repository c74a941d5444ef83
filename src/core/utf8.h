/* UTF-8 checks. */
#ifndef PEFTC_CORE_UTF8_H
#define PEFTC_CORE_UTF8_H

#include <stddef.h>

/* The index of the first byte that is not strict UTF-8 (overlong forms, surrogates, characters
 * above U+10FFFF and cut sequences are not); len when all is well. */
size_t pc_utf8_valid(const char *text, size_t len);

/* Replace every offending byte by '?', in place. */
void pc_utf8_repair(char *text, size_t len);

#endif
