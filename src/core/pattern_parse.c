/* Text → tree, by the rules of Python 3.11's re for str patterns: the same
 * constructs, the same refusals.  Recursion is bounded by PC_PATTERN_DEPTH. */
#include "pattern_internal.h"

#include <string.h>

enum { /* flags in effect at a point of the pattern */
    FLAG_IGNORECASE = 1,
    FLAG_MULTILINE = 2,
    FLAG_DOTALL = 4,
    FLAG_VERBOSE = 8,
    FLAG_ASCII = 16,
    FLAG_UNICODE = 32
};

typedef struct group_info {
    uint32_t name_at, name_len; /* in the text; len 0: no name */
    uint32_t least, most;       /* its width, once closed */
    bool open;
} group_info;

typedef struct parser {
    const uint32_t *text;
    uint32_t count, at;
    unsigned flags; /* of the scope that is being parsed */
    uint32_t depth;
    uint32_t behind_groups; /* groups + 1 when the outermost lookbehind began, or 0 outside */
    uint32_t highest_condition, condition_at; /* a (?(n)…) may refer to a later group: checked at the end */
    group_info *groups;                   /* [0] unused */
    uint32_t group_capacity;
    const char *source;
    size_t source_len;
    pc_tree *tree;
    pc_error *err;
} parser;

#define NONE UINT32_MAX

static uint32_t peek(const parser *p) { return p->at < p->count ? p->text[p->at] : NONE; }

static bool take(parser *p, uint32_t c)
{
    if (peek(p) != c)
        return false;
    p->at++;
    return true;
}

static pc_status fail_at(parser *p, uint32_t at, const char *what)
{
    return pc_pattern_fail(p->err, p->source, p->source_len, "is not valid: %s at position %u", what, (unsigned)at);
}

static uint32_t add_width(uint32_t a, uint32_t b) { return a > PC_UNLIMITED - b ? PC_UNLIMITED : a + b; }

static uint32_t mul_width(uint32_t a, uint32_t b)
{
    uint64_t product = (uint64_t)a * b;
    return product > PC_UNLIMITED ? PC_UNLIMITED : (uint32_t)product;
}

static pc_status new_node(parser *p, pc_node_kind kind, pc_node **out)
{
    pc_node *node = pc_pool_alloc(p->tree->scratch, sizeof *node);
    if (node == NULL)
        return pc_fail_nomem(p->err, "a regular expression");
    node->kind = kind;
    node->position = p->at;
    *out = node;
    return PC_OK;
}

static void append(pc_node *parent, pc_node *child)
{
    if (parent->last_child == NULL)
        parent->child = child;
    else
        parent->last_child->next = child;
    parent->last_child = child;
}

static pc_fold fold_of(const parser *p)
{
    if (!(p->flags & FLAG_IGNORECASE))
        return PC_FOLD_NONE;
    return p->flags & FLAG_ASCII ? PC_FOLD_ASCII : PC_FOLD_UNICODE;
}

