#define _DEFAULT_SOURCE
#include "json_tree.h"

#include <cjson/cJSON.h>
#include <errno.h>
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../core/strmap.h"
#include "../core/utf8.h"

/* How the scanner marks strings that are not what they seem.  U+0001 cannot
 * stand in JSON text as it is, and a string with an escaped one is re-written. */
#define MARK '\x01'
#define MARK_NUMBER '#' /* then the digits */
#define MARK_TEXT '$'   /* then text in which MARK and four hex digits stand for NUL, U+0001 or a lone surrogate */

/* ------------------------------------------------------------------- scanner */

typedef struct scanner {
    const char *text;
    size_t len, at;
    char *out; /* what cJSON gets */
    size_t out_len, out_capacity;
    size_t values;
    const char *label;
    pc_error *err;
} scanner;

static pc_status fail_at(scanner *s, size_t at, const char *what)
{
    size_t line = 1, start = 0;
    for (size_t i = 0; i < at && i < s->len; i++)
        if (s->text[i] == '\n') {
            line++;
            start = i + 1;
        }
    return pc_fail(s->err, PC_ERR_VALUE, "%s is not valid JSON: %s at line %zu column %zu", s->label, what, line,
                   at - start + 1);
}

static pc_status put(scanner *s, const char *bytes, size_t len)
{
    if (len > s->out_capacity - s->out_len) {
        size_t capacity = s->out_capacity * 2 + len;
        char *grown = pc_realloc(s->out, capacity);
        if (grown == NULL)
            return pc_fail_nomem(s->err, "a JSON text");
        s->out = grown;
        s->out_capacity = capacity;
    }
    memcpy(s->out + s->out_len, bytes, len);
    s->out_len += len;
    return PC_OK;
}

static void skip_blanks(scanner *s)
{
    while (s->at < s->len && strchr(" \t\n\r", s->text[s->at]) != NULL && s->text[s->at] != '\0')
        s->at++;
}

static int peek(const scanner *s) { return s->at < s->len ? (unsigned char)s->text[s->at] : -1; }

static bool is_digit(int c) { return c >= '0' && c <= '9'; }

