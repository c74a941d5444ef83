/* The reader: open, check every number of the header, then pread on demand.
 *
 * The order of work is the order of trust.  The file's size comes from fstat,
 * the header's length is compared with it before memory is taken, the header is
 * scanned strictly (json_scan.h), and only when every tensor's bytes are
 * accounted for does the object exist.  The rules are listed in
 * docs/file-formats.md; the numbers in brackets below refer to that list.
 */
#define _GNU_SOURCE
#include "safetensors_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../core/utf8.h"
#include "json_scan.h"

/* ---------------------------------------------------------------- helpers */

const char *pc_quote_name(char buffer[PC_QUOTED], const char *name, size_t len)
{
    const size_t room = PC_QUOTED - 6; /* quotes, an ellipsis of three bytes, NUL */
    size_t used = 0;
    buffer[used++] = '"';
    size_t shown = len;
    if (shown > room) {
        shown = room;
        while (shown > 0 && ((unsigned char)name[shown] & 0xC0u) == 0x80u)
            shown--; /* not in the middle of a character */
    }
    for (size_t i = 0; i < shown; i++)
        buffer[used++] = (unsigned char)name[i] < 0x20 || name[i] == 0x7F ? '?' : name[i];
    if (shown < len) {
        memcpy(buffer + used, "\xE2\x80\xA6", 3);
        used += 3;
    }
    buffer[used++] = '"';
    buffer[used] = '\0';
    return buffer;
}

bool pc_tensor_bytes(pc_dtype dtype, const uint64_t *shape, int ndim, uint64_t *out)
{
    uint64_t count = 1;
    for (int d = 0; d < ndim; d++)
        if (__builtin_mul_overflow(count, shape[d], &count))
            return false;
    if (__builtin_mul_overflow(count, (uint64_t)pc_dtype_get(dtype)->bits, &count) || count % 8 != 0)
        return false;
    *out = count / 8;
    return true;
}

/* --------------------------------------------------------- header → tables */

/* A tensor as the header describes it, before it is checked against the others. */
typedef struct entry {
    uint64_t begin, end;
    const char *name;
    size_t name_len;
    size_t shape_at; /* index into shapes */
    size_t position; /* in the header: breaks ties, so that the order is always the same */
    int ndim;
    pc_dtype dtype;
} entry;

typedef struct parser {
    pc_safetensors *st;
    pc_json json;
    entry *entries;
    size_t entry_count, entry_room;
    size_t shape_count, shape_room;
    size_t metadata_room;
    pc_error *err;
} parser;

/* Room for one more item.  Growth by half again keeps the total within a small multiple of the header. */
static bool reserve(void *array, size_t item, size_t count, size_t *room)
{
    if (count < *room)
        return true;
    size_t more = *room < 8 ? 8 : *room + *room / 2;
    size_t bytes;
    void *old;
    memcpy(&old, array, sizeof old);
    if (!pc_mul_size(more, item, &bytes))
        return false;
    void *grown = pc_realloc(old, bytes);
    if (grown == NULL)
        return false;
    memcpy(array, &grown, sizeof grown);
    *room = more;
    return true;
}

static pc_status bad_json(const parser *p)
{
    return pc_fail(p->err, PC_ERR_FORMAT, "\"%s\": the header is not valid: %s (at byte %zu)", p->st->label,
                   p->json.why, (size_t)(p->json.at - p->st->header) + PC_SAFETENSORS_PREFIX);
}

/* The same inside a tensor's entry. */
static pc_status bad_field(const parser *p, const entry *e, const char *field)
{
    char name[PC_QUOTED];
    return pc_fail(p->err, PC_ERR_FORMAT, "\"%s\": tensor %s: %s: %s (at byte %zu)", p->st->label,
                   pc_quote_name(name, e->name, e->name_len), field, p->json.why,
                   (size_t)(p->json.at - p->st->header) + PC_SAFETENSORS_PREFIX);
}

