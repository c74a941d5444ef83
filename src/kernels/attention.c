/* Scaled dot-product attention, one (batch, head) at a time: scores of a few query rows, softmax and the weighted sum
 * stay in the nearer caches, and nothing of size tq × tk is ever stored.
 *
 * A masked key has weight exactly 0, and 0 times a NaN or infinity in its value is NaN, as in torch. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "../core/memory.h"
#include "table.h"

typedef struct attention_job {
    pc_dtype dt;
    int64_t batch, heads, tq, tk, dim;
    const void *q, *k, *v;
    const uint8_t *mask;
    double scale;
    void *out;
    char *scratch;
    int64_t slot_bytes, add_bytes;
    atomic_llong next; /* head to take next */
} attention_job;

/* Fill `add` with 0 or -∞ per key; true when some key takes part. */
static bool spread_mask(pc_dtype dt, const uint8_t *mask, int64_t tk, void *add)
{
    bool any = false;
    for (int64_t i = 0; i < tk; i++) {
        any |= mask[i] != 0;
        if (dt == PC_F64)
            ((double *)add)[i] = mask[i] != 0 ? 0.0 : -(double)INFINITY;
        else
            ((float *)add)[i] = mask[i] != 0 ? 0.0f : -INFINITY;
    }
    return any;
}

static void head_f64(const attention_job *j, double scale, const double *q, const double *k, const double *v,
                     const double *add, double *out, double *scores)
{
    int64_t stride = j->heads * j->dim;
    for (int64_t i = 0; i < j->tq; i++, q += stride, out += stride) {
        for (int64_t t = 0; t < j->tk; t++) {
            double dot = 0.0;
            for (int64_t d = 0; d < j->dim; d++)
                dot += q[d] * k[t * stride + d];
            scores[t] = dot;
        }
        pc_rows_f64.softmax(j->tk, scores, scale, add, scores);
        memset(out, 0, (size_t)j->dim * sizeof *out);
        for (int64_t t = 0; t < j->tk; t++)
            for (int64_t d = 0; d < j->dim; d++)
                out[d] += scores[t] * v[t * stride + d];
    }
}

/* Each slot is a piece of scratch; whoever runs it takes heads until none is left. */
static void slot_range(void *ctx, int64_t begin, int64_t end)
{
    attention_job *j = ctx;
    for (int64_t slot = begin; slot < end; slot++) {
        char *scratch = j->scratch + slot * j->slot_bytes;
        for (;;) {
            int64_t item = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
            if (item >= j->batch * j->heads)
                break;
            int64_t b = item / j->heads, h = item % j->heads, stride = j->heads * j->dim;
            int64_t at_q = b * j->tq * stride + h * j->dim, at_k = b * j->tk * stride + h * j->dim;
            void *add = NULL;
            double scale = j->scale;
            if (j->mask != NULL) {
                add = scratch;
                if (!spread_mask(j->dt, j->mask + b * j->tk, j->tk, add)) {
                    add = NULL; /* all masked: equal weights */
                    scale = 0.0;
                }
            }
            if (j->dt == PC_F64) {
                head_f64(j, scale, (const double *)j->q + at_q, (const double *)j->k + at_k,
                         (const double *)j->v + at_k, add, (double *)j->out + at_q,
                         (double *)(void *)(scratch + j->add_bytes));
            } else {
                pc_head_job head = {.tq = j->tq, .tk = j->tk, .dim = j->dim, .stride = stride, .add = add};
                head.q = (const float *)j->q + at_q;
                head.k = (const float *)j->k + at_k;
                head.v = (const float *)j->v + at_k;
                head.scale = (float)scale;
                head.out = (float *)j->out + at_q;
                head.scratch = (float *)(void *)(scratch + j->add_bytes);
                pc_kernels()->head(&head);
            }
        }
    }
}

pc_status pc_attention(pc_runtime *rt, pc_dtype dt, int64_t batch, int64_t heads, int64_t tq, int64_t tk, int64_t dim,
                       const void *q, const void *k, const void *v, const uint8_t *mask, double scale, void *out,
                       pc_error *err)
{
    if (batch <= 0 || heads <= 0 || tq <= 0 || dim <= 0)
        return PC_OK;
    size_t size = pc_dtype_size(dt);
    if (tk <= 0) { /* a sum over nothing */
        memset(out, 0, (size_t)(batch * tq * heads * dim) * size);
        return PC_OK;
    }
    int64_t floats, slots = rt != NULL ? pc_runtime_threads(rt) : 1;
    attention_job j = {.dt = dt, .batch = batch, .heads = heads, .tq = tq, .tk = tk, .dim = dim};
    /* roughly what a head costs; waking others for less than some ten microseconds is a loss */
    double work = 2.0 * (double)tq * (double)tk * (double)(dim + 8) * (double)(batch * heads);
    slots = pc_min(slots, pc_max(1, pc_min(batch * heads, (int64_t)pc_min((int64_t)1 << 20, (int64_t)(work / 2e5)))));
    size_t bytes = 0;
    if (!__builtin_mul_overflow(tk, 3 * dim + 64, &floats) && floats < INT64_MAX / 64) {
        j.add_bytes = (int64_t)pc_align_up((size_t)tk * size);
        int64_t count = dt == PC_F64 ? tk : pc_kernels()->head_scratch(tk, dim);
        j.slot_bytes = j.add_bytes + (int64_t)pc_align_up((size_t)count * size);
        if (pc_mul_size((size_t)j.slot_bytes, (size_t)slots, &bytes) && pc_add_size(bytes, PC_ALIGNMENT, &bytes))
            j.scratch = pc_malloc(bytes);
    }
    if (j.scratch == NULL)
        return pc_fail_nomem(err, "the scratch of attention");
    char *base = j.scratch;
    j.scratch = (char *)(((uintptr_t)base + PC_ALIGNMENT - 1) & ~(uintptr_t)(PC_ALIGNMENT - 1));
    j.q = q;
    j.k = k;
    j.v = v;
    j.mask = mask;
    j.scale = scale;
    j.out = out;
    atomic_init(&j.next, 0);
    pc_parallel_for(rt, slots, 1, slot_range, &j);
    pc_free(base);
    return PC_OK;
}
