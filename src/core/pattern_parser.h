/* What the files of the pattern parser share: its state, and one function for each level of the grammar.
 *
 *   pattern_parse.c    alternatives, sequences, repeats
 *   pattern_group.c    everything that begins with "("
 *   pattern_set.c      [...] and the classes that stand alone
 *   pattern_escape.c   everything that begins with "\", and what becomes of one character
 */
#ifndef PEFTC_CORE_PATTERN_PARSER_H
#define PEFTC_CORE_PATTERN_PARSER_H

#include "pattern_internal.h"

enum { /* flags in effect at a point of the pattern */
    PC_FLAG_IGNORECASE = 1,
    PC_FLAG_MULTILINE = 2,
    PC_FLAG_DOTALL = 4,
    PC_FLAG_VERBOSE = 8,
    PC_FLAG_ASCII = 16,
    PC_FLAG_UNICODE = 32
};

typedef struct pc_group_info {
    uint32_t name_at, name_len; /* in the text; len 0: no name */
    uint32_t least, most;       /* its width, once closed */
    bool open;
} pc_group_info;

typedef struct pc_parser {
    const uint32_t *text;
    uint32_t count, at;
    unsigned flags; /* of the scope that is being parsed */
    uint32_t depth;
    uint32_t behind_groups; /* groups + 1 when the outermost lookbehind began, or 0 outside */
    uint32_t highest_condition, condition_at; /* a (?(n)…) may refer to a later group: checked at the end */
    pc_group_info *groups;                     /* [0] unused */
    uint32_t group_capacity;
    const char *source;
    size_t source_len;
    pc_tree *tree;
    pc_error *err;
} pc_parser;

#define PC_NO_CHAR UINT32_MAX

static inline uint32_t pc_peek(const pc_parser *p) { return p->at < p->count ? p->text[p->at] : PC_NO_CHAR; }

static inline bool pc_take(pc_parser *p, uint32_t c)
{
    if (pc_peek(p) != c)
        return false;
    p->at++;
    return true;
}

static inline bool pc_is_digit(uint32_t c) { return c >= '0' && c <= '9'; }
static inline bool pc_is_octal(uint32_t c) { return c >= '0' && c <= '7'; }

/* ------------------------------------------------------------------ pattern_parse.c */

/* PC_ERR_VALUE "… is not valid: `what` at position `at`". */
pc_status pc_parse_fail(pc_parser *p, uint32_t at, const char *what);
pc_status pc_parse_node(pc_parser *p, pc_node_kind kind, pc_node **out);
void pc_node_append(pc_node *parent, pc_node *child);
/* How case is treated at this point of the pattern. */
pc_fold pc_parse_fold(const pc_parser *p);
/* One or more sequences with "|" between them, up to ")" or the end. */
pc_status pc_parse_alternatives(pc_parser *p, bool top, pc_node **out);

/* ------------------------------------------------------------------ pattern_group.c */

/* After "(".  *out stays NULL for what leaves no node: comments and global flags. */
pc_status pc_parse_group(pc_parser *p, bool may_set_globals, pc_node **out);
/* To the end of a comment, which stays. An escaped end does not end it, and a lone backslash is an error even here. */
pc_status pc_skip_comment(pc_parser *p, uint32_t end);

/* -------------------------------------------------------------------- pattern_set.c */

/* After "[". */
pc_status pc_parse_set(pc_parser *p, pc_node **out);
/* A set of the classes alone (bits of pc_set.classes). */
pc_status pc_parse_class(pc_parser *p, unsigned classes, pc_node **out);

/* ----------------------------------------------------------------- pattern_escape.c */

/* After "\", outside of a set. */
pc_status pc_parse_escape(pc_parser *p, pc_node **out);
/* The class that \w \d \s and their opposites name (a bit of pc_set.classes), or 0. */
unsigned pc_class_escape(uint32_t letter);
/* A literal character, escaped alike inside and outside of sets. p->at is after `c`. */
pc_status pc_literal_escape(pc_parser *p, uint32_t c, uint32_t start, uint32_t *out);
pc_status pc_parse_char(pc_parser *p, uint32_t c, pc_node **out);
pc_status pc_parse_at(pc_parser *p, pc_at at, pc_node **out);
/* A reference to a group that is closed already. */
pc_status pc_parse_backref(pc_parser *p, uint32_t group, uint32_t start, pc_node **out);

#endif