static pc_status bad_tensor(const parser *p, const entry *e, const char *why)
{
    char name[PC_QUOTED];
    return pc_fail(p->err, PC_ERR_FORMAT, "\"%s\": tensor %s: %s", p->st->label,
                   pc_quote_name(name, e->name, e->name_len), why);
}

static pc_status parse_dtype(parser *p, entry *e)
{
    char *text;
    size_t len;
    if (!pc_json_string(&p->json, &text, &len))
        return bad_field(p, e, "dtype");
    e->dtype = pc_dtype_from_name(text, len);
    if (e->dtype == PC_DTYPE_NONE) {
        char name[PC_QUOTED], dtype[PC_QUOTED];
        return pc_fail(p->err, PC_ERR_FORMAT, "\"%s\": tensor %s: unknown dtype %s", p->st->label,
                       pc_quote_name(name, e->name, e->name_len), pc_quote_name(dtype, text, len));
    }
    return PC_OK;
}

static pc_status parse_shape(parser *p, entry *e)
{
    pc_json *json = &p->json;
    if (!pc_json_open(json, '['))
        return bad_field(p, e, "shape");
    e->shape_at = p->shape_count;
    for (bool first = true;; first = false) {
        bool more;
        uint64_t dim;
        if (!pc_json_more(json, ']', first, &more))
            return bad_field(p, e, "shape");
        if (!more)
            return PC_OK;
        if (!pc_json_uint(json, &dim))
            return bad_field(p, e, "shape");
        if (e->ndim == PC_MAX_DIMS)
            return bad_tensor(p, e, "more than 64 dimensions, which is more than peftc (and NumPy) can hold");
        if (!reserve(&p->st->shapes, sizeof *p->st->shapes, p->shape_count, &p->shape_room))
            return pc_fail_nomem(p->err, "the table of shapes");
        p->st->shapes[p->shape_count++] = dim;
        e->ndim++;
    }
}

static pc_status parse_offsets(parser *p, entry *e)
{
    pc_json *json = &p->json;
    uint64_t offsets[2];
    if (!pc_json_open(json, '['))
        return bad_field(p, e, "data_offsets");
    for (int i = 0;; i++) {
        bool more;
        if (!pc_json_more(json, ']', i == 0, &more))
            return bad_field(p, e, "data_offsets");
        if (more != (i < 2))
            return bad_tensor(p, e, "data_offsets must be two integers, [begin, end]");
        if (!more)
            break;
        if (!pc_json_uint(json, &offsets[i]))
            return bad_field(p, e, "data_offsets");
    }
    e->begin = offsets[0];
    e->end = offsets[1];
    return PC_OK;
}

static bool is_word(const char *text, size_t len, const char *word)
{
    return len == strlen(word) && memcmp(text, word, len) == 0;
}

/* The value of one tensor's name: an object with three fields we know; others are checked and ignored. */
static pc_status parse_entry(parser *p, const char *name, size_t name_len)
{
    pc_json *json = &p->json;
    entry e = {.name = name, .name_len = name_len, .position = p->entry_count};
    size_t other;
    if (pc_strmap_get(&p->st->index, name, name_len, &other))
        return bad_tensor(p, &e, "the name is given twice"); /* [8] */
    if (!pc_strmap_put(&p->st->index, name, name_len, p->entry_count))
        return pc_fail_nomem(p->err, "the index of names");
    if (pc_json_peek(json) != '{')
        return bad_tensor(p, &e, "its entry must be an object with dtype, shape and data_offsets");
    if (!pc_json_open(json, '{'))
        return bad_json(p);
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4 };
    unsigned seen = 0;
    for (bool first = true;; first = false) {
        bool more;
        char *key;
        size_t len;
        if (!pc_json_more(json, '}', first, &more))
            return bad_field(p, &e, "its entry");
        if (!more)
            break;
        if (!pc_json_key(json, &key, &len))
            return bad_field(p, &e, "its entry");
        unsigned field = is_word(key, len, "dtype")          ? DTYPE
                         : is_word(key, len, "shape")        ? SHAPE
                         : is_word(key, len, "data_offsets") ? OFFSETS
                                                             : 0;
        if ((seen & field) != 0)
            return bad_tensor(p, &e, "dtype, shape or data_offsets is given twice"); /* [7] */
        seen |= field;
        pc_status status = PC_OK;
        if (field == DTYPE)
            status = parse_dtype(p, &e);
        else if (field == SHAPE)
            status = parse_shape(p, &e);
        else if (field == OFFSETS)
            status = parse_offsets(p, &e);
        else if (!pc_json_skip(json))
            status = bad_field(p, &e, "a field that is not used");
        if (status != PC_OK)
            return status;
    }
    if (seen != (DTYPE | SHAPE | OFFSETS))
        return bad_tensor(p, &e,
                          (seen & DTYPE) == 0   ? "dtype is missing"
                          : (seen & SHAPE) == 0 ? "shape is missing"
                                                : "data_offsets is missing");
    if (!reserve(&p->entries, sizeof *p->entries, p->entry_count, &p->entry_room))
        return pc_fail_nomem(p->err, "the table of tensors");
    p->entries[p->entry_count++] = e;
    return PC_OK;
}

