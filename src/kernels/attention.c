/* Scaled dot-product attention, one (batch, head) at a time: scores of a few query rows, softmax and the weighted sum
 * stay in the nearer caches, and nothing of size tq × tk is ever stored.
 *
 * A masked key has weight exactly 0, and 0 times a NaN or infinity in its value is NaN, as in torch. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "../core/memory.h"
#include "gradients.h"
#include "table.h"

typedef struct attention_job {
    pc_dtype dt;
    pc_attention_shape s;
    const void *q, *k, *v;
    const uint8_t *mask;
    void *out;
    bool back; /* gradients are wanted */
    const void *dy;
    void *dq, *dk, *dv;
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

/* One head in f64: q, dy, out, dq move by tokens; k, v, dk, dv are the head's first. */
typedef struct head_f64 {
    const double *q, *k, *v, *add, *dy;
    double *out, *dq, *dk, *dv, *scores, *slopes; /* scores and slopes: (tk) */
    double scale;
    uint64_t first_draw;
} head_f64;

/* What dropout multiplies the probability of key t in row i with. */
static double kept(const pc_attention_shape *s, const head_f64 *h, int64_t i, int64_t t)
{
    if (!(s->dropout > 0.0))
        return 1.0;
    uint64_t at = h->first_draw + (uint64_t)(i * pc_draws_of_row(s->tk) + t);
    return s->dropout < 1.0 && (double)pc_rng_unit(s->rng, at) >= s->dropout ? 1.0 / (1.0 - s->dropout) : 0.0;
}

static double dot_f64(int64_t n, const double *a, const double *b)
{
    double sum = 0.0;
    for (int64_t d = 0; d < n; d++)
        sum += a[d] * b[d];
    return sum;
}

static void probabilities_f64(const pc_attention_shape *s, const head_f64 *h, const double *q)
{
    int64_t stride = s->heads * s->dim;
    for (int64_t t = 0; t < s->tk; t++)
        h->scores[t] = dot_f64(s->dim, q, h->k + t * stride);
    pc_rows_f64.softmax(s->tk, h->scores, h->scale, h->add, h->scores);
}

static void forward_f64(const pc_attention_shape *s, const head_f64 *h)
{
    int64_t stride = s->heads * s->dim;
    for (int64_t i = 0; i < s->tq; i++) {
        double *out = h->out + i * stride;
        probabilities_f64(s, h, h->q + i * stride);
        memset(out, 0, (size_t)s->dim * sizeof *out);
        for (int64_t t = 0; t < s->tk; t++)
            pc_rows_f64.axpy(s->dim, h->scores[t] * kept(s, h, i, t), h->v + t * stride, out);
    }
}

static void back_f64(const pc_attention_shape *s, const head_f64 *h)
{
    int64_t stride = s->heads * s->dim;
    size_t bytes = (size_t)s->dim * sizeof(double);
    for (int64_t t = 0; t < s->tk; t++) {
        if (h->dk != NULL)
            memset(h->dk + t * stride, 0, bytes);
        if (h->dv != NULL)
            memset(h->dv + t * stride, 0, bytes);
    }
    for (int64_t i = 0; i < s->tq; i++) {
        const double *q = h->q + i * stride, *dy = h->dy + i * stride;
        probabilities_f64(s, h, q);
        for (int64_t t = 0; t < s->tk; t++) {
            double keep = kept(s, h, i, t);
            if (h->dv != NULL)
                pc_rows_f64.axpy(s->dim, h->scores[t] * keep, dy, h->dv + t * stride);
            h->slopes[t] = keep * dot_f64(s->dim, dy, h->v + t * stride);
        }
        pc_rows_f64.softmax_back(s->tk, h->scores, h->slopes, h->scale, h->slopes);
        if (h->dq != NULL)
            memset(h->dq + i * stride, 0, bytes);
        for (int64_t t = 0; t < s->tk; t++) {
            if (h->dq != NULL)
                pc_rows_f64.axpy(s->dim, h->slopes[t], h->k + t * stride, h->dq + i * stride);
            if (h->dk != NULL)
                pc_rows_f64.axpy(s->dim, h->slopes[t], q, h->dk + t * stride);
        }
    }
}

static const void *moved(pc_dtype dt, const void *base, int64_t by) { return base != NULL ? pc_at(dt, base, by) : NULL; }
static void *moved_mut(pc_dtype dt, void *base, int64_t by) { return base != NULL ? pc_at_mut(dt, base, by) : NULL; }

static void run_head(const attention_job *j, int64_t item, char *scratch)
{
    const pc_attention_shape *s = &j->s;
    const pc_dtype dt = j->dt;
    int64_t b = item / s->heads, h = item % s->heads, stride = s->heads * s->dim;
    int64_t at_q = b * s->tq * stride + h * s->dim, at_k = b * s->tk * stride + h * s->dim;
    void *add = NULL;
    double scale = s->scale;
    if (j->mask != NULL) {
        add = scratch;
        if (!spread_mask(dt, j->mask + b * s->tk, s->tk, add)) {
            add = NULL; /* all masked: equal weights */
            scale = 0.0;
        }
    }
    void *room = scratch + j->add_bytes;
    uint64_t first_draw = (uint64_t)(item * s->tq * pc_draws_of_row(s->tk));
    const void *q = moved(dt, j->q, at_q), *k = moved(dt, j->k, at_k), *v = moved(dt, j->v, at_k);
    const void *dy = moved(dt, j->dy, at_q);
    void *out = moved_mut(dt, j->out, at_q), *dq = moved_mut(dt, j->dq, at_q), *dk = moved_mut(dt, j->dk, at_k);
    void *dv = moved_mut(dt, j->dv, at_k);
    if (dt == PC_F64) {
        head_f64 head = {.q = q, .k = k, .v = v, .add = add, .dy = dy, .out = out, .dq = dq, .dk = dk, .dv = dv};
        head.scores = room;
        head.slopes = head.scores + s->tk;
        head.scale = scale;
        head.first_draw = first_draw;
        if (j->back)
            back_f64(s, &head);
        else
            forward_f64(s, &head);
        return;
    }
    pc_head_job head = {.tq = s->tq, .tk = s->tk, .dim = s->dim, .stride = stride, .q = q, .k = k, .v = v};
    head.add = add;
    head.scale = (float)scale;
    head.out = out;
    head.scratch = room;
    head.dropout = s->dropout;
    head.rng = s->rng;
    head.first_draw = first_draw;
    head.dy = dy;
    head.dq = dq;
    head.dk = dk;
    head.dv = dv;
    if (j->back)
        pc_kernels()->head_back(&head);
    else
        pc_kernels()->head(&head);
}

