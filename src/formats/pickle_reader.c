#include <stdio.h>
#include <string.h>

#include "../core/utf8.h"
#include "pickle_internal.h"
#include "pickle_opcodes.h"

/* -------------------------------------------------------------------- stack */

static pc_status push(pc_pickle *pickle, pc_pickle_ref ref, pc_error *err)
{
    if (pickle->stack_count == pickle->stack_room) {
        void *array = pickle->stack;
        pc_status status = pc_pickle_make_room(pickle, &array, &pickle->stack_room, pickle->stack_count + 1,
                                               sizeof *pickle->stack, PC_PICKLE_MAX_STACK, "values on the stack", err);
        if (status != PC_OK)
            return status;
        pickle->stack = array;
    }
    pickle->stack[pickle->stack_count++] = ref;
    return PC_OK;
}

static pc_status push_new(pc_pickle *pickle, pc_pickle_kind kind, pc_error *err)
{
    pc_pickle_ref ref;
    pc_status status = pc_pickle_new(pickle, kind, &ref, err);
    return status == PC_OK ? push(pickle, ref, err) : status;
}

/* Values above the last mark: what an opcode may take. */
static size_t available(const pc_pickle *pickle)
{
    return pickle->stack_count - (pickle->mark_count != 0 ? pickle->marks[pickle->mark_count - 1] : 0);
}

static pc_status require(const pc_pickle *pickle, size_t count, pc_error *err)
{
    if (available(pickle) < count)
        return pc_pickle_bad(pickle, err, "an opcode takes more values than there are");
    return PC_OK;
}

/* Replace the top `count` values by a tuple of them. */
static pc_status make_tuple(pc_pickle *pickle, size_t count, pc_error *err)
{
    if (count == 0)
        return push(pickle, PC_PICKLE_REF_EMPTY, err);
    pc_pickle_ref ref;
    const pc_pickle_ref *items = pickle->stack + (pickle->stack_count - count);
    pc_status status = pc_pickle_spend(pickle, count, err);
    if (status == PC_OK)
        status = pc_pickle_new(pickle, PC_PICKLE_TUPLE, &ref, err);
    if (status == PC_OK)
        status = pc_pickle_note_depth(pickle, ref, items, count, err);
    if (status != PC_OK)
        return status;
    pc_pickle_object *tuple = pc_pickle_at(pickle, ref);
    pc_pickle_ref *to = tuple->as.few;
    if (count > 2) {
        to = pc_pool_array(&pickle->pool, count, sizeof *to);
        if (to == NULL)
            return pc_fail_nomem(err, "the objects of a pickle");
        tuple->as.items = to;
    }
    memcpy(to, items, count * sizeof *to);
    tuple->count = (uint32_t)count;
    pickle->stack_count -= count;
    return push(pickle, ref, err);
}

/* -------------------------------------------------------------------- input */

void pc_pickle_input_free(pc_pickle_input *input)
{
    pc_free(input->owned);
    *input = (pc_pickle_input){0};
}

/* Make sure that n more bytes can be taken. */
static pc_status need(pc_pickle *pickle, size_t n, pc_error *err)
{
    pc_pickle_input *input = pickle->input;
    if (n <= input->have - pickle->at)
        return PC_OK;
    uint64_t all = input->source != NULL ? input->source->size : input->have;
    if (n > all - pickle->at)
        return pc_pickle_bad(pickle, err, "the pickle ends in the middle (the file is cut short?)");
    if (n > PC_PICKLE_MAX_BYTES || pickle->at + n > PC_PICKLE_MAX_BYTES)
        return pc_pickle_bad(pickle, err, "the pickle is longer than 64 MiB");
    if (input->source == NULL || (input->bytes != NULL && input->owned == NULL))
        return pc_pickle_bad(pickle, err, "the pickle is longer than it may be");
    size_t want = input->have < 32 * 1024 ? 64 * 1024 : input->have * 2;
    want = want < pickle->at + n ? pickle->at + n : want;
    want = want > PC_PICKLE_MAX_BYTES ? PC_PICKLE_MAX_BYTES : want;
    want = want > all ? (size_t)all : want;
    uint8_t *moved = pc_realloc(input->owned, want);
    if (moved == NULL)
        return pc_fail_nomem(err, "a pickle");
    input->owned = moved;
    input->bytes = moved;
    pc_status status = pc_source_read(input->source, input->have, moved + input->have, want - input->have, err);
    if (status == PC_OK)
        input->have = want;
    return status;
}