static bool is_digit(uint32_t c) { return c >= '0' && c <= '9'; }
static bool is_octal(uint32_t c) { return c >= '0' && c <= '7'; }
static bool is_letter(uint32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
static bool is_blank(uint32_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

static int hex_value(uint32_t c)
{
    if (is_digit(c))
        return (int)(c - '0');
    if (c >= 'a' && c <= 'f')
        return (int)(c - 'a') + 10;
    if (c >= 'A' && c <= 'F')
        return (int)(c - 'A') + 10;
    return -1;
}

/* ------------------------------------------------------------------ escapes */

/* The character of \a \f \n \r \t \v \\, or NONE. \b is the caller's: it means two things. */
static uint32_t simple_escape(uint32_t c)
{
    switch (c) {
    case 'a':
        return 7;
    case 'f':
        return '\f';
    case 'n':
        return '\n';
    case 'r':
        return '\r';
    case 't':
        return '\t';
    case 'v':
        return '\v';
    case '\\':
        return '\\';
    default:
        return NONE;
    }
}

static unsigned class_escape(uint32_t c)
{
    switch (c) {
    case 'w':
        return PC_CLASS_WORD;
    case 'W':
        return PC_CLASS_NOT_WORD;
    case 'd':
        return PC_CLASS_DIGIT;
    case 'D':
        return PC_CLASS_NOT_DIGIT;
    case 's':
        return PC_CLASS_SPACE;
    case 'S':
        return PC_CLASS_NOT_SPACE;
    default:
        return 0;
    }
}

/* \xhh \uhhhh \Uhhhhhhhh, after the letter. */
static pc_status hex_escape(parser *p, uint32_t letter, uint32_t start, uint32_t *c)
{
    int digits = letter == 'x' ? 2 : letter == 'u' ? 4 : 8;
    uint32_t value = 0;
    for (int i = 0; i < digits; i++) {
        int digit = p->at < p->count ? hex_value(p->text[p->at]) : -1;
        if (digit < 0)
            return fail_at(p, start, "incomplete escape");
        value = value << 4 | (uint32_t)digit;
        p->at++;
    }
    if (value > 0x10FFFF)
        return fail_at(p, start, "bad escape");
    *c = value;
    return PC_OK;
}

/* What both kinds of escape have in common: a literal character. p->at is after `c`. */
static pc_status literal_escape(parser *p, uint32_t c, uint32_t start, uint32_t *out)
{
    if (simple_escape(c) != NONE) {
        *out = simple_escape(c);
        return PC_OK;
    }
    if (c == 'x' || c == 'u' || c == 'U')
        return hex_escape(p, c, start, out);
    if (c == 'N')
        return fail_at(p, start, "named characters (\\N{...}) are not supported: write the character itself, found");
    if (is_letter(c) || is_digit(c))
        return fail_at(p, start, "bad escape");
    *out = c;
    return PC_OK;
}

/* --------------------------------------------------------------------- sets */

typedef struct range_list {
    pc_char_range *items;
    size_t count, capacity;
} range_list;

static pc_status add_range(parser *p, range_list *list, uint32_t first, uint32_t last)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 16;
        pc_char_range *grown = pc_realloc(list->items, capacity * sizeof *grown);
        if (grown == NULL)
            return pc_fail_nomem(p->err, "a character set");
        list->items = grown;
        list->capacity = capacity;
    }
    list->items[list->count++] = (pc_char_range){first, last};
    return PC_OK;
}

/* Add to the list the representative of every character in it, so that a test
 * of a folded character finds it. Runs and twins are what folds at all. */
static pc_status fold_ranges(parser *p, range_list *list, pc_fold fold)
{
    size_t given = list->count;
    for (size_t i = 0; i < given; i++) {
        pc_char_range range = list->items[i];
        pc_status status = PC_OK;
        if (range.last >= 'A' && range.first <= 'Z')
            status = add_range(p, list, (range.first > 'A' ? range.first : 'A') + 32,
                               (range.last < 'Z' ? range.last : 'Z') + 32);
        if (fold == PC_FOLD_ASCII || range.last < 0x80) {
            if (status != PC_OK)
                return status;
            continue;
        }
        for (size_t r = 0; r < pc_lower_runs_count && status == PC_OK; r++) {
            const pc_lower_run *run = &pc_lower_runs[r];
            if (run->last < range.first || run->first > range.last)
                continue;
            for (uint32_t c = run->first; c <= run->last && status == PC_OK; c += run->stride) {
                if (c < range.first || c > range.last)
                    continue;
                uint32_t folded = pc_char_fold(c, fold);
                status = add_range(p, list, folded, folded);
            }
        }
        for (size_t t = 0; t < pc_case_twins_count && status == PC_OK; t++)
            if (pc_case_twins[t].first >= range.first && pc_case_twins[t].first <= range.last)
                status = add_range(p, list, pc_case_twins[t].last, pc_case_twins[t].last);
        if (status != PC_OK)
            return status;
    }
    return PC_OK;
}

/* Heap sort: no recursion, no worst case, and the lists come from untrusted text. */
static void sort_ranges(pc_char_range *items, size_t count)
{
    for (size_t phase = count / 2 + count; count > 1 && phase-- > 1;) {
        size_t root, end;
        if (phase >= count) {
            root = phase - count;
            end = count;
        } else {
            pc_char_range top = items[0];
            items[0] = items[phase];
            items[phase] = top;
            root = 0;
            end = phase;
        }
        for (size_t child; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && items[child].first < items[child + 1].first)
                child++;
            if (items[root].first >= items[child].first)
                break;
            pc_char_range swap = items[root];
            items[root] = items[child];
            items[child] = swap;
        }
    }
}

