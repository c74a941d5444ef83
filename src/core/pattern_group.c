/* Groups: captures, flags, look-around, conditions, comments. */
#include <string.h>

#include "pattern_parser.h"

/* A name up to `end`, which is consumed. */
static pc_status parse_name(pc_parser *p, uint32_t end, uint32_t *name_at, uint32_t *name_len)
{
    *name_at = p->at;
    while (p->at < p->count && p->text[p->at] != end)
        p->at++;
    *name_len = p->at - *name_at;
    if (!pc_take(p, end))
        return pc_parse_fail(p, *name_at, "missing the end of a group name");
    if (*name_len == 0)
        return pc_parse_fail(p, *name_at, "missing group name");
    return PC_OK;
}

static bool is_identifier(const pc_parser *p, uint32_t at, uint32_t len)
{
    for (uint32_t i = 0; i < len; i++)
        if (!pc_char_is(p->text[at + i], PC_CLASS_WORD, false))
            return false;
    return !pc_char_is(p->text[at], PC_CLASS_DIGIT, false);
}

/* The group with the name, or 0. */
static uint32_t find_group(const pc_parser *p, uint32_t at, uint32_t len)
{
    for (uint32_t g = 1; g <= p->tree->groups; g++)
        if (p->groups[g].name_len == len && len > 0 &&
            memcmp(p->text + p->groups[g].name_at, p->text + at, len * sizeof *p->text) == 0)
            return g;
    return 0;
}

static pc_status open_group(pc_parser *p, uint32_t name_at, uint32_t name_len, uint32_t *number)
{
    uint32_t needed = p->tree->groups + 2;
    if (needed > p->group_capacity) {
        uint32_t capacity = needed * 2;
        pc_group_info *grown = pc_realloc(p->groups, capacity * sizeof *grown);
        if (grown == NULL)
            return pc_fail_nomem(p->err, "the groups of a regular expression");
        p->groups = grown;
        p->group_capacity = capacity;
    }
    *number = ++p->tree->groups;
    p->groups[*number] = (pc_group_info){.name_at = name_at, .name_len = name_len, .open = true};
    return PC_OK;
}

static unsigned flag_of(uint32_t c)
{
    switch (c) {
    case 'i':
        return PC_FLAG_IGNORECASE;
    case 'm':
        return PC_FLAG_MULTILINE;
    case 's':
        return PC_FLAG_DOTALL;
    case 'x':
        return PC_FLAG_VERBOSE;
    case 'a':
        return PC_FLAG_ASCII;
    case 'u':
        return PC_FLAG_UNICODE;
    default:
        return 0;
    }
}

#define TYPE_FLAGS ((unsigned)(PC_FLAG_ASCII | PC_FLAG_UNICODE))

/* After "(?": letters, perhaps "-" and letters, then ")" or ":". Consumes that; *global tells which it was. */
static pc_status parse_flags(pc_parser *p, uint32_t start, unsigned *add, unsigned *remove, bool *global)
{
    *add = *remove = 0;
    *global = false;
    uint32_t c = pc_peek(p);
    while (c != '-') {
        unsigned flag = flag_of(c);
        if (c == 'L')
            return pc_parse_fail(p, p->at, "bad inline flags: 'L' works with bytes only, found");
        if (flag == 0)
            return pc_parse_fail(p, p->at, c == PC_NO_CHAR ? "missing -, : or )" : "unknown flag");
        *add |= flag;
        if ((flag & TYPE_FLAGS) && (*add & TYPE_FLAGS) != flag)
            return pc_parse_fail(p, p->at, "bad inline flags: 'a' and 'u' are incompatible, found");
        p->at++;
        c = pc_peek(p);
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
        c = pc_peek(p);
        unsigned flag = flag_of(c);
        if (flag == 0)
            return pc_parse_fail(p, p->at, c == PC_NO_CHAR ? "missing flag" : "unknown flag");
        if (flag & TYPE_FLAGS)
            return pc_parse_fail(p, p->at, "bad inline flags: 'a' and 'u' cannot be turned off, found");
        *remove |= flag;
        p->at++;
    } while (!pc_take(p, ':'));
    if (*add & *remove)
        return pc_parse_fail(p, start, "bad inline flags: flag turned on and off");
    return PC_OK;
}

