/* The writer: lay the file out, then write it in one go.
 *
 * The bytes are those of the official writer (0.8.0): tensors in the order of
 * its dtype list, last first, then by name; compact JSON; spaces up to a
 * multiple of eight.  Metadata keeps the caller's order, because the official
 * order is a hash table's and differs from run to run.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../core/utf8.h"
#include "atomic_file.h"
#include "safetensors_internal.h"

/* ------------------------------------------------------------------ order */

/* The official list, which is what files are sorted by; a dtype's place is its rank. */
static const pc_dtype official_order[] = {
    PC_BOOL,    PC_F4,      PC_F6_E2M3,     PC_F6_E3M2,     PC_U8,  PC_I8,  PC_F8_E5M2, PC_F8_E4M3,
    PC_F8_E8M0, PC_F8_E4M3FNUZ, PC_F8_E5M2FNUZ, PC_I16,     PC_U16, PC_F16, PC_BF16,    PC_I32,
    PC_U32,     PC_F32,     PC_C64,         PC_F64,         PC_I64, PC_U64,
};

static int rank_of(pc_dtype dtype)
{
    for (size_t i = 0; i < sizeof official_order / sizeof official_order[0]; i++)
        if (official_order[i] == dtype)
            return (int)i;
    return -1;
}

typedef struct item {
    const char *name;
    size_t name_len;
    int rank;
    size_t view;
} item;

static int by_rank_and_name(const void *a, const void *b)
{
    const item *x = a, *y = b;
    if (x->rank != y->rank)
        return x->rank > y->rank ? -1 : 1;
    int order = memcmp(x->name, y->name, x->name_len < y->name_len ? x->name_len : y->name_len);
    if (order != 0)
        return order;
    return x->name_len < y->name_len ? -1 : x->name_len > y->name_len ? 1 : 0;
}

/* ----------------------------------------------------------------- header */

typedef struct text {
    char *bytes;
    size_t len, room;
    bool failed; /* out of memory; what follows is dropped */
} text;

static void put(text *t, const char *bytes, size_t len)
{
    size_t need;
    if (t->failed || len == 0)
        return;
    if (!pc_add_size(t->len, len, &need)) {
        t->failed = true;
        return;
    }
    if (need > t->room) {
        size_t room = need + need / 2 + 256;
        char *grown = room > need ? pc_realloc(t->bytes, room) : NULL;
        if (grown == NULL) {
            t->failed = true;
            return;
        }
        t->bytes = grown;
        t->room = room;
    }
    memcpy(t->bytes + t->len, bytes, len);
    t->len = need;
}

static void put_word(text *t, const char *word) { put(t, word, strlen(word)); }

static void put_number(text *t, uint64_t n)
{
    char digits[24];
    int len = snprintf(digits, sizeof digits, "%llu", (unsigned long long)n);
    put(t, digits, (size_t)len);
}

/* A JSON string with the escapes that the official writer uses: only what must be escaped. */
static void put_string(text *t, const char *s, size_t len)
{
    put(t, "\"", 1);
    size_t start = 0;
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x20 && c != '"' && c != '\\')
            continue;
        put(t, s + start, i - start);
        start = i + 1;
        char escape[8];
        const char *shorthand = c == '"'    ? "\\\""
                                : c == '\\' ? "\\\\"
                                : c == '\b' ? "\\b"
                                : c == '\f' ? "\\f"
                                : c == '\n' ? "\\n"
                                : c == '\r' ? "\\r"
                                : c == '\t' ? "\\t"
                                            : NULL;
        if (shorthand == NULL) {
            snprintf(escape, sizeof escape, "\\u%04x", c);
            shorthand = escape;
        }
        put_word(t, shorthand);
    }
    put(t, s + start, len - start);
    put(t, "\"", 1);
}

static void put_metadata(text *t, const pc_metadata_item *items, size_t count)
{
    put_word(t, "\"__metadata__\":{");
    for (size_t i = 0; i < count; i++) {
        if (i > 0)
            put(t, ",", 1);
        put_string(t, items[i].key, items[i].key_len);
        put(t, ":", 1);
        put_string(t, items[i].value, items[i].value_len);
    }
    put(t, "}", 1);
}