/* Sort, merge and keep the ranges as a new set of the tree. */
static pc_status finish_set(parser *p, range_list *list, unsigned classes, bool negate, uint32_t *index)
{
    pc_tree *tree = p->tree;
    pc_fold fold = fold_of(p);
    if (fold != PC_FOLD_NONE) {
        pc_status status = fold_ranges(p, list, fold);
        if (status != PC_OK)
            return status;
    }
    sort_ranges(list->items, list->count);
    size_t kept = 0;
    for (size_t i = 0; i < list->count; i++) {
        pc_char_range range = list->items[i];
        if (kept > 0 && range.first <= list->items[kept - 1].last + 1) {
            if (range.last > list->items[kept - 1].last)
                list->items[kept - 1].last = range.last;
        } else {
            list->items[kept++] = range;
        }
    }
    if (tree->set_count == tree->set_capacity) {
        size_t capacity = tree->set_capacity ? tree->set_capacity * 2 : 8;
        pc_set *grown = pc_pool_array(tree->keep, capacity, sizeof *grown);
        if (grown == NULL)
            return pc_fail_nomem(p->err, "a regular expression");
        if (tree->set_count > 0)
            memcpy(grown, tree->sets, tree->set_count * sizeof *grown);
        tree->sets = grown;
        tree->set_capacity = capacity;
    }
    pc_char_range *ranges = pc_pool_array(tree->keep, kept, sizeof *ranges);
    if (ranges == NULL)
        return pc_fail_nomem(p->err, "a character set");
    if (kept > 0)
        memcpy(ranges, list->items, kept * sizeof *ranges);
    tree->sets[tree->set_count] = (pc_set){.ranges = ranges,
                                           .count = kept,
                                           .classes = (uint8_t)classes,
                                           .ascii = (p->flags & FLAG_ASCII) != 0,
                                           .negate = negate,
                                           .fold = fold};
    *index = (uint32_t)tree->set_count++;
    return PC_OK;
}

/* One item inside [...]: a character, or a class (then *classes is not 0). */
static pc_status set_item(parser *p, uint32_t set_start, uint32_t *c, unsigned *classes)
{
    *classes = 0;
    uint32_t start = p->at;
    uint32_t this = peek(p);
    if (this == NONE)
        return fail_at(p, set_start, "unterminated character set");
    p->at++;
    *c = this;
    if (this != '\\')
        return PC_OK;
    uint32_t letter = peek(p);
    if (letter == NONE)
        return fail_at(p, start, "bad escape (end of pattern)");
    p->at++;
    *classes = class_escape(letter);
    if (*classes != 0)
        return PC_OK;
    if (letter == 'b') {
        *c = '\b';
        return PC_OK;
    }
    if (is_octal(letter)) {
        uint32_t value = letter - '0';
        for (int i = 0; i < 2 && p->at < p->count && is_octal(p->text[p->at]); i++)
            value = value * 8 + (p->text[p->at++] - '0');
        if (value > 0377)
            return fail_at(p, start, "octal escape value outside of range 0-0o377");
        *c = value;
        return PC_OK;
    }
    return literal_escape(p, letter, start, c);
}

static pc_status parse_set_items(parser *p, range_list *list, unsigned *classes, uint32_t start)
{
    for (bool first = true;; first = false) {
        if (!first && take(p, ']'))
            return PC_OK;
        uint32_t low = 0, high = 0, item_at = p->at;
        unsigned low_class = 0, high_class = 0;
        pc_status status = set_item(p, start, &low, &low_class);
        if (status != PC_OK)
            return status;
        if (take(p, '-')) {
            if (take(p, ']')) {
                *classes |= low_class;
                if (low_class == 0 && (status = add_range(p, list, low, low)) != PC_OK)
                    return status;
                return add_range(p, list, '-', '-');
            }
            if ((status = set_item(p, start, &high, &high_class)) != PC_OK)
                return status;
            if (low_class != 0 || high_class != 0 || high < low)
                return fail_at(p, item_at, "bad character range");
            if ((status = add_range(p, list, low, high)) != PC_OK)
                return status;
            continue;
        }
        *classes |= low_class;
        if (low_class == 0 && (status = add_range(p, list, low, low)) != PC_OK)
            return status;
    }
}

/* After "[". */
static pc_status parse_set(parser *p, pc_node **out)
{
    uint32_t start = p->at - 1;
    bool negate = take(p, '^');
    range_list list = {0};
    unsigned classes = 0;
    pc_status status = parse_set_items(p, &list, &classes, start);
    if (status == PC_OK)
        status = new_node(p, PC_NODE_SET, out);
    if (status == PC_OK)
        status = finish_set(p, &list, classes, negate, &(*out)->a);
    if (status == PC_OK)
        (*out)->least = (*out)->most = 1;
    pc_free(list.items);
    return status;
}