/* Take a little-endian number of `width` bytes. */
static pc_status take(pc_pickle *pickle, size_t width, uint64_t *value, pc_error *err)
{
    pc_status status = need(pickle, width, err);
    if (status != PC_OK)
        return status;
    const uint8_t *p = pickle->input->bytes + pickle->at;
    uint64_t v = 0;
    for (size_t i = width; i-- > 0;)
        v = v << 8 | p[i];
    *value = v;
    pickle->at += width;
    return PC_OK;
}

const char *pc_pickle_bytes(const pc_pickle *pickle, const pc_pickle_object *object)
{
    return (const char *)pickle->input->bytes + object->as.offset;
}

static pc_status push_bytes(pc_pickle *pickle, pc_pickle_kind kind, size_t width, pc_error *err)
{
    uint64_t len;
    pc_status status = take(pickle, width, &len, err);
    if (status != PC_OK)
        return status;
    if (len > PC_PICKLE_MAX_STRING)
        return pc_pickle_bad(pickle, err, "a string is longer than %zu bytes", PC_PICKLE_MAX_STRING);
    status = need(pickle, (size_t)len, err);
    if (status != PC_OK)
        return status;
    if (kind == PC_PICKLE_TEXT && pc_utf8_valid((const char *)pickle->input->bytes + pickle->at, (size_t)len) != len)
        return pc_pickle_bad(pickle, err, "a string is not UTF-8");
    status = push_new(pickle, kind, err);
    if (status != PC_OK)
        return status;
    pc_pickle_object *object = pc_pickle_at(pickle, (pc_pickle_ref)(pickle->object_count - 1));
    object->as.offset = pickle->at;
    object->count = (uint32_t)len;
    pickle->at += (size_t)len;
    return PC_OK;
}

static pc_status push_int(pc_pickle *pickle, int64_t value, pc_error *err)
{
    if (value >= 0 && value < 256)
        return push(pickle, (pc_pickle_ref)(PC_PICKLE_REF_INTS + value), err);
    pc_status status = push_new(pickle, PC_PICKLE_INT, err);
    if (status == PC_OK)
        pc_pickle_at(pickle, (pc_pickle_ref)(pickle->object_count - 1))->as.number = value;
    return status;
}

/* LONG1, LONG4: two's complement of any length. */
static pc_status push_long(pc_pickle *pickle, size_t width, pc_error *err)
{
    size_t before = pickle->object_count;
    pc_status status = push_bytes(pickle, PC_PICKLE_BIG_INT, width, err);
    if (status != PC_OK)
        return status;
    pc_pickle_object *object = pc_pickle_at(pickle, (pc_pickle_ref)before);
    size_t len = object->count;
    const uint8_t *p = pickle->input->bytes + object->as.offset;
    /* A last byte that only repeats the sign says nothing. */
    while (len > 1 && p[len - 1] == ((p[len - 2] & 0x80u) != 0 ? 0xFFu : 0u))
        len--;
    if (len > sizeof(int64_t))
        return PC_OK;
    uint64_t value = len != 0 && (p[len - 1] & 0x80u) != 0 ? UINT64_MAX : 0;
    for (size_t i = len; i-- > 0;)
        value = value << 8 | p[i];
    *object = (pc_pickle_object){.kind = PC_PICKLE_INT};
    memcpy(&object->as.number, &value, sizeof value);
    return PC_OK;
}

/* ------------------------------------------------------------ larger opcodes */

static pc_status pop_mark(pc_pickle *pickle, size_t *count, pc_error *err)
{
    if (pickle->mark_count == 0)
        return pc_pickle_bad(pickle, err, "an opcode needs a mark and there is none");
    *count = pickle->stack_count - pickle->marks[--pickle->mark_count];
    return PC_OK;
}