/* The value of "__metadata__": strings only.  A key that comes twice keeps its first place and its last value. */
static pc_status parse_metadata(parser *p)
{
    pc_json *json = &p->json;
    pc_safetensors *st = p->st;
    if (pc_json_peek(json) == 'n')
        return pc_json_null(json) ? PC_OK : bad_json(p);
    if (!pc_json_open(json, '{'))
        return pc_fail(p->err, PC_ERR_FORMAT, "\"%s\": __metadata__ must be an object", st->label);
    st->has_metadata = true;
    pc_strmap keys;
    pc_strmap_init(&keys);
    pc_status status = PC_OK;
    for (bool first = true; status == PC_OK; first = false) {
        bool more;
        char *key, *value;
        size_t key_len, value_len, at;
        if (!pc_json_more(json, '}', first, &more)) {
            status = bad_json(p);
            break;
        }
        if (!more)
            break;
        if (!pc_json_key(json, &key, &key_len)) {
            status = bad_json(p);
        } else if (pc_json_peek(json) != '"') {
            char name[PC_QUOTED];
            status = pc_fail(p->err, PC_ERR_FORMAT, "\"%s\": __metadata__ field %s must be a string", st->label,
                             pc_quote_name(name, key, key_len));
        } else if (!pc_json_string(json, &value, &value_len)) {
            status = bad_json(p);
        } else if (pc_strmap_get(&keys, key, key_len, &at)) {
            st->metadata[at].value = value;
            st->metadata[at].value_len = value_len;
        } else if (!pc_strmap_put(&keys, key, key_len, st->metadata_count) ||
                   !reserve(&st->metadata, sizeof *st->metadata, st->metadata_count, &p->metadata_room)) {
            status = pc_fail_nomem(p->err, "the metadata");
        } else {
            st->metadata[st->metadata_count++] =
                (pc_metadata_item){.key = key, .key_len = key_len, .value = value, .value_len = value_len};
        }
    }
    pc_strmap_free(&keys);
    return status;
}

static pc_status parse_header(parser *p)
{
    pc_safetensors *st = p->st;
    size_t bad = pc_utf8_valid(st->header, st->header_len); /* [3] */
    if (bad != st->header_len)
        return pc_fail(p->err, PC_ERR_FORMAT, "\"%s\": the header is not valid UTF-8 (at byte %zu)", st->label,
                       bad + PC_SAFETENSORS_PREFIX);
    pc_json *json = &p->json;
    pc_json_init(json, st->header, st->header_len);
    if (!pc_json_open(json, '{'))
        return bad_json(p);
    bool metadata_seen = false;
    for (bool first = true;; first = false) {
        bool more;
        char *key;
        size_t len;
        if (!pc_json_more(json, '}', first, &more))
            return bad_json(p);
        if (!more)
            break;
        if (!pc_json_key(json, &key, &len))
            return bad_json(p);
        pc_status status;
        if (is_word(key, len, "__metadata__")) {
            if (metadata_seen)
                return pc_fail(p->err, PC_ERR_FORMAT, "\"%s\": __metadata__ is given twice", st->label);
            metadata_seen = true;
            status = parse_metadata(p);
        } else {
            status = parse_entry(p, key, len);
        }
        if (status != PC_OK)
            return status;
    }
    return pc_json_finish(json) ? PC_OK : bad_json(p); /* [2] */
}

