/* UTF-8 checks. */
#ifndef PEFTC_CORE_UTF8_H
#define PEFTC_CORE_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The index of the first byte that is not strict UTF-8 (overlong forms, surrogates, characters
 * above U+10FFFF and cut sequences are not); len when all is well. */
size_t pc_utf8_valid(const char *text, size_t len);

/* Replace every offending byte by '?', in place. */
void pc_utf8_repair(char *text, size_t len);

/* Decode the character at text[*at] (*at < len) and advance *at past it; false, and *at unchanged, when it is not
 * valid. */
static inline bool pc_utf8_next(const char *text, size_t len, size_t *at, uint32_t *c)
{
    const unsigned char *s = (const unsigned char *)text + *at;
    size_t left = len - *at;
    uint32_t lead = s[0];
    if (lead < 0x80) {
        *c = lead;
        *at += 1;
        return true;
    }
    size_t need = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4 || left < need)
        return false;
    uint32_t value = lead & (0x7Fu >> need);
    for (size_t i = 1; i < need; i++) {
        if ((s[i] & 0xC0u) != 0x80u)
            return false;
        value = value << 6 | (s[i] & 0x3Fu);
    }
    if ((need == 3 && value < 0x800) || (need == 4 && (value < 0x10000 || value > 0x10FFFF)) ||
        (value >= 0xD800 && value <= 0xDFFF))
        return false;
    *c = value;
    *at += need;
    return true;
}

#endif
