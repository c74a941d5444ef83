#include "quote.h"

#include <string.h>

#include "../core/utf8.h"

/* Length of the UTF-8 sequence that text begins with, or 0. */
static size_t sequence(const unsigned char *text, size_t len)
{
    size_t want = *text < 0x80 ? 1 : *text < 0xE0 ? 2 : *text < 0xF0 ? 3 : 4;
    return want <= len && pc_utf8_valid((const char *)text, want) == want ? want : 0;
}

const char *pc_quote(const char *text, size_t len, char out[PC_QUOTED])
{
    static const char digits[] = "0123456789abcdef";
    const unsigned char *p = (const unsigned char *)text;
    size_t used = 0;
    out[used++] = '\'';
    while (len != 0) {
        if (used > PC_QUOTED - 10) { /* room for one more character, "...", the quote and NUL */
            memcpy(out + used, "...", 3);
            used += 3;
            break;
        }
        size_t step = sequence(p, len);
        if (step == 0 || *p < 0x20 || *p == 0x7F) {
            out[used++] = '\\';
            out[used++] = 'x';
            out[used++] = digits[*p >> 4];
            out[used++] = digits[*p & 15u];
            step = 1;
        } else {
            memcpy(out + used, p, step);
            used += step;
        }
        p += step;
        len -= step;
    }
    out[used++] = '\'';
    out[used] = '\0';
    return out;
}
