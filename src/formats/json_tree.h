/* JSON as Python's json.loads takes it, as a tree of cJSON nodes.
 *
 * cJSON alone is not strict enough for untrusted text, and loses information:
 * it skips a BOM and control characters, takes NUL for the end, keeps numbers
 * as doubles, refuses NaN and Infinity, and looks names up without case.  So a
 * scanner of ours checks every byte first and re-writes what cJSON would
 * spoil: a number becomes a string that holds its digits, and a string with
 * NUL or a lone surrogate becomes one with those escaped.  pc_json_kind and
 * friends see through that.
 *
 * Of a name that occurs twice in an object the last value stays, at the first
 * one's place, as in a Python dict.
 */
#ifndef PEFTC_FORMATS_JSON_TREE_H
#define PEFTC_FORMATS_JSON_TREE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../core/memory.h"
#include "../core/status.h"

#define PC_JSON_DEPTH 500                         /* arrays and objects inside one another; cJSON's limit is 1000 */
#define PC_JSON_VALUES 1000000                    /* values in one text: bounds the tree at some 150 MB */
#define PC_JSON_BYTES ((size_t)16 * 1024 * 1024)  /* longest text */
#define PC_JSON_DIGITS 4300                       /* longest integer, as in Python */

typedef struct cJSON pc_json_value; /* a value; the tree is read-only */

typedef enum pc_json_kind {
    PC_JSON_NULL,
    PC_JSON_BOOL,
    PC_JSON_NUMBER,
    PC_JSON_STRING,
    PC_JSON_ARRAY,
    PC_JSON_OBJECT
} pc_json_kind;

/* Errors are PC_ERR_VALUE with label, line, column and reason. */
pc_status pc_json_parse(const char *text, size_t len, const char *label, pc_json_value **out, pc_error *err);
void pc_json_free(pc_json_value *root); /* NULL is allowed */

pc_json_kind pc_json_kind_of(const pc_json_value *value);
bool pc_json_bool(const pc_json_value *value);

/* Elements of an array, members of an object: the first, and the one after. NULL at the end. */
const pc_json_value *pc_json_first(const pc_json_value *parent);
const pc_json_value *pc_json_next(const pc_json_value *value);
/* The member with exactly this name, or NULL. */
const pc_json_value *pc_json_member(const pc_json_value *object, const char *name);

/* A string, or a member's name. NULL when it holds NUL or a lone surrogate: then only pc_json_decode has it. */
const char *pc_json_text(const pc_json_value *value);
const char *pc_json_name(const pc_json_value *member);
/* The same for every string, as UTF-8 in which lone surrogates are encoded too; lives in `pool`. False: no memory. */
bool pc_json_decode(const pc_json_value *value, bool name, pc_pool *pool, const char **text, size_t *len);

/* A number's digits as written, or NaN, Infinity, -Infinity. */
const char *pc_json_number(const pc_json_value *value);
bool pc_json_is_integer(const pc_json_value *value);          /* written without fraction and exponent */
bool pc_json_int64(const pc_json_value *value, int64_t *out); /* an integer, or a float with an integral value, that fits */
pc_status pc_json_double(const pc_json_value *value, double *out, pc_error *err);

/* A value in few words, for messages: at most `size` bytes with the NUL, valid UTF-8. */
void pc_json_describe(const pc_json_value *value, char *out, size_t size);

#endif
