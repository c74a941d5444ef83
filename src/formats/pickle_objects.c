/* The objects of a pickle: numbered, not linked, and limited in number, depth and sharing. */
#include <stdio.h>
#include <string.h>

#include "pickle_internal.h"

pc_status pc_pickle_bad(const pc_pickle *pickle, pc_error *err, const char *fmt, ...)
{
    char why[700];
    va_list args;
    va_start(args, fmt);
    if (vsnprintf(why, sizeof why, fmt, args) < 0)
        why[0] = '\0';
    va_end(args);
    return pc_fail(err, PC_ERR_UNPICKLE, "%s: byte %zu of the pickle: %s", pickle->label, pickle->op, why);
}

const char *pc_pickle_kind_name(const pc_pickle_object *object)
{
    switch ((pc_pickle_kind)object->kind) {
    case PC_PICKLE_NONE:
        return "None";
    case PC_PICKLE_BOOL:
        return "a bool";
    case PC_PICKLE_INT:
    case PC_PICKLE_BIG_INT:
        return "an int";
    case PC_PICKLE_FLOAT:
        return "a float";
    case PC_PICKLE_TEXT:
        return "a str";
    case PC_PICKLE_BYTES:
        return "bytes";
    case PC_PICKLE_TUPLE:
        return "a tuple";
    case PC_PICKLE_LIST:
        return "a list";
    case PC_PICKLE_SET:
        return "a set";
    case PC_PICKLE_DICT:
        return "a dict";
    case PC_PICKLE_GLOBAL:
        return "a function or type";
    case PC_PICKLE_STORAGE:
        return "a storage";
    case PC_PICKLE_TENSOR:
        return "a tensor";
    case PC_PICKLE_OPAQUE:
        break;
    }
    return "another value";
}

pc_status pc_pickle_make_room(const pc_pickle *pickle, void **array, size_t *room, size_t need, size_t size,
                              size_t limit, const char *what, pc_error *err)
{
    if (need > limit)
        return pc_pickle_bad(pickle, err, "more than %zu %s", limit, what);
    size_t bigger = *room < 512 ? 1024 : *room * 2;
    if (bigger < need)
        bigger = need;
    if (bigger > limit)
        bigger = limit;
    void *moved = pc_realloc(*array, bigger * size); /* limits are far below SIZE_MAX / size */
    if (moved == NULL)
        return pc_fail_nomem(err, "the objects of a pickle");
    *array = moved;
    *room = bigger;
    return PC_OK;
}

pc_status pc_pickle_new(pc_pickle *pickle, pc_pickle_kind kind, pc_pickle_ref *ref, pc_error *err)
{
    if (pickle->object_count == pickle->object_room) {
        void *array = pickle->objects;
        pc_status status = pc_pickle_make_room(pickle, &array, &pickle->object_room, pickle->object_count + 1,
                                               sizeof *pickle->objects, PC_PICKLE_MAX_OBJECTS, "objects", err);
        if (status != PC_OK)
            return status;
        pickle->objects = array;
    }
    pickle->objects[pickle->object_count] = (pc_pickle_object){.kind = (uint8_t)kind};
    *ref = (pc_pickle_ref)pickle->object_count++;
    return PC_OK;
}

pc_status pc_pickle_add_tensor(pc_pickle *pickle, const pc_pickle_tensor *tensor, pc_pickle_ref *ref, pc_error *err)
{
    if (pickle->tensor_count == pickle->tensor_room) {
        void *array = pickle->tensors;
        pc_status status = pc_pickle_make_room(pickle, &array, &pickle->tensor_room, pickle->tensor_count + 1,
                                               sizeof *pickle->tensors, PC_PICKLE_MAX_TENSORS, "tensors", err);
        if (status != PC_OK)
            return status;
        pickle->tensors = array;
    }
    pc_status status = pc_pickle_new(pickle, PC_PICKLE_TENSOR, ref, err);
    if (status != PC_OK)
        return status;
    pickle->objects[*ref].as.number = (int64_t)pickle->tensor_count;
    pickle->tensors[pickle->tensor_count++] = *tensor;
    return PC_OK;
}

pc_status pc_pickle_spend(pc_pickle *pickle, size_t count, pc_error *err)
{
    if (count > PC_PICKLE_MAX_REFERENCES - pickle->references)
        return pc_pickle_bad(pickle, err, "more than %zu items in all containers", PC_PICKLE_MAX_REFERENCES);
    pickle->references += count;
    return PC_OK;
}

pc_status pc_pickle_note_depth(pc_pickle *pickle, pc_pickle_ref container, const pc_pickle_ref *items, size_t count,
                            pc_error *err)
{
    unsigned depth = pc_pickle_at(pickle, container)->depth;
    for (size_t i = 0; i < count; i++) {
        unsigned inside = pc_pickle_at(pickle, items[i])->depth + 1u;
        depth = inside > depth ? inside : depth;
    }
    if (depth > PC_PICKLE_MAX_DEPTH)
        return pc_pickle_bad(pickle, err, "containers are nested more than %d deep", PC_PICKLE_MAX_DEPTH);
    pc_pickle_at(pickle, container)->depth = (uint16_t)depth;
    return PC_OK;
}

const pc_pickle_ref *pc_pickle_items(const pc_pickle_object *object)
{
    if (object->count == 0)
        return object->as.few;
    if (object->kind == PC_PICKLE_TUPLE)
        return object->count <= 2 ? object->as.few : object->as.items;
    return object->as.items + 1;
}

pc_status pc_pickle_extend(pc_pickle *pickle, pc_pickle_ref container, const pc_pickle_ref *items, size_t count,
                           pc_error *err)
{
    pc_status status = pc_pickle_spend(pickle, count, err);
    if (status == PC_OK)
        status = pc_pickle_note_depth(pickle, container, items, count, err);
    if (status != PC_OK || count == 0)
        return status;
    pc_pickle_object *object = pc_pickle_at(pickle, container);
    size_t have = object->count;
    size_t room = have != 0 ? object->as.items[0] : 0;
    if (have + count > room) {
        size_t bigger = room * 2 > have + count ? room * 2 : have + count + 1;
        pc_pickle_ref *moved = pc_pool_array(&pickle->pool, bigger + 1, sizeof *moved);
        if (moved == NULL)
            return pc_fail_nomem(err, "the objects of a pickle");
        moved[0] = (pc_pickle_ref)bigger;
        if (have != 0)
            memcpy(moved + 1, object->as.items + 1, have * sizeof *moved);
        object->as.items = moved;
    }
    memcpy(object->as.items + 1 + have, items, count * sizeof *items);
    object->count = (uint32_t)(have + count); /* references are limited far below 2^32 */
    return PC_OK;
}

bool pc_pickle_hashable(const pc_pickle_object *object)
{
    /* A tuple is taken as it is: keys are never hashed or compared here, so what it holds does not matter. */
    return object->kind != PC_PICKLE_LIST && object->kind != PC_PICKLE_DICT && object->kind != PC_PICKLE_SET &&
           object->kind != PC_PICKLE_TENSOR && object->kind != PC_PICKLE_STORAGE;
}
