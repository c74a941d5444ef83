/* LoRA's initial values: torch's defaults, Gaussian, orthogonal, OLoRA
 * (Büyükakyüz 2024) and PiSSA (Meng et al. 2024). */
#include "lora.h"

#include <math.h>

/* What starts as zeros is not written below: an arena begins as zeros, and memory that nobody has written takes no pages. */

static pc_rng stream(pc_rng rng, int role)
{
    rng.stream += (uint64_t)role;
    return rng;
}

/* torch's default for the weight and bias of linear layers and convolutions: uniform in ±1/√fan_in. */
static void fill_default(pc_runtime *rt, pc_rng rng, const pc_adapter *adapter, const pc_tensor *tensor, int64_t fan_in)
{
    const double bound = fan_in > 0 ? 1.0 / sqrt((double)fan_in) : 0.0;
    pc_fill_uniform(rt, stream(rng, tensor->role), tensor->dtype, pc_tensor_data(adapter, tensor),
                    pc_tensor_count(tensor), -bound, bound);
}

static void fill_normal(pc_runtime *rt, pc_rng rng, const pc_adapter *adapter, const pc_tensor *tensor, double std)
{
    pc_fill_normal(rt, stream(rng, tensor->role), tensor->dtype, pc_tensor_data(adapter, tensor),
                   pc_tensor_count(tensor), 0.0, std);
}

/* Store n numbers of dtype `dt` as a tensor. */
static void store(pc_runtime *rt, const pc_adapter *adapter, const pc_tensor *tensor, pc_dtype dt, const void *values)
{
    pc_convert(rt, tensor->dtype, pc_tensor_data(adapter, tensor), dt, values, pc_tensor_count(tensor));
}

static void init_embedding(pc_runtime *rt, const pc_adapter *adapter, const pc_tensor *a, const pc_tensor *b,
                           pc_rng rng, lora_init kind)
{
    if (kind == LORA_INIT_RANDOM)
        fill_normal(rt, rng, adapter, a, 1.0);
    fill_normal(rt, rng, adapter, b, 1.0);
}

static void init_random(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_tensor *a,
                        const pc_tensor *b, pc_rng rng, lora_init kind)
{
    const pc_tensor *bias = pc_slot_tensor(adapter, slot, LORA_B_BIAS);
    const int64_t b_columns = b->shape[1];
    if (kind == LORA_INIT_GAUSSIAN)
        fill_normal(rt, rng, adapter, a, 1.0 / (double)slot->rank);
    else
        fill_default(rt, rng, adapter, a, pc_tensor_count(a) / slot->rank);
    if (kind != LORA_INIT_RANDOM)
        return;
    fill_default(rt, rng, adapter, b, b_columns);
    if (bias != NULL)
        fill_default(rt, rng, adapter, bias, b_columns);
}

/* --------------------------------------------------- factors of random bases */

/* A and B lie in complementary halves of one random orthogonal basis of the rank space: B·A = 0 though neither is. */
static pc_status init_orthogonal(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_tensor *a,
                                 const pc_tensor *b, pc_rng rng, pc_pool *scratch, pc_error *err)
{
    const pc_dtype dt = pc_compute_dtype(a->dtype);
    const int64_t r = slot->rank, half = r / 2, in = a->shape[1], out = b->shape[0];
    void *x, *q, *rest, *left, *right, *a_values, *b_values;
    pc_status status = pc_scratch(scratch, dt, r, r, &x, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, r, r, &q, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, r, r, &rest, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, half, in, &right, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, half, out, &left, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, r, in, &a_values, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, out, r, &b_values, err);
    if (status != PC_OK)
        return status;
    pc_fill_normal(rt, stream(rng, 16), dt, x, r * r, 0.0, 1.0);
    pc_fill_normal(rt, stream(rng, LORA_A), dt, right, half * in, 0.0, 1.0);
    pc_fill_normal(rt, stream(rng, LORA_B), dt, left, half * out, 0.0, 1.0);
    status = pc_qr(dt, r, r, x, q, rest, err);
    /* Row 2i of q goes to A, row 2i + 1 to B: a row stride of 2r. */
    if (status == PC_OK)
        status = pc_gemm(rt, dt, true, false, r, in, half, 0.1, q, 2 * r, right, in, 0.0, a_values, in, err);
    if (status == PC_OK)
        status = pc_gemm(rt, dt, true, false, out, r, half, 0.1, left, out, pc_at(dt, q, r), 2 * r, 0.0, b_values, r,
                         err);
    if (status == PC_OK) {
        store(rt, adapter, a, dt, a_values);
        store(rt, adapter, b, dt, b_values);
    }
    return status;
}

