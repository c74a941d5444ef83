/* JSON text as Python writes it: json.dumps(value, indent=2, sort_keys=True). */
#define _DEFAULT_SOURCE
#include "adapter_config.h"
#include "json_tree.h"

#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../core/memory.h"

#define PC_JSON_WRITTEN ((size_t)64 * 1024 * 1024)

typedef struct writer {
    const char *label;
    char *out;
    size_t len, capacity;
    pc_pool pool; /* decoded strings and sorted members */
    pc_error *err;
} writer;

static pc_status put(writer *w, const char *bytes, size_t len)
{
    if (len >= w->capacity - w->len) { /* one byte stays for the NUL */
        size_t capacity = w->capacity * 2 + len + 256;
        if (w->len > PC_JSON_WRITTEN) /* a million values, each indented by a kilobyte */
            return pc_fail(w->err, PC_ERR_VALUE, "%s takes more than 64 MiB when indented", w->label);
        char *grown = pc_realloc(w->out, capacity);
        if (grown == NULL)
            return pc_fail_nomem(w->err, "a JSON text");
        w->out = grown;
        w->capacity = capacity;
    }
    memcpy(w->out + w->len, bytes, len);
    w->len += len;
    return PC_OK;
}

static pc_status put_text(writer *w, const char *text) { return put(w, text, strlen(text)); }

static pc_status new_line(writer *w, size_t depth)
{
    pc_status status = put(w, "\n", 1);
    for (size_t i = 0; i < depth && status == PC_OK; i++)
        status = put(w, "  ", 2);
    return status;
}

/* The character at text[*at]; a surrogate may be encoded like any other. The text is well formed. */
static uint32_t next_character(const char *text, size_t *at)
{
    const unsigned char *s = (const unsigned char *)text + *at;
    size_t need = s[0] < 0x80 ? 1 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    uint32_t c = need == 1 ? s[0] : s[0] & (0x7Fu >> need);
    for (size_t i = 1; i < need; i++)
        c = c << 6 | (s[i] & 0x3Fu);
    *at += need;
    return c;
}

static pc_status put_string(writer *w, const pc_json_value *value, bool name)
{
    const char *text;
    size_t len;
    if (!pc_json_decode(value, name, &w->pool, &text, &len))
        return pc_fail_nomem(w->err, "a JSON text");
    pc_status status = put(w, "\"", 1);
    for (size_t at = 0; at < len && status == PC_OK;) {
        size_t start = at;
        while (at < len && (unsigned char)text[at] >= 0x20 && (unsigned char)text[at] < 0x7F && text[at] != '"' &&
               text[at] != '\\')
            at++;
        if (at > start) {
            status = put(w, text + start, at - start);
            continue;
        }
        static const char letters[] = "\"\\\n\r\t\f\b", names[] = "\"\\nrtfb";
        uint32_t c = next_character(text, &at);
        const char *letter = c != 0 && c < 0x7F ? strchr(letters, (int)c) : NULL;
        char escape[16];
        if (letter != NULL)
            snprintf(escape, sizeof escape, "\\%c", names[letter - letters]);
        else if (c < 0x10000)
            snprintf(escape, sizeof escape, "\\u%04x", (unsigned)c);
        else
            snprintf(escape, sizeof escape, "\\u%04x\\u%04x", (unsigned)(0xD800 + ((c - 0x10000) >> 10)),
                     (unsigned)(0xDC00 + ((c - 0x10000) & 0x3FF)));
        status = put_text(w, escape);
    }
    return status == PC_OK ? put(w, "\"", 1) : status;
}

/* ------------------------------------------------------------------- numbers */

/* 0.d1d2…dn × 10^point, from snprintf's %e, whose decimal point depends on the locale. */
typedef struct decimal {
    char digits[24];
    int count;
    int point;
} decimal;

static decimal take_apart(double magnitude, int digits)
{
    char text[64];
    decimal d = {.count = 0};
    snprintf(text, sizeof text, "%.*e", digits - 1, magnitude);
    const char *c = text;
    for (; *c != 'e' && *c != '\0'; c++)
        if (*c >= '0' && *c <= '9' && d.count < 20)
            d.digits[d.count++] = *c;
    d.point = (*c == 'e' ? atoi(c + 1) : 0) + 1;
    return d;
}

static double put_together(const decimal *d)
{
    char text[64];
    snprintf(text, sizeof text, "%.*se%d", d->count, d->digits, d->point - d->count);
    return strtod(text, NULL);
}

/* The next larger number with as many digits. */
static void step_up(decimal *d)
{
    int i = d->count - 1;
    while (i >= 0 && d->digits[i] == '9')
        d->digits[i--] = '0';
    if (i >= 0) {
        d->digits[i]++;
    } else {
        d->digits[0] = '1';
        d->point++;
    }
}

/* The fewest digits that read back as the same double, nearest to it: Python's repr. */
static decimal shortest(double magnitude)
{
    for (int digits = 1; digits < 17; digits++) {
        decimal d = take_apart(magnitude, digits);
        if (put_together(&d) == magnitude)
            return d;
        /* Just above a power of two the doubles lie closer below than above: there the nearest number with
         * these digits may read back as the next double down while the one after it reads back right. */
        step_up(&d);
        if (put_together(&d) == magnitude)
            return d;
    }
    return take_apart(magnitude, 17);
}