/* APPEND(S), ADDITEMS, SETITEM(S): the top `count` values go into the container below them. */
static pc_status fill(pc_pickle *pickle, size_t count, pc_pickle_kind kind, pc_error *err)
{
    pc_status status = require(pickle, count + 1, err);
    if (status != PC_OK)
        return status;
    const pc_pickle_ref *items = pickle->stack + (pickle->stack_count - count);
    pc_pickle_ref container = items[-1];
    if (pc_pickle_at(pickle, container)->kind != kind)
        return pc_pickle_bad(pickle, err, "cannot add items to %s",
                             pc_pickle_kind_name(pc_pickle_at(pickle, container)));
    if (kind == PC_PICKLE_DICT) {
        if (count % 2 != 0)
            return pc_pickle_bad(pickle, err, "a dict gets a key without a value");
        for (size_t i = 0; i < count; i += 2)
            if (!pc_pickle_hashable(pc_pickle_at(pickle, items[i])))
                return pc_pickle_bad(pickle, err, "%s cannot be a key of a dict",
                                     pc_pickle_kind_name(pc_pickle_at(pickle, items[i])));
    }
    status = pc_pickle_extend(pickle, container, items, count, err);
    pickle->stack_count -= count;
    return status;
}

static pc_status put_memo(pc_pickle *pickle, uint64_t index, pc_error *err)
{
    pc_status status = require(pickle, 1, err);
    if (status != PC_OK)
        return status;
    /* Picklers number from 0 or 1 without gaps: an index beyond the bytes read so far is an attempt to waste memory. */
    if (index > pickle->at)
        return pc_pickle_bad(pickle, err, "memo index %llu is out of proportion", (unsigned long long)index);
    if (index >= pickle->memo_room) {
        size_t old = pickle->memo_room;
        void *array = pickle->memo;
        status = pc_pickle_make_room(pickle, &array, &pickle->memo_room, (size_t)index + 1, sizeof *pickle->memo,
                                     PC_PICKLE_MAX_MEMO, "memo entries", err);
        if (status != PC_OK)
            return status;
        pickle->memo = array;
        for (size_t i = old; i < pickle->memo_room; i++)
            pickle->memo[i] = UINT32_MAX;
    }
    if (pickle->memo[index] == UINT32_MAX)
        pickle->memo_next++; /* MEMOIZE writes at the number of entries */
    pickle->memo[index] = pickle->stack[pickle->stack_count - 1];
    return PC_OK;
}

static pc_status get_memo(pc_pickle *pickle, uint64_t index, pc_error *err)
{
    if (index >= pickle->memo_room || pickle->memo[index] == UINT32_MAX)
        return pc_pickle_bad(pickle, err, "memo entry %llu does not exist", (unsigned long long)index);
    return push(pickle, pickle->memo[index], err);
}

/* Take a line of GLOBAL or INST; *start is its offset. */
static pc_status take_line(pc_pickle *pickle, size_t *start, size_t *len, pc_error *err)
{
    *start = pickle->at;
    for (*len = 0;; (*len)++) {
        uint64_t byte;
        pc_status status = take(pickle, 1, &byte, err);
        if (status != PC_OK)
            return status;
        if (byte == '\n')
            return PC_OK;
        if (*len == 255)
            return pc_pickle_bad(pickle, err, "a name is longer than 255 bytes");
    }
}

static pc_status push_global(pc_pickle *pickle, const char *module, size_t module_len, const char *name,
                             size_t name_len, pc_error *err)
{
    int64_t row;
    pc_status status = pc_torch_find_global(pickle, module, module_len, name, name_len, &row, err);
    if (status == PC_OK)
        status = push_new(pickle, PC_PICKLE_GLOBAL, err);
    if (status == PC_OK)
        pc_pickle_at(pickle, (pc_pickle_ref)(pickle->object_count - 1))->as.number = row;
    return status;
}

static pc_status run_global(pc_pickle *pickle, bool instantiate, pc_error *err)
{
    size_t module, module_len, name, name_len;
    pc_status status = take_line(pickle, &module, &module_len, err);
    if (status == PC_OK)
        status = take_line(pickle, &name, &name_len, err);
    if (status != PC_OK)
        return status;
    const char *bytes = (const char *)pickle->input->bytes;
    if (instantiate) {
        char text[520], quoted[PC_QUOTED];
        int len = snprintf(text, sizeof text, "%.*s.%.*s", (int)module_len, bytes + module, (int)name_len, bytes + name);
        return pc_pickle_bad(pickle, err, "refused to create an instance of %s: nothing in the file was run",
                             pc_quote(text, len > 0 ? (size_t)len : 0, quoted));
    }
    return push_global(pickle, bytes + module, module_len, bytes + name, name_len, err);
}

