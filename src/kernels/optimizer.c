/* AdamW (Loshchilov and Hutter 2019) and SGD, in torch's formulation, over whole tensors at a time. */
#include <math.h>

#include "gradients.h"
#include "table.h"

/* Elements of a 16-bit tensor that are widened at a time, and what makes a piece of work worth another thread. */
#define CHUNK 512
#define GRAIN 16384

typedef struct step_job {
    const pc_adamw *adamw;
    const pc_sgd *sgd;
    const pc_update *u;
} step_job;

/* The loops below are written for the compiler to turn into vectors, once per dtype. */
#define DEFINE_STEPS(REAL, SQRT)                                                                                       \
    static void adamw_##REAL(const pc_adamw *o, int64_t n, REAL *p, const REAL *g, REAL *m, REAL *v)                   \
    {                                                                                                                  \
        const REAL b1 = (REAL)o->beta1, b2 = (REAL)o->beta2, c1 = (REAL)(1.0 - o->beta1), c2 = (REAL)(1.0 - o->beta2); \
        const REAL keep = (REAL)(1.0 - o->lr * o->weight_decay), step = (REAL)(o->lr / o->correction1);                \
        const REAL root = (REAL)sqrt(o->correction2), eps = (REAL)o->eps, sign = o->maximize ? (REAL)-1 : (REAL)1;     \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            REAL grad = sign * g[i];                                                                                   \
            m[i] = b1 * m[i] + c1 * grad;                                                                              \
            v[i] = b2 * v[i] + c2 * grad * grad;                                                                       \
            p[i] = keep * p[i] - step * m[i] / (SQRT(v[i]) / root + eps);                                              \
        }                                                                                                              \
    }                                                                                                                  \
    static void sgd_##REAL(const pc_sgd *o, int64_t n, REAL *p, const REAL *g, REAL *buffer, bool first)               \
    {                                                                                                                  \
        const REAL lr = (REAL)o->lr, decay = (REAL)o->weight_decay, sign = o->maximize ? (REAL)-1 : (REAL)1;           \
        const REAL momentum = (REAL)o->momentum, fresh = first ? (REAL)1 : (REAL)(1.0 - o->dampening);                 \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            REAL grad = sign * g[i] + decay * p[i];                                                                    \
            if (buffer != NULL) {                                                                                      \
                buffer[i] = (first ? (REAL)0 : momentum * buffer[i]) + fresh * grad;                                   \
                grad = o->nesterov ? grad + momentum * buffer[i] : buffer[i];                                          \
            }                                                                                                          \
            p[i] -= lr * grad;                                                                                         \
        }                                                                                                              \
    }
DEFINE_STEPS(float, sqrtf)
DEFINE_STEPS(double, sqrt)
#undef DEFINE_STEPS

static void *state_at(const pc_update *u, int which, int64_t i)
{
    return u->state[which] != NULL ? pc_at_mut(pc_compute_dtype(u->dtype), u->state[which], i) : NULL;
}

static void step_range(void *ctx, int64_t begin, int64_t end)
{
    const step_job *j = ctx;
    const pc_update *u = j->u;
    const pc_dtype compute = pc_compute_dtype(u->dtype);
    const bool direct = u->dtype == compute && u->grad_dtype == compute;
    const int64_t most = direct ? end - begin : CHUNK;
    union {
        float f32[CHUNK];
        double f64[CHUNK];
    } p_room, g_room;
    for (int64_t at = begin; at < end; at += most) {
        int64_t n = pc_min(most, end - at);
        void *p = pc_at_mut(u->dtype, u->data, at);
        const void *g = pc_at(u->grad_dtype, u->grad, at);
        if (!direct) {
            pc_widen_to(compute, &p_room, u->dtype, p, n);
            pc_widen_to(compute, &g_room, u->grad_dtype, g, n);
            p = &p_room;
            g = &g_room;
        }
        void *first = state_at(u, 0, at), *second = state_at(u, 1, at);
        if (compute == PC_F64 && j->adamw != NULL)
            adamw_double(j->adamw, n, p, g, first, second);
        else if (compute == PC_F64)
            sgd_double(j->sgd, n, p, g, first, u->first);
        else if (j->adamw != NULL)
            adamw_float(j->adamw, n, p, g, first, second);
        else
            sgd_float(j->sgd, n, p, g, first, u->first);
        if (!direct)
            pc_widen_to(u->dtype, pc_at_mut(u->dtype, u->data, at), compute, p, n);
    }
}

static void run_steps(pc_runtime *rt, step_job *j, const pc_update *updates, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        j->u = &updates[i];
        pc_parallel_for(rt, updates[i].n, GRAIN, step_range, j);
    }
}

void pc_adamw_step(pc_runtime *rt, const pc_adamw *options, const pc_update *updates, size_t count)
{
    step_job j = {.adamw = options};
    run_steps(rt, &j, updates, count);
}

void pc_sgd_step(pc_runtime *rt, const pc_sgd *options, const pc_update *updates, size_t count)
{
    step_job j = {.sgd = options};
    run_steps(rt, &j, updates, count);
}

int64_t pc_first_not_finite(pc_dtype dtype, const void *values, int64_t n)
{
    if (dtype == PC_F32) { /* x - x is 0 unless x is NaN or infinite: a sum that the compiler turns into vectors */
        const float *x = values;
        float sum = 0.0f;
        for (int64_t at = 0; at < n; at += CHUNK) {
            int64_t part = pc_min(CHUNK, n - at);
            float lanes[16] = {0};
            for (int64_t i = 0; i + 16 <= part; i += 16)
                for (int lane = 0; lane < 16; lane++)
                    lanes[lane] += x[at + i + lane] - x[at + i + lane];
            for (int64_t i = part / 16 * 16; i < part; i++)
                sum += x[at + i] - x[at + i];
            for (int lane = 0; lane < 16; lane++)
                sum += lanes[lane];
            if (sum != 0.0f)
                break;
        }
        if (sum == 0.0f)
            return -1;
    }
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(pc_get_double(dtype, values, i)))
            return i;
    return -1;
}

double pc_norm(pc_dtype dtype, const void *values, int64_t n, double kind)
{
    double sum = 0.0;
    if (dtype == PC_F32 && kind == 2.0) { /* the usual case, in vectors */
        for (int64_t at = 0; at < n; at += CHUNK) {
            const float *x = (const float *)values + at;
            double lanes[8] = {0};
            const int64_t part = pc_min(CHUNK, n - at);
            for (int64_t i = 0; i + 8 <= part; i += 8)
                for (int lane = 0; lane < 8; lane++)
                    lanes[lane] += (double)x[i + lane] * (double)x[i + lane];
            for (int64_t i = part / 8 * 8; i < part; i++)
                sum += (double)x[i] * (double)x[i];
            for (int lane = 0; lane < 8; lane++)
                sum += lanes[lane];
        }
        return sqrt(sum);
    }
    for (int64_t i = 0; i < n; i++) {
        const double x = fabs(pc_get_double(dtype, values, i));
        if (isinf(kind))
            sum = x > sum || x != x ? x : sum;
        else
            sum += kind == 2.0 ? x * x : kind == 1.0 ? x : pow(x, kind);
    }
    return isinf(kind) || kind == 1.0 ? sum : kind == 2.0 ? sqrt(sum) : pow(sum, 1.0 / kind);
}
