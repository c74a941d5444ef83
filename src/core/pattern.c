/* Tree → program, the fast path, and the public calls.
 *
 * Most patterns in real files are names with escaped (or forgotten) dots, such
 * as "layer\.5\.attention\.self\.query": a plain sequence of characters, of
 * which some may be any.  Those are compared directly and get no program. */
#include "pattern_internal.h"

#include <stdio.h>
#include <string.h>

#define ANY_BUT_NEWLINE UINT32_MAX

struct pc_pattern {
    char *source;
    size_t source_len;
    uint32_t *fixed; /* the sequence, or NULL */
    uint32_t fixed_len;
    pc_program plain;  /* of the text itself */
    pc_program suffix; /* of (.*\.)?(text)$ */
    char *suffix_error; /* why there is no suffix program: some texts are a pattern only by themselves */
    pc_pool pool;
};

pc_status pc_pattern_fail(pc_error *err, const char *source, size_t source_len, const char *fmt, ...)
{
    char what[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(what, sizeof what, fmt, args);
    va_end(args);
    size_t shown = source_len <= 200 ? source_len : 200;
    while (shown < source_len && shown > 0 && ((unsigned char)source[shown] & 0xC0u) == 0x80u)
        shown--;
    return pc_fail(err, PC_ERR_VALUE, "the regular expression '%.*s%s' %s", (int)shown, source,
                   shown < source_len ? "…" : "", what);
}

/* ------------------------------------------------------------ tree → program */

typedef struct emitter {
    pc_program *program;
    const char *source;
    size_t source_len;
    pc_error *err;
} emitter;

static pc_status emit(emitter *e, pc_op op, unsigned mode, uint32_t a, uint32_t b, uint32_t *where)
{
    pc_program *program = e->program;
    if (program->count == program->capacity) {
        uint32_t capacity = program->capacity ? program->capacity * 2 : 32;
        pc_inst *grown = pc_realloc(program->code, capacity * sizeof *grown);
        if (grown == NULL)
            return pc_fail_nomem(e->err, "a regular expression");
        program->code = grown;
        program->capacity = capacity;
    }
    if (where != NULL)
        *where = program->count;
    program->code[program->count++] = (pc_inst){.op = (uint8_t)op, .mode = (uint8_t)mode, .a = a, .b = b};
    return PC_OK;
}

static pc_status emit_node(emitter *e, const pc_node *node);

static pc_status emit_children(emitter *e, const pc_node *node)
{
    pc_status status = PC_OK;
    for (const pc_node *child = node->child; child != NULL && status == PC_OK; child = child->next)
        status = emit_node(e, child);
    return status;
}

static pc_status emit_alternatives(emitter *e, const pc_node *node)
{
    /* The jumps to the end are chained through their targets until the end is known. */
    uint32_t chain = UINT32_MAX;
    for (const pc_node *child = node->child; child != NULL; child = child->next) {
        uint32_t split = 0;
        pc_status status = PC_OK;
        if (child->next != NULL)
            status = emit(e, PC_OP_SPLIT, 0, 0, 0, &split);
        if (status == PC_OK)
            status = emit_node(e, child);
        if (status == PC_OK && child->next != NULL) {
            status = emit(e, PC_OP_JUMP, 0, chain, 0, &chain);
            if (status == PC_OK)
                e->program->code[split].a = e->program->count;
        }
        if (status != PC_OK)
            return status;
    }
    while (chain != UINT32_MAX) {
        uint32_t next = e->program->code[chain].a;
        e->program->code[chain].a = e->program->count;
        chain = next;
    }
    return PC_OK;
}

/* The node when it is one one-character test, perhaps in groups without number, else NULL. */
static const pc_node *single_test(const pc_node *node)
{
    while ((node->kind == PC_NODE_PLAIN || node->kind == PC_NODE_CAT) && node->child != NULL &&
           node->child->next == NULL)
        node = node->child;
    bool single = node->kind == PC_NODE_CHAR || node->kind == PC_NODE_ANY || node->kind == PC_NODE_SET;
    return single ? node : NULL;
}

static pc_status emit_around(emitter *e, pc_op before, const pc_node *node, pc_op after)
{
    pc_status status = emit(e, before, 0, 0, 0, NULL);
    if (status == PC_OK)
        status = emit_node(e, node);
    return status == PC_OK ? emit(e, after, 0, 0, 0, NULL) : status;
}

static pc_status add_loop(emitter *e, const pc_node *node, uint32_t *index)
{
    pc_program *program = e->program;
    if (program->loop_count == UINT16_MAX)
        return pc_pattern_fail(e->err, e->source, e->source_len, "has too many repeats");
    if (program->loop_count == program->loop_capacity) {
        uint32_t capacity = program->loop_capacity ? program->loop_capacity * 2 : 8;
        pc_loop *grown = pc_realloc(program->loops, capacity * sizeof *grown);
        if (grown == NULL)
            return pc_fail_nomem(e->err, "a regular expression");
        program->loops = grown;
        program->loop_capacity = capacity;
    }
    program->loops[program->loop_count] = (pc_loop){node->a, node->b};
    *index = program->loop_count++;
    return PC_OK;
}

static pc_status emit_repeat(emitter *e, const pc_node *node)
{
    const pc_node *test = single_test(node->child);
    if (test != NULL) {
        pc_status status = emit(e, PC_OP_ONE, node->mode, node->a, node->b, NULL);
        return status == PC_OK ? emit_node(e, test) : status;
    }
    bool possessive = node->mode == PC_POSSESSIVE;
    uint32_t index = 0, head = 0;
    pc_status status = add_loop(e, node, &index);
    uint32_t registers = 2 * (e->program->groups + 1) + 2 * index;
    if (status == PC_OK && possessive)
        status = emit(e, PC_OP_ATOMIC, 0, 0, 0, NULL);
    if (status == PC_OK)
        status = emit(e, PC_OP_LOOP_START, 0, registers, 0, NULL);
    if (status == PC_OK)
        status = emit(e, PC_OP_LOOP, possessive ? PC_GREEDY : node->mode, registers, 0, &head);
    if (status == PC_OK) /* each round of a possessive loop is final by itself, as in re */
        status = possessive ? emit_around(e, PC_OP_ATOMIC, node->child, PC_OP_ATOMIC_END) : emit_node(e, node->child);
    if (status == PC_OK)
        status = emit(e, PC_OP_JUMP, 0, head, 0, NULL);
    if (status == PC_OK)
        status = emit(e, PC_OP_LOOP_AGAIN, 0, head, 0, NULL);
    if (status == PC_OK) {
        e->program->code[head].loop = (uint16_t)index;
        e->program->code[head].b = e->program->count;
        if (possessive)
            status = emit(e, PC_OP_ATOMIC_END, 0, 0, 0, NULL);
    }
    return status;
}

static pc_status emit_condition(emitter *e, const pc_node *node)
{
    uint32_t test = 0, jump = 0;
    const pc_node *yes = node->child, *no = yes->next;
    pc_status status = emit(e, PC_OP_COND, 0, node->a, 0, &test);
    if (status == PC_OK)
        status = emit_node(e, yes);
    if (status == PC_OK && no != NULL)
        status = emit(e, PC_OP_JUMP, 0, 0, 0, &jump);
    if (status != PC_OK)
        return status;
    e->program->code[test].b = e->program->count;
    if (no != NULL) {
        status = emit_node(e, no);
        e->program->code[jump].a = e->program->count;
    }
    return status;
}

static pc_status emit_node(emitter *e, const pc_node *node)
{
    pc_status status = PC_OK;
    switch (node->kind) {
    case PC_NODE_CHAR:
        return node->fold == PC_FOLD_NONE ? emit(e, PC_OP_CHAR, 0, node->a, 0, NULL)
                                          : emit(e, PC_OP_CHAR_FOLD, node->fold, node->a, 0, NULL);
    case PC_NODE_ANY:
        return emit(e, node->flag ? PC_OP_ANY_CHAR : PC_OP_ANY, 0, 0, 0, NULL);
    case PC_NODE_SET:
        return emit(e, PC_OP_SET, 0, node->a, 0, NULL);
    case PC_NODE_AT:
        return emit(e, PC_OP_AT, node->flag, node->a, 0, NULL);
    case PC_NODE_CAT:
    case PC_NODE_PLAIN:
        return emit_children(e, node);
    case PC_NODE_ALT:
        return emit_alternatives(e, node);
    case PC_NODE_GROUP:
        status = emit(e, PC_OP_SAVE, 0, 2 * node->a, 0, NULL);
        if (status == PC_OK)
            status = emit_children(e, node);
        return status == PC_OK ? emit(e, PC_OP_SAVE, 0, 2 * node->a + 1, 0, NULL) : status;
    case PC_NODE_ATOMIC:
        return emit_around(e, PC_OP_ATOMIC, node->child, PC_OP_ATOMIC_END);
    case PC_NODE_REPEAT:
        return emit_repeat(e, node);
    case PC_NODE_LOOK: {
        uint32_t look = 0;
        status = emit(e, PC_OP_LOOK, node->flag, 0, node->b, &look);
        if (status == PC_OK)
            status = emit_children(e, node);
        if (status == PC_OK)
            status = emit(e, PC_OP_LOOK_END, 0, 0, 0, NULL);
        if (status == PC_OK)
            e->program->code[look].a = e->program->count;
        return status;
    }
    case PC_NODE_BACKREF:
        return emit(e, PC_OP_BACKREF, node->fold, node->a, 0, NULL);
    case PC_NODE_COND:
        return emit_condition(e, node);
    }
    return status;
}

static void free_program(pc_program *program)
{
    pc_free(program->code);
    pc_free(program->loops);
    *program = (pc_program){0};
}

static pc_status build(pc_pattern *pattern, const uint32_t *text, size_t count, pc_program *program, pc_error *err)
{
    pc_pool scratch;
    pc_pool_init(&scratch);
    pc_tree tree = {.keep = &pattern->pool, .scratch = &scratch};
    pc_status status = pc_pattern_parse(text, count, pattern->source, pattern->source_len, &tree, err);
    if (status == PC_OK) {
        emitter e = {.program = program, .source = pattern->source, .source_len = pattern->source_len, .err = err};
        program->groups = tree.groups;
        program->sets = tree.sets;
        status = emit_node(&e, tree.root);
        if (status == PC_OK)
            status = emit(&e, PC_OP_MATCH, 0, 0, 0, NULL);
        program->registers = 2 * (tree.groups + 1) + 2 * program->loop_count;
    }
    pc_pool_free(&scratch);
    return status;
}

/* ----------------------------------------------------------------- compiling */

/* If text is characters, escaped punctuation and dots only: the sequence, into `out` (as long as text). */
static bool fixed_sequence(const uint32_t *text, size_t count, uint32_t *out, uint32_t *out_len)
{
    uint32_t n = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t c = text[i];
        if (c == '\\') {
            if (++i == count || text[i] >= 0x80 || (text[i] != '_' && pc_char_is(text[i], PC_CLASS_WORD, true)))
                return false;
            out[n++] = text[i];
        } else if (c == '.') {
            out[n++] = ANY_BUT_NEWLINE;
        } else if (c < 0x80 && c != 0 && strchr("^$*+?{}[]|()", (int)c) != NULL) {
            return false;
        } else {
            out[n++] = c;
        }
    }
    *out_len = n;
    return true;
}