/* Each slot is a piece of scratch; whoever runs it takes heads until none is left. */
static void slot_range(void *ctx, int64_t begin, int64_t end)
{
    attention_job *j = ctx;
    for (int64_t slot = begin; slot < end; slot++) {
        for (;;) {
            int64_t item = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
            if (item >= j->s.batch * j->s.heads)
                break;
            run_head(j, item, j->scratch + slot * j->slot_bytes);
        }
    }
}

static pc_status run_heads(pc_runtime *rt, attention_job *j, pc_error *err)
{
    const pc_attention_shape *s = &j->s;
    size_t size = pc_dtype_size(j->dt);
    int64_t floats, slots = rt != NULL ? pc_runtime_threads(rt) : 1, heads = s->batch * s->heads;
    /* roughly what a head costs; waking others for less than some ten microseconds is a loss */
    double work = (j->back ? 5.0 : 2.0) * (double)s->tq * (double)s->tk * (double)(s->dim + 8) * (double)heads;
    slots = pc_min(slots, pc_max(1, pc_min(heads, (int64_t)pc_min((int64_t)1 << 20, (int64_t)(work / 2e5)))));
    size_t bytes = 0;
    char *base = NULL;
    if (!__builtin_mul_overflow(s->tk, 4 * s->dim + 512, &floats) && floats < INT64_MAX / 64) {
        j->add_bytes = (int64_t)pc_align_up((size_t)s->tk * size);
        int64_t count = j->dt == PC_F64 ? 2 * s->tk
                        : j->back       ? pc_kernels()->head_back_scratch(s->tk, s->dim)
                                        : pc_kernels()->head_scratch(s->tk, s->dim);
        j->slot_bytes = j->add_bytes + (int64_t)pc_align_up((size_t)count * size);
        if (pc_mul_size((size_t)j->slot_bytes, (size_t)slots, &bytes) && pc_add_size(bytes, PC_ALIGNMENT, &bytes))
            base = pc_malloc(bytes);
    }
    if (base == NULL)
        return pc_fail_nomem(err, "the scratch of attention");
    j->scratch = (char *)pc_align_up((uintptr_t)base);
    atomic_init(&j->next, 0);
    pc_parallel_for(rt, slots, 1, slot_range, j);
    pc_free(base);
    return PC_OK;
}

pc_status pc_attention_train(pc_runtime *rt, pc_dtype dt, const pc_attention_shape *shape, const void *q, const void *k,
                             const void *v, const uint8_t *mask, void *out, pc_error *err)
{
    if (shape->batch <= 0 || shape->heads <= 0 || shape->tq <= 0 || shape->dim <= 0)
        return PC_OK;
    if (shape->tk <= 0) { /* a sum over nothing */
        memset(out, 0, (size_t)(shape->batch * shape->tq * shape->heads * shape->dim) * pc_dtype_size(dt));
        return PC_OK;
    }
    attention_job j = {.dt = dt, .s = *shape, .q = q, .k = k, .v = v, .mask = mask, .out = out};
    return run_heads(rt, &j, err);
}

pc_status pc_attention(pc_runtime *rt, pc_dtype dt, int64_t batch, int64_t heads, int64_t tq, int64_t tk, int64_t dim,
                       const void *q, const void *k, const void *v, const uint8_t *mask, double scale, void *out,
                       pc_error *err)
{
    pc_attention_shape shape = {.batch = batch, .heads = heads, .tq = tq, .tk = tk, .dim = dim, .scale = scale};
    return pc_attention_train(rt, dt, &shape, q, k, v, mask, out, err);
}

pc_status pc_attention_back(pc_runtime *rt, pc_dtype dt, const pc_attention_shape *shape, const void *q, const void *k,
                            const void *v, const uint8_t *mask, const void *dy, void *dq, void *dk, void *dv,
                            pc_error *err)
{
    if (shape->batch <= 0 || shape->heads <= 0 || shape->dim <= 0)
        return PC_OK;
    size_t token = (size_t)(shape->batch * shape->heads * shape->dim) * pc_dtype_size(dt);
    if (shape->tk <= 0 || shape->tq <= 0) { /* nothing depends on anything */
        if (dq != NULL)
            memset(dq, 0, token * (size_t)shape->tq);
        if (dk != NULL)
            memset(dk, 0, token * (size_t)shape->tk);
        if (dv != NULL)
            memset(dv, 0, token * (size_t)shape->tk);
        return PC_OK;
    }
    attention_job j = {.dt = dt, .s = *shape, .q = q, .k = k, .v = v, .mask = mask, .back = true};
    j.dy = dy;
    j.dq = dq;
    j.dk = dk;
    j.dv = dv;
    return run_heads(rt, &j, err);
}