static pc_status put_double(writer *w, double value)
{
    if (isnan(value))
        return put_text(w, "NaN");
    if (isinf(value))
        return put_text(w, value > 0 ? "Infinity" : "-Infinity");
    if (value == 0)
        return put_text(w, signbit(value) ? "-0.0" : "0.0");
    decimal d = shortest(fabs(value));
    while (d.count > 1 && d.digits[d.count - 1] == '0')
        d.count--;
    char text[64];
    size_t n = 0;
    if (value < 0)
        text[n++] = '-';
    if (d.point > -4 && d.point <= 16) { /* 0.0001 … 9999999999999998.0 */
        for (int i = d.point < 1 ? d.point - 1 : 0; i < d.point || i < d.count; i++) {
            if (i == (d.point < 1 ? d.point : d.point))
                text[n++] = '.';
            text[n++] = i >= 0 && i < d.count ? d.digits[i] : '0';
        }
        if (d.count <= d.point) {
            text[n++] = '.';
            text[n++] = '0';
        }
    } else {
        text[n++] = d.digits[0];
        if (d.count > 1) {
            text[n++] = '.';
            for (int i = 1; i < d.count; i++)
                text[n++] = d.digits[i];
        }
        n += (size_t)snprintf(text + n, sizeof text - n, "e%c%02d", d.point > 0 ? '+' : '-', abs(d.point - 1));
    }
    return put(w, text, n);
}

static pc_status put_number(writer *w, const pc_json_value *value)
{
    const char *digits = pc_json_number(value);
    if (pc_json_is_integer(value))
        return put_text(w, strcmp(digits, "-0") == 0 ? "0" : digits);
    double d;
    pc_status status = pc_json_double(value, &d, w->err);
    return status == PC_OK ? put_double(w, d) : status;
}

/* --------------------------------------------------------------------- trees */

typedef struct member {
    const char *name;
    size_t len;
    const pc_json_value *value;
} member;

static int by_name(const void *a, const void *b)
{
    const member *left = a, *right = b;
    size_t shorter = left->len < right->len ? left->len : right->len;
    int order = memcmp(left->name, right->name, shorter); /* bytes of UTF-8 sort as code points do */
    return order != 0 ? order : (left->len > right->len) - (left->len < right->len);
}

static pc_status put_value(writer *w, const pc_json_value *value, size_t depth);

static pc_status put_array(writer *w, const pc_json_value *array, size_t depth)
{
    if (pc_json_first(array) == NULL)
        return put(w, "[]", 2);
    pc_status status = put(w, "[", 1);
    for (const pc_json_value *item = pc_json_first(array); item != NULL && status == PC_OK; item = pc_json_next(item)) {
        if (item != pc_json_first(array))
            status = put(w, ",", 1);
        if (status == PC_OK)
            status = new_line(w, depth + 1);
        if (status == PC_OK)
            status = put_value(w, item, depth + 1);
    }
    if (status == PC_OK)
        status = new_line(w, depth);
    return status == PC_OK ? put(w, "]", 1) : status;
}

static pc_status put_object(writer *w, const pc_json_value *object, size_t depth)
{
    size_t count = 0;
    for (const pc_json_value *item = pc_json_first(object); item != NULL; item = pc_json_next(item))
        count++;
    if (count == 0)
        return put(w, "{}", 2);
    member *members = pc_pool_array(&w->pool, count, sizeof *members);
    if (members == NULL)
        return pc_fail_nomem(w->err, "a JSON text");
    size_t i = 0;
    for (const pc_json_value *item = pc_json_first(object); item != NULL; item = pc_json_next(item), i++) {
        members[i].value = item;
        if (!pc_json_decode(item, true, &w->pool, &members[i].name, &members[i].len))
            return pc_fail_nomem(w->err, "a JSON text");
    }
    qsort(members, count, sizeof *members, by_name);
    pc_status status = put(w, "{", 1);
    for (i = 0; i < count && status == PC_OK; i++) {
        if (i > 0)
            status = put(w, ",", 1);
        if (status == PC_OK)
            status = new_line(w, depth + 1);
        if (status == PC_OK)
            status = put_string(w, members[i].value, true);
        if (status == PC_OK)
            status = put(w, ": ", 2);
        if (status == PC_OK)
            status = put_value(w, members[i].value, depth + 1);
    }
    if (status == PC_OK)
        status = new_line(w, depth);
    return status == PC_OK ? put(w, "}", 1) : status;
}

static pc_status put_value(writer *w, const pc_json_value *value, size_t depth)
{
    switch (pc_json_kind_of(value)) {
    case PC_JSON_BOOL:
        return put_text(w, pc_json_bool(value) ? "true" : "false");
    case PC_JSON_NUMBER:
        return put_number(w, value);
    case PC_JSON_STRING:
        return put_string(w, value, false);
    case PC_JSON_ARRAY:
        return put_array(w, value, depth);
    case PC_JSON_OBJECT:
        return put_object(w, value, depth);
    case PC_JSON_NULL:
        break;
    }
    return put_text(w, "null");
}

pc_status pc_json_canonical(const char *text, size_t len, const char *label, char **out, size_t *out_len,
                            pc_error *err)
{
    *out = NULL;
    *out_len = 0;
    pc_json_value *root;
    pc_status status = pc_json_parse(text, len, label, &root, err);
    if (status != PC_OK)
        return status;
    writer w = {.label = label, .err = err};
    pc_pool_init(&w.pool);
    status = put_value(&w, root, 0);
    pc_pool_free(&w.pool);
    pc_json_free(root);
    if (status != PC_OK) {
        pc_free(w.out);
        return status;
    }
    w.out[w.len] = '\0';
    *out = w.out;
    *out_len = w.len;
    return PC_OK;
}
