/* [...]: its items, and the sorted, disjoint ranges that they become. */
#include <string.h>

#include "pattern_parser.h"

typedef struct range_list {
    pc_char_range *items;
    size_t count, capacity;
} range_list;

static pc_status add_range(pc_parser *p, range_list *list, uint32_t first, uint32_t last)
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
static pc_status fold_ranges(pc_parser *p, range_list *list, pc_fold fold)
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
static pc_status finish_set(pc_parser *p, range_list *list, unsigned classes, bool negate, uint32_t *index)
{
    pc_tree *tree = p->tree;
    pc_fold fold = pc_parse_fold(p);
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
                                           .ascii = (p->flags & PC_FLAG_ASCII) != 0,
                                           .negate = negate,
                                           .fold = fold};
    *index = (uint32_t)tree->set_count++;
    return PC_OK;
}

/* One item inside [...]: a character, or a class (then *classes is not 0). */
static pc_status set_item(pc_parser *p, uint32_t set_start, uint32_t *c, unsigned *classes)
{
    *classes = 0;
    uint32_t start = p->at;
    uint32_t this = pc_peek(p);
    if (this == PC_NO_CHAR)
        return pc_parse_fail(p, set_start, "unterminated character set");
    p->at++;
    *c = this;
    if (this != '\\')
        return PC_OK;
    uint32_t letter = pc_peek(p);
    if (letter == PC_NO_CHAR)
        return pc_parse_fail(p, start, "bad escape (end of pattern)");
    p->at++;
    *classes = pc_class_escape(letter);
    if (*classes != 0)
        return PC_OK;
    if (letter == 'b') {
        *c = '\b';
        return PC_OK;
    }
    if (pc_is_octal(letter)) {
        uint32_t value = letter - '0';
        for (int i = 0; i < 2 && p->at < p->count && pc_is_octal(p->text[p->at]); i++)
            value = value * 8 + (p->text[p->at++] - '0');
        if (value > 0377)
            return pc_parse_fail(p, start, "octal escape value outside of range 0-0o377");
        *c = value;
        return PC_OK;
    }
    return pc_literal_escape(p, letter, start, c);
}

static pc_status parse_set_items(pc_parser *p, range_list *list, unsigned *classes, uint32_t start)
{
    for (bool first = true;; first = false) {
        if (!first && pc_take(p, ']'))
            return PC_OK;
        uint32_t low = 0, high = 0, item_at = p->at;
        unsigned low_class = 0, high_class = 0;
        pc_status status = set_item(p, start, &low, &low_class);
        if (status != PC_OK)
            return status;
        if (pc_take(p, '-')) {
            if (pc_take(p, ']')) {
                *classes |= low_class;
                if (low_class == 0 && (status = add_range(p, list, low, low)) != PC_OK)
                    return status;
                return add_range(p, list, '-', '-');
            }
            if ((status = set_item(p, start, &high, &high_class)) != PC_OK)
                return status;
            if (low_class != 0 || high_class != 0 || high < low)
                return pc_parse_fail(p, item_at, "bad character range");
            if ((status = add_range(p, list, low, high)) != PC_OK)
                return status;
            continue;
        }
        *classes |= low_class;
        if (low_class == 0 && (status = add_range(p, list, low, low)) != PC_OK)
            return status;
    }
}

pc_status pc_parse_set(pc_parser *p, pc_node **out)
{
    uint32_t start = p->at - 1;
    bool negate = pc_take(p, '^');
    range_list list = {0};
    unsigned classes = 0;
    pc_status status = parse_set_items(p, &list, &classes, start);
    if (status == PC_OK)
        status = pc_parse_node(p, PC_NODE_SET, out);
    if (status == PC_OK)
        status = finish_set(p, &list, classes, negate, &(*out)->a);
    if (status == PC_OK)
        (*out)->least = (*out)->most = 1;
    pc_free(list.items);
    return status;
}

pc_status pc_parse_class(pc_parser *p, unsigned classes, pc_node **out)
{
    range_list none = {0};
    pc_status status = pc_parse_node(p, PC_NODE_SET, out);
    if (status == PC_OK)
        status = finish_set(p, &none, classes, false, &(*out)->a);
    if (status == PC_OK)
        (*out)->least = (*out)->most = 1;
    pc_free(none.items);
    return status;
}