static pc_status class_node(parser *p, unsigned classes, pc_node **out)
{
    range_list none = {0};
    pc_status status = new_node(p, PC_NODE_SET, out);
    if (status == PC_OK)
        status = finish_set(p, &none, classes, false, &(*out)->a);
    if (status == PC_OK)
        (*out)->least = (*out)->most = 1;
    pc_free(none.items);
    return status;
}

/* ----------------------------------------------------------------- elements */

static pc_status char_node(parser *p, uint32_t c, pc_node **out)
{
    pc_status status = new_node(p, PC_NODE_CHAR, out);
    if (status != PC_OK)
        return status;
    (*out)->fold = fold_of(p);
    (*out)->a = pc_char_fold(c, (*out)->fold);
    (*out)->least = (*out)->most = 1;
    return PC_OK;
}

static pc_status at_node(parser *p, pc_at at, pc_node **out)
{
    pc_status status = new_node(p, PC_NODE_AT, out);
    if (status != PC_OK)
        return status;
    (*out)->a = at;
    (*out)->flag = (p->flags & FLAG_ASCII) != 0;
    return PC_OK;
}

static pc_status backref_node(parser *p, uint32_t group, uint32_t start, pc_node **out)
{
    if (p->groups[group].open)
        return fail_at(p, start, "cannot refer to an open group");
    if (p->behind_groups != 0 && group >= p->behind_groups)
        return fail_at(p, start, "cannot refer to group defined in the same lookbehind subpattern");
    pc_status status = new_node(p, PC_NODE_BACKREF, out);
    if (status != PC_OK)
        return status;
    (*out)->a = group;
    (*out)->fold = fold_of(p);
    (*out)->least = p->groups[group].least;
    (*out)->most = p->groups[group].most;
    return PC_OK;
}

/* After "\". */
static pc_status parse_escape(parser *p, pc_node **out)
{
    uint32_t start = p->at - 1;
    uint32_t c = peek(p);
    if (c == NONE)
        return fail_at(p, start, "bad escape (end of pattern)");
    p->at++;
    unsigned classes = class_escape(c);
    if (classes != 0)
        return class_node(p, classes, out);
    switch (c) {
    case 'A':
        return at_node(p, PC_AT_START, out);
    case 'Z':
        return at_node(p, PC_AT_END, out);
    case 'b':
        return at_node(p, PC_AT_BOUNDARY, out);
    case 'B':
        return at_node(p, PC_AT_NOT_BOUNDARY, out);
    default:
        break;
    }
    if (c == '0') {
        uint32_t value = 0;
        for (int i = 0; i < 2 && p->at < p->count && is_octal(p->text[p->at]); i++)
            value = value * 8 + (p->text[p->at++] - '0');
        return char_node(p, value, out);
    }
    if (is_digit(c)) {
        uint32_t number = c - '0';
        if (p->at < p->count && is_digit(p->text[p->at])) {
            uint32_t second = p->text[p->at++];
            number = number * 10 + (second - '0');
            if (is_octal(c) && is_octal(second) && p->at < p->count && is_octal(p->text[p->at])) {
                uint32_t value = ((c - '0') * 8 + (second - '0')) * 8 + (p->text[p->at++] - '0');
                if (value > 0377)
                    return fail_at(p, start, "octal escape value outside of range 0-0o377");
                return char_node(p, value, out);
            }
        }
        if (number > p->tree->groups)
            return fail_at(p, start, "invalid group reference");
        return backref_node(p, number, start, out);
    }
    uint32_t literal = 0;
    pc_status status = literal_escape(p, c, start, &literal);
    return status == PC_OK ? char_node(p, literal, out) : status;
}

static pc_status parse_alternatives(parser *p, bool top, pc_node **out);

/* A name up to `end`, which is consumed. */
static pc_status parse_name(parser *p, uint32_t end, uint32_t *name_at, uint32_t *name_len)
{
    *name_at = p->at;
    while (p->at < p->count && p->text[p->at] != end)
        p->at++;
    *name_len = p->at - *name_at;
    if (!take(p, end))
        return fail_at(p, *name_at, "missing the end of a group name");
    if (*name_len == 0)
        return fail_at(p, *name_at, "missing group name");
    return PC_OK;
}

static bool is_identifier(const parser *p, uint32_t at, uint32_t len)
{
    for (uint32_t i = 0; i < len; i++)
        if (!pc_char_is(p->text[at + i], PC_CLASS_WORD, false))
            return false;
    return !pc_char_is(p->text[at], PC_CLASS_DIGIT, false);
}

