/* What the files of the pattern engine share: the syntax tree, the program
 * that it becomes, and what is known about characters.
 *
 *   pattern_parse.c   text → tree, by the rules of Python's re (3.11); its parts in pattern_parser.h
 *   pattern.c         tree → program, the fast path, the public calls
 *   pattern_match.c   runs a program: backtracking on a stack of its own
 *   pattern_chars.c, pattern_tables.c   classes and case
 */
#ifndef PEFTC_CORE_PATTERN_INTERNAL_H
#define PEFTC_CORE_PATTERN_INTERNAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "memory.h"
#include "pattern.h"
#include "status.h"
#include "utf8.h"

/* --------------------------------------------------------------- characters */

typedef struct pc_char_range {
    uint32_t first, last;
} pc_char_range;

typedef struct pc_lower_run {
    uint32_t first, last, stride;
    int32_t delta;
} pc_lower_run;

extern const pc_char_range pc_word_ranges[], pc_digit_ranges[], pc_space_ranges[], pc_case_twins[];
extern const size_t pc_word_ranges_count, pc_digit_ranges_count, pc_space_ranges_count, pc_case_twins_count;
extern const pc_lower_run pc_lower_runs[];
extern const size_t pc_lower_runs_count;

typedef enum pc_fold {
    PC_FOLD_NONE = 0,
    PC_FOLD_ASCII,  /* (?ai): only A-Z have a lower case */
    PC_FOLD_UNICODE /* (?i) */
} pc_fold;

uint32_t pc_char_lower(uint32_t c, pc_fold fold);
/* One representative for all characters that (?i) treats as equal. */
uint32_t pc_char_fold(uint32_t c, pc_fold fold);

enum { /* bits of pc_set.classes */
    PC_CLASS_WORD = 1,
    PC_CLASS_NOT_WORD = 2,
    PC_CLASS_DIGIT = 4,
    PC_CLASS_NOT_DIGIT = 8,
    PC_CLASS_SPACE = 16,
    PC_CLASS_NOT_SPACE = 32
};

bool pc_char_is(uint32_t c, unsigned one_class, bool ascii);

typedef struct pc_set {
    const pc_char_range *ranges; /* sorted, disjoint; of folded characters when fold is on */
    size_t count;
    uint8_t classes;
    bool ascii; /* the classes are ASCII's */
    bool negate;
    pc_fold fold;
} pc_set;

bool pc_set_has(const pc_set *set, uint32_t c);

/* --------------------------------------------------------------------- tree */

#define PC_UNLIMITED UINT32_MAX
#define PC_PATTERN_DEPTH 200          /* nested groups: bounds the parser's recursion */
#define PC_PATTERN_BYTES (64 * 1024)  /* longest pattern; memory is a small multiple */
#define PC_PATTERN_STACK (1u << 18)   /* entries of the matcher's stack: 4 MiB */

typedef enum pc_node_kind {
    PC_NODE_CHAR,    /* a: character */
    PC_NODE_ANY,     /* flag: newline too */
    PC_NODE_SET,     /* a: index into sets */
    PC_NODE_AT,      /* a: pc_at */
    PC_NODE_CAT,     /* children in sequence */
    PC_NODE_ALT,     /* children are alternatives */
    PC_NODE_GROUP,   /* a: number; child */
    PC_NODE_PLAIN,   /* (?:…) with or without flags; child */
    PC_NODE_ATOMIC,  /* child */
    PC_NODE_REPEAT,  /* a, b: least and most; mode; child */
    PC_NODE_LOOK,    /* a: 1 when behind; flag: negative; child */
    PC_NODE_BACKREF, /* a: group */
    PC_NODE_COND     /* a: group; one or two children */
} pc_node_kind;

typedef enum pc_at { PC_AT_START, PC_AT_LINE_START, PC_AT_END, PC_AT_LAST, PC_AT_LINE_END, PC_AT_BOUNDARY,
                     PC_AT_NOT_BOUNDARY } pc_at;

