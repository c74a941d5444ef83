/* Cross entropy. */
#include <math.h>

#include "gradients.h"
#include "table.h"

#define GRAIN 4096

typedef struct loss_job {
    pc_dtype dt;
    int64_t n;
    const void *logits;
    const int64_t *labels;
    const pc_cross_entropy_options *o;
    double weights, norm; /* Σ weight over all classes; what the sum is divided by */
    double *row_loss;     /* NULL: the gradient alone */
    void *grad;
} loss_job;

static double value(pc_dtype dt, const void *values, int64_t i)
{
    return dt == PC_F64 ? ((const double *)values)[i] : (double)((const float *)values)[i];
}

static double weight_of(const loss_job *j, int64_t label)
{
    return j->o->weight != NULL ? value(j->dt, j->o->weight, label) : 1.0;
}

/* ln Σ e^x of a row */
static double log_sum(const loss_job *j, int64_t row)
{
    double top = -INFINITY, sum = 0.0;
    for (int64_t c = 0; c < j->n; c++) {
        double x = value(j->dt, j->logits, row * j->n + c);
        top = x > top || x != x ? x : top;
    }
    if (!isfinite(top))
        return top == INFINITY ? NAN : top;
    for (int64_t c = 0; c < j->n; c++)
        sum += exp(value(j->dt, j->logits, row * j->n + c) - top);
    return top + log(sum);
}

/* Smoothing gives every class c its weight · smoothing / n, and the label its weight · (1 - smoothing) on top. */
static double loss_of_row(const loss_job *j, int64_t row, double lse)
{
    int64_t label = j->labels[row];
    double sum = (1.0 - j->o->smoothing) * weight_of(j, label) * (lse - value(j->dt, j->logits, row * j->n + label));
    for (int64_t c = 0; c < j->n && j->o->smoothing != 0.0; c++)
        sum += j->o->smoothing / (double)j->n * weight_of(j, c) * (lse - value(j->dt, j->logits, row * j->n + c));
    return sum;
}

static void loss_range(void *ctx, int64_t begin, int64_t end)
{
    const loss_job *j = ctx;
    for (int64_t row = begin; row < end; row++) {
        int64_t label = j->labels[row];
        bool counts = label != j->o->ignore;
        double lse = counts ? log_sum(j, row) : 0.0;
        double mass = counts ? (1.0 - j->o->smoothing) * weight_of(j, label) +
                                   j->o->smoothing / (double)j->n * j->weights
                             : 0.0;
        j->row_loss[row] = counts ? loss_of_row(j, row, lse) : 0.0;
        for (int64_t c = 0; c < j->n; c++) {
            double g = 0.0;
            if (counts) {
                g = mass * exp(value(j->dt, j->logits, row * j->n + c) - lse);
                g -= j->o->smoothing / (double)j->n * weight_of(j, c);
                if (c == label)
                    g -= (1.0 - j->o->smoothing) * weight_of(j, c);
                g /= j->norm;
            }
            if (j->dt == PC_F64)
                ((double *)j->grad)[row * j->n + c] = g;
            else
                ((float *)j->grad)[row * j->n + c] = (float)g;
        }
    }
}

void pc_cross_entropy(pc_runtime *rt, pc_dtype dt, int64_t m, int64_t n, const void *logits, const int64_t *labels,
                      const pc_cross_entropy_options *options, double *row_loss, double *loss, void *grad)
{
    loss_job j = {.dt = dt, .n = n, .logits = logits, .labels = labels, .o = options, .row_loss = row_loss, .grad = grad};
    for (int64_t c = 0; c < n; c++)
        j.weights += weight_of(&j, c);
    for (int64_t row = 0; row < m; row++)
        if (labels[row] != options->ignore)
            j.norm += weight_of(&j, labels[row]);
    if (!options->mean)
        j.norm = 1.0;
    pc_parallel_for(rt, m, pc_max(1, GRAIN / pc_max(n, 1)), loss_range, &j);
    double sum = 0.0;
    for (int64_t row = 0; row < m; row++)
        sum += row_loss[row];
    *loss = sum / j.norm;
}