static int hex_value(char c)
{
    return is_digit(c) ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The code unit of \uhhhh at text[at], or -1. */
static long code_unit(const scanner *s, size_t at)
{
    if (at + 6 > s->len || s->text[at] != '\\' || s->text[at + 1] != 'u')
        return -1;
    long unit = 0;
    for (size_t i = 2; i < 6; i++) {
        int digit = hex_value(s->text[at + i]);
        if (digit < 0)
            return -1;
        unit = unit << 4 | digit;
    }
    return unit;
}

/* One character of a string that is being checked: *special receives the code unit of an escape that cJSON would
 * spoil, else -1. Advances *at. */
static pc_status string_step(scanner *s, size_t *at, long *special)
{
    *special = -1;
    unsigned char c = (unsigned char)s->text[*at];
    if (c < 0x20)
        return fail_at(s, *at, "a control character that is not escaped");
    if (c != '\\') {
        uint32_t character;
        if (!pc_utf8_next(s->text, s->len, at, &character))
            return fail_at(s, *at, "bytes that are not UTF-8");
        return PC_OK;
    }
    if (*at + 1 < s->len && s->text[*at + 1] != '\0' && strchr("\"\\/bfnrt", s->text[*at + 1]) != NULL) {
        *at += 2;
        return PC_OK;
    }
    long unit = code_unit(s, *at);
    if (unit < 0)
        return fail_at(s, *at, "an escape that JSON does not know");
    if (unit >= 0xD800 && unit <= 0xDBFF) {
        long low = code_unit(s, *at + 6);
        if (low >= 0xDC00 && low <= 0xDFFF) {
            *at += 12;
            return PC_OK;
        }
    }
    if (unit <= 1 || (unit >= 0xD800 && unit <= 0xDFFF))
        *special = unit;
    *at += 6;
    return PC_OK;
}

static pc_status scan_string(scanner *s)
{
    size_t start = s->at, at = s->at + 1;
    bool odd = false;
    pc_status status;
    while (at < s->len && s->text[at] != '"') {
        long special;
        if ((status = string_step(s, &at, &special)) != PC_OK)
            return status;
        odd = odd || special >= 0;
    }
    if (at >= s->len)
        return fail_at(s, start, "a string without end");
    s->at = at + 1;
    if (!odd)
        return put(s, s->text + start, s->at - start);
    const char mark[] = {'"', MARK, MARK_TEXT};
    if ((status = put(s, mark, sizeof mark)) != PC_OK)
        return status;
    for (at = start + 1; s->text[at] != '"';) {
        size_t from = at;
        long special;
        if ((status = string_step(s, &at, &special)) != PC_OK)
            return status;
        char coded[8];
        if (special >= 0)
            snprintf(coded, sizeof coded, "%c%04lx", MARK, (unsigned long)special & 0xFFFFu);
        status = special >= 0 ? put(s, coded, 5) : put(s, s->text + from, at - from);
        if (status != PC_OK)
            return status;
    }
    return put(s, "\"", 1);
}

static pc_status put_number(scanner *s, size_t start)
{
    const char mark[] = {'"', MARK, MARK_NUMBER};
    pc_status status = put(s, mark, sizeof mark);
    if (status == PC_OK)
        status = put(s, s->text + start, s->at - start);
    return status == PC_OK ? put(s, "\"", 1) : status;
}

static bool take_word(scanner *s, const char *word)
{
    size_t len = strlen(word);
    if (s->len - s->at < len || memcmp(s->text + s->at, word, len) != 0)
        return false;
    s->at += len;
    return true;
}

static pc_status scan_number(scanner *s)
{
    size_t start = s->at;
    bool whole = true;
    if (peek(s) == '-')
        s->at++;
    if (!is_digit(peek(s)))
        return fail_at(s, start, "a value is expected");
    size_t digits = s->at;
    if (peek(s) == '0')
        s->at++;
    else
        while (is_digit(peek(s)))
            s->at++;
    size_t digit_count = s->at - digits;
    if (peek(s) == '.') {
        s->at++;
        whole = false;
        if (!is_digit(peek(s)))
            return fail_at(s, s->at, "a digit is expected");
        while (is_digit(peek(s)))
            s->at++;
    }
    if (peek(s) == 'e' || peek(s) == 'E') {
        s->at++;
        whole = false;
        if (peek(s) == '+' || peek(s) == '-')
            s->at++;
        if (!is_digit(peek(s)))
            return fail_at(s, s->at, "a digit is expected");
        while (is_digit(peek(s)))
            s->at++;
    }
    if (whole && digit_count > PC_JSON_DIGITS)
        return fail_at(s, start, "an integer of more than 4300 digits");
    return put_number(s, start);
}

/* A string, number, true, false, null, NaN, Infinity or -Infinity. */
static pc_status scan_scalar(scanner *s)
{
    size_t start = s->at;
    if (peek(s) == '"')
        return scan_string(s);
    if (take_word(s, "NaN") || take_word(s, "Infinity") || take_word(s, "-Infinity"))
        return put_number(s, start);
    if (take_word(s, "true") || take_word(s, "false") || take_word(s, "null"))
        return put(s, s->text + start, s->at - start);
    return scan_number(s);
}

/* A member's name and colon. */
static pc_status scan_name(scanner *s)
{
    skip_blanks(s);
    if (peek(s) != '"')
        return fail_at(s, s->at, "a name in double quotes is expected");
    pc_status status = scan_string(s);
    if (status != PC_OK)
        return status;
    skip_blanks(s);
    if (peek(s) != ':')
        return fail_at(s, s->at, "':' is expected");
    s->at++;
    return put(s, ":", 1);
}

/* The value at s->at, whole. No recursion: `open` holds the brackets that must close. */
static pc_status scan_value(scanner *s)
{
    char open[PC_JSON_DEPTH];
    size_t depth = 0;
    pc_status status;
    for (;;) {
        skip_blanks(s);
        if (++s->values > PC_JSON_VALUES)
            return fail_at(s, s->at, "more than a million values");
        int c = peek(s);
        if (c == '{' || c == '[') {
            char close = c == '{' ? '}' : ']';
            if (depth == PC_JSON_DEPTH)
                return fail_at(s, s->at, "arrays and objects nested more than 500 deep");
            if ((status = put(s, s->text + s->at++, 1)) != PC_OK)
                return status;
            open[depth++] = close;
            skip_blanks(s);
            if (peek(s) != close) {
                if (c == '{' && (status = scan_name(s)) != PC_OK)
                    return status;
                continue;
            }
        } else if ((status = scan_scalar(s)) != PC_OK) {
            return status;
        }
        for (;;) { /* after a value: close what closes, until something goes on */
            if (depth == 0)
                return PC_OK;
            skip_blanks(s);
            c = peek(s);
            if (c == ',')
                break;
            if (c != open[depth - 1])
                return fail_at(s, s->at, open[depth - 1] == '}' ? "',' or '}' is expected" : "',' or ']' is expected");
            depth--;
            if ((status = put(s, s->text + s->at++, 1)) != PC_OK)
                return status;
        }
        if ((status = put(s, s->text + s->at++, 1)) != PC_OK)
            return status;
        if (open[depth - 1] == '}' && (status = scan_name(s)) != PC_OK)
            return status;
    }
}

static pc_status scan(scanner *s)
{
    const unsigned char *b = (const unsigned char *)s->text;
    if (s->len > PC_JSON_BYTES)
        return pc_fail(s->err, PC_ERR_VALUE, "%s has %zu bytes; a config of more than 16 MiB is refused", s->label,
                       s->len);
    if (s->len >= 3 && b[0] == 0xEF && b[1] == 0xBB && b[2] == 0xBF)
        return pc_fail(s->err, PC_ERR_VALUE, "%s begins with a UTF-8 byte order mark: save it as UTF-8 without BOM",
                       s->label);
    if (s->len >= 2 && ((b[0] == 0xFF && b[1] == 0xFE) || (b[0] == 0xFE && b[1] == 0xFF) || b[0] == 0 || b[1] == 0))
        return pc_fail(s->err, PC_ERR_VALUE, "%s is not UTF-8 (it looks like UTF-16 or UTF-32): save it as UTF-8",
                       s->label);
    pc_status status = scan_value(s);
    if (status != PC_OK)
        return status;
    skip_blanks(s);
    return s->at == s->len ? PC_OK : fail_at(s, s->at, "something after the end of the value");
}

/* ---------------------------------------------------------------------- tree */

/* Make `to` hold what `from` holds and the other way round; names and places stay. */
static void swap_values(cJSON *to, cJSON *from)
{
    cJSON was = *to;
    to->type = from->type;
    to->child = from->child;
    to->valuestring = from->valuestring;
    from->type = was.type;
    from->child = was.child;
    from->valuestring = was.valuestring;
}

static bool drop_duplicates_in(cJSON *object, cJSON **seen)
{
    pc_strmap names;
    pc_strmap_init(&names);
    size_t count = 0;
    bool ok = true;
    for (cJSON *member = object->child, *next; member != NULL && ok; member = next) {
        next = member->next;
        size_t len = strlen(member->string), earlier;
        if (pc_strmap_get(&names, member->string, len, &earlier)) {
            swap_values(seen[earlier], member);
            cJSON_Delete(cJSON_DetachItemViaPointer(object, member));
        } else {
            ok = pc_strmap_put(&names, member->string, len, count);
            seen[count++] = member;
        }
    }
    pc_strmap_free(&names);
    return ok;
}

/* Recursion as deep as the text, which PC_JSON_DEPTH bounds. */
static bool drop_duplicates(cJSON *value)
{
    bool ok = true;
    if (cJSON_IsObject(value) && value->child != NULL && value->child->next != NULL) {
        size_t count = 0;
        for (const cJSON *member = value->child; member != NULL; member = member->next)
            count++;
        cJSON **seen = pc_malloc(count * sizeof *seen);
        ok = seen != NULL && drop_duplicates_in(value, seen);
        pc_free(seen);
    }
    for (cJSON *child = value->child; child != NULL && ok; child = child->next)
        if (child->child != NULL)
            ok = drop_duplicates(child);
    return ok;
}

pc_status pc_json_parse(const char *text, size_t len, const char *label, pc_json_value **out, pc_error *err)
{
    *out = NULL;
    scanner s = {.text = text, .len = len, .label = label, .err = err};
    pc_status status = scan(&s);
    cJSON *root = NULL;
    if (status == PC_OK) {
        root = cJSON_ParseWithLength(s.out, s.out_len);
        if (root == NULL || !drop_duplicates(root)) /* the text is valid by now: only memory can be missing */
            status = pc_fail_nomem(err, "a JSON text");
    }
    pc_free(s.out);
    if (status != PC_OK) {
        cJSON_Delete(root);
        return status;
    }
    *out = root;
    return PC_OK;
}

void pc_json_free(pc_json_value *root) { cJSON_Delete(root); }

pc_json_kind pc_json_kind_of(const pc_json_value *value)
{
    switch (value->type & 0xFF) {
    case cJSON_True:
    case cJSON_False:
        return PC_JSON_BOOL;
    case cJSON_String:
        return value->valuestring[0] == MARK && value->valuestring[1] == MARK_NUMBER ? PC_JSON_NUMBER : PC_JSON_STRING;
    case cJSON_Array:
        return PC_JSON_ARRAY;
    case cJSON_Object:
        return PC_JSON_OBJECT;
    default:
        return PC_JSON_NULL;
    }
}

bool pc_json_bool(const pc_json_value *value) { return (value->type & 0xFF) == cJSON_True; }
const pc_json_value *pc_json_first(const pc_json_value *parent) { return parent->child; }
const pc_json_value *pc_json_next(const pc_json_value *value) { return value->next; }

const pc_json_value *pc_json_member(const pc_json_value *object, const char *name)
{
    for (const cJSON *member = object->child; member != NULL; member = member->next)
        if (strcmp(member->string, name) == 0)
            return member;
    return NULL;
}

const char *pc_json_text(const pc_json_value *value) { return value->valuestring[0] != MARK ? value->valuestring : NULL; }
const char *pc_json_name(const pc_json_value *member) { return member->string[0] != MARK ? member->string : NULL; }

bool pc_json_decode(const pc_json_value *value, bool name, pc_pool *pool, const char **text, size_t *len)
{
    const char *from = name ? value->string : value->valuestring;
    if (from[0] != MARK) {
        *text = from;
        *len = strlen(from);
        return true;
    }
    char *to = pc_pool_alloc(pool, strlen(from));
    if (to == NULL)
        return false;
    *text = to;
    for (from += 2; *from != '\0'; from++) {
        if (*from != MARK) {
            *to++ = *from;
            continue;
        }
        unsigned unit = 0;
        for (int i = 1; i <= 4; i++)
            unit = unit << 4 | (unsigned)hex_value(from[i]);
        from += 4;
        if (unit >= 0x800) {
            *to++ = (char)(0xE0u | unit >> 12);
            *to++ = (char)(0x80u | (unit >> 6 & 0x3Fu));
            *to++ = (char)(0x80u | (unit & 0x3Fu));
        } else {
            *to++ = (char)unit;
        }
    }
    *len = (size_t)(to - *text);
    return true;
}

/* ------------------------------------------------------------------- numbers */

const char *pc_json_number(const pc_json_value *value) { return value->valuestring + 2; }

bool pc_json_is_integer(const pc_json_value *value)
{
    return strpbrk(pc_json_number(value), ".eENI") == NULL;
}

pc_status pc_json_double(const pc_json_value *value, double *out, pc_error *err)
{
    const char *digits = pc_json_number(value);
    if (strcmp(digits, "NaN") == 0) {
        *out = NAN;
        return PC_OK;
    }
    if (strchr(digits, 'I') != NULL) {
        *out = digits[0] == '-' ? -INFINITY : INFINITY;
        return PC_OK;
    }
    /* strtod reads the decimal point of the process's locale, which a host may have set */
    const char *point = localeconv()->decimal_point, *dot = strchr(digits, '.');
    size_t len = strlen(digits), point_len = strlen(point);
    if (dot == NULL || strcmp(point, ".") == 0) {
        *out = strtod(digits, NULL);
        return PC_OK;
    }
    char *local = pc_malloc(len + point_len + 1);
    if (local == NULL)
        return pc_fail_nomem(err, "a number");
    size_t before = (size_t)(dot - digits);
    memcpy(local, digits, before);
    memcpy(local + before, point, point_len);
    memcpy(local + before + point_len, dot + 1, len - before);
    *out = strtod(local, NULL);
    pc_free(local);
    return PC_OK;
}

bool pc_json_int64(const pc_json_value *value, int64_t *out)
{
    const char *digits = pc_json_number(value);
    if (pc_json_is_integer(value)) {
        errno = 0;
        long long n = strtoll(digits, NULL, 10);
        if (errno != 0)
            return false;
        *out = n;
        return true;
    }
    double d;
    if (pc_json_double(value, &d, NULL) != PC_OK || !(fabs(d) <= 9007199254740992.0) || d != floor(d))
        return false;
    *out = (int64_t)d;
    return true;
}

void pc_json_describe(const pc_json_value *value, char *out, size_t size)
{
    int printed = 0;
    switch (pc_json_kind_of(value)) {
    case PC_JSON_NULL:
        printed = snprintf(out, size, "null");
        break;
    case PC_JSON_BOOL:
        printed = snprintf(out, size, "%s", pc_json_bool(value) ? "true" : "false");
        break;
    case PC_JSON_NUMBER:
        printed = snprintf(out, size, "%s", pc_json_number(value));
        break;
    case PC_JSON_STRING:
        if (pc_json_text(value) == NULL)
            printed = snprintf(out, size, "a string with NUL or a lone surrogate");
        else
            printed = snprintf(out, size, "\"%s\"", pc_json_text(value));
        break;
    case PC_JSON_ARRAY:
        printed = snprintf(out, size, "an array");
        break;
    case PC_JSON_OBJECT:
        printed = snprintf(out, size, "an object");
        break;
    }
    if (printed < 0 || (size_t)printed < size || size < 8)
        return;
    size_t end = size - 4; /* cut: end with "…", not inside a character */
    while (end > 0 && ((unsigned char)out[end] & 0xC0u) == 0x80u)
        end--;
    memcpy(out + end, "…", 4);
}
