/* Runs a program: backtracking over a stack of its own, so that neither the
 * pattern nor the subject decides how deep the C stack gets.
 *
 * The stack holds what to do on failure, newest last: another place to go on
 * (CHOICE), fewer or more rounds of a one-character loop (SHORTER, LONGER), a
 * register to put back (UNDO), or the border of a lookaround or atomic group
 * (BORDER).  Every instruction, every character that a loop consumes and every
 * entry that is moved counts as a step. */
#include "pattern_internal.h"

#include <string.h>

typedef enum entry_kind { CHOICE, SHORTER, LONGER, UNDO, BORDER } entry_kind;

typedef struct entry {
    uint32_t kind;
    uint32_t pc; /* CHOICE, SHORTER: where to go on; LONGER, BORDER: the instruction itself; UNDO: register */
    uint32_t at; /* position; UNDO: old value */
    uint32_t limit; /* SHORTER: least position; LONGER: rounds left; BORDER: the border outside this one */
} entry;

#define INLINE_ENTRIES 64
#define INLINE_REGISTERS 32
#define UNSET UINT32_MAX

typedef struct machine {
    const pc_program *program;
    const uint32_t *subject;
    uint32_t len;
    bool full;
    int64_t steps;
    entry *stack;
    uint32_t top, capacity;
    uint32_t border; /* index of the innermost BORDER, or UNSET */
    uint32_t *registers;
    const char *source;
    size_t source_len;
    pc_error *err;
    entry inline_stack[INLINE_ENTRIES];
    uint32_t inline_registers[INLINE_REGISTERS];
} machine;

static pc_status too_much(machine *m, const char *what)
{
    return pc_pattern_fail(m->err, m->source, m->source_len,
                           "needs more than %s to compare with a name of %u characters: write it without nested or "
                           "overlapping repeats",
                           what, (unsigned)m->len);
}

static pc_status grow(machine *m)
{
    if (m->capacity >= PC_PATTERN_STACK)
        return too_much(m, "the allowed memory");
    uint32_t capacity = m->capacity * 4;
    entry *larger = pc_malloc(capacity * sizeof *larger);
    if (larger == NULL)
        return pc_fail_nomem(m->err, "a regular expression match");
    memcpy(larger, m->stack, m->top * sizeof *larger);
    if (m->stack != m->inline_stack)
        pc_free(m->stack);
    m->stack = larger;
    m->capacity = capacity;
    return PC_OK;
}

static inline pc_status push(machine *m, entry e)
{
    if (m->top == m->capacity) {
        pc_status status = grow(m);
        if (status != PC_OK)
            return status;
    }
    m->stack[m->top++] = e;
    return PC_OK;
}

static inline pc_status set_register(machine *m, uint32_t reg, uint32_t value)
{
    pc_status status = push(m, (entry){.kind = UNDO, .pc = reg, .at = m->registers[reg]});
    m->registers[reg] = value;
    return status;
}

static bool one_matches(const machine *m, const pc_inst *inst, uint32_t c)
{
    switch ((pc_op)inst->op) {
    case PC_OP_CHAR:
        return c == inst->a;
    case PC_OP_CHAR_FOLD:
        return pc_char_fold(c, (pc_fold)inst->mode) == inst->a;
    case PC_OP_ANY:
        return c != '\n';
    case PC_OP_ANY_CHAR:
        return true;
    default:
        return pc_set_has(&m->program->sets[inst->a], c);
    }
}

static bool word_at(const machine *m, uint32_t at, bool ascii)
{
    return at < m->len && pc_char_is(m->subject[at], PC_CLASS_WORD, ascii);
}

static bool at_holds(const machine *m, const pc_inst *inst, uint32_t at)
{
    const uint32_t *s = m->subject;
    switch ((pc_at)inst->a) {
    case PC_AT_START:
        return at == 0;
    case PC_AT_LINE_START:
        return at == 0 || s[at - 1] == '\n';
    case PC_AT_END:
        return at == m->len;
    case PC_AT_LAST:
        return at == m->len || (at + 1 == m->len && s[at] == '\n');
    case PC_AT_LINE_END:
        return at == m->len || s[at] == '\n';
    case PC_AT_BOUNDARY:
    case PC_AT_NOT_BOUNDARY: {
        if (m->len == 0) /* re: neither \b nor \B matches in an empty string */
            return false;
        bool edge = (at > 0 && word_at(m, at - 1, inst->mode)) != word_at(m, at, inst->mode);
        return edge == (inst->a == PC_AT_BOUNDARY);
    }
    }
    return false;
}

/* Close the innermost border: forget the choices inside it, keep the undo entries. */
static void cut(machine *m)
{
    uint32_t to = m->border, outer = m->stack[to].limit;
    for (uint32_t from = to + 1; from < m->top; from++)
        if (m->stack[from].kind == UNDO)
            m->stack[to++] = m->stack[from];
    m->steps -= m->top - m->border;
    m->top = to;
    m->border = outer;
}

