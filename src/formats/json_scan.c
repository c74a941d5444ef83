#include "json_scan.h"

#include <math.h>
#include <string.h>

void pc_json_init(pc_json *json, char *text, size_t len)
{
    json->at = text;
    json->end = text + len;
    json->depth = 0;
    json->why = NULL;
}

static bool fail(pc_json *json, const char *why)
{
    json->why = why;
    return false;
}

/* ------------------------------------------------------------- structure */

char pc_json_peek(pc_json *json)
{
    while (json->at < json->end) {
        char c = *json->at;
        if (c != ' ' && c != '\n' && c != '\t' && c != '\r')
            return c; /* a NUL byte in the text is never a legal token, so it may look like the end */
        json->at++;
    }
    return '\0';
}

bool pc_json_open(pc_json *json, char bracket)
{
    if (pc_json_peek(json) != bracket)
        return fail(json, bracket == '{' ? "an object is expected" : "an array is expected");
    if (json->depth == PC_JSON_MAX_DEPTH)
        return fail(json, "nested more than 127 levels deep");
    json->at++;
    json->depth++;
    return true;
}

bool pc_json_more(pc_json *json, char close, bool first, bool *more)
{
    char c = pc_json_peek(json);
    if (c == close) {
        json->at++;
        json->depth--;
        *more = false;
        return true;
    }
    *more = true;
    if (first)
        return true;
    if (c != ',')
        return fail(json, close == '}' ? "\",\" or \"}\" is expected" : "\",\" or \"]\" is expected");
    json->at++;
    return true; /* what follows must be a key or value, so a trailing comma fails there */
}

bool pc_json_key(pc_json *json, char **text, size_t *len)
{
    if (pc_json_peek(json) != '"')
        return fail(json, "a field name is expected");
    if (!pc_json_string(json, text, len))
        return false;
    if (pc_json_peek(json) != ':')
        return fail(json, "\":\" is expected");
    json->at++;
    return true;
}

bool pc_json_finish(pc_json *json)
{
    pc_json_peek(json);
    return json->at == json->end || fail(json, "something follows the end of the object");
}

static bool literal(pc_json *json, const char *word)
{
    size_t len = strlen(word);
    if ((size_t)(json->end - json->at) < len || memcmp(json->at, word, len) != 0)
        return fail(json, "a value is expected");
    json->at += len;
    return true;
}

bool pc_json_null(pc_json *json)
{
    pc_json_peek(json);
    return literal(json, "null");
}

/* --------------------------------------------------------------- strings */

static bool hex4(pc_json *json, uint32_t *out)
{
    if (json->end - json->at < 4)
        return fail(json, "the text ends inside a \\u escape");
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) {
        char c = *json->at;
        uint32_t digit;
        if (c >= '0' && c <= '9')
            digit = (uint32_t)(c - '0');
        else if (c >= 'a' && c <= 'f')
            digit = (uint32_t)(c - 'a') + 10;
        else if (c >= 'A' && c <= 'F')
            digit = (uint32_t)(c - 'A') + 10;
        else
            return fail(json, "a \\u escape needs four hexadecimal digits");
        value = value << 4 | digit;
        json->at++;
    }
    *out = value;
    return true;
}

