#include "pattern_internal.h"

static bool in_ranges(const pc_char_range *ranges, size_t count, uint32_t c)
{
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (c < ranges[middle].first)
            high = middle;
        else if (c > ranges[middle].last)
            low = middle + 1;
        else
            return true;
    }
    return false;
}

uint32_t pc_char_lower(uint32_t c, pc_fold fold)
{
    if (c < 0x80 || fold == PC_FOLD_ASCII)
        return c >= 'A' && c <= 'Z' ? c + 32 : c;
    size_t low = 0, high = pc_lower_runs_count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const pc_lower_run *run = &pc_lower_runs[middle];
        if (c < run->first)
            high = middle;
        else if (c > run->last)
            low = middle + 1;
        else
            return (c - run->first) % run->stride == 0 ? (uint32_t)((int64_t)c + run->delta) : c;
    }
    return c;
}

uint32_t pc_char_fold(uint32_t c, pc_fold fold)
{
    if (fold == PC_FOLD_NONE)
        return c;
    c = pc_char_lower(c, fold);
    if (c < 0x80 || fold == PC_FOLD_ASCII)
        return c;
    size_t low = 0, high = pc_case_twins_count; /* pairs (character, representative), sorted by the first */
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (c < pc_case_twins[middle].first)
            high = middle;
        else if (c > pc_case_twins[middle].first)
            low = middle + 1;
        else
            return pc_case_twins[middle].last;
    }
    return c;
}

static bool ascii_word(uint32_t c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

bool pc_char_is(uint32_t c, unsigned one_class, bool ascii)
{
    bool wide = c >= 0x80 && !ascii;
    switch (one_class) {
    case PC_CLASS_WORD:
        return wide ? in_ranges(pc_word_ranges, pc_word_ranges_count, c) : ascii_word(c);
    case PC_CLASS_DIGIT:
        return wide ? in_ranges(pc_digit_ranges, pc_digit_ranges_count, c) : c >= '0' && c <= '9';
    case PC_CLASS_SPACE:
        /* FS, GS, RS and US are white space to str.isspace, and so to re unless (?a) is on */
        return ascii ? c == ' ' || (c >= '\t' && c <= '\r') : in_ranges(pc_space_ranges, pc_space_ranges_count, c);
    case PC_CLASS_NOT_WORD:
    case PC_CLASS_NOT_DIGIT:
    case PC_CLASS_NOT_SPACE:
        return !pc_char_is(c, one_class >> 1, ascii);
    default:
        return false;
    }
}

bool pc_set_has(const pc_set *set, uint32_t c)
{
    bool found = in_ranges(set->ranges, set->count, pc_char_fold(c, set->fold));
    for (unsigned bit = 1; !found && bit <= set->classes; bit <<= 1)
        if (set->classes & bit)
            found = pc_char_is(c, bit, set->ascii);
    return found != set->negate;
}