/* The group with the name, or 0. */
static uint32_t find_group(const parser *p, uint32_t at, uint32_t len)
{
    for (uint32_t g = 1; g <= p->tree->groups; g++)
        if (p->groups[g].name_len == len && len > 0 &&
            memcmp(p->text + p->groups[g].name_at, p->text + at, len * sizeof *p->text) == 0)
            return g;
    return 0;
}

static pc_status open_group(parser *p, uint32_t name_at, uint32_t name_len, uint32_t *number)
{
    uint32_t needed = p->tree->groups + 2;
    if (needed > p->group_capacity) {
        uint32_t capacity = needed * 2;
        group_info *grown = pc_realloc(p->groups, capacity * sizeof *grown);
        if (grown == NULL)
            return pc_fail_nomem(p->err, "the groups of a regular expression");
        p->groups = grown;
        p->group_capacity = capacity;
    }
    *number = ++p->tree->groups;
    p->groups[*number] = (group_info){.name_at = name_at, .name_len = name_len, .open = true};
    return PC_OK;
}

static unsigned flag_of(uint32_t c)
{
    switch (c) {
    case 'i':
        return FLAG_IGNORECASE;
    case 'm':
        return FLAG_MULTILINE;
    case 's':
        return FLAG_DOTALL;
    case 'x':
        return FLAG_VERBOSE;
    case 'a':
        return FLAG_ASCII;
    case 'u':
        return FLAG_UNICODE;
    default:
        return 0;
    }
}

#define TYPE_FLAGS ((unsigned)(FLAG_ASCII | FLAG_UNICODE))

/* After "(?": letters, perhaps "-" and letters, then ")" or ":". Consumes that; *global tells which it was. */
static pc_status parse_flags(parser *p, uint32_t start, unsigned *add, unsigned *remove, bool *global)
{
    *add = *remove = 0;
    *global = false;
    uint32_t c = peek(p);
    while (c != '-') {
        unsigned flag = flag_of(c);
        if (c == 'L')
            return fail_at(p, p->at, "bad inline flags: 'L' works with bytes only, found");
        if (flag == 0)
            return fail_at(p, p->at, c == NONE ? "missing -, : or )" : "unknown flag");
        *add |= flag;
        if ((flag & TYPE_FLAGS) && (*add & TYPE_FLAGS) != flag)
            return fail_at(p, p->at, "bad inline flags: 'a' and 'u' are incompatible, found");
        p->at++;
        c = peek(p);
        if (c == ')') {
            p->at++;
            *global = true;
            return PC_OK;
        }
        if (c == ':') {
            p->at++;
            return PC_OK;
        }
    }
    p->at++;
    do {
        c = peek(p);
        unsigned flag = flag_of(c);
        if (flag == 0)
            return fail_at(p, p->at, c == NONE ? "missing flag" : "unknown flag");
        if (flag & TYPE_FLAGS)
            return fail_at(p, p->at, "bad inline flags: 'a' and 'u' cannot be turned off, found");
        *remove |= flag;
        p->at++;
    } while (!take(p, ':'));
    if (*add & *remove)
        return fail_at(p, start, "bad inline flags: flag turned on and off");
    return PC_OK;
}

/* The rest of a group: alternatives and ")". */
static pc_status parse_body(parser *p, uint32_t start, pc_node **out)
{
    pc_status status = parse_alternatives(p, false, out);
    if (status == PC_OK && !take(p, ')'))
        return fail_at(p, start, "missing ), unterminated subpattern");
    return status;
}

/* A node of `kind` around the rest of the group. */
static pc_status wrap_body(parser *p, pc_node_kind kind, uint32_t start, pc_node **out)
{
    pc_node *body = NULL;
    pc_status status = new_node(p, kind, out);
    if (status == PC_OK)
        status = parse_body(p, start, &body);
    if (status != PC_OK)
        return status;
    append(*out, body);
    (*out)->least = body->least;
    (*out)->most = body->most;
    return PC_OK;
}

static pc_status parse_capture(parser *p, uint32_t start, uint32_t name_at, uint32_t name_len, pc_node **out)
{
    uint32_t number = 0;
    pc_status status = open_group(p, name_at, name_len, &number);
    if (status == PC_OK)
        status = wrap_body(p, PC_NODE_GROUP, start, out);
    if (status != PC_OK)
        return status;
    (*out)->a = number;
    p->groups[number].open = false;
    p->groups[number].least = (*out)->least;
    p->groups[number].most = (*out)->most;
    return PC_OK;
}

