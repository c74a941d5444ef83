#include "utf8.h"

#include <stdint.h>
#include <string.h>

size_t pc_utf8_valid(const char *text, size_t len)
{
    const unsigned char *s = (const unsigned char *)text;
    size_t i = 0;
    while (i < len) {
        uint64_t word;
        if (len - i >= sizeof word && (memcpy(&word, s + i, sizeof word), (word & 0x8080808080808080u) == 0)) {
            i += sizeof word;
            continue;
        }
        unsigned char c = s[i];
        if (c < 0x80) {
            i++;
            continue;
        }
        /* The second byte's range rules out overlong forms, surrogates and what is above U+10FFFF. */
        size_t extra = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
        unsigned char low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
        unsigned char high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
        if (c < 0xC2 || c > 0xF4 || len - i <= extra || s[i + 1] < low || s[i + 1] > high)
            return i;
        for (size_t k = 2; k <= extra; k++)
            if ((s[i + k] & 0xC0) != 0x80)
                return i;
        i += extra + 1;
    }
    return len;
}

void pc_utf8_repair(char *text, size_t len)
{
    for (size_t bad = pc_utf8_valid(text, len); bad < len; bad += pc_utf8_valid(text + bad, len - bad))
        text[bad] = '?';
}