static pc_status run_stack_global(pc_pickle *pickle, pc_error *err)
{
    pc_status status = require(pickle, 2, err);
    if (status != PC_OK)
        return status;
    const pc_pickle_object *name = pc_pickle_at(pickle, pickle->stack[--pickle->stack_count]);
    const pc_pickle_object *module = pc_pickle_at(pickle, pickle->stack[--pickle->stack_count]);
    if (name->kind != PC_PICKLE_TEXT || module->kind != PC_PICKLE_TEXT)
        return pc_pickle_bad(pickle, err, "a module and a name must be strings");
    return push_global(pickle, pc_pickle_bytes(pickle, module), module->count, pc_pickle_bytes(pickle, name),
                       name->count, err);
}

static pc_status run_reduce(pc_pickle *pickle, bool new_object, pc_error *err)
{
    pc_status status = require(pickle, 2, err);
    if (status != PC_OK)
        return status;
    pc_pickle_ref arguments = pickle->stack[--pickle->stack_count];
    pc_pickle_ref callable = pickle->stack[--pickle->stack_count];
    pc_pickle_ref result;
    status = pc_torch_reduce(pickle, callable, arguments, new_object, &result, err);
    return status == PC_OK ? push(pickle, result, err) : status;
}

/* nn.Module.state_dict() carries _metadata (module versions) as an attribute: accepted, of no use here. */
static pc_status run_build(pc_pickle *pickle, pc_error *err)
{
    pc_status status = require(pickle, 2, err);
    if (status != PC_OK)
        return status;
    const pc_pickle_object *state = pc_pickle_at(pickle, pickle->stack[--pickle->stack_count]);
    const pc_pickle_object *target = pc_pickle_at(pickle, pickle->stack[pickle->stack_count - 1]);
    if (target->kind != PC_PICKLE_DICT || target->detail == 0)
        return pc_pickle_bad(pickle, err, "refused to set the attributes of %s", pc_pickle_kind_name(target));
    if (state->kind != PC_PICKLE_DICT)
        return pc_pickle_bad(pickle, err, "the attributes of an OrderedDict must be a dict, not %s",
                             pc_pickle_kind_name(state));
    return PC_OK;
}

static pc_status run_persistent(pc_pickle *pickle, pc_error *err)
{
    pc_status status = require(pickle, 1, err);
    if (status != PC_OK)
        return status;
    pc_pickle_ref result;
    status = pc_torch_persistent(pickle, pickle->stack[--pickle->stack_count], &result, err);
    return status == PC_OK ? push(pickle, result, err) : status;
}

static pc_status run_mark(pc_pickle *pickle, pc_error *err)
{
    if (pickle->mark_count == PC_PICKLE_MAX_DEPTH)
        return pc_pickle_bad(pickle, err, "containers are nested more than %d deep", PC_PICKLE_MAX_DEPTH);
    pickle->marks[pickle->mark_count++] = (uint32_t)pickle->stack_count;
    return PC_OK;
}

/* ------------------------------------------------------------------ the loop */

/* Opcodes that exist but have no place in a file of weights: what a message calls them. */
static const struct {
    uint8_t op;
    const char *name;
} refused_ops[] = {
    {'0', "POP"},           {'1', "POP_MARK"},         {'2', "DUP"},
    {'I', "INT"},           {'L', "LONG"},             {'F', "FLOAT"},
    {'S', "STRING"},        {'V', "UNICODE"},          {'d', "DICT"},
    {'l', "LIST"},          {'g', "GET"},              {'p', "PUT"},
    {'P', "PERSID"},        {'o', "OBJ"},              {0x82, "EXT1"},
    {0x83, "EXT2"},         {0x84, "EXT4"},            {0x91, "FROZENSET"},
    {0x92, "NEWOBJ_EX"},    {0x97, "NEXT_BUFFER"},     {0x98, "READONLY_BUFFER"},
};
#define REFUSED_OPS (sizeof refused_ops / sizeof refused_ops[0])

