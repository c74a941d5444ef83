/* Reading tensors in bulk and in part. */
#include <stdatomic.h>
#include <string.h>

#include "safetensors_internal.h"

/* --------------------------------------------------------------- all of it */

typedef struct bulk {
    const pc_safetensors *st;
    void *const *dst;
    atomic_bool failed;
    atomic_flag recorded; /* the first failure writes the error */
    pc_status status;
    pc_error *err;
} bulk;

/* Bytes [begin, end) of the data, which touch one tensor after the other. */
static void read_range(void *ctx, int64_t begin, int64_t end)
{
    bulk *b = ctx;
    const pc_safetensors *st = b->st;
    uint64_t at = (uint64_t)begin, stop = (uint64_t)end;
    /* The last tensor that begins at or before `at`; empty ones in front of it have nothing to read. */
    size_t low = 0, high = st->weights.count;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (st->begins[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    for (size_t i = low; at < stop && !atomic_load_explicit(&b->failed, memory_order_relaxed); i++) {
        uint64_t within = at - st->begins[i];
        uint64_t len = st->tensors[i].nbytes - within;
        if (len > stop - at)
            len = stop - at;
        pc_error error;
        pc_status status = pc_safetensors_read_at(st, st->data_start + at, (char *)b->dst[i] + within, (size_t)len,
                                                  &error);
        if (status != PC_OK) {
            if (!atomic_flag_test_and_set(&b->recorded)) {
                b->status = status;
                if (b->err != NULL)
                    *b->err = error;
            }
            atomic_store(&b->failed, true);
            return;
        }
        at += len;
    }
}

/* A thread's share at least: below it, waking a thread costs more than it saves. */
#define BYTES_PER_THREAD ((int64_t)2 << 20)

pc_status pc_safetensors_read_all(const pc_safetensors *st, void *const *dst, pc_runtime *rt, pc_error *err)
{
    uint64_t total = st->size - st->data_start;
    if (total > (uint64_t)INT64_MAX)
        return pc_fail_nomem(err, "the tensors of a file");
    bulk b = {.st = st, .dst = dst, .status = PC_OK, .err = err, .recorded = ATOMIC_FLAG_INIT};
    atomic_init(&b.failed, false);
    pc_parallel_for(rt, (int64_t)total, BYTES_PER_THREAD, read_range, &b);
    return b.status;
}

/* ------------------------------------------------------------- part of one */

/* Runs that lie close together are read with what lies between them and picked out of a buffer: one
 * system call costs about as much as copying a few kilobytes. */
#define SCRATCH_BYTES ((uint64_t)256 << 10)
#define SMALL_GAP ((uint64_t)8 << 10)

typedef struct picker {
    const pc_safetensors *st;
    const pc_axis *axes;
    int ndim;
    uint64_t stride[PC_MAX_DIMS + 1]; /* bytes from one element to the next along each axis */
    uint64_t low[PC_MAX_DIMS + 1];    /* of a sub-block at axis d: first byte that is wanted … */
    uint64_t span[PC_MAX_DIMS + 1];   /* … and bytes up to the last one */
    bool whole[PC_MAX_DIMS + 1];      /* everything from axis d on is wanted, in order */
    char *scratch;
    uint64_t scratch_at; /* place in the file of scratch[0] */
    char *dst;
    pc_error *err;
} picker;

static uint64_t step_bytes(const picker *p, int d)
{
    int64_t step = p->axes[d].step;
    return (step < 0 ? 0 - (uint64_t)step : (uint64_t)step) * p->stride[d];
}

/* Element k of axis d, in bytes from the start of the sub-block. */
static uint64_t place(const picker *p, int d, uint64_t k)
{
    const pc_axis *axis = &p->axes[d];
    uint64_t way = k * step_bytes(p, d);
    uint64_t start = axis->start * p->stride[d];
    return axis->step < 0 ? start - way : start + way;
}

/* From axis d on, what is wanted is one run of bytes. */
static bool is_run(const picker *p, int d)
{
    return d == p->ndim || ((p->axes[d].step == 1 || p->axes[d].count == 1) && p->whole[d + 1]);
}

static uint64_t run_bytes(const picker *p, int d)
{
    return d == p->ndim ? p->stride[d] : p->axes[d].count * p->stride[d];
}

/* Copy elements first … first + count of axis d, of the sub-block at `base`, from scratch. */
static void gather(picker *p, int d, uint64_t base, uint64_t first, uint64_t count)
{
    if (is_run(p, d)) {
        uint64_t from = base + (d < p->ndim ? place(p, d, first) : 0);
        uint64_t len = d < p->ndim ? count * p->stride[d] : p->stride[d];
        memcpy(p->dst, p->scratch + (from - p->scratch_at), (size_t)len);
        p->dst += len;
        return;
    }
    for (uint64_t k = first; k < first + count; k++) {
        uint64_t at = base + place(p, d, k);
        if (d + 1 == p->ndim) {
            memcpy(p->dst, p->scratch + (at - p->scratch_at), (size_t)p->stride[d]);
            p->dst += p->stride[d];
        } else {
            gather(p, d + 1, at, 0, p->axes[d + 1].count);
        }
    }
}

static pc_status fill_scratch(picker *p, uint64_t from, uint64_t len)
{
    p->scratch_at = from;
    return pc_safetensors_read_at(p->st, from, p->scratch, (size_t)len, p->err);
}

/* The sub-block at axis d whose first byte is at `base` in the file. */
static pc_status pick(picker *p, int d, uint64_t base)
{
    if (is_run(p, d)) {
        uint64_t len = run_bytes(p, d);
        uint64_t from = base + (d < p->ndim ? place(p, d, 0) : 0);
        pc_status status = pc_safetensors_read_at(p->st, from, p->dst, (size_t)len, p->err);
        p->dst += len;
        return status;
    }
    /* How many elements of this axis fit the buffer together, gaps included. */
    uint64_t gap = step_bytes(p, d), count = p->axes[d].count, batch = 1;
    if (p->span[d + 1] <= SCRATCH_BYTES && gap <= SMALL_GAP && gap > 0)
        batch = 1 + (SCRATCH_BYTES - p->span[d + 1]) / gap;
    for (uint64_t k = 0; k < count; k += batch) {
        pc_status status;
        if (batch > 1) {
            uint64_t n = count - k < batch ? count - k : batch;
            uint64_t lowest = place(p, d, p->axes[d].step < 0 ? k + n - 1 : k) + p->low[d + 1];
            status = fill_scratch(p, base + lowest, (n - 1) * gap + p->span[d + 1]);
            if (status == PC_OK)
                gather(p, d, base, k, n);
        } else {
            status = pick(p, d + 1, base + place(p, d, k));
        }
        if (status != PC_OK)
            return status;
    }
    return PC_OK;
}

static bool within(const pc_axis *axis, uint64_t size)
{
    if (axis->start >= size)
        return false;
    uint64_t steps = axis->count - 1;
    uint64_t reach = axis->step < 0 ? axis->start : size - 1 - axis->start;
    uint64_t step = axis->step < 0 ? 0 - (uint64_t)axis->step : (uint64_t)axis->step;
    return step == 0 ? steps == 0 : steps <= reach / step;
}

pc_status pc_safetensors_read_slice(const pc_safetensors *st, size_t i, const pc_axis *axes, void *dst, pc_error *err)
{
    const pc_tensor_info *info = &st->tensors[i];
    uint64_t element = pc_dtype_size(info->dtype);
    if (element == 0)
        return pc_fail(err, PC_ERR_UNSUPPORTED, "\"%s\": slices of %s tensors are not supported: an element is less "
                                                "than a byte",
                       st->label, pc_dtype_get(info->dtype)->name);
    picker p = {.st = st, .axes = axes, .ndim = info->ndim, .dst = dst, .err = err};
    for (int d = 0; d < info->ndim; d++)
        if (axes[d].count == 0)
            return PC_OK;
    for (int d = 0; d < info->ndim; d++)
        if (!within(&axes[d], info->shape[d]))
            return pc_fail(err, PC_ERR_INDEX, "\"%s\": slice out of bounds for axis %d with size %llu", st->label, d,
                           (unsigned long long)info->shape[d]);
    /* No axis is empty here, so no product below is larger than the tensor. */
    p.stride[info->ndim] = element;
    p.span[info->ndim] = element;
    p.whole[info->ndim] = true;
    uint64_t stride = element;
    for (int d = info->ndim - 1; d >= 0; d--) {
        const pc_axis *axis = &axes[d];
        p.stride[d] = stride;
        p.whole[d] = p.whole[d + 1] && axis->count == info->shape[d] && (axis->step == 1 || axis->count == 1);
        p.low[d] = place(&p, d, axis->step < 0 ? axis->count - 1 : 0) + p.low[d + 1];
        p.span[d] = (axis->count - 1) * step_bytes(&p, d) + p.span[d + 1];
        stride *= info->shape[d];
    }
    p.scratch = pc_malloc(SCRATCH_BYTES);
    if (p.scratch == NULL)
        return pc_fail_nomem(err, "a read buffer");
    pc_status status = pick(&p, 0, st->data_start + st->begins[i]);
    pc_free(p.scratch);
    return status;
}