static pc_status decode(const pc_pattern *pattern, uint32_t *out, size_t *count, pc_error *err)
{
    size_t at = 0, n = 0;
    while (at < pattern->source_len)
        if (!pc_utf8_next(pattern->source, pattern->source_len, &at, &out[n++]))
            return pc_fail(err, PC_ERR_VALUE, "a regular expression is not valid UTF-8 (byte %zu)", at);
    *count = n;
    return PC_OK;
}

static pc_status compile_into(pc_pattern *pattern, uint32_t *buffer, pc_error *err)
{
    /* buffer: "(.*\.)?(" text ")$"; the text alone is a part of it */
    static const char before[] = "(.*\\.)?(", after[] = ")$";
    enum { BEFORE = sizeof before - 1, AFTER = sizeof after - 1 };
    uint32_t *text = buffer + BEFORE;
    size_t count = 0;
    pc_status status = decode(pattern, text, &count, err);
    if (status != PC_OK)
        return status;
    pattern->fixed = pc_pool_array(&pattern->pool, count, sizeof *pattern->fixed);
    if (pattern->fixed == NULL)
        return pc_fail_nomem(err, "a regular expression");
    if (fixed_sequence(text, count, pattern->fixed, &pattern->fixed_len))
        return PC_OK;
    pattern->fixed = NULL;
    status = build(pattern, text, count, &pattern->plain, err);
    if (status != PC_OK)
        return status;
    for (size_t i = 0; i < BEFORE; i++)
        buffer[i] = (uint32_t)before[i];
    for (size_t i = 0; i < AFTER; i++)
        text[count + i] = (uint32_t)after[i];
    pc_error reason;
    status = build(pattern, buffer, BEFORE + count + AFTER, &pattern->suffix, &reason);
    if (status == PC_ERR_VALUE) {
        free_program(&pattern->suffix);
        pattern->suffix_error = pc_pool_strndup(&pattern->pool, reason.text, strlen(reason.text));
        status = pattern->suffix_error != NULL ? PC_OK : PC_ERR_NOMEM;
    }
    return status == PC_ERR_NOMEM ? pc_fail_nomem(err, "a regular expression") : status;
}