/* ------------------------------------------------ factors of the base weight */

/* The base weight as a matrix (out, in) of dtype dt, in scratch. */
static pc_status base_matrix(pc_runtime *rt, const pc_module *m, pc_dtype dt, pc_pool *scratch, void **out,
                             pc_error *err)
{
    const int64_t rows = m->out_features, columns = m->in_features;
    pc_status status = pc_need_weight(m, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, rows, columns, out, err);
    if (status != PC_OK)
        return status;
    if (m->kind != PC_CONV1D) {
        pc_convert(rt, dt, *out, m->dtype, m->weight, rows * columns);
        return PC_OK;
    }
    for (int64_t i = 0; i < columns; i++)
        for (int64_t o = 0; o < rows; o++)
            pc_put_double(dt, *out, o * columns + i, pc_get_double(m->dtype, m->weight, i * rows + o));
    return PC_OK;
}

/* Left (out, q) and right (q, in) factors of a matrix, and weights (q) for each pair of their vectors. */
typedef struct decomposition {
    int64_t q;
    void *left, *weights, *right;
} decomposition;

static pc_status scratch_for(decomposition *d, pc_dtype dt, int64_t rows, int64_t columns, int64_t q,
                             pc_pool *scratch, pc_error *err)
{
    d->q = q;
    pc_status status = pc_scratch(scratch, dt, rows, q, &d->left, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, q, columns, &d->right, err);
    return status == PC_OK ? pc_scratch(scratch, dt, q, 1, &d->weights, err) : status;
}

/* The sketch of randomised SVD depends on nothing but the shape, so that the part of the base weight
 * that an adapter replaces is the same when it is made and when it is loaded. */
static const pc_rng sketch_rng = {.seed = 0x70697373615F6E69u, .stream = 0};

/* One half of a power iteration: basis (rows, q) ← orthonormal basis of op(w) · vectors. */
static pc_status power_step(pc_runtime *rt, pc_dtype dt, bool transpose, int64_t rows, int64_t q, int64_t inner,
                            const void *w, int64_t w_columns, const void *vectors, void *product, void *basis,
                            void *triangle, pc_error *err)
{
    pc_status status = pc_gemm(rt, dt, transpose, false, rows, q, inner, 1.0, w, w_columns, vectors, q, 0.0, product,
                               q, err);
    return status == PC_OK ? pc_qr(dt, rows, q, product, basis, triangle, err) : status;
}