/* ------------------------------------------------------------- validation */

/* NULL for a scalar: there may be no table at all. */
static const uint64_t *shape_of(const pc_safetensors *st, const entry *e)
{
    return e->ndim != 0 ? st->shapes + e->shape_at : NULL;
}

static int by_position(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    if (x->begin != y->begin)
        return x->begin < y->begin ? -1 : 1;
    if (x->end != y->end)
        return x->end < y->end ? -1 : 1;
    return x->position < y->position ? -1 : 1;
}

/* Sorted by place, the tensors must touch each other and fill the file. [9, 10] */
static pc_status check_coverage(parser *p)
{
    pc_safetensors *st = p->st;
    bool sorted = true;
    for (size_t i = 1; sorted && i < p->entry_count; i++)
        sorted = by_position(&p->entries[i - 1], &p->entries[i]) < 0;
    if (!sorted)
        qsort(p->entries, p->entry_count, sizeof *p->entries, by_position);

    uint64_t place = 0;
    for (size_t i = 0; i < p->entry_count; i++) {
        const entry *e = &p->entries[i];
        char name[PC_QUOTED];
        uint64_t bytes;
        if (e->begin != place || e->end < e->begin)
            return pc_fail(p->err, PC_ERR_FORMAT,
                           "\"%s\": tensor %s: data_offsets [%llu, %llu] do not continue at %llu, where the tensor "
                           "before it ends; tensors may neither overlap nor leave gaps",
                           st->label, pc_quote_name(name, e->name, e->name_len), (unsigned long long)e->begin,
                           (unsigned long long)e->end, (unsigned long long)place);
        if (!pc_tensor_bytes(e->dtype, shape_of(st, e), e->ndim, &bytes))
            return bad_tensor(p, e, "its shape and dtype give a size that overflows or is not whole bytes");
        if (e->end - e->begin != bytes)
            return pc_fail(p->err, PC_ERR_FORMAT,
                           "\"%s\": tensor %s: shape and dtype need %llu bytes, data_offsets give %llu", st->label,
                           pc_quote_name(name, e->name, e->name_len), (unsigned long long)bytes,
                           (unsigned long long)(e->end - e->begin));
        place = e->end;
    }
    uint64_t data = st->size - st->data_start;
    if (place != data)
        return pc_fail(p->err, PC_ERR_FORMAT,
                       "\"%s\": the header describes %llu bytes of tensors, the file holds %llu%s", st->label,
                       (unsigned long long)place, (unsigned long long)data,
                       data < place ? " (it may have been cut off, for example by an unfinished download)" : "");
    return PC_OK;
}

/* The checked entries become what pc_weights promises. */
static pc_status make_tables(parser *p)
{
    pc_safetensors *st = p->st;
    size_t n = p->entry_count, bytes, begin_bytes;
    if (!pc_mul_size(n, sizeof *st->tensors, &bytes) || !pc_mul_size(n, sizeof *st->begins, &begin_bytes) ||
        (st->tensors = pc_malloc(bytes)) == NULL || (st->begins = pc_malloc(begin_bytes)) == NULL)
        return pc_fail_nomem(p->err, "the table of tensors");
    for (size_t i = 0; i < n; i++) {
        const entry *e = &p->entries[i];
        if (!pc_strmap_put(&st->index, e->name, e->name_len, i)) /* from its place in the header to that in the file */
            return pc_fail_nomem(p->err, "the index of names");
        st->begins[i] = e->begin;
        st->tensors[i] = (pc_tensor_info){.name = e->name,
                                          .name_len = e->name_len,
                                          .dtype = e->dtype,
                                          .ndim = e->ndim,
                                          .shape = shape_of(st, e),
                                          .nbytes = e->end - e->begin};
    }
    st->weights.tensors = st->tensors;
    st->weights.count = n;
    return PC_OK;
}