static pc_status parse_look(parser *p, uint32_t start, bool behind, bool negative, pc_node **out)
{
    uint32_t outer = p->behind_groups;
    if (behind && outer == 0)
        p->behind_groups = p->tree->groups + 1;
    pc_status status = wrap_body(p, PC_NODE_LOOK, start, out);
    p->behind_groups = outer;
    if (status != PC_OK)
        return status;
    if (behind && (*out)->least != (*out)->most)
        return fail_at(p, start, "look-behind requires fixed-width pattern");
    (*out)->a = behind;
    (*out)->b = behind ? (*out)->least : 0;
    (*out)->flag = negative;
    (*out)->least = (*out)->most = 0;
    return PC_OK;
}

/* After "(?(". */
static pc_status parse_condition(parser *p, uint32_t start, pc_node **out)
{
    uint32_t name_at = 0, name_len = 0, group = 0;
    pc_status status = parse_name(p, ')', &name_at, &name_len);
    if (status != PC_OK)
        return status;
    if (is_identifier(p, name_at, name_len)) {
        group = find_group(p, name_at, name_len);
        if (group == 0)
            return fail_at(p, name_at, "unknown group name");
    } else {
        for (uint32_t i = 0; i < name_len; i++) {
            if (!is_digit(p->text[name_at + i]))
                return fail_at(p, name_at, "bad character in group name");
            group = group * 10 + (p->text[name_at + i] - '0');
            if (group > PC_PATTERN_BYTES)
                return fail_at(p, name_at, "invalid group reference");
        }
        if (group == 0)
            return fail_at(p, name_at, "bad group number");
        if (group > p->highest_condition) {
            p->highest_condition = group;
            p->condition_at = name_at;
        }
    }
    if (p->behind_groups != 0) {
        if (group > p->tree->groups || p->groups[group].open)
            return fail_at(p, name_at, "cannot refer to an open group");
        if (group >= p->behind_groups)
            return fail_at(p, name_at, "cannot refer to group defined in the same lookbehind subpattern");
    }
    pc_node *body = NULL;
    status = new_node(p, PC_NODE_COND, out);
    if (status == PC_OK)
        status = parse_body(p, start, &body);
    if (status != PC_OK)
        return status;
    pc_node *yes = body, *no = NULL;
    if (body->kind == PC_NODE_ALT) {
        yes = body->child;
        no = yes->next;
        if (no->next != NULL)
            return fail_at(p, start, "conditional backref with more than two branches");
        yes->next = NULL;
    }
    (*out)->a = group;
    append(*out, yes);
    (*out)->least = yes->least;
    (*out)->most = yes->most;
    if (no != NULL)
        append(*out, no);
    uint32_t least = no != NULL ? no->least : 0, most = no != NULL ? no->most : 0;
    if (least < (*out)->least)
        (*out)->least = least;
    if (most > (*out)->most)
        (*out)->most = most;
    return PC_OK;
}

/* After "(?P". */
static pc_status parse_python_group(parser *p, uint32_t start, pc_node **out)
{
    uint32_t name_at = 0, name_len = 0;
    if (take(p, '<')) {
        pc_status status = parse_name(p, '>', &name_at, &name_len);
        if (status != PC_OK)
            return status;
        if (!is_identifier(p, name_at, name_len))
            return fail_at(p, name_at, "bad character in group name");
        if (find_group(p, name_at, name_len) != 0)
            return fail_at(p, name_at, "redefinition of group name");
        return parse_capture(p, start, name_at, name_len, out);
    }
    if (take(p, '=')) {
        pc_status status = parse_name(p, ')', &name_at, &name_len);
        if (status != PC_OK)
            return status;
        uint32_t group = find_group(p, name_at, name_len);
        if (group == 0)
            return fail_at(p, name_at, "unknown group name");
        return backref_node(p, group, name_at, out);
    }
    return fail_at(p, start, peek(p) == NONE ? "unexpected end of pattern" : "unknown extension (?P");
}

/* To the end of a comment, which stays. An escaped end does not end it, and a lone backslash is an error even here. */
static pc_status skip_comment(parser *p, uint32_t end)
{
    while (p->at < p->count && p->text[p->at] != end) {
        if (p->text[p->at] == '\\' && ++p->at == p->count)
            return fail_at(p, p->at - 1, "bad escape (end of pattern)");
        p->at++;
    }
    return PC_OK;
}