/* The same, with everything inside it undone. */
static void unwind(machine *m)
{
    uint32_t outer = m->stack[m->border].limit;
    m->steps -= m->top - m->border;
    while (m->top > m->border) {
        const entry *e = &m->stack[--m->top];
        if (e->kind == UNDO)
            m->registers[e->pc] = e->at;
    }
    m->border = outer;
}

/* The one-character loop at `pc`. Returns false when it fails. */
static bool run_one(machine *m, uint32_t pc, uint32_t *at, pc_status *status)
{
    const pc_inst *loop = &m->program->code[pc], *test = loop + 1;
    uint32_t left = m->len - *at, rounds = 0;
    uint32_t most = loop->mode == PC_LAZY ? loop->a : loop->b;
    if (most > left)
        most = left;
    if (loop->a > left)
        return false;
    if (test->op == PC_OP_ANY_CHAR)
        rounds = most;
    else
        while (rounds < most && one_matches(m, test, m->subject[*at + rounds]))
            rounds++;
    m->steps -= rounds;
    if (rounds < loop->a)
        return false;
    uint32_t first = *at + loop->a;
    *at += rounds;
    if (loop->mode == PC_LAZY && loop->b > loop->a)
        *status = push(m, (entry){LONGER, pc, *at, loop->b - loop->a});
    else if (loop->mode == PC_GREEDY && *at > first)
        *status = push(m, (entry){SHORTER, pc + 2, *at, first});
    return true;
}

/* Take the newest entry that says where to go on. False: there is none. */
static bool backtrack(machine *m, uint32_t *pc, uint32_t *at, pc_status *status)
{
    const pc_inst *code = m->program->code;
    while (m->top > 0) {
        entry *e = &m->stack[m->top - 1];
        m->steps--;
        switch ((entry_kind)e->kind) {
        case UNDO:
            m->registers[e->pc] = e->at;
            m->top--;
            break;
        case CHOICE:
            *pc = e->pc;
            *at = e->at;
            m->top--;
            return true;
        case SHORTER: {
            const pc_inst *next = &code[e->pc];
            uint32_t position = e->at - 1;
            /* what follows is often one literal character: go straight to where it stands */
            if (next->op == PC_OP_CHAR)
                while (position > e->limit && m->subject[position] != next->a) {
                    position--;
                    m->steps--;
                }
            *pc = e->pc;
            *at = e->at = position;
            if (position == e->limit)
                m->top--;
            return true;
        }
        case LONGER: {
            const pc_inst *loop = &code[e->pc];
            if (e->at == m->len || !one_matches(m, loop + 1, m->subject[e->at])) {
                m->top--;
                break;
            }
            *pc = e->pc + 2;
            *at = ++e->at;
            if (e->limit != PC_UNLIMITED - loop->a && --e->limit == 0)
                m->top--;
            return true;
        }
        case BORDER: {
            const pc_inst *look = &code[e->pc];
            bool negative = look->op == PC_OP_LOOK && look->mode != 0;
            *pc = look->a;
            *at = e->at;
            m->border = e->limit;
            m->top--;
            if (negative)
                return true;
            break;
        }
        }
    }
    *status = PC_OK;
    return false;
}

/* A general loop after a round, or before the first: into the body again, or on? */
static pc_status run_loop(machine *m, uint32_t pc, uint32_t *next, uint32_t at, bool tail_failed)
{
    const pc_inst *loop = &m->program->code[pc];
    pc_loop bounds = m->program->loops[loop->loop];
    uint32_t rounds = m->registers[loop->a];
    pc_status status;
    if (rounds < bounds.least) {
        *next = pc + 1;
        return set_register(m, loop->a, rounds + 1);
    }
    /* a round that consumed nothing is the last one */
    bool more = (rounds < bounds.most || bounds.most == PC_UNLIMITED) && at != m->registers[loop->a + 1];
    if (loop->mode == PC_LAZY && !tail_failed) {
        *next = loop->b;
        return more ? push(m, (entry){CHOICE, loop->b - 1, at, 0}) : PC_OK;
    }
    if (!more) {
        *next = loop->b;
        return PC_OK;
    }
    if (loop->mode != PC_LAZY && (status = push(m, (entry){CHOICE, loop->b, at, 0})) != PC_OK)
        return status;
    if ((status = set_register(m, loop->a, rounds < PC_UNLIMITED ? rounds + 1 : rounds)) != PC_OK)
        return status;
    *next = pc + 1;
    return set_register(m, loop->a + 1, at);
}

static bool backref_matches(machine *m, const pc_inst *inst, uint32_t *at)
{
    uint32_t first = m->registers[2 * inst->a], past = m->registers[2 * inst->a + 1];
    if (first == UNSET || past == UNSET || past < first || past - first > m->len - *at)
        return false;
    m->steps -= past - first;
    for (uint32_t i = 0; i < past - first; i++) {
        uint32_t a = m->subject[first + i], b = m->subject[*at + i];
        if (a != b && (inst->mode == PC_FOLD_NONE ||
                       pc_char_lower(a, (pc_fold)inst->mode) != pc_char_lower(b, (pc_fold)inst->mode)))
            return false;
    }
    *at += past - first;
    return true;
}