static char *put_utf8(char *to, uint32_t c)
{
    if (c < 0x80) {
        *to++ = (char)c;
    } else if (c < 0x800) {
        *to++ = (char)(0xC0 | c >> 6);
        *to++ = (char)(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
        *to++ = (char)(0xE0 | c >> 12);
        *to++ = (char)(0x80 | (c >> 6 & 0x3F));
        *to++ = (char)(0x80 | (c & 0x3F));
    } else {
        *to++ = (char)(0xF0 | c >> 18);
        *to++ = (char)(0x80 | (c >> 12 & 0x3F));
        *to++ = (char)(0x80 | (c >> 6 & 0x3F));
        *to++ = (char)(0x80 | (c & 0x3F));
    }
    return to;
}

/* After the "\u" of an escape.  Characters above U+FFFF come as two escapes. */
static bool unicode_escape(pc_json *json, char **to)
{
    uint32_t c;
    if (!hex4(json, &c))
        return false;
    if (c >= 0xDC00 && c <= 0xDFFF)
        return fail(json, "lone surrogate in a \\u escape");
    if (c >= 0xD800 && c <= 0xDBFF) {
        uint32_t low;
        if (json->end - json->at < 2 || json->at[0] != '\\' || json->at[1] != 'u')
            return fail(json, "lone surrogate in a \\u escape");
        json->at += 2;
        if (!hex4(json, &low))
            return false;
        if (low < 0xDC00 || low > 0xDFFF)
            return fail(json, "lone surrogate in a \\u escape");
        c = 0x10000 + ((c - 0xD800) << 10 | (low - 0xDC00));
    }
    *to = put_utf8(*to, c); /* at most 3 bytes for 6 of source, 4 for 12 */
    return true;
}

bool pc_json_string(pc_json *json, char **text, size_t *len)
{
    if (pc_json_peek(json) != '"')
        return fail(json, "a string is expected");
    char *to = ++json->at;
    *text = to;
    while (json->at < json->end) {
        char c = *json->at;
        if (c == '"') {
            *len = (size_t)(to - *text);
            json->at++;
            return true;
        }
        if ((unsigned char)c < 0x20)
            return fail(json, "raw control character in a string");
        json->at++;
        if (c != '\\') {
            *to++ = c;
            continue;
        }
        if (json->at == json->end)
            break;
        switch (*json->at++) {
        case '"':
            *to++ = '"';
            break;
        case '\\':
            *to++ = '\\';
            break;
        case '/':
            *to++ = '/';
            break;
        case 'b':
            *to++ = '\b';
            break;
        case 'f':
            *to++ = '\f';
            break;
        case 'n':
            *to++ = '\n';
            break;
        case 'r':
            *to++ = '\r';
            break;
        case 't':
            *to++ = '\t';
            break;
        case 'u':
            if (!unicode_escape(json, &to))
                return false;
            break;
        default:
            json->at--;
            return fail(json, "unknown escape in a string");
        }
    }
    return fail(json, "the text ends inside a string");
}

/* --------------------------------------------------------------- numbers */

static bool is_digit(const pc_json *json)
{
    return json->at < json->end && *json->at >= '0' && *json->at <= '9';
}

bool pc_json_uint(pc_json *json, uint64_t *value)
{
    pc_json_peek(json);
    if (!is_digit(json))
        return fail(json, "a non-negative integer is expected");
    uint64_t n = 0;
    const char *start = json->at;
    while (is_digit(json)) {
        uint64_t digit = (uint64_t)(*json->at - '0');
        if (__builtin_mul_overflow(n, (uint64_t)10, &n) || __builtin_add_overflow(n, digit, &n))
            return fail(json, "an integer that does not fit 64 bits");
        json->at++;
    }
    if (*start == '0' && json->at - start > 1)
        return fail(json, "a number with a leading zero");
    if (json->at < json->end && (*json->at == '.' || *json->at == 'e' || *json->at == 'E'))
        return fail(json, "a non-negative integer is expected, without fraction or exponent");
    *value = n;
    return true;
}

/* Whether significand × 10^exponent is beyond the largest double.  Called with what a reader that
 * keeps 64 bits of significand would have, so the decision is the official reader's. */
static bool too_large(uint64_t significand, int64_t exponent)
{
    if (significand == 0 || exponent < 0)
        return false;
    if (exponent > 308)
        return true;
    static const long double powers[] = {1e1L, 1e2L, 1e4L, 1e8L, 1e16L, 1e32L, 1e64L, 1e128L, 1e256L};
    long double scale = 1.0L;
    for (unsigned bit = 0; bit < sizeof powers / sizeof powers[0]; bit++)
        if (((uint64_t)exponent >> bit & 1u) != 0)
            scale *= powers[bit];
    return isinf((double)significand * (double)scale);
}

/* Digits into the significand until it is full; `step` is how the exponent follows one kept digit,
 * `dropped` how it follows one that did not fit. */
static void digits(pc_json *json, uint64_t *significand, int64_t *exponent, int kept, int dropped)
{
    bool full = false;
    while (is_digit(json)) {
        uint64_t digit = (uint64_t)(*json->at++ - '0');
        uint64_t next;
        if (!full && !__builtin_mul_overflow(*significand, (uint64_t)10, &next) &&
            !__builtin_add_overflow(next, digit, &next)) {
            *significand = next;
            *exponent += kept;
        } else {
            full = true; /* once one is left out, so are all that follow */
            *exponent += dropped;
        }
    }
}

static bool number(pc_json *json)
{
    uint64_t significand = 0;
    int64_t exponent = 0;
    if (*json->at == '-')
        json->at++;
    if (!is_digit(json))
        return fail(json, "a digit is expected");
    const char *start = json->at;
    digits(json, &significand, &exponent, 0, 1);
    if (*start == '0' && json->at - start > 1)
        return fail(json, "a number with a leading zero");
    if (json->at < json->end && *json->at == '.') {
        json->at++;
        if (!is_digit(json))
            return fail(json, "a digit is expected");
        digits(json, &significand, &exponent, -1, 0);
    }
    if (json->at < json->end && (*json->at == 'e' || *json->at == 'E')) {
        json->at++;
        bool negative = false;
        if (json->at < json->end && (*json->at == '+' || *json->at == '-'))
            negative = *json->at++ == '-';
        if (!is_digit(json))
            return fail(json, "a digit is expected");
        int64_t power = 0;
        bool huge = false;
        while (is_digit(json)) {
            power = power * 10 + (*json->at++ - '0');
            if (power > INT32_MAX) {
                huge = true;
                power = INT32_MAX;
            }
        }
        if (huge) /* whatever the digits before it were: zero, or beyond every double unless negative */
            return significand == 0 || negative || fail(json, "a number that is too large");
        exponent += negative ? -power : power;
    }
    return !too_large(significand, exponent) || fail(json, "a number that is too large");
}

/* --------------------------------------------------------- skipping values */

bool pc_json_skip(pc_json *json)
{
    /* Not recursive: one bit per open level says whether it is an object. */
    bool object[PC_JSON_MAX_DEPTH + 1];
    int base = json->depth;
    bool first = true;
    for (;;) {
        char *text;
        size_t len;
        if (json->depth > base) {
            bool more;
            bool in_object = object[json->depth];
            if (!pc_json_more(json, in_object ? '}' : ']', first, &more))
                return false;
            if (!more) {
                first = false;
                if (json->depth == base)
                    return true;
                continue;
            }
            if (in_object && !pc_json_key(json, &text, &len))
                return false;
        }
        char c = pc_json_peek(json);
        first = false;
        switch (c) {
        case '{':
        case '[':
            if (!pc_json_open(json, c))
                return false;
            object[json->depth] = c == '{';
            first = true;
            continue;
        case '"':
            if (!pc_json_string(json, &text, &len))
                return false;
            break;
        case 't':
            if (!literal(json, "true"))
                return false;
            break;
        case 'f':
            if (!literal(json, "false"))
                return false;
            break;
        case 'n':
            if (!literal(json, "null"))
                return false;
            break;
        default:
            if (c != '-' && !(c >= '0' && c <= '9'))
                return fail(json, "a value is expected");
            if (!number(json))
                return false;
        }
        if (json->depth == base)
            return true;
    }
}