/* After "(".  *out stays NULL for what leaves no node: comments and global flags. */
static pc_status parse_group(parser *p, bool may_set_globals, pc_node **out)
{
    uint32_t start = p->at - 1;
    pc_status status;
    if (!take(p, '?'))
        return parse_capture(p, start, 0, 0, out);
    uint32_t c = peek(p);
    if (c == NONE)
        return fail_at(p, p->at, "unexpected end of pattern");
    p->at++;
    switch (c) {
    case 'P':
        return parse_python_group(p, start, out);
    case ':':
        return wrap_body(p, PC_NODE_PLAIN, start, out);
    case '>':
        return wrap_body(p, PC_NODE_ATOMIC, start, out);
    case '#':
        if ((status = skip_comment(p, ')')) != PC_OK)
            return status;
        return take(p, ')') ? PC_OK : fail_at(p, start, "missing ), unterminated comment");
    case '=':
    case '!':
        return parse_look(p, start, false, c == '!', out);
    case '<': {
        uint32_t kind = peek(p);
        if (kind != '=' && kind != '!')
            return fail_at(p, start, kind == NONE ? "unexpected end of pattern" : "unknown extension (?<");
        p->at++;
        return parse_look(p, start, true, kind == '!', out);
    }
    case '(':
        return parse_condition(p, start, out);
    default:
        break;
    }
    p->at--;
    if (c != '-' && c != 'L' && flag_of(c) == 0)
        return fail_at(p, start, "unknown extension after (?");
    unsigned add = 0, remove = 0, outer = p->flags;
    bool global = false;
    status = parse_flags(p, start, &add, &remove, &global);
    if (status != PC_OK)
        return status;
    if (global) {
        if (!may_set_globals)
            return fail_at(p, start, "global flags not at the start of the expression");
        p->flags |= add;
        if ((p->flags & TYPE_FLAGS) == TYPE_FLAGS)
            return fail_at(p, start, "bad inline flags: 'a' and 'u' are incompatible, found");
        return PC_OK;
    }
    if (add & TYPE_FLAGS)
        p->flags &= ~TYPE_FLAGS;
    p->flags = (p->flags | add) & ~remove;
    status = wrap_body(p, PC_NODE_PLAIN, start, out);
    if (status == PC_OK)
        (*out)->flag = true;
    p->flags = outer;
    return status;
}

/* ------------------------------------------------- repeats, sequences, branches */

/* Digits at p->at; false when the value is too large for re. */
static bool parse_count(parser *p, uint32_t *value)
{
    uint64_t n = 0;
    while (p->at < p->count && is_digit(p->text[p->at])) {
        n = n * 10 + (p->text[p->at++] - '0');
        if (n >= PC_UNLIMITED)
            return false;
    }
    *value = (uint32_t)n;
    return true;
}

/* Is there a repeat at p->at?  Then consumes it without its suffix. */
static pc_status parse_repeat(parser *p, bool *found, uint32_t *least, uint32_t *most)
{
    uint32_t start = p->at;
    *found = true;
    *least = 0;
    *most = PC_UNLIMITED;
    if (take(p, '*'))
        return PC_OK;
    if (take(p, '+')) {
        *least = 1;
        return PC_OK;
    }
    if (take(p, '?')) {
        *most = 1;
        return PC_OK;
    }
    *found = false;
    if (!take(p, '{'))
        return PC_OK;
    if (peek(p) == '}') {
        p->at = start;
        return PC_OK;
    }
    bool fits = true, has_most = false;
    uint32_t low_at = p->at;
    fits = parse_count(p, least);
    bool has_least = p->at > low_at;
    if (fits && take(p, ',')) {
        uint32_t high_at = p->at;
        fits = parse_count(p, most);
        has_most = p->at > high_at;
        if (!has_most)
            *most = PC_UNLIMITED;
    } else if (fits) {
        has_most = has_least;
        *most = has_least ? *least : PC_UNLIMITED;
    }
    if (!fits)
        return fail_at(p, start, "the repetition number is too large");
    if (!take(p, '}')) {
        p->at = start; /* a literal "{" */
        return PC_OK;
    }
    if (has_most && *most < *least)
        return fail_at(p, start, "min repeat greater than max repeat");
    *found = true;
    return PC_OK;
}

/* Put a repeat around the last child of `sequence`. */
static pc_status repeat_last(parser *p, pc_node *sequence, pc_node *before_last, uint32_t start, uint32_t least,
                             uint32_t most)
{
    pc_node *item = sequence->last_child, *repeat = NULL;
    if (item == NULL || item->kind == PC_NODE_AT)
        return fail_at(p, start, "nothing to repeat");
    if (item->kind == PC_NODE_REPEAT)
        return fail_at(p, start, "multiple repeat");
    pc_status status = new_node(p, PC_NODE_REPEAT, &repeat);
    if (status != PC_OK)
        return status;
    repeat->mode = take(p, '?') ? PC_LAZY : take(p, '+') ? PC_POSSESSIVE : PC_GREEDY;
    repeat->a = least;
    repeat->b = most;
    repeat->child = repeat->last_child = item;
    repeat->least = mul_width(item->least, least);
    repeat->most = mul_width(item->most, most);
    if (before_last != NULL)
        before_last->next = repeat;
    else
        sequence->child = repeat;
    sequence->last_child = repeat;
    return PC_OK;
}

