/* One head of attention and its gradients.  Included by simd_products.h, whose tiles and packing it uses. */

/* Query rows whose scores are held at once. */
#define HEAD_ROWS (2 * TILE_ROWS)

static int64_t isa_head_scratch(int64_t tk, int64_t dim)
{
    int64_t keys = (tk + VW - 1) / VW * VW, wide = (dim + VW - 1) / VW * VW;
    return keys * dim + keys * HEAD_ROWS + tk * wide;
}

static void isa_drop(int64_t n, const float *x, const float *keep, float c, float *y)
{
    const V factor = v_set1(c), zero = v_set1(0);
    int64_t i = 0;
    for (; i + VW <= n; i += VW)
        v_store(y + i, v_select_less(zero, v_load(keep + i), v_load(x + i) * factor, zero));
    if (i < n)
        v_storen(y + i, v_select_less(zero, v_loadn(keep + i, n - i), v_loadn(x + i, n - i) * factor, zero), n - i);
}

/* Draws that are made at once. */
#define DRAWS 256

/* m (tk) = what dropout multiplies the probabilities of row i with. */
static void drop_mask(const pc_head_job *job, int64_t i, float *m)
{
    isa_keep(job->rng, job->first_draw + (uint64_t)i * (uint64_t)pc_draws_of_row(job->tk), job->tk, job->dropout, m);
    row_scale(job->tk, m, job->dropout < 1.0 ? 1.0 / (1.0 - job->dropout) : 0.0, m);
}

/* x (tk) ⊙= the mask of row i. */
static void drop_row(const pc_head_job *job, int64_t i, float *x)
{
    float keep[DRAWS];
    const uint64_t first = job->first_draw + (uint64_t)i * (uint64_t)pc_draws_of_row(job->tk);
    const float factor = job->dropout < 1.0 ? (float)(1.0 / (1.0 - job->dropout)) : 0.0f;
    for (int64_t j = 0; j < job->tk; j += DRAWS) {
        const int64_t part = pc_min(DRAWS, job->tk - j);
        isa_keep(job->rng, first + (uint64_t)j, part, job->dropout, keep);
        isa_drop(part, x + j, keep, factor, x + j);
    }
}

static void isa_head(const pc_head_job *job)
{
    int64_t tk = job->tk, dim = job->dim, stride = job->stride;
    int64_t keys = (tk + VW - 1) / VW * VW, wide = (dim + VW - 1) / VW * VW;
    float *kt = job->scratch, *scores = kt + keys * dim, *vp = scores + keys * HEAD_ROWS;
    for (int64_t j = 0; j < tk; j += WIDTH(MAX_VECTORS)) { /* keys, transposed in panels */
        int64_t width = pc_min(WIDTH(MAX_VECTORS), keys - j);
        pack_transposed(PC_F32, job->k, j * stride, stride, pc_min(width, tk - j), dim, kt + j * dim, width);
    }
    const float *v = job->v;
    int64_t ldv = stride;
    if (dim != wide) { /* values, filled up to whole vectors */
        for (int64_t j = 0; j < tk; j++) {
            memcpy(vp + j * wide, v + j * stride, (size_t)dim * sizeof(float));
            memset(vp + j * wide + dim, 0, (size_t)(wide - dim) * sizeof(float));
        }
        v = vp;
        ldv = wide;
    }
    for (int64_t i0 = 0; i0 < job->tq; i0 += HEAD_ROWS) {
        int64_t rows = pc_min(HEAD_ROWS, job->tq - i0);
        const float *q = job->q + i0 * stride;
        float *out = job->out + i0 * stride;
        for (int64_t j = 0; j < tk; j += WIDTH(MAX_VECTORS)) {
            int64_t width = pc_min(WIDTH(MAX_VECTORS), keys - j);
            rows_by_panel(rows, dim, q, stride, kt + j * dim, width, width / VW, scores + j, keys, false, VW);
        }
        for (int64_t i = 0; i < rows; i++)
            row_softmax(tk, scores + i * keys, (double)job->scale, job->add, scores + i * keys);
        if (job->dropout > 0.0)
            for (int64_t i = 0; i < rows; i++)
                drop_row(job, i0 + i, scores + i * keys);
        for (int64_t d = 0; d < dim; d += WIDTH(MAX_VECTORS)) {
            int64_t cols = pc_min(WIDTH(MAX_VECTORS), dim - d), vectors = (cols + VW - 1) / VW;
            rows_by_panel(rows, tk, scores, keys, v + d, ldv, vectors, out + d, stride, false,
                          cols - (vectors - 1) * VW);
        }
    }
}

/* ------------------------------------------------------------------- gradients */

/* Query rows that are worked on at once: their scores, gradients of scores and transposed copies stay in the nearer
 * caches for sequences of usual length. */
#define BACK_ROWS 64

static int64_t rounded(int64_t n) { return (n + VW - 1) / VW * VW; }

static int64_t isa_head_back_scratch(int64_t tk, int64_t dim)
{
    int64_t keys = rounded(tk), wide = rounded(dim);
    return 2 * keys * dim + 3 * BACK_ROWS * keys + keys * BACK_ROWS + tk * wide + 2 * BACK_ROWS * wide;
}