static pc_status refuse(const pc_pickle *pickle, uint8_t op, pc_error *err)
{
    for (size_t i = 0; i < REFUSED_OPS; i++)
        if (refused_ops[i].op == op)
            return pc_pickle_bad(pickle, err, "refused opcode %s: files of torch.save do not use it",
                                 refused_ops[i].name);
    return pc_pickle_bad(pickle, err, "unknown opcode 0x%02x", op);
}

static pc_status step(pc_pickle *pickle, uint8_t op, pc_error *err)
{
    uint64_t n = 0;
    size_t count = 0;
    pc_status status = PC_OK;
    switch (op) {
    case OP_MARK:
        return run_mark(pickle, err);
    case OP_NONE:
        return push(pickle, PC_PICKLE_REF_NONE, err);
    case OP_TRUE:
        return push(pickle, PC_PICKLE_REF_TRUE, err);
    case OP_FALSE:
        return push(pickle, PC_PICKLE_REF_FALSE, err);
    case OP_BININT:
        status = take(pickle, 4, &n, err);
        return status == PC_OK ? push_int(pickle, (int64_t)(int32_t)(uint32_t)n, err) : status;
    case OP_BININT1:
    case OP_BININT2:
        status = take(pickle, op == OP_BININT1 ? 1 : 2, &n, err);
        return status == PC_OK ? push_int(pickle, (int64_t)n, err) : status;
    case OP_LONG1:
        return push_long(pickle, 1, err);
    case OP_LONG4:
        return push_long(pickle, 4, err);
    case OP_BINFLOAT:
        status = take(pickle, 8, &n, err);
        return status == PC_OK ? push_new(pickle, PC_PICKLE_FLOAT, err) : status;
    case OP_SHORT_BINUNICODE:
        return push_bytes(pickle, PC_PICKLE_TEXT, 1, err);
    case OP_BINUNICODE:
        return push_bytes(pickle, PC_PICKLE_TEXT, 4, err);
    case OP_BINUNICODE8:
        return push_bytes(pickle, PC_PICKLE_TEXT, 8, err);
    case OP_SHORT_BINSTRING:
    case OP_SHORT_BINBYTES:
        return push_bytes(pickle, PC_PICKLE_BYTES, 1, err);
    case OP_BINSTRING:
    case OP_BINBYTES:
        return push_bytes(pickle, PC_PICKLE_BYTES, 4, err);
    case OP_BINBYTES8:
    case OP_BYTEARRAY8:
        return push_bytes(pickle, PC_PICKLE_BYTES, 8, err);
    case OP_EMPTY_TUPLE:
        return push(pickle, PC_PICKLE_REF_EMPTY, err);
    case OP_TUPLE:
        status = pop_mark(pickle, &count, err);
        return status == PC_OK ? make_tuple(pickle, count, err) : status;
    case OP_TUPLE1:
    case OP_TUPLE2:
    case OP_TUPLE3:
        count = (size_t)(op - OP_TUPLE1) + 1;
        status = require(pickle, count, err);
        return status == PC_OK ? make_tuple(pickle, count, err) : status;
    case OP_EMPTY_LIST:
        return push_new(pickle, PC_PICKLE_LIST, err);
    case OP_EMPTY_DICT:
        return push_new(pickle, PC_PICKLE_DICT, err);
    case OP_EMPTY_SET:
        return push_new(pickle, PC_PICKLE_SET, err);
    case OP_APPEND:
        return fill(pickle, 1, PC_PICKLE_LIST, err);
    case OP_SETITEM:
        return fill(pickle, 2, PC_PICKLE_DICT, err);
    case OP_APPENDS:
    case OP_SETITEMS:
    case OP_ADDITEMS:
        status = pop_mark(pickle, &count, err);
        if (status != PC_OK)
            return status;
        return fill(pickle, count,
                    op == OP_APPENDS    ? PC_PICKLE_LIST
                    : op == OP_SETITEMS ? PC_PICKLE_DICT
                                        : PC_PICKLE_SET,
                    err);
    case OP_BINPUT:
    case OP_LONG_BINPUT:
        status = take(pickle, op == OP_BINPUT ? 1 : 4, &n, err);
        return status == PC_OK ? put_memo(pickle, n, err) : status;
    case OP_MEMOIZE:
        return put_memo(pickle, pickle->memo_next, err);
    case OP_BINGET:
    case OP_LONG_BINGET:
        status = take(pickle, op == OP_BINGET ? 1 : 4, &n, err);
        return status == PC_OK ? get_memo(pickle, n, err) : status;
    case OP_GLOBAL:
        return run_global(pickle, false, err);
    case OP_INST:
        return run_global(pickle, true, err);
    case OP_STACK_GLOBAL:
        return run_stack_global(pickle, err);
    case OP_REDUCE:
    case OP_NEWOBJ:
        return run_reduce(pickle, op == OP_NEWOBJ, err);
    case OP_BUILD:
        return run_build(pickle, err);
    case OP_BINPERSID:
        return run_persistent(pickle, err);
    case OP_FRAME:
        status = take(pickle, 8, &n, err);
        return status == PC_OK && n > PC_PICKLE_MAX_BYTES
                   ? pc_pickle_bad(pickle, err, "a frame is longer than 64 MiB")
                   : status;
    default:
        return refuse(pickle, op, err);
    }
}