static pc_status parse_item(parser *p, bool may_set_globals, pc_node **out)
{
    uint32_t c = p->text[p->at++];
    switch (c) {
    case '\\':
        return parse_escape(p, out);
    case '[':
        return parse_set(p, out);
    case '(':
        return parse_group(p, may_set_globals, out);
    case '.': {
        pc_status status = new_node(p, PC_NODE_ANY, out);
        if (status == PC_OK) {
            (*out)->flag = (p->flags & FLAG_DOTALL) != 0;
            (*out)->least = (*out)->most = 1;
        }
        return status;
    }
    case '^':
        return at_node(p, p->flags & FLAG_MULTILINE ? PC_AT_LINE_START : PC_AT_START, out);
    case '$':
        return at_node(p, p->flags & FLAG_MULTILINE ? PC_AT_LINE_END : PC_AT_LAST, out);
    default:
        return char_node(p, c, out);
    }
}

static pc_status parse_sequence(parser *p, bool first_at_top, pc_node **out)
{
    pc_node *before_last = NULL;
    pc_status status = new_node(p, PC_NODE_CAT, out);
    if (status != PC_OK)
        return status;
    pc_node *sequence = *out;
    while (p->at < p->count && p->text[p->at] != '|' && p->text[p->at] != ')') {
        uint32_t c = p->text[p->at], start = p->at;
        if (p->flags & FLAG_VERBOSE) {
            if (is_blank(c)) {
                p->at++;
                continue;
            }
            if (c == '#') {
                if ((status = skip_comment(p, '\n')) != PC_OK)
                    return status;
                continue;
            }
        }
        bool repeats = false;
        uint32_t least = 0, most = 0;
        if ((status = parse_repeat(p, &repeats, &least, &most)) != PC_OK)
            return status;
        if (repeats) {
            if ((status = repeat_last(p, sequence, before_last, start, least, most)) != PC_OK)
                return status;
            continue;
        }
        pc_node *item = NULL;
        if ((status = parse_item(p, first_at_top && sequence->child == NULL, &item)) != PC_OK)
            return status;
        if (item == NULL)
            continue;
        before_last = sequence->last_child;
        append(sequence, item);
    }
    for (const pc_node *item = sequence->child; item != NULL; item = item->next) {
        sequence->least = add_width(sequence->least, item->least);
        sequence->most = add_width(sequence->most, item->most);
    }
    return PC_OK;
}

static pc_status parse_alternatives(parser *p, bool top, pc_node **out)
{
    if (++p->depth > PC_PATTERN_DEPTH)
        return fail_at(p, p->at, "groups are nested too deeply");
    pc_node *first = NULL;
    pc_status status = parse_sequence(p, top, &first);
    if (status == PC_OK && peek(p) == '|') {
        pc_node *alternatives = NULL;
        if ((status = new_node(p, PC_NODE_ALT, &alternatives)) != PC_OK)
            return status;
        append(alternatives, first);
        alternatives->least = first->least;
        alternatives->most = first->most;
        while (status == PC_OK && take(p, '|')) {
            pc_node *next = NULL;
            if ((status = parse_sequence(p, false, &next)) != PC_OK)
                return status;
            append(alternatives, next);
            if (next->least < alternatives->least)
                alternatives->least = next->least;
            if (next->most > alternatives->most)
                alternatives->most = next->most;
        }
        first = alternatives;
    }
    p->depth--;
    *out = first;
    return status;
}

pc_status pc_pattern_parse(const uint32_t *text, size_t count, const char *source, size_t source_len, pc_tree *tree,
                           pc_error *err)
{
    parser p = {.text = text,
                .count = (uint32_t)count,
                .source = source,
                .source_len = source_len,
                .tree = tree,
                .err = err};
    pc_status status = parse_alternatives(&p, true, &tree->root);
    if (status == PC_OK && p.at < p.count)
        status = fail_at(&p, p.at, "unbalanced parenthesis");
    if (status == PC_OK && p.highest_condition > tree->groups)
        status = fail_at(&p, p.condition_at, "invalid group reference");
    pc_free(p.groups);
    return status;
}