/* ------------------------------------------------------------------ input */

/* One call never asks for more: some systems refuse lengths above 2 GiB. */
#define READ_AT_ONCE ((size_t)1 << 30)

pc_status pc_safetensors_read_at(const pc_safetensors *st, uint64_t offset, void *dst, size_t len, pc_error *err)
{
    if (st->fd < 0) {
        if (len != 0)
            memcpy(dst, st->bytes + offset, len);
        return PC_OK;
    }
    char *to = dst;
    while (len > 0) {
        ssize_t got = pread(st->fd, to, len < READ_AT_ONCE ? len : READ_AT_ONCE, (off_t)offset);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return pc_fail_errno(err, errno, "cannot read \"%s\"", st->label);
        }
        if (got == 0)
            return pc_fail(err, PC_ERR_FORMAT, "\"%s\": the file has become shorter while it was being read",
                           st->label);
        to += got;
        offset += (uint64_t)got;
        len -= (size_t)got;
    }
    return PC_OK;
}

static pc_status read_tensor(pc_weights *weights, size_t i, void *dst, pc_error *err)
{
    const pc_safetensors *st = (const pc_safetensors *)weights;
    const pc_tensor_info *info = &st->tensors[i];
    if (info->nbytes > (uint64_t)PTRDIFF_MAX)
        return pc_fail_nomem(err, "a tensor");
    return pc_safetensors_read_at(st, st->data_start + st->begins[i], dst, (size_t)info->nbytes, err);
}

static void close_weights(pc_weights *weights) { pc_safetensors_close((pc_safetensors *)weights); }

/* From prefix to tables; st->size and the source are set. */
static pc_status read_header(pc_safetensors *st, pc_error *err)
{
    if (st->size < PC_SAFETENSORS_PREFIX)
        return pc_fail(err, PC_ERR_FORMAT, "\"%s\": not a safetensors file: %llu bytes are too few for a header",
                       st->label, (unsigned long long)st->size);
    unsigned char prefix[PC_SAFETENSORS_PREFIX];
    pc_status status = pc_safetensors_read_at(st, 0, prefix, sizeof prefix, err);
    if (status != PC_OK)
        return status;
    uint64_t len = 0;
    for (int i = PC_SAFETENSORS_PREFIX - 1; i >= 0; i--)
        len = len << 8 | prefix[i];
    /* [1] Compared before anything is added to it or allocated for it. */
    if (len == 0 || len > PC_SAFETENSORS_MAX_HEADER)
        return pc_fail(err, PC_ERR_FORMAT,
                       "\"%s\": not a safetensors file: its header would be %llu bytes (1 to %u are possible)",
                       st->label, (unsigned long long)len, PC_SAFETENSORS_MAX_HEADER);
    if (len > st->size - PC_SAFETENSORS_PREFIX)
        return pc_fail(err, PC_ERR_FORMAT,
                       "\"%s\": the header should be %llu bytes, but only %llu follow (it may have been cut off, for "
                       "example by an unfinished download)",
                       st->label, (unsigned long long)len, (unsigned long long)(st->size - PC_SAFETENSORS_PREFIX));
    st->header_len = (size_t)len;
    st->data_start = PC_SAFETENSORS_PREFIX + len;
    st->header = pc_malloc(st->header_len);
    if (st->header == NULL)
        return pc_fail_nomem(err, "the header of a safetensors file");
    status = pc_safetensors_read_at(st, PC_SAFETENSORS_PREFIX, st->header, st->header_len, err);
    parser p = {.st = st, .err = err};
    if (status == PC_OK)
        status = parse_header(&p);
    if (status == PC_OK)
        status = check_coverage(&p);
    if (status == PC_OK)
        status = make_tables(&p);
    pc_free(p.entries);
    return status;
}

