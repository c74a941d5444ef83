/* From storages to tensors: most tensors fill a storage of their own and are
 * read straight to where they are wanted; a part of a storage is read alone
 * once the storage's checksum is known to be right; a strided tensor is
 * gathered from the whole storage, which is kept until the last such tensor. */
#include "torch_storage.h"

#include <string.h>

/* ------------------------------------------------------------------ byte order */

static void swap16(uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    v = __builtin_bswap16(v);
    memcpy(p, &v, sizeof v);
}

static void swap32(uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    v = __builtin_bswap32(v);
    memcpy(p, &v, sizeof v);
}

static void swap64(uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    v = __builtin_bswap64(v);
    memcpy(p, &v, sizeof v);
}

static void swap_bytes(uint8_t *bytes, size_t len, pc_dtype dtype)
{
    size_t width = dtype == PC_C64 ? 4 : pc_dtype_size(dtype); /* the two halves of a complex number swap alone */
    for (size_t at = 0; width > 1 && at + width <= len; at += width) {
        if (width == 2)
            swap16(bytes + at);
        else if (width == 4)
            swap32(bytes + at);
        else
            swap64(bytes + at);
    }
}

/* -------------------------------------------------------------------- gathering */

/* The dimensions that matter, outermost first: without those of size 1, and with neighbours that
 * step as one merged into one. */
typedef struct walk {
    int ndim;
    uint64_t size[PC_MAX_DIMS];
    uint64_t step[PC_MAX_DIMS]; /* in bytes */
} walk;

static void plan_walk(const pc_tensor_info *info, const uint64_t *stride, size_t width, walk *w)
{
    w->ndim = 0;
    for (int d = 0; d < info->ndim; d++) {
        if (info->shape[d] == 1)
            continue;
        /* Checked when the file was opened: every byte offset that these lead to is inside the storage. */
        uint64_t step = stride[d] * width;
        if (w->ndim > 0 && w->step[w->ndim - 1] == step * info->shape[d]) {
            w->size[w->ndim - 1] *= info->shape[d];
            w->step[w->ndim - 1] = step;
            continue;
        }
        w->size[w->ndim] = info->shape[d];
        w->step[w->ndim] = step;
        w->ndim++;
    }
}

static uint8_t *copy_run(uint8_t *dst, const uint8_t *src, uint64_t count, uint64_t step, size_t width)
{
    if (step == width) {
        memcpy(dst, src, (size_t)count * width);
        return dst + (size_t)count * width;
    }
    /* One loop per width, so that the copy of an element is a load and a store. */
    switch (width) {
    case 1:
        for (uint64_t i = 0; i < count; i++)
            *dst++ = src[i * step];
        return dst;
    case 2:
        for (uint64_t i = 0; i < count; i++, dst += 2)
            memcpy(dst, src + i * step, 2);
        return dst;
    case 4:
        for (uint64_t i = 0; i < count; i++, dst += 4)
            memcpy(dst, src + i * step, 4);
        return dst;
    default:
        for (uint64_t i = 0; i < count; i++, dst += 8)
            memcpy(dst, src + i * step, 8);
        return dst;
    }
}

/* Row-major copy of a tensor with at least one element. */
static void gather(const pc_tensor_info *info, const uint64_t *stride, const uint8_t *src, uint8_t *dst)
{
    size_t width = pc_dtype_size(info->dtype);
    walk w;
    plan_walk(info, stride, width, &w);
    if (w.ndim == 0) {
        memcpy(dst, src, width);
        return;
    }
    int inner = w.ndim - 1;
    uint64_t index[PC_MAX_DIMS] = {0};
    for (;;) {
        dst = copy_run(dst, src, w.size[inner], w.step[inner], width);
        int d = inner - 1;
        for (; d >= 0; d--) {
            src += w.step[d];
            if (++index[d] < w.size[d])
                break;
            src -= w.step[d] * w.size[d];
            index[d] = 0;
        }
        if (d < 0)
            return;
    }
}

/* --------------------------------------------------------------------- reading */

static pc_status verify(pc_torch_bin *bin, pc_bin_storage *s, pc_error *err)
{
    if (s->verified)
        return PC_OK;
    pc_status status = pc_zip_read(&bin->zip, s->entry, NULL, err);
    s->verified = status == PC_OK;
    return status;
}

/* Bytes [start, start + len) of a storage. */
static pc_status read_part(pc_torch_bin *bin, pc_bin_storage *s, uint64_t start, void *dst, size_t len, pc_error *err)
{
    if (!s->verified && start == 0 && len == bin->zip.entries[s->entry].size) {
        pc_status status = pc_zip_read(&bin->zip, s->entry, dst, err);
        s->verified = status == PC_OK;
        return status;
    }
    pc_status status = verify(bin, s, err);
    return status == PC_OK ? pc_source_read(&bin->source, s->offset + start, dst, len, err) : status;
}

static pc_status read_strided(pc_torch_bin *bin, pc_bin_storage *s, pc_bin_layout *layout, const pc_tensor_info *info,
                              void *dst, pc_error *err)
{
    const uint8_t *bytes = NULL;
    pc_status status = PC_OK;
    if (bin->source.bytes != NULL) {
        status = verify(bin, s, err);
        bytes = bin->source.bytes + s->offset;
    } else {
        if (s->cache == NULL) {
            s->cache = pc_block_alloc((size_t)s->nbytes);
            if (s->cache == NULL)
                return pc_fail_nomem(err, "a storage of strided tensors");
            status = read_part(bin, s, 0, s->cache, (size_t)s->nbytes, err);
        }
        bytes = s->cache;
    }
    if (status == PC_OK)
        gather(info, layout->stride, bytes + layout->start, dst);
    if (status == PC_OK && !layout->gathered) {
        layout->gathered = true;
        s->gathers--;
    }
    if (s->cache != NULL && (status != PC_OK || s->gathers == 0)) {
        pc_block_free(s->cache, (size_t)s->nbytes);
        s->cache = NULL;
    }
    return status;
}

pc_status pc_bin_read(pc_weights *self, size_t i, void *dst, pc_error *err)
{
    pc_torch_bin *bin = (pc_torch_bin *)self;
    const pc_tensor_info *info = &self->tensors[i];
    pc_bin_layout *layout = &bin->layouts[i];
    if (info->nbytes == 0)
        return PC_OK;
    pc_bin_storage *s = &bin->storages[layout->storage];
    pc_status status = layout->contiguous
                           ? read_part(bin, s, layout->start, dst, (size_t)info->nbytes, err)
                           : read_strided(bin, s, layout, info, dst, err);
    if (status != PC_OK)
        return status;
    const bool host_is_big = __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__;
    if (bin->big_endian != host_is_big)
        swap_bytes(dst, (size_t)info->nbytes, info->dtype);
    if (info->dtype == PC_BOOL) /* a bool that is neither 0 nor 1 confuses whoever reads it */
        for (uint8_t *p = dst, *end = p + info->nbytes; p < end; p++)
            *p = *p != 0;
    return PC_OK;
}
