/* Text → tree, by the rules of Python 3.11's re for str patterns: the same
 * constructs, the same refusals.  Recursion is bounded by PC_PATTERN_DEPTH. */
#include "pattern_parser.h"

pc_status pc_parse_fail(pc_parser *p, uint32_t at, const char *what)
{
    return pc_pattern_fail(p->err, p->source, p->source_len, "is not valid: %s at position %u", what, (unsigned)at);
}

pc_status pc_parse_node(pc_parser *p, pc_node_kind kind, pc_node **out)
{
    pc_node *node = pc_pool_alloc(p->tree->scratch, sizeof *node);
    if (node == NULL)
        return pc_fail_nomem(p->err, "a regular expression");
    node->kind = kind;
    node->position = p->at;
    *out = node;
    return PC_OK;
}

void pc_node_append(pc_node *parent, pc_node *child)
{
    if (parent->last_child == NULL)
        parent->child = child;
    else
        parent->last_child->next = child;
    parent->last_child = child;
}

pc_fold pc_parse_fold(const pc_parser *p)
{
    if (!(p->flags & PC_FLAG_IGNORECASE))
        return PC_FOLD_NONE;
    return p->flags & PC_FLAG_ASCII ? PC_FOLD_ASCII : PC_FOLD_UNICODE;
}

static uint32_t add_width(uint32_t a, uint32_t b) { return a > PC_UNLIMITED - b ? PC_UNLIMITED : a + b; }

static uint32_t mul_width(uint32_t a, uint32_t b)
{
    uint64_t product = (uint64_t)a * b;
    return product > PC_UNLIMITED ? PC_UNLIMITED : (uint32_t)product;
}

static bool is_blank(uint32_t c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/* Digits at p->at; false when the value is too large for re. */
static bool parse_count(pc_parser *p, uint32_t *value)
{
    uint64_t n = 0;
    while (p->at < p->count && pc_is_digit(p->text[p->at])) {
        n = n * 10 + (p->text[p->at++] - '0');
        if (n >= PC_UNLIMITED)
            return false;
    }
    *value = (uint32_t)n;
    return true;
}

/* Is there a repeat at p->at?  Then consumes it without its suffix. */
static pc_status parse_repeat(pc_parser *p, bool *found, uint32_t *least, uint32_t *most)
{
    uint32_t start = p->at;
    *found = true;
    *least = 0;
    *most = PC_UNLIMITED;
    if (pc_take(p, '*'))
        return PC_OK;
    if (pc_take(p, '+')) {
        *least = 1;
        return PC_OK;
    }
    if (pc_take(p, '?')) {
        *most = 1;
        return PC_OK;
    }
    *found = false;
    if (!pc_take(p, '{'))
        return PC_OK;
    if (pc_peek(p) == '}') {
        p->at = start;
        return PC_OK;
    }
    bool fits = true, has_most = false;
    uint32_t low_at = p->at;
    fits = parse_count(p, least);
    bool has_least = p->at > low_at;
    if (fits && pc_take(p, ',')) {
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
        return pc_parse_fail(p, start, "the repetition number is too large");
    if (!pc_take(p, '}')) {
        p->at = start; /* a literal "{" */
        return PC_OK;
    }
    if (has_most && *most < *least)
        return pc_parse_fail(p, start, "min repeat greater than max repeat");
    *found = true;
    return PC_OK;
}

/* Put a repeat around the last child of `sequence`. */
static pc_status repeat_last(pc_parser *p, pc_node *sequence, pc_node *before_last, uint32_t start, uint32_t least,
                             uint32_t most)
{
    pc_node *item = sequence->last_child, *repeat = NULL;
    if (item == NULL || item->kind == PC_NODE_AT)
        return pc_parse_fail(p, start, "nothing to repeat");
    if (item->kind == PC_NODE_REPEAT)
        return pc_parse_fail(p, start, "multiple repeat");
    pc_status status = pc_parse_node(p, PC_NODE_REPEAT, &repeat);
    if (status != PC_OK)
        return status;
    repeat->mode = pc_take(p, '?') ? PC_LAZY : pc_take(p, '+') ? PC_POSSESSIVE : PC_GREEDY;
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

static pc_status parse_item(pc_parser *p, bool may_set_globals, pc_node **out)
{
    uint32_t c = p->text[p->at++];
    switch (c) {
    case '\\':
        return pc_parse_escape(p, out);
    case '[':
        return pc_parse_set(p, out);
    case '(':
        return pc_parse_group(p, may_set_globals, out);
    case '.': {
        pc_status status = pc_parse_node(p, PC_NODE_ANY, out);
        if (status == PC_OK) {
            (*out)->flag = (p->flags & PC_FLAG_DOTALL) != 0;
            (*out)->least = (*out)->most = 1;
        }
        return status;
    }
    case '^':
        return pc_parse_at(p, p->flags & PC_FLAG_MULTILINE ? PC_AT_LINE_START : PC_AT_START, out);
    case '$':
        return pc_parse_at(p, p->flags & PC_FLAG_MULTILINE ? PC_AT_LINE_END : PC_AT_LAST, out);
    default:
        return pc_parse_char(p, c, out);
    }
}

static pc_status parse_sequence(pc_parser *p, bool first_at_top, pc_node **out)
{
    pc_node *before_last = NULL;
    pc_status status = pc_parse_node(p, PC_NODE_CAT, out);
    if (status != PC_OK)
        return status;
    pc_node *sequence = *out;
    while (p->at < p->count && p->text[p->at] != '|' && p->text[p->at] != ')') {
        uint32_t c = p->text[p->at], start = p->at;
        if (p->flags & PC_FLAG_VERBOSE) {
            if (is_blank(c)) {
                p->at++;
                continue;
            }
            if (c == '#') {
                if ((status = pc_skip_comment(p, '\n')) != PC_OK)
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
        pc_node_append(sequence, item);
    }
    for (const pc_node *item = sequence->child; item != NULL; item = item->next) {
        sequence->least = add_width(sequence->least, item->least);
        sequence->most = add_width(sequence->most, item->most);
    }
    return PC_OK;
}

pc_status pc_parse_alternatives(pc_parser *p, bool top, pc_node **out)
{
    if (++p->depth > PC_PATTERN_DEPTH)
        return pc_parse_fail(p, p->at, "groups are nested too deeply");
    pc_node *first = NULL;
    pc_status status = parse_sequence(p, top, &first);
    if (status == PC_OK && pc_peek(p) == '|') {
        pc_node *alternatives = NULL;
        if ((status = pc_parse_node(p, PC_NODE_ALT, &alternatives)) != PC_OK)
            return status;
        pc_node_append(alternatives, first);
        alternatives->least = first->least;
        alternatives->most = first->most;
        while (status == PC_OK && pc_take(p, '|')) {
            pc_node *next = NULL;
            if ((status = parse_sequence(p, false, &next)) != PC_OK)
                return status;
            pc_node_append(alternatives, next);
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
    pc_parser p = {.text = text,
                .count = (uint32_t)count,
                .source = source,
                .source_len = source_len,
                .tree = tree,
                .err = err};
    pc_status status = pc_parse_alternatives(&p, true, &tree->root);
    if (status == PC_OK && p.at < p.count)
        status = pc_parse_fail(&p, p.at, "unbalanced parenthesis");
    if (status == PC_OK && p.highest_condition > tree->groups)
        status = pc_parse_fail(&p, p.condition_at, "invalid group reference");
    pc_free(p.groups);
    return status;
}