/* The rest of a group: alternatives and ")". */
static pc_status parse_body(pc_parser *p, uint32_t start, pc_node **out)
{
    pc_status status = pc_parse_alternatives(p, false, out);
    if (status == PC_OK && !pc_take(p, ')'))
        return pc_parse_fail(p, start, "missing ), unterminated subpattern");
    return status;
}

/* A node of `kind` around the rest of the group. */
static pc_status wrap_body(pc_parser *p, pc_node_kind kind, uint32_t start, pc_node **out)
{
    pc_node *body = NULL;
    pc_status status = pc_parse_node(p, kind, out);
    if (status == PC_OK)
        status = parse_body(p, start, &body);
    if (status != PC_OK)
        return status;
    pc_node_append(*out, body);
    (*out)->least = body->least;
    (*out)->most = body->most;
    return PC_OK;
}

static pc_status parse_capture(pc_parser *p, uint32_t start, uint32_t name_at, uint32_t name_len, pc_node **out)
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

static pc_status parse_look(pc_parser *p, uint32_t start, bool behind, bool negative, pc_node **out)
{
    uint32_t outer = p->behind_groups;
    if (behind && outer == 0)
        p->behind_groups = p->tree->groups + 1;
    pc_status status = wrap_body(p, PC_NODE_LOOK, start, out);
    p->behind_groups = outer;
    if (status != PC_OK)
        return status;
    if (behind && (*out)->least != (*out)->most)
        return pc_parse_fail(p, start, "look-behind requires fixed-width pattern");
    (*out)->a = behind;
    (*out)->b = behind ? (*out)->least : 0;
    (*out)->flag = negative;
    (*out)->least = (*out)->most = 0;
    return PC_OK;
}

/* After "(?(". */
static pc_status parse_condition(pc_parser *p, uint32_t start, pc_node **out)
{
    uint32_t name_at = 0, name_len = 0, group = 0;
    pc_status status = parse_name(p, ')', &name_at, &name_len);
    if (status != PC_OK)
        return status;
    if (is_identifier(p, name_at, name_len)) {
        group = find_group(p, name_at, name_len);
        if (group == 0)
            return pc_parse_fail(p, name_at, "unknown group name");
    } else {
        for (uint32_t i = 0; i < name_len; i++) {
            if (!pc_is_digit(p->text[name_at + i]))
                return pc_parse_fail(p, name_at, "bad character in group name");
            group = group * 10 + (p->text[name_at + i] - '0');
            if (group > PC_PATTERN_BYTES)
                return pc_parse_fail(p, name_at, "invalid group reference");
        }
        if (group == 0)
            return pc_parse_fail(p, name_at, "bad group number");
        if (group > p->highest_condition) {
            p->highest_condition = group;
            p->condition_at = name_at;
        }
    }
    if (p->behind_groups != 0) {
        if (group > p->tree->groups || p->groups[group].open)
            return pc_parse_fail(p, name_at, "cannot refer to an open group");
        if (group >= p->behind_groups)
            return pc_parse_fail(p, name_at, "cannot refer to group defined in the same lookbehind subpattern");
    }
    pc_node *body = NULL;
    status = pc_parse_node(p, PC_NODE_COND, out);
    if (status == PC_OK)
        status = parse_body(p, start, &body);
    if (status != PC_OK)
        return status;
    pc_node *yes = body, *no = NULL;
    if (body->kind == PC_NODE_ALT) {
        yes = body->child;
        no = yes->next;
        if (no->next != NULL)
            return pc_parse_fail(p, start, "conditional backref with more than two branches");
        yes->next = NULL;
    }
    (*out)->a = group;
    pc_node_append(*out, yes);
    (*out)->least = yes->least;
    (*out)->most = yes->most;
    if (no != NULL)
        pc_node_append(*out, no);
    uint32_t least = no != NULL ? no->least : 0, most = no != NULL ? no->most : 0;
    if (least < (*out)->least)
        (*out)->least = least;
    if (most > (*out)->most)
        (*out)->most = most;
    return PC_OK;
}

