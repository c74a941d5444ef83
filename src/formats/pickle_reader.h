/* A pickle machine that cannot run anything.
 *
 * It knows the opcodes of protocols 2 to 5 that build data, and of the names a
 * pickle may call only a fixed table (pickle_torch.c): what rebuilds tensors,
 * ordered dicts, sizes.  A name is never looked up anywhere else; every other
 * one is refused with its module.  The result is a graph of small objects that
 * are numbered, not linked, so that nothing here recurses and sharing costs
 * nothing: a pickle is work and memory in proportion to its own length.
 */
#ifndef PEFTC_FORMATS_PICKLE_READER_H
#define PEFTC_FORMATS_PICKLE_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../core/dtype.h"
#include "../core/memory.h"
#include "../core/status.h"
#include "byte_source.h"
#include "quote.h"

/* Limits.  A state dict costs some 200 bytes, 10 objects, 15 references and 20 memo slots per tensor:
 * these allow 300,000 tensors, and keep the worst pickle under 512 MiB. */
#define PC_PICKLE_MAX_BYTES ((size_t)64 * 1024 * 1024)
#define PC_PICKLE_MAX_OBJECTS ((size_t)4 * 1024 * 1024)
#define PC_PICKLE_MAX_REFERENCES ((size_t)16 * 1024 * 1024) /* items of lists, dicts and tuples together */
#define PC_PICKLE_MAX_STACK ((size_t)8 * 1024 * 1024)
#define PC_PICKLE_MAX_MEMO ((size_t)8 * 1024 * 1024)
#define PC_PICKLE_MAX_TENSORS ((size_t)1024 * 1024)
#define PC_PICKLE_MAX_STRING ((size_t)16 * 1024 * 1024)
#define PC_PICKLE_MAX_DEPTH 1000 /* marks, and containers inside one another */

typedef enum pc_pickle_kind {
    PC_PICKLE_NONE = 0,
    PC_PICKLE_BOOL,    /* number */
    PC_PICKLE_INT,     /* number */
    PC_PICKLE_BIG_INT, /* count bytes at offset, two's complement, little-endian */
    PC_PICKLE_FLOAT,   /* its value is of no use here */
    PC_PICKLE_TEXT,    /* count bytes of UTF-8 at offset */
    PC_PICKLE_BYTES,   /* count bytes at offset */
    PC_PICKLE_TUPLE,
    PC_PICKLE_LIST,
    PC_PICKLE_SET,
    PC_PICKLE_DICT,    /* count is twice the number of entries: key, value, key, value … */
    PC_PICKLE_GLOBAL,  /* number: row of the table in pickle_torch.c */
    PC_PICKLE_STORAGE, /* count: storage, detail: dtype, number: its bytes */
    PC_PICKLE_TENSOR,  /* number: index into tensors */
    PC_PICKLE_OPAQUE   /* a harmless value without weights: a device, a layout, a complex number */
} pc_pickle_kind;

/* References are indices into the objects.  None, True, False, () and the small integers have fixed ones. */
typedef uint32_t pc_pickle_ref;
enum { PC_PICKLE_REF_NONE, PC_PICKLE_REF_TRUE, PC_PICKLE_REF_FALSE, PC_PICKLE_REF_EMPTY, PC_PICKLE_REF_INTS };

typedef struct pc_pickle_object {
    uint8_t kind;
    uint8_t detail; /* dict: 1 if it is an OrderedDict */
    uint16_t depth; /* of containers: how many may lie inside one another */
    uint32_t count;
    union {
        int64_t number;
        uint64_t offset;         /* of the bytes in the input */
        pc_pickle_ref few[2];    /* tuple of at most two */
        pc_pickle_ref *items;    /* longer tuple; list, set and dict: items[0] is the capacity */
    } as;
} pc_pickle_object;

/* A tensor as the pickle describes it, checked against its storage. */
typedef struct pc_pickle_tensor {
    uint32_t storage;
    pc_pickle_ref shape, stride; /* tuples of integers of equal length */
    pc_dtype dtype;
    uint64_t offset; /* in elements */
    uint64_t nbytes; /* of all elements, stored contiguously */
} pc_pickle_tensor;

/* What the pickle says about a storage. */
typedef struct pc_pickle_storage {
    pc_dtype dtype; /* PC_U8 for an untyped one */
    const char *key;
    size_t key_len;
    uint64_t count; /* of elements */
    uint64_t nbytes;
    bool has_view_field; /* the legacy layout's persistent ids have it, those in a zip archive have not */
    bool is_view;        /* elements [view_start, view_start + view_count) of the storage */
    uint64_t view_start, view_count;
} pc_pickle_storage;

/* The bytes of the pickle: all of them, or the beginning of a file that is read further as needed. */
typedef struct pc_pickle_input {
    const uint8_t *bytes;
    size_t have;
    uint8_t *owned;               /* grows; NULL when bytes are borrowed */
    const pc_byte_source *source; /* to read on; NULL when bytes are all there is */
} pc_pickle_input;

typedef struct pc_pickle pc_pickle;

/* Find or declare a storage; *index is what tensors refer to.  pickle is for its error text (pc_pickle_bad). */
typedef pc_status (*pc_pickle_storage_fn)(void *context, const pc_pickle *pickle, const pc_pickle_storage *request,
                                          uint32_t *index, uint64_t *nbytes, pc_error *err);

struct pc_pickle {
    const char *label;
    pc_pickle_input *input;
    size_t at; /* the next byte */
    size_t op; /* where the current opcode is, for messages */
    pc_pickle_storage_fn storage;
    void *context;

    pc_pickle_object *objects;
    size_t object_count, object_room;
    pc_pickle_ref *stack;
    size_t stack_count, stack_room;
    uint32_t marks[PC_PICKLE_MAX_DEPTH]; /* heights of the stack */
    size_t mark_count;
    pc_pickle_ref *memo; /* UINT32_MAX: empty */
    size_t memo_room, memo_next;
    size_t references; /* spent of PC_PICKLE_MAX_REFERENCES */
    pc_pickle_tensor *tensors;
    size_t tensor_count, tensor_room;
    pc_pool pool; /* items */
};

/* Prepare a machine at byte `at` of the input. storage may be NULL: then no storage is allowed. */
pc_status pc_pickle_init(pc_pickle *pickle, const char *label, pc_pickle_input *input, size_t at,
                         pc_pickle_storage_fn storage, void *context, pc_error *err);
/* Run up to and including STOP. Afterwards pickle->at is behind it and the objects can be looked at. */
pc_status pc_pickle_run(pc_pickle *pickle, pc_pickle_ref *result, pc_error *err);
void pc_pickle_free(pc_pickle *pickle); /* frees everything but the input; right for a zeroed machine too */

void pc_pickle_input_free(pc_pickle_input *input);

/* The items of a tuple, or of a list, set or dict. */
const pc_pickle_ref *pc_pickle_items(const pc_pickle_object *object);
/* The bytes of a text, bytes or big integer. Valid until the machine runs on. */
const char *pc_pickle_bytes(const pc_pickle *pickle, const pc_pickle_object *object);
const char *pc_pickle_kind_name(const pc_pickle_object *object); /* "a dict", "an int" */
/* PC_ERR_UNPICKLE "LABEL: byte N of the pickle: …". */
pc_status pc_pickle_bad(const pc_pickle *pickle, pc_error *err, const char *fmt, ...) PC_PRINTF(3, 4);

#endif