pc_status pc_pattern_compile(const char *text, size_t len, pc_pattern **out, pc_error *err)
{
    *out = NULL;
    if (len > PC_PATTERN_BYTES)
        return pc_pattern_fail(err, text, len, "is longer than %d bytes", PC_PATTERN_BYTES);
    pc_pattern *pattern = pc_calloc(1, sizeof *pattern);
    uint32_t *buffer = pc_malloc((len + 16) * sizeof *buffer);
    pc_status status = PC_ERR_NOMEM;
    if (pattern != NULL && buffer != NULL) {
        pc_pool_init(&pattern->pool);
        pattern->source = pc_pool_strndup(&pattern->pool, text, len);
        pattern->source_len = len;
        if (pattern->source != NULL)
            status = compile_into(pattern, buffer, err);
        else
            pc_fail_nomem(err, "a regular expression");
    } else {
        pc_fail_nomem(err, "a regular expression");
    }
    pc_free(buffer);
    if (status != PC_OK) {
        pc_pattern_free(pattern);
        return status;
    }
    *out = pattern;
    return PC_OK;
}

void pc_pattern_free(pc_pattern *pattern)
{
    if (pattern == NULL)
        return;
    free_program(&pattern->plain);
    free_program(&pattern->suffix);
    pc_pool_free(&pattern->pool);
    pc_free(pattern);
}

