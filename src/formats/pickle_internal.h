/* What the files of the pickle machine share.
 *
 *   pickle_reader.c    the machine: bytes, stack, marks, memo, and one step for each opcode
 *   pickle_opcodes.h   what its instructions are called
 *   pickle_objects.c   the objects that it makes, their limits, and how messages name them
 *   pickle_torch.c     the allow-list: what a pickle may call, and what comes of it
 */
#ifndef PEFTC_FORMATS_PICKLE_INTERNAL_H
#define PEFTC_FORMATS_PICKLE_INTERNAL_H

#include "pickle_reader.h"

/* ----------------------------------------------------------------- pickle_objects.c */

static inline pc_pickle_object *pc_pickle_at(const pc_pickle *pickle, pc_pickle_ref ref)
{
    return &pickle->objects[ref];
}

pc_status pc_pickle_new(pc_pickle *pickle, pc_pickle_kind kind, pc_pickle_ref *ref, pc_error *err);
/* Room for `need` items of `size` bytes in the growing array *array, at most `limit`. The array comes and goes
 * as void *, because a pointer to a typed pointer may not be used as a void **. */
pc_status pc_pickle_make_room(const pc_pickle *pickle, void **array, size_t *room, size_t need, size_t size,
                              size_t limit, const char *what, pc_error *err);
/* One more tensor; its index goes into the object. */
pc_status pc_pickle_add_tensor(pc_pickle *pickle, const pc_pickle_tensor *tensor, pc_pickle_ref *ref, pc_error *err);
/* Count `count` items against PC_PICKLE_MAX_REFERENCES. */
pc_status pc_pickle_spend(pc_pickle *pickle, size_t count, pc_error *err);
/* A container is one deeper than the deepest of its items. */
pc_status pc_pickle_note_depth(pc_pickle *pickle, pc_pickle_ref container, const pc_pickle_ref *items, size_t count,
                               pc_error *err);
/* Append references to a list, set or dict. */
pc_status pc_pickle_extend(pc_pickle *pickle, pc_pickle_ref container, const pc_pickle_ref *items, size_t count,
                           pc_error *err);
/* Is it something that a dict may have as a key? */
bool pc_pickle_hashable(const pc_pickle_object *object);

/* ------------------------------------------------------------------- pickle_torch.c */

/* The row of the allow-list for module.name, or an error that names it. */
pc_status pc_torch_find_global(const pc_pickle *pickle, const char *module, size_t module_len, const char *name,
                               size_t name_len, int64_t *row, pc_error *err);
/* Apply a row of the table to the items of a tuple; new_object: it must be a type. */
pc_status pc_torch_reduce(pc_pickle *pickle, pc_pickle_ref callable, pc_pickle_ref arguments, bool new_object,
                          pc_pickle_ref *result, pc_error *err);
/* BINPERSID: a storage. */
pc_status pc_torch_persistent(pc_pickle *pickle, pc_pickle_ref id, pc_pickle_ref *result, pc_error *err);

#endif
