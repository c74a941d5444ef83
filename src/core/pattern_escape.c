/* Escapes, and the nodes of single characters, positions and references. */
#include "pattern_parser.h"

static bool is_letter(uint32_t c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

static int hex_value(uint32_t c)
{
    if (pc_is_digit(c))
        return (int)(c - '0');
    if (c >= 'a' && c <= 'f')
        return (int)(c - 'a') + 10;
    if (c >= 'A' && c <= 'F')
        return (int)(c - 'A') + 10;
    return -1;
}

/* The character of \a \f \n \r \t \v \\, or PC_NO_CHAR. \b is the caller's: it means two things. */
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
        return PC_NO_CHAR;
    }
}

unsigned pc_class_escape(uint32_t c)
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
static pc_status hex_escape(pc_parser *p, uint32_t letter, uint32_t start, uint32_t *c)
{
    int digits = letter == 'x' ? 2 : letter == 'u' ? 4 : 8;
    uint32_t value = 0;
    for (int i = 0; i < digits; i++) {
        int digit = p->at < p->count ? hex_value(p->text[p->at]) : -1;
        if (digit < 0)
            return pc_parse_fail(p, start, "incomplete escape");
        value = value << 4 | (uint32_t)digit;
        p->at++;
    }
    if (value > 0x10FFFF)
        return pc_parse_fail(p, start, "bad escape");
    *c = value;
    return PC_OK;
}

pc_status pc_literal_escape(pc_parser *p, uint32_t c, uint32_t start, uint32_t *out)
{
    if (simple_escape(c) != PC_NO_CHAR) {
        *out = simple_escape(c);
        return PC_OK;
    }
    if (c == 'x' || c == 'u' || c == 'U')
        return hex_escape(p, c, start, out);
    if (c == 'N')
        return pc_parse_fail(p, start, "named characters (\\N{...}) are not supported: write the character itself, found");
    if (is_letter(c) || pc_is_digit(c))
        return pc_parse_fail(p, start, "bad escape");
    *out = c;
    return PC_OK;
}

pc_status pc_parse_char(pc_parser *p, uint32_t c, pc_node **out)
{
    pc_status status = pc_parse_node(p, PC_NODE_CHAR, out);
    if (status != PC_OK)
        return status;
    (*out)->fold = pc_parse_fold(p);
    (*out)->a = pc_char_fold(c, (*out)->fold);
    (*out)->least = (*out)->most = 1;
    return PC_OK;
}

pc_status pc_parse_at(pc_parser *p, pc_at at, pc_node **out)
{
    pc_status status = pc_parse_node(p, PC_NODE_AT, out);
    if (status != PC_OK)
        return status;
    (*out)->a = at;
    (*out)->flag = (p->flags & PC_FLAG_ASCII) != 0;
    return PC_OK;
}

pc_status pc_parse_backref(pc_parser *p, uint32_t group, uint32_t start, pc_node **out)
{
    if (p->groups[group].open)
        return pc_parse_fail(p, start, "cannot refer to an open group");
    if (p->behind_groups != 0 && group >= p->behind_groups)
        return pc_parse_fail(p, start, "cannot refer to group defined in the same lookbehind subpattern");
    pc_status status = pc_parse_node(p, PC_NODE_BACKREF, out);
    if (status != PC_OK)
        return status;
    (*out)->a = group;
    (*out)->fold = pc_parse_fold(p);
    (*out)->least = p->groups[group].least;
    (*out)->most = p->groups[group].most;
    return PC_OK;
}

pc_status pc_parse_escape(pc_parser *p, pc_node **out)
{
    uint32_t start = p->at - 1;
    uint32_t c = pc_peek(p);
    if (c == PC_NO_CHAR)
        return pc_parse_fail(p, start, "bad escape (end of pattern)");
    p->at++;
    unsigned classes = pc_class_escape(c);
    if (classes != 0)
        return pc_parse_class(p, classes, out);
    switch (c) {
    case 'A':
        return pc_parse_at(p, PC_AT_START, out);
    case 'Z':
        return pc_parse_at(p, PC_AT_END, out);
    case 'b':
        return pc_parse_at(p, PC_AT_BOUNDARY, out);
    case 'B':
        return pc_parse_at(p, PC_AT_NOT_BOUNDARY, out);
    default:
        break;
    }
    if (c == '0') {
        uint32_t value = 0;
        for (int i = 0; i < 2 && p->at < p->count && pc_is_octal(p->text[p->at]); i++)
            value = value * 8 + (p->text[p->at++] - '0');
        return pc_parse_char(p, value, out);
    }
    if (pc_is_digit(c)) {
        uint32_t number = c - '0';
        if (p->at < p->count && pc_is_digit(p->text[p->at])) {
            uint32_t second = p->text[p->at++];
            number = number * 10 + (second - '0');
            if (pc_is_octal(c) && pc_is_octal(second) && p->at < p->count && pc_is_octal(p->text[p->at])) {
                uint32_t value = ((c - '0') * 8 + (second - '0')) * 8 + (p->text[p->at++] - '0');
                if (value > 0377)
                    return pc_parse_fail(p, start, "octal escape value outside of range 0-0o377");
                return pc_parse_char(p, value, out);
            }
        }
        if (number > p->tree->groups)
            return pc_parse_fail(p, start, "invalid group reference");
        return pc_parse_backref(p, number, start, out);
    }
    uint32_t literal = 0;
    pc_status status = pc_literal_escape(p, c, start, &literal);
    return status == PC_OK ? pc_parse_char(p, literal, out) : status;
}