static void put_tensor(text *t, const pc_tensor_info *info, uint64_t begin)
{
    put_string(t, info->name, info->name_len);
    put_word(t, ":{\"dtype\":\"");
    put_word(t, pc_dtype_get(info->dtype)->name);
    put_word(t, "\",\"shape\":[");
    for (int d = 0; d < info->ndim; d++) {
        if (d > 0)
            put(t, ",", 1);
        put_number(t, info->shape[d]);
    }
    put_word(t, "],\"data_offsets\":[");
    put_number(t, begin);
    put(t, ",", 1);
    put_number(t, begin + info->nbytes);
    put_word(t, "]}");
}

/* ----------------------------------------------------------------- checks */

static pc_status check_view(const pc_tensor_info *info, pc_error *err)
{
    char name[PC_QUOTED];
    if (pc_utf8_valid(info->name, info->name_len) != info->name_len)
        return pc_fail(err, PC_ERR_FORMAT, "cannot save: a tensor's name is not valid UTF-8");
    pc_quote_name(name, info->name, info->name_len);
    if (info->name_len == strlen("__metadata__") && memcmp(info->name, "__metadata__", info->name_len) == 0)
        return pc_fail(err, PC_ERR_FORMAT, "cannot save: a tensor must not be named \"__metadata__\", which the format "
                                           "keeps for itself");
    if (rank_of(info->dtype) < 0)
        return pc_fail(err, PC_ERR_FORMAT, "cannot save: tensor %s has no dtype", name);
    uint64_t bytes;
    if (info->ndim < 0 || info->ndim > PC_MAX_DIMS ||
        !pc_tensor_bytes(info->dtype, info->shape, info->ndim, &bytes) || bytes != info->nbytes)
        return pc_fail(err, PC_ERR_FORMAT, "cannot save: the size of tensor %s does not fit its shape and dtype", name);
    return PC_OK;
}

static pc_status check_metadata(const pc_metadata_item *items, size_t count, pc_error *err)
{
    for (size_t i = 0; i < count; i++)
        if (pc_utf8_valid(items[i].key, items[i].key_len) != items[i].key_len ||
            pc_utf8_valid(items[i].value, items[i].value_len) != items[i].value_len)
            return pc_fail(err, PC_ERR_FORMAT, "cannot save: metadata that is not valid UTF-8");
    return PC_OK;
}

/* ------------------------------------------------------------------- plan */

static pc_status sort_views(const pc_tensor_view *views, item *items, size_t count, pc_error *err)
{
    for (size_t i = 0; i < count; i++) {
        const pc_tensor_info *info = &views[i].info;
        pc_status status = check_view(info, err);
        if (status != PC_OK)
            return status;
        items[i] = (item){.name = info->name, .name_len = info->name_len, .rank = rank_of(info->dtype), .view = i};
    }
    qsort(items, count, sizeof *items, by_rank_and_name);
    return PC_OK;
}

/* Two tensors of different dtypes may share a name without being neighbours, so a map finds them. */
static pc_status check_names(const item *items, size_t count, pc_error *err)
{
    pc_status status = PC_OK;
    pc_strmap names;
    pc_strmap_init(&names);
    for (size_t i = 0; status == PC_OK && i < count; i++) {
        size_t other;
        char name[PC_QUOTED];
        if (pc_strmap_get(&names, items[i].name, items[i].name_len, &other))
            status = pc_fail(err, PC_ERR_FORMAT, "cannot save: two tensors are named %s",
                             pc_quote_name(name, items[i].name, items[i].name_len));
        else if (!pc_strmap_put(&names, items[i].name, items[i].name_len, i))
            status = pc_fail_nomem(err, "the index of names");
    }
    pc_strmap_free(&names);
    return status;
}