/* Randomised SVD (Halko, Martinsson, Tropp 2011, algorithms 4.4 and 5.1) with q ≤ min(rows, columns). */
static pc_status low_rank_svd(pc_runtime *rt, pc_dtype dt, int64_t rows, int64_t columns, int64_t q, int niter,
                              const void *w, pc_pool *scratch, decomposition *d, pc_error *err)
{
    const int64_t longer = rows > columns ? rows : columns;
    void *range, *domain, *product, *triangle, *small, *small_u;
    pc_status status = scratch_for(d, dt, rows, columns, q, scratch, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, rows, q, &range, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, columns, q, &domain, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, longer, q, &product, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, q, q, &triangle, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, q, columns, &small, err);
    if (status == PC_OK)
        status = pc_scratch(scratch, dt, q, q, &small_u, err);
    if (status != PC_OK)
        return status;
    pc_fill_normal(rt, sketch_rng, dt, domain, columns * q, 0.0, 1.0);
    status = power_step(rt, dt, false, rows, q, columns, w, columns, domain, product, range, triangle, err);
    for (int i = 0; i < niter && status == PC_OK; i++) {
        status = power_step(rt, dt, true, columns, q, rows, w, columns, range, product, domain, triangle, err);
        if (status == PC_OK)
            status = power_step(rt, dt, false, rows, q, columns, w, columns, domain, product, range, triangle, err);
    }
    if (status == PC_OK)
        status = pc_gemm(rt, dt, true, false, q, columns, rows, 1.0, range, q, w, columns, 0.0, small, columns, err);
    if (status == PC_OK)
        status = pc_svd(dt, q, columns, small, small_u, d->weights, d->right, err);
    if (status == PC_OK)
        status = pc_gemm(rt, dt, false, false, rows, q, q, 1.0, range, q, small_u, q, 0.0, d->left, q, err);
    return status;
}

static pc_status decompose(pc_runtime *rt, const pc_slot *slot, const pc_module *m, pc_dtype dt, lora_init kind,
                           int niter, pc_pool *scratch, decomposition *d, pc_error *err)
{
    const int64_t rows = m->out_features, columns = m->in_features;
    const int64_t full = rows < columns ? rows : columns;
    void *w;
    pc_status status = base_matrix(rt, m, dt, scratch, &w, err);
    if (status != PC_OK)
        return status;
    if (kind == LORA_INIT_PISSA && niter >= 0)
        return low_rank_svd(rt, dt, rows, columns, slot->rank < full ? slot->rank : full, niter, w, scratch, d, err);
    status = scratch_for(d, dt, rows, columns, full, scratch, err);
    if (status != PC_OK)
        return status;
    if (kind == LORA_INIT_PISSA)
        return pc_svd(dt, rows, columns, w, d->left, d->weights, d->right, err);
    for (int64_t i = 0; i < full; i++)
        pc_put_double(dt, d->weights, i, 1.0);
    return pc_qr(dt, rows, columns, w, d->left, d->right, err);
}

/* A ← the first r right vectors, B ← the first r left ones, PiSSA's scaled by √(σ/s) each.
 * A rank beyond the matrix's own leaves zeros. */
static pc_status init_from_base(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *m,
                                const pc_tensor *a, const pc_tensor *b, lora_init kind, int niter, pc_pool *scratch,
                                pc_error *err)
{
    const pc_dtype dt = pc_compute_dtype(m->dtype);
    decomposition d;
    pc_status status = decompose(rt, slot, m, dt, kind, niter, scratch, &d, err);
    if (status != PC_OK)
        return status;
    const int64_t r = slot->rank, kept = r < d.q ? r : d.q;
    void *a_data = pc_tensor_data(adapter, a), *b_data = pc_tensor_data(adapter, b);
    for (int64_t k = 0; k < kept; k++) {
        double scale = kind == LORA_INIT_PISSA ? sqrt(pc_get_double(dt, d.weights, k) / slot->scaling) : 1.0;
        for (int64_t i = 0; i < m->in_features; i++)
            pc_put_double(a->dtype, a_data, k * m->in_features + i,
                          scale * pc_get_double(dt, d.right, k * m->in_features + i));
        for (int64_t o = 0; o < m->out_features; o++)
            pc_put_double(b->dtype, b_data, o * r + k, scale * pc_get_double(dt, d.left, o * d.q + k));
    }
    return PC_OK;
}