static pc_status new_reader(const char *path, pc_safetensors **out, pc_error *err)
{
    *out = NULL;
    pc_safetensors *st = pc_calloc(1, sizeof *st);
    if (st == NULL)
        return pc_fail_nomem(err, "a safetensors reader");
    st->fd = -1;
    pc_strmap_init(&st->index);
    st->label = pc_strndup(path, strlen(path));
    if (st->label == NULL) {
        pc_safetensors_close(st);
        return pc_fail_nomem(err, "a safetensors reader");
    }
    pc_utf8_repair(st->label, strlen(st->label)); /* a path may hold any bytes, a message may not */
    st->weights.label = st->label;
    st->weights.read = read_tensor;
    st->weights.concurrent = true; /* pread and memcpy */
    st->weights.close = close_weights;
    *out = st;
    return PC_OK;
}

static pc_status finish(pc_safetensors *st, pc_status status, pc_safetensors **out)
{
    if (status != PC_OK) {
        pc_safetensors_close(st);
        st = NULL;
    }
    *out = st;
    return status;
}

static pc_status open_file(pc_safetensors *st, const char *path, pc_error *err)
{
    /* O_NONBLOCK: opening a FIFO that nobody writes to must not hang. It means nothing for a regular file. */
    do {
        st->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    } while (st->fd < 0 && errno == EINTR);
    if (st->fd < 0)
        return pc_fail_errno(err, errno, "cannot open \"%s\"", st->label);
    struct stat info;
    if (fstat(st->fd, &info) != 0)
        return pc_fail_errno(err, errno, "cannot open \"%s\"", st->label);
    if (S_ISDIR(info.st_mode))
        return pc_fail_errno(err, EISDIR, "cannot read \"%s\"", st->label);
    if (!S_ISREG(info.st_mode))
        return pc_fail(err, PC_ERR_IO, "cannot read \"%s\": it is a %s; a safetensors file must be a regular file",
                       st->label, S_ISFIFO(info.st_mode) ? "pipe" : S_ISSOCK(info.st_mode) ? "socket" : "device");
    st->size = (uint64_t)info.st_size;
    return read_header(st, err);
}

pc_status pc_safetensors_open(const char *path, pc_safetensors **out, pc_error *err)
{
    pc_safetensors *st;
    pc_status status = new_reader(path, &st, err);
    if (status == PC_OK)
        status = open_file(st, path, err);
    return finish(st, status, out);
}

pc_status pc_safetensors_parse(const void *bytes, size_t len, pc_safetensors **out, pc_error *err)
{
    pc_safetensors *st;
    pc_status status = new_reader("<bytes>", &st, err);
    if (status == PC_OK) {
        st->bytes = bytes;
        st->size = len;
        status = read_header(st, err);
    }
    return finish(st, status, out);
}

void pc_safetensors_close(pc_safetensors *st)
{
    if (st == NULL)
        return;
    if (st->fd >= 0)
        close(st->fd);
    pc_strmap_free(&st->index);
    pc_free(st->metadata);
    pc_free(st->shapes);
    pc_free(st->begins);
    pc_free(st->tensors);
    pc_free(st->header);
    pc_free(st->label);
    pc_free(st);
}

/* ---------------------------------------------------------------- queries */

pc_weights *pc_safetensors_weights(pc_safetensors *st) { return &st->weights; }

uint64_t pc_safetensors_offset(const pc_safetensors *st, size_t i) { return st->data_start + st->begins[i]; }

size_t pc_safetensors_find(const pc_safetensors *st, const char *name, size_t len)
{
    size_t i;
    return pc_strmap_get(&st->index, name, len, &i) ? i : SIZE_MAX;
}

bool pc_safetensors_metadata(const pc_safetensors *st, const pc_metadata_item **items, size_t *count)
{
    *items = st->metadata;
    *count = st->metadata_count;
    return st->has_metadata;
}