static pc_status write_header(const pc_tensor_view *views, const item *items, size_t count,
                              const pc_metadata_item *metadata, size_t metadata_count, bool has_metadata,
                              pc_safetensors_layout *out, pc_error *err)
{
    text t = {0};
    uint64_t place = 0;
    put(&t, "\0\0\0\0\0\0\0\0{", 9);
    if (has_metadata)
        put_metadata(&t, metadata, metadata_count);
    for (size_t i = 0; i < count; i++) {
        const pc_tensor_info *info = &views[items[i].view].info;
        if (i > 0 || has_metadata)
            put(&t, ",", 1);
        if (info->nbytes > (uint64_t)INT64_MAX - place) { /* file offsets are signed */
            pc_free(t.bytes);
            return pc_fail(err, PC_ERR_FORMAT, "cannot save: the tensors together are too large for a file");
        }
        put_tensor(&t, info, place);
        place += info->nbytes;
        out->order[i] = items[i].view;
    }
    put(&t, "}", 1);
    while (!t.failed && t.len % 8 != 0) /* the prefix is eight bytes long itself */
        put(&t, " ", 1);
    if (t.failed) {
        pc_free(t.bytes);
        return pc_fail_nomem(err, "the header of a safetensors file");
    }
    uint64_t len = t.len - PC_SAFETENSORS_PREFIX;
    if (len > PC_SAFETENSORS_MAX_HEADER || place > (uint64_t)INT64_MAX - t.len) {
        pc_free(t.bytes);
        return pc_fail(err, PC_ERR_FORMAT,
                       "cannot save: the header would be %llu bytes, more than the %u that readers accept",
                       (unsigned long long)len, PC_SAFETENSORS_MAX_HEADER);
    }
    for (int i = 0; i < PC_SAFETENSORS_PREFIX; i++)
        t.bytes[i] = (char)(len >> (8 * i) & 0xFF);
    out->header = t.bytes;
    out->header_len = t.len;
    out->file_size = t.len + place;
    return PC_OK;
}

pc_status pc_safetensors_plan(const pc_tensor_view *views, size_t count, const pc_metadata_item *metadata,
                              size_t metadata_count, bool has_metadata, pc_safetensors_layout *out, pc_error *err)
{
    *out = (pc_safetensors_layout){.count = count};
    if (!has_metadata)
        metadata_count = 0;
    size_t bytes, order_bytes;
    item *items = pc_mul_size(count, sizeof *items, &bytes) ? pc_malloc(bytes) : NULL;
    out->order = pc_mul_size(count, sizeof *out->order, &order_bytes) ? pc_malloc(order_bytes) : NULL;
    pc_status status = PC_OK;
    if (items == NULL || out->order == NULL)
        status = pc_fail_nomem(err, "the layout of a safetensors file");
    if (status == PC_OK)
        status = check_metadata(metadata, metadata_count, err);
    if (status == PC_OK)
        status = sort_views(views, items, count, err);
    if (status == PC_OK)
        status = check_names(items, count, err);
    if (status == PC_OK)
        status = write_header(views, items, count, metadata, metadata_count, has_metadata, out, err);
    pc_free(items);
    if (status != PC_OK)
        pc_safetensors_layout_free(out);
    return status;
}

void pc_safetensors_layout_free(pc_safetensors_layout *layout)
{
    pc_free(layout->header);
    pc_free(layout->order);
    *layout = (pc_safetensors_layout){0};
}

/* ------------------------------------------------------------------- save */

pc_status pc_safetensors_save(const char *path, const pc_tensor_view *views, size_t count,
                              const pc_metadata_item *metadata, size_t metadata_count, bool has_metadata,
                              pc_error *err)
{
    pc_safetensors_layout layout;
    pc_status status = pc_safetensors_plan(views, count, metadata, metadata_count, has_metadata, &layout, err);
    if (status != PC_OK)
        return status;
    pc_atomic_file file;
    status = pc_atomic_open(path, &file, err);
    if (status == PC_OK) {
        status = pc_atomic_write(&file, layout.header, layout.header_len, err);
        for (size_t i = 0; status == PC_OK && i < count; i++) {
            const pc_tensor_view *view = &views[layout.order[i]];
            status = pc_atomic_write(&file, view->data, (size_t)view->info.nbytes, err);
        }
        if (status == PC_OK)
            status = pc_atomic_commit(&file, err);
        else
            pc_atomic_abort(&file);
    }
    pc_safetensors_layout_free(&layout);
    return status;
}