pc_status pc_pickle_init(pc_pickle *pickle, const char *label, pc_pickle_input *input, size_t at,
                         pc_pickle_storage_fn storage, void *context, pc_error *err)
{
    memset(pickle, 0, sizeof *pickle);
    pickle->label = label;
    pickle->input = input;
    pickle->at = pickle->op = at;
    pickle->storage = storage;
    pickle->context = context;
    pc_pool_init(&pickle->pool);
    static const pc_pickle_object fixed[PC_PICKLE_REF_INTS] = {
        [PC_PICKLE_REF_NONE] = {.kind = PC_PICKLE_NONE},
        [PC_PICKLE_REF_TRUE] = {.kind = PC_PICKLE_BOOL, .as.number = 1},
        [PC_PICKLE_REF_FALSE] = {.kind = PC_PICKLE_BOOL},
        [PC_PICKLE_REF_EMPTY] = {.kind = PC_PICKLE_TUPLE},
    };
    pc_pickle_ref ref;
    for (int i = 0; i < PC_PICKLE_REF_INTS + 256; i++) {
        pc_status status = pc_pickle_new(pickle, PC_PICKLE_INT, &ref, err);
        if (status != PC_OK)
            return status;
        if (i < PC_PICKLE_REF_INTS)
            pickle->objects[ref] = fixed[i];
        else
            pickle->objects[ref].as.number = i - PC_PICKLE_REF_INTS;
    }
    return PC_OK;
}

pc_status pc_pickle_run(pc_pickle *pickle, pc_pickle_ref *result, pc_error *err)
{
    uint64_t byte;
    pc_status status = take(pickle, 1, &byte, err);
    if (status != PC_OK)
        return status;
    if (byte != OP_PROTO)
        return pc_pickle_bad(pickle, err, "it does not begin as a pickle of protocol 2 to 5");
    status = take(pickle, 1, &byte, err);
    if (status != PC_OK)
        return status;
    if (byte < 2 || byte > 5)
        return pc_pickle_bad(pickle, err, "pickle protocol %u is not supported (2 to 5 are)", (unsigned)byte);
    for (;;) {
        pickle->op = pickle->at;
        status = take(pickle, 1, &byte, err);
        if (status == PC_OK && byte == OP_STOP)
            break;
        if (status == PC_OK)
            status = step(pickle, (uint8_t)byte, err);
        if (status != PC_OK)
            return status;
    }
    if (pickle->stack_count != 1 || pickle->mark_count != 0)
        return pc_pickle_bad(pickle, err, "the pickle ends with %zu values instead of one", pickle->stack_count);
    *result = pickle->stack[0];
    return PC_OK;
}

void pc_pickle_free(pc_pickle *pickle)
{
    pc_free(pickle->objects);
    pc_free(pickle->stack);
    pc_free(pickle->memo);
    pc_free(pickle->tensors);
    if (pickle->input != NULL)
        pc_pool_free(&pickle->pool);
    memset(pickle, 0, sizeof *pickle);
}