/* The copy of the base weight that goes into the file is what PEFT leaves of it: without the initial product. */
static pc_status store_residual(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *m,
                                pc_pool *scratch, pc_error *err)
{
    const pc_tensor *copy = pc_slot_tensor(adapter, slot, PC_ROLE_BASE_WEIGHT);
    if (copy == NULL)
        return PC_OK;
    const pc_dtype dt = pc_compute_dtype(m->dtype);
    const int64_t n = pc_tensor_count(copy);
    lora_factors initial;
    void *w;
    pc_status status = pc_scratch(scratch, dt, n, 1, &w, err);
    if (status == PC_OK)
        status = lora_get_factors(rt, adapter, slot, dt, true, scratch, &initial, err);
    if (status != PC_OK)
        return status;
    pc_convert(rt, dt, w, m->dtype, m->weight, n);
    status = lora_add_product(rt, m, dt, &initial, -slot->scaling, w, err);
    if (status == PC_OK)
        store(rt, adapter, copy, dt, w);
    return status;
}

/* ---------------------------------------------------------------------- entry */

static pc_status init_factors(pc_runtime *rt, const pc_adapter *adapter, const pc_slot *slot, const pc_module *module,
                              pc_rng rng, bool loading, pc_pool *scratch, pc_error *err)
{
    int niter;
    const lora_init kind = lora_init_kind(&lora_params_of(adapter->config)->init, &niter);
    const pc_tensor *a = pc_slot_tensor(adapter, slot, LORA_A), *b = pc_slot_tensor(adapter, slot, LORA_B);
    const pc_tensor *initial_a = pc_slot_tensor(adapter, slot, LORA_INITIAL_A);
    const pc_tensor *initial_b = pc_slot_tensor(adapter, slot, LORA_INITIAL_B);
    if (initial_a != NULL) {
        pc_status status = init_from_base(rt, adapter, slot, module, initial_a, initial_b, kind, niter, scratch, err);
        if (status == PC_OK && !loading) {
            memcpy(pc_tensor_data(adapter, a), pc_tensor_data(adapter, initial_a), a->nbytes);
            memcpy(pc_tensor_data(adapter, b), pc_tensor_data(adapter, initial_b), b->nbytes);
        }
        return status == PC_OK ? store_residual(rt, adapter, slot, module, scratch, err) : status;
    }
    if (loading)
        return PC_OK;
    if (a == NULL)
        init_embedding(rt, adapter, pc_slot_tensor(adapter, slot, LORA_EMBEDDING_A),
                       pc_slot_tensor(adapter, slot, LORA_EMBEDDING_B), rng, kind);
    else if (kind == LORA_INIT_ORTHOGONAL)
        return init_orthogonal(rt, adapter, slot, a, b, rng, scratch, err);
    else
        init_random(rt, adapter, slot, a, b, rng, kind);
    const pc_tensor *out_a = pc_slot_tensor(adapter, slot, LORA_OUT_A);
    if (out_a != NULL)
        init_random(rt, adapter, slot, out_a, pc_slot_tensor(adapter, slot, LORA_OUT_B), rng, kind);
    return PC_OK;
}

pc_status lora_init_slot(pc_runtime *rt, pc_adapter *adapter, const pc_slot *slot, const pc_module *module, pc_rng rng,
                         bool loading, pc_error *err)
{
    pc_pool scratch;
    pc_pool_init_scratch(&scratch);
    pc_status status = init_factors(rt, adapter, slot, module, rng, loading, &scratch, err);
    const pc_tensor *magnitude = pc_slot_tensor(adapter, slot, LORA_MAGNITUDE);
    if (status == PC_OK && magnitude != NULL && !loading) {
        const pc_dtype dt = pc_compute_dtype(module->dtype);
        void *norms;
        status = pc_scratch(&scratch, dt, module->out_features, 1, &norms, err);
        if (status == PC_OK)
            status = dora_norms(rt, adapter, slot, module, dt, norms, err);
        if (status == PC_OK)
            store(rt, adapter, magnitude, dt, norms);
    }
    pc_pool_free(&scratch);
    return status;
}