/* ------------------------------------------------------------------ matching */

#define INLINE_CHARACTERS 512

typedef struct decoded {
    uint32_t *text;
    uint32_t len;
    uint32_t inline_text[INLINE_CHARACTERS];
} decoded;

static pc_status decode_subject(decoded *d, const char *subject, size_t len, pc_error *err)
{
    d->text = d->inline_text;
    d->len = 0;
    if (len > PC_PATTERN_STEPS)
        return pc_fail(err, PC_ERR_VALUE, "a name of %zu bytes is too long to compare with a regular expression", len);
    if (len > INLINE_CHARACTERS) {
        d->text = pc_malloc(len * sizeof *d->text);
        if (d->text == NULL)
            return pc_fail_nomem(err, "a name to match");
    }
    for (size_t at = 0; at < len;)
        if (!pc_utf8_next(subject, len, &at, &d->text[d->len++])) {
            if (d->text != d->inline_text)
                pc_free(d->text);
            return pc_fail(err, PC_ERR_VALUE, "a name to match is not valid UTF-8 (byte %zu)", at);
        }
    return PC_OK;
}

static void free_subject(decoded *d)
{
    if (d->text != d->inline_text)
        pc_free(d->text);
}

static bool fixed_at(const pc_pattern *pattern, const uint32_t *text)
{
    for (uint32_t i = 0; i < pattern->fixed_len; i++)
        if (pattern->fixed[i] != text[i] && (pattern->fixed[i] != ANY_BUT_NEWLINE || text[i] == '\n'))
            return false;
    return true;
}

