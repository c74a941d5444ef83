/* A strict JSON scanner for the header of a safetensors file.
 *
 * It accepts exactly what RFC 8259 does, with the limits of the official
 * safetensors reader: 127 nested levels, numbers that fit a double, strings
 * without raw control bytes or lone surrogates.  There is no tree: the caller
 * walks the text once, and strings are decoded where they stand (a decoded
 * string is never longer than its source), so scanning allocates nothing.
 *
 * Every function returns false on the first error and leaves its reason in
 * `why` and its place in `at`; whitespace before a token is skipped.
 */
#ifndef PEFTC_FORMATS_JSON_SCAN_H
#define PEFTC_FORMATS_JSON_SCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PC_JSON_MAX_DEPTH 127

typedef struct pc_json {
    char *at;
    char *end;
    int depth;       /* objects and arrays that are open */
    const char *why; /* a constant text, set on error */
} pc_json;

/* Start on `len` bytes of valid UTF-8 (core/utf8.h), which will be written to. */
void pc_json_init(pc_json *json, char *text, size_t len);

/* The next byte that is not whitespace, without consuming it; '\0' at the end of the text. */
char pc_json_peek(pc_json *json);

/* Enter and leave objects ("{", "}") and arrays.  A walk reads
 *
 *     if (!pc_json_open(json, '{')) ...
 *     for (bool first = true;; first = false) {
 *         bool more;
 *         if (!pc_json_more(json, '}', first, &more)) ...   // consumes "," or "}"
 *         if (!more) break;
 *         if (!pc_json_key(json, &key, &len)) ...           // consumes the key and ":"
 *         ... one value ...
 *     }
 */
bool pc_json_open(pc_json *json, char bracket);
bool pc_json_more(pc_json *json, char close, bool first, bool *more);
bool pc_json_key(pc_json *json, char **text, size_t *len);

/* A string, decoded in place; it may contain NUL and is not terminated. */
bool pc_json_string(pc_json *json, char **text, size_t *len);
/* An integer token without sign, fraction or exponent that fits 64 bits. */
bool pc_json_uint(pc_json *json, uint64_t *value);
bool pc_json_null(pc_json *json);
/* Any value, checked as strictly as one that is used. */
bool pc_json_skip(pc_json *json);
/* Nothing but whitespace is left. */
bool pc_json_finish(pc_json *json);

#endif