/* Rows (stride apart) filled up to whole vectors, or as they lie when they are whole already. */
static const float *whole_rows(const float *src, int64_t rows, int64_t dim, int64_t stride, float *room, int64_t *ld)
{
    int64_t wide = rounded(dim);
    *ld = stride;
    if (wide == dim)
        return src;
    for (int64_t i = 0; i < rows; i++) {
        memcpy(room + i * wide, src + i * stride, (size_t)dim * sizeof(float));
        memset(room + i * wide + dim, 0, (size_t)(wide - dim) * sizeof(float));
    }
    *ld = wide;
    return room;
}

/* t (keys, ·) in panels ← x (tk, dim) transposed, as rows_by_panel wants it. */
static void pack_keys(const float *x, int64_t tk, int64_t dim, int64_t stride, float *t)
{
    int64_t keys = rounded(tk);
    for (int64_t j = 0; j < tk; j += WIDTH(MAX_VECTORS)) {
        int64_t width = pc_min(WIDTH(MAX_VECTORS), keys - j);
        pack_transposed(PC_F32, x, j * stride, stride, pc_min(width, tk - j), dim, t + j * dim, width);
    }
}

/* c (rows, keys) = a (rows, dim) · t */
static void times_keys(int64_t rows, int64_t keys, int64_t dim, const float *a, int64_t lda, const float *t, float *c)
{
    for (int64_t j = 0; j < keys; j += WIDTH(MAX_VECTORS)) {
        int64_t width = pc_min(WIDTH(MAX_VECTORS), keys - j);
        rows_by_panel(rows, dim, a, lda, t + j * dim, width, width / VW, c + j, keys, false, VW);
    }
}

/* c (m, dim) [+]= a (m, k) · b (k, dim); b's rows are whole vectors. */
static void times_rows(int64_t m, int64_t k, int64_t dim, const float *a, int64_t lda, const float *b, int64_t ldb,
                       float *c, int64_t ldc, bool add)
{
    for (int64_t d = 0; d < dim; d += WIDTH(MAX_VECTORS)) {
        int64_t cols = pc_min(WIDTH(MAX_VECTORS), dim - d), vectors = (cols + VW - 1) / VW;
        rows_by_panel(m, k, a, lda, b + d, ldb, vectors, c + d, ldc, add, cols - (vectors - 1) * VW);
    }
}

/* With p = softmax(scale · q kᵀ + add), o = (p ⊙ m) v for the mask m of dropout:
 *     dv = (p ⊙ m)ᵀ dy,  dp = (dy vᵀ) ⊙ m,  ds = scale · p ⊙ (dp − Σ p ⊙ dp),  dq = ds k,  dk = dsᵀ q */
static void isa_head_back(const pc_head_job *job)
{
    int64_t tk = job->tk, dim = job->dim, stride = job->stride, keys = rounded(tk), wide = rounded(dim);
    float *kt = job->scratch, *vt = kt + keys * dim, *p = vt + keys * dim, *dp = p + BACK_ROWS * keys;
    float *mask = dp + BACK_ROWS * keys, *turned = mask + BACK_ROWS * keys, *room_k = turned + keys * BACK_ROWS;
    float *room_q = room_k + tk * wide, *room_dy = room_q + BACK_ROWS * wide;
    bool scores = job->dq != NULL || job->dk != NULL;
    int64_t ldk, ldq, ldy;
    pack_keys(job->k, tk, dim, stride, kt);
    if (scores)
        pack_keys(job->v, tk, dim, stride, vt);
    const float *k = whole_rows(job->k, job->dq != NULL ? tk : 0, dim, stride, room_k, &ldk);
    for (int64_t i0 = 0; i0 < job->tq; i0 += BACK_ROWS) {
        int64_t rows = pc_min(BACK_ROWS, job->tq - i0), deep = rounded(rows);
        const float *q = job->q + i0 * stride, *dy = job->dy + i0 * stride, *kept = p;
        times_keys(rows, keys, dim, q, stride, kt, p);
        for (int64_t i = 0; i < rows; i++)
            row_softmax(tk, p + i * keys, (double)job->scale, job->add, p + i * keys);
        for (int64_t i = 0; i < rows && job->dropout > 0.0; i++) {
            drop_mask(job, i0 + i, mask + i * keys);
            row_multiply(tk, p + i * keys, mask + i * keys, dp + i * keys);
            kept = dp;
        }
        if (job->dv != NULL) {
            const float *whole_dy = whole_rows(dy, rows, dim, stride, room_dy, &ldy);
            pack_transposed(PC_F32, kept, 0, keys, rows, tk, turned, deep);
            times_rows(tk, rows, dim, turned, deep, whole_dy, ldy, job->dv, stride, i0 > 0);
        }
        if (!scores)
            continue;
        times_keys(rows, keys, dim, dy, stride, vt, dp);
        for (int64_t i = 0; i < rows; i++) {
            if (job->dropout > 0.0)
                row_multiply(tk, dp + i * keys, mask + i * keys, dp + i * keys);
            row_softmax_back(tk, p + i * keys, dp + i * keys, (double)job->scale, dp + i * keys);
        }
        if (job->dq != NULL)
            times_rows(rows, tk, dim, dp, keys, k, ldk, job->dq + i0 * stride, stride, false);
        if (job->dk != NULL) {
            const float *whole_q = whole_rows(q, rows, dim, stride, room_q, &ldq);
            pack_transposed(PC_F32, dp, 0, keys, rows, tk, turned, deep);
            times_rows(tk, rows, dim, turned, deep, whole_q, ldq, job->dk, stride, i0 > 0);
        }
    }
}