/* After "(?P". */
static pc_status parse_python_group(pc_parser *p, uint32_t start, pc_node **out)
{
    uint32_t name_at = 0, name_len = 0;
    if (pc_take(p, '<')) {
        pc_status status = parse_name(p, '>', &name_at, &name_len);
        if (status != PC_OK)
            return status;
        if (!is_identifier(p, name_at, name_len))
            return pc_parse_fail(p, name_at, "bad character in group name");
        if (find_group(p, name_at, name_len) != 0)
            return pc_parse_fail(p, name_at, "redefinition of group name");
        return parse_capture(p, start, name_at, name_len, out);
    }
    if (pc_take(p, '=')) {
        pc_status status = parse_name(p, ')', &name_at, &name_len);
        if (status != PC_OK)
            return status;
        uint32_t group = find_group(p, name_at, name_len);
        if (group == 0)
            return pc_parse_fail(p, name_at, "unknown group name");
        return pc_parse_backref(p, group, name_at, out);
    }
    return pc_parse_fail(p, start, pc_peek(p) == PC_NO_CHAR ? "unexpected end of pattern" : "unknown extension (?P");
}

pc_status pc_skip_comment(pc_parser *p, uint32_t end)
{
    while (p->at < p->count && p->text[p->at] != end) {
        if (p->text[p->at] == '\\' && ++p->at == p->count)
            return pc_parse_fail(p, p->at - 1, "bad escape (end of pattern)");
        p->at++;
    }
    return PC_OK;
}

pc_status pc_parse_group(pc_parser *p, bool may_set_globals, pc_node **out)
{
    uint32_t start = p->at - 1;
    pc_status status;
    if (!pc_take(p, '?'))
        return parse_capture(p, start, 0, 0, out);
    uint32_t c = pc_peek(p);
    if (c == PC_NO_CHAR)
        return pc_parse_fail(p, p->at, "unexpected end of pattern");
    p->at++;
    switch (c) {
    case 'P':
        return parse_python_group(p, start, out);
    case ':':
        return wrap_body(p, PC_NODE_PLAIN, start, out);
    case '>':
        return wrap_body(p, PC_NODE_ATOMIC, start, out);
    case '#':
        if ((status = pc_skip_comment(p, ')')) != PC_OK)
            return status;
        return pc_take(p, ')') ? PC_OK : pc_parse_fail(p, start, "missing ), unterminated comment");
    case '=':
    case '!':
        return parse_look(p, start, false, c == '!', out);
    case '<': {
        uint32_t kind = pc_peek(p);
        if (kind != '=' && kind != '!')
            return pc_parse_fail(p, start, kind == PC_NO_CHAR ? "unexpected end of pattern" : "unknown extension (?<");
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
        return pc_parse_fail(p, start, "unknown extension after (?");
    unsigned add = 0, remove = 0, outer = p->flags;
    bool global = false;
    status = parse_flags(p, start, &add, &remove, &global);
    if (status != PC_OK)
        return status;
    if (global) {
        if (!may_set_globals)
            return pc_parse_fail(p, start, "global flags not at the start of the expression");
        p->flags |= add;
        if ((p->flags & TYPE_FLAGS) == TYPE_FLAGS)
            return pc_parse_fail(p, start, "bad inline flags: 'a' and 'u' are incompatible, found");
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