/* Match from `start`. */
static pc_status run(machine *m, uint32_t start, bool *matched)
{
    const pc_inst *code = m->program->code;
    uint32_t pc = 0, at = start;
    pc_status status = PC_OK;
    m->top = 0;
    m->border = UNSET;
    for (;;) {
        const pc_inst *inst = &code[pc];
        bool ok = true;
        if (--m->steps < 0)
            return too_much(m, "the allowed work");
        switch ((pc_op)inst->op) {
        case PC_OP_MATCH:
            if (!m->full || at == m->len) {
                m->registers[0] = start;
                m->registers[1] = at;
                *matched = true;
                return PC_OK;
            }
            ok = false;
            break;
        case PC_OP_CHAR:
            ok = at < m->len && m->subject[at] == inst->a;
            at++;
            pc++;
            break;
        case PC_OP_CHAR_FOLD:
        case PC_OP_ANY:
        case PC_OP_ANY_CHAR:
        case PC_OP_SET:
            ok = at < m->len && one_matches(m, inst, m->subject[at]);
            at++;
            pc++;
            break;
        case PC_OP_AT:
            ok = at_holds(m, inst, at);
            pc++;
            break;
        case PC_OP_SAVE:
            status = set_register(m, inst->a, at);
            pc++;
            break;
        case PC_OP_JUMP:
            pc = inst->a;
            break;
        case PC_OP_SPLIT: {
            const pc_inst *next = inst + 1; /* alternatives mostly differ in their first character */
            if (next->op == PC_OP_CHAR && (at == m->len || m->subject[at] != next->a)) {
                pc = inst->a;
                break;
            }
            status = push(m, (entry){CHOICE, inst->a, at, 0});
            pc++;
            break;
        }
        case PC_OP_ONE:
            ok = run_one(m, pc, &at, &status);
            pc += 2;
            break;
        case PC_OP_LOOP_START:
            status = set_register(m, inst->a, 0);
            if (status == PC_OK)
                status = set_register(m, inst->a + 1, UNSET);
            pc++;
            break;
        case PC_OP_LOOP:
            status = run_loop(m, pc, &pc, at, false);
            break;
        case PC_OP_LOOP_AGAIN:
            status = run_loop(m, inst->a, &pc, at, true);
            break;
        case PC_OP_LOOK:
            if (at < inst->b) {
                ok = inst->mode != 0;
                pc = inst->a;
                break;
            }
            status = push(m, (entry){BORDER, pc, at, m->border});
            m->border = m->top - 1;
            at -= inst->b;
            pc++;
            break;
        case PC_OP_LOOK_END: {
            entry border = m->stack[m->border];
            at = border.at;
            if (code[border.pc].mode != 0) {
                unwind(m);
                ok = false;
            } else {
                cut(m);
            }
            pc++;
            break;
        }
        case PC_OP_ATOMIC:
            status = push(m, (entry){BORDER, pc, at, m->border});
            m->border = m->top - 1;
            pc++;
            break;
        case PC_OP_ATOMIC_END:
            cut(m);
            pc++;
            break;
        case PC_OP_BACKREF:
            ok = backref_matches(m, inst, &at);
            pc++;
            break;
        case PC_OP_COND:
            pc = m->registers[2 * inst->a + 1] == UNSET || m->registers[2 * inst->a] == UNSET ? inst->b : pc + 1;
            break;
        }
        if (status != PC_OK)
            return status;
        if (!ok && !backtrack(m, &pc, &at, &status)) {
            *matched = false;
            return PC_OK;
        }
    }
}

pc_status pc_program_run(const pc_program *program, pc_anchor anchor, const uint32_t *subject, uint32_t len,
                         const char *source, size_t source_len, bool *matched, uint32_t group[2], pc_error *err)
{
    machine m;
    m.program = program;
    m.subject = subject;
    m.len = len;
    m.full = anchor == PC_ANCHOR_FULL;
    m.steps = PC_PATTERN_STEPS;
    m.stack = m.inline_stack;
    m.capacity = INLINE_ENTRIES;
    m.registers = m.inline_registers;
    m.source = source;
    m.source_len = source_len;
    m.err = err;
    *matched = false;
    if (program->registers > INLINE_REGISTERS) {
        m.registers = pc_malloc(program->registers * sizeof *m.registers);
        if (m.registers == NULL)
            return pc_fail_nomem(err, "a regular expression match");
    }
    pc_status status = PC_OK;
    uint32_t last = anchor == PC_ANCHOR_SEARCH ? len : 0;
    for (uint32_t start = 0; start <= last && status == PC_OK && !*matched; start++) {
        for (uint32_t i = 0; i < program->registers; i++)
            m.registers[i] = UNSET;
        m.steps -= program->registers;
        status = run(&m, start, matched);
    }
    group[0] = group[1] = UNSET;
    if (*matched && program->groups > 0 && m.registers[3] != UNSET) {
        group[0] = m.registers[2];
        group[1] = m.registers[3];
    }
    if (m.registers != m.inline_registers)
        pc_free(m.registers);
    if (m.stack != m.inline_stack)
        pc_free(m.stack);
    return status;
}