typedef enum pc_mode { PC_GREEDY, PC_LAZY, PC_POSSESSIVE } pc_mode;

typedef struct pc_node {
    pc_node_kind kind;
    uint32_t a, b;
    pc_mode mode;
    pc_fold fold; /* CHAR, BACKREF */
    bool flag;    /* AT: the boundary is ASCII's */
    uint32_t position;
    uint32_t least, most; /* width in characters, saturating at PC_UNLIMITED */
    struct pc_node *child, *last_child, *next;
} pc_node;

typedef struct pc_tree {
    pc_node *root;
    uint32_t groups; /* highest group number */
    pc_set *sets;    /* in pool */
    size_t set_count, set_capacity;
    pc_pool *keep;    /* sets and their ranges: live as long as the program */
    pc_pool *scratch; /* nodes */
} pc_tree;

/* Parse `text`; `source` is what messages quote. */
pc_status pc_pattern_parse(const uint32_t *text, size_t count, const char *source, size_t source_len, pc_tree *tree,
                           pc_error *err);

/* PC_ERR_VALUE "the regular expression '…' …": quotes at most 200 bytes of the source. */
pc_status pc_pattern_fail(pc_error *err, const char *source, size_t source_len, const char *fmt, ...) PC_PRINTF(4, 5);

/* ------------------------------------------------------------------ program */

typedef enum pc_op {
    PC_OP_MATCH,
    PC_OP_CHAR,      /* a */
    PC_OP_CHAR_FOLD, /* a, mode: fold */
    PC_OP_ANY,       /* all but newline */
    PC_OP_ANY_CHAR,
    PC_OP_SET,         /* a: set */
    PC_OP_AT,          /* a: pc_at; mode: ASCII */
    PC_OP_SAVE,        /* a: register receives the position */
    PC_OP_JUMP,        /* a */
    PC_OP_SPLIT,       /* go on; on failure at a */
    PC_OP_ONE,         /* a … b times the one-character test that follows; mode */
    PC_OP_LOOP_START,  /* a: first of two registers (count, position of the last round) */
    PC_OP_LOOP,        /* a: registers, b: where it goes on; loop, mode; the body follows and jumps back here */
    PC_OP_LOOP_AGAIN,  /* a: its loop; sits at b - 1: what follows a lazy loop has failed, so one more round */
    PC_OP_LOOK,        /* a: where it goes on, b: characters back; mode: negative */
    PC_OP_LOOK_END,
    PC_OP_ATOMIC,
    PC_OP_ATOMIC_END,
    PC_OP_BACKREF, /* a: group, mode: fold */
    PC_OP_COND     /* a: group, b: where to go when it took no part */
} pc_op;

typedef struct pc_inst {
    uint8_t op, mode;
    uint16_t loop;
    uint32_t a, b;
} pc_inst;

typedef struct pc_loop {
    uint32_t least, most;
} pc_loop;

typedef struct pc_program {
    pc_inst *code;
    uint32_t count, capacity;
    pc_loop *loops;
    uint32_t loop_count, loop_capacity;
    pc_set *sets;
    uint32_t registers; /* 2 per group (group 0 too), then 2 per loop */
    uint32_t groups;
} pc_program;

/* How a match must lie. */
typedef enum pc_anchor {
    PC_ANCHOR_FULL,   /* from the first to the last character */
    PC_ANCHOR_START,  /* from the first */
    PC_ANCHOR_SEARCH  /* anywhere */
} pc_anchor;

/* Run it. group[2] receives group 1's first and past-last character, or UINT32_MAX. */
pc_status pc_program_run(const pc_program *program, pc_anchor anchor, const uint32_t *subject, uint32_t len,
                         const char *source, size_t source_len, bool *matched, uint32_t group[2], pc_error *err);

#endif