/* Does the sequence end just before `end`, at the start or after a first line's "."? */
static bool fixed_ends(const pc_pattern *pattern, const uint32_t *text, uint32_t end)
{
    if (pattern->fixed_len > end)
        return false;
    uint32_t start = end - pattern->fixed_len;
    if (start > 0) {
        if (text[start - 1] != '.')
            return false;
        for (uint32_t i = 0; i < start; i++)
            if (text[i] == '\n')
                return false;
    }
    return fixed_at(pattern, text + start);
}

pc_status pc_pattern_fullmatch(const pc_pattern *pattern, const char *subject, size_t len, bool *matched, pc_error *err)
{
    decoded d;
    uint32_t group[2];
    pc_status status = decode_subject(&d, subject, len, err);
    if (status != PC_OK)
        return status;
    if (pattern->fixed != NULL)
        *matched = d.len == pattern->fixed_len && fixed_at(pattern, d.text);
    else
        status = pc_program_run(&pattern->plain, PC_ANCHOR_FULL, d.text, d.len, pattern->source, pattern->source_len,
                                matched, group, err);
    free_subject(&d);
    return status;
}

pc_status pc_pattern_match_suffix(const pc_pattern *pattern, const char *subject, size_t len, bool *matched,
                                  pc_error *err)
{
    decoded d;
    uint32_t group[2];
    if (pattern->suffix_error != NULL)
        return pc_fail(err, PC_ERR_VALUE, "%s (as part of (.*\\.)?(…)$)", pattern->suffix_error);
    pc_status status = decode_subject(&d, subject, len, err);
    if (status != PC_OK)
        return status;
    if (pattern->fixed != NULL) /* "$" also matches before a newline that ends the text */
        *matched = fixed_ends(pattern, d.text, d.len) ||
                   (d.len > 0 && d.text[d.len - 1] == '\n' && fixed_ends(pattern, d.text, d.len - 1));
    else
        status = pc_program_run(&pattern->suffix, PC_ANCHOR_START, d.text, d.len, pattern->source, pattern->source_len,
                                matched, group, err);
    free_subject(&d);
    return status;
}

/* Bytes of the first n characters of valid UTF-8. */
static size_t bytes_of(const char *text, uint32_t n)
{
    size_t at = 0;
    for (; n > 0; n--) {
        unsigned char lead = (unsigned char)text[at];
        at += lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    }
    return at;
}

pc_status pc_pattern_search(const pc_pattern *pattern, const char *subject, size_t len, bool *matched,
                            const char **group_text, size_t *group_len, pc_error *err)
{
    decoded d;
    uint32_t group[2] = {UINT32_MAX, UINT32_MAX};
    *group_text = NULL;
    *group_len = 0;
    pc_status status = decode_subject(&d, subject, len, err);
    if (status != PC_OK)
        return status;
    if (pattern->fixed != NULL) {
        *matched = false;
        for (uint32_t start = 0; !*matched && start + pattern->fixed_len <= d.len; start++)
            *matched = fixed_at(pattern, d.text + start);
    } else {
        status = pc_program_run(&pattern->plain, PC_ANCHOR_SEARCH, d.text, d.len, pattern->source, pattern->source_len,
                                matched, group, err);
    }
    if (status == PC_OK && group[0] != UINT32_MAX) {
        size_t first = bytes_of(subject, group[0]);
        *group_text = subject + first;
        *group_len = bytes_of(*group_text, group[1] - group[0]);
    }
    free_subject(&d);
    return status;
}
