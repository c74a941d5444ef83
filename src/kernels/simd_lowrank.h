/* Low-rank products of f32, f16 and bf16 with f32 sums.  Included by simd_products.h, whose tiles and dots it uses.
 *
 * A block of rows goes through both products of every term before the next one starts: what is between them is a few
 * kilobytes on the stack.  Few rows are multiplied as dots, which read the weights where they lie; more of them are
 * worth a panel of the weight.  Stack: at most 72 KB per call.
 */

/* Floats of x · aᵀ at once, and rows of a block at most. */
#define HIDDEN_FLOATS PC_LOWRANK_MOST
#define BLOCK_ROWS 64
/* Depth of a panel of a, beside as many floats of each row of x. */
#define SLICE 128
/* Up to so many rows dots are faster than panels. */
#define DOT_ROWS 4
/* Depth that dots take at a time from x in 16 bits, and columns of b that they produce at a time. */
#define DOT_SLICE 1024
#define DOT_COLUMNS 128

static inline const void *element(pc_dtype dt, const void *base, int64_t i)
{
    return dt == PC_F32 ? (const void *)((const float *)base + i) : (const void *)((const uint16_t *)base + i);
}

/* h (m,r) (+)= x (m,k) · rowsᵀ for up to four rows of x in f32; w's rows lie ldw apart. */
static void few_by_rows(pc_dtype dt, int64_t m, int64_t r, int64_t k, const float *x, int64_t ldx, const void *w,
                        int64_t ldw, float *h, int64_t ldh, bool accumulate)
{
    dot_fn dot = dots[dt == PC_F32 ? 0 : dt == PC_F16 ? 1 : 2][m - 1];
    for (int64_t j = 0; j < r; j += 4) {
        float out[4][4];
        int64_t cols = pc_min(4, r - j);
        if (cols == 4) {
            dot(k, x, ldx, element(dt, w, j * ldw), ldw, out);
        } else { /* a stride of 0 reads the one row four times */
            for (int64_t c = 0; c < cols; c++) {
                float one[4][4];
                dot(k, x, ldx, element(dt, w, (j + c) * ldw), 0, one);
                for (int64_t i = 0; i < m; i++)
                    out[i][c] = one[i][0];
            }
        }
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < cols; c++)
                h[i * ldh + j + c] = accumulate ? h[i * ldh + j + c] + out[i][c] : out[i][c];
    }
}

/* y (R,n) += h (R,r) · bᵀ, b (n,r): the few numbers of a row of b at a time. */
#define DEFINE_UP(NAME, ELEMENT, R, LOAD, LOADN)                                                                       \
    static void up_##NAME##_##R(int64_t n, int64_t r, const float *h, int64_t ldh, const void *b_, float *y,           \
                                int64_t ldy)                                                                           \
    {                                                                                                                  \
        const ELEMENT *b = b_;                                                                                         \
        int64_t whole = r / VW * VW;                                                                                   \
        V tail[R];                                                                                                     \
        UNROLL for (int i = 0; i < R; i++) tail[i] = whole < r ? v_loadn(h + i * ldh + whole, r - whole) : v_set1(0);  \
        for (int64_t col = 0; col < n; col += 4) {                                                                     \
            int64_t cols = n - col < 4 ? n - col : 4, step = cols == 4 ? r : 0; /* a step of 0: one row, four times */ \
            for (int64_t at = col; at < col + cols; at += step != 0 ? 4 : 1) {                                         \
                const ELEMENT *row = b + at * r;                                                                       \
                V acc[R][4];                                                                                           \
                float sums[4];                                                                                         \
                UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 4; j++) acc[i][j] = v_set1(0);           \
                for (int64_t p = 0; p < whole; p += VW) {                                                              \
                    UNROLL for (int j = 0; j < 4; j++)                                                                 \
                    {                                                                                                  \
                        V bv = LOAD(row + j * step + p);                                                               \
                        UNROLL for (int i = 0; i < R; i++) acc[i][j] = v_fma(v_load(h + i * ldh + p), bv, acc[i][j]);  \
                    }                                                                                                  \
                }                                                                                                      \
                if (whole < r)                                                                                         \
                    UNROLL for (int j = 0; j < 4; j++)                                                                 \
                    {                                                                                                  \
                        V bv = LOADN(row + j * step + whole, r - whole);                                               \
                        UNROLL for (int i = 0; i < R; i++) acc[i][j] = v_fma(tail[i], bv, acc[i][j]);                  \
                    }                                                                                                  \
                UNROLL for (int i = 0; i < R; i++)                                                                     \
                {                                                                                                      \
                    float *to = y + i * ldy + at;                                                                      \
                    v_sum4(acc[i], sums);                                                                              \
                    if (step != 0)                                                                                     \
                        UNROLL for (int j = 0; j < 4; j++) to[j] += sums[j];                                           \
                    else                                                                                               \
                        to[0] += sums[0];                                                                              \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
#define DEFINE_UPS(R)                                                                                                  \
    DEFINE_UP(f32, float, R, v_load, v_loadn)                                                                          \
    DEFINE_UP(f16, uint16_t, R, v_load_f16, loadn_f16)                                                                 \
    DEFINE_UP(bf16, uint16_t, R, v_load_bf16, loadn_bf16)
DEFINE_UPS(1)
DEFINE_UPS(2)
DEFINE_UPS(3)
DEFINE_UPS(4)

typedef void (*up_fn)(int64_t n, int64_t r, const float *h, int64_t ldh, const void *b, float *y, int64_t ldy);
static const up_fn ups[3][DOT_ROWS] = {{up_f32_1, up_f32_2, up_f32_3, up_f32_4},
                                       {up_f16_1, up_f16_2, up_f16_3, up_f16_4},
                                       {up_bf16_1, up_bf16_2, up_bf16_3, up_bf16_4}};

/* A panel (depth × width) of op(w), w (cols…, k) by rows or (k, cols…), from column `col` and depth k0 on. */
static void fill_panel(pc_dtype dt, const void *w, bool by_rows, int64_t ldw, int64_t col, int64_t cols, int64_t k0,
                       int64_t depth, float *panel, int64_t width)
{
    if (by_rows) {
        pack_transposed(dt, w, col * ldw + k0, ldw, cols, depth, panel, width);
        return;
    }
    for (int64_t p = 0; p < depth; p++) {
        widen_row(dt, w, (k0 + p) * ldw + col, cols, panel + p * width);
        for (int64_t j = cols; j < width; j++)
            panel[p * width + j] = 0.0f;
    }
}

/* out (R, VW) (+)= a (R,k) · b (k,VW): two sums each, or the additions would wait for each other. */
#define DEFINE_NARROW(R)                                                                                               \
    static void narrow_##R(int64_t k, const float *a, int64_t lda, const float *b, float *out, int64_t ldo,            \
                           bool accumulate, int64_t last)                                                              \
    {                                                                                                                  \
        V even[R], odd[R];                                                                                             \
        UNROLL for (int i = 0; i < R; i++) even[i] = odd[i] = v_set1(0);                                               \
        int64_t p = 0;                                                                                                 \
        for (; p + 2 <= k; p += 2) {                                                                                   \
            V b0 = v_load(b + p * VW), b1 = v_load(b + p * VW + VW);                                                   \
            UNROLL for (int i = 0; i < R; i++)                                                                         \
            {                                                                                                          \
                even[i] = v_fma(v_set1(a[i * lda + p]), b0, even[i]);                                                  \
                odd[i] = v_fma(v_set1(a[i * lda + p + 1]), b1, odd[i]);                                                \
            }                                                                                                          \
        }                                                                                                              \
        if (p < k)                                                                                                     \
            UNROLL for (int i = 0; i < R; i++) even[i] = v_fma(v_set1(a[i * lda + p]), v_load(b + p * VW), even[i]);   \
        UNROLL for (int i = 0; i < R; i++)                                                                             \
        {                                                                                                              \
            V sum = even[i] + odd[i];                                                                                  \
            if (accumulate)                                                                                            \
                sum = sum + v_loadn(out + i * ldo, last);                                                              \
            v_storen(out + i * ldo, sum, last);                                                                        \
        }                                                                                                              \
    }
#define DEFINE_NARROW_TILE(R) DEFINE_NARROW(R)
DEFINE_NARROW_TILE(TILE_ROWS)
DEFINE_NARROW(1)

#define JOIN(a, b) a##b
#define NARROW(R) JOIN(narrow_, R)

/* rows_by_panel for a panel of any width. */
static void by_packed(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t vectors, float *c,
                      int64_t ldc, bool accumulate, int64_t last)
{
    if (vectors > 1) {
        rows_by_panel(m, k, a, lda, b, WIDTH(vectors), vectors, c, ldc, accumulate, last);
        return;
    }
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        NARROW(TILE_ROWS)(k, a + i * lda, lda, b, c + i * ldc, ldc, accumulate, last);
    for (; i < m; i++)
        narrow_1(k, a + i * lda, lda, b, c + i * ldc, ldc, accumulate, last);
}

/* Panels of the ranks: as wide as they come, the last as few vectors as it needs. */
static int64_t panel_vectors(int64_t cols) { return pc_min(MAX_VECTORS, (cols + VW - 1) / VW); }

static void isa_pack_lowrank(const pc_lowrank_job *job, bool b, int64_t begin, int64_t end, float *to)
{
    const int64_t widest = WIDTH(MAX_VECTORS);
    if (!b) { /* ranks of the terms one after the other, so that a panel may belong to two of them */
        for (int64_t panel = begin; panel < end; panel++) {
            int64_t col = panel * widest, cols = pc_min(widest, job->ranks - col), width = WIDTH(panel_vectors(cols));
            float *dst = to + col * job->k;
            int64_t first = 0; /* rank of the term */
            memset(dst, 0, (size_t)(width * job->k) * sizeof(float));
            for (int t = 0; t < job->count; first += job->terms[t++].r) {
                const pc_lowrank_term *term = &job->terms[t];
                int64_t from = pc_max(col, first), until = pc_min(col + cols, first + term->r);
                if (until <= from)
                    continue;
                if (!job->swapped && from == col && until == col + cols) {
                    pack_transposed(job->dt, term->a, (from - first) * job->k, job->k, cols, job->k, dst, width);
                    continue;
                }
                for (int64_t p = 0; p < job->k; p++) {
                    float *row = dst + p * width;
                    if (job->swapped)
                        widen_row(job->dt, term->a, p * term->r + from - first, until - from, row + from - col);
                    for (int64_t j = from; j < until && !job->swapped; j++)
                        widen_row(job->dt, term->a, (j - first) * job->k + p, 1, row + j - col);
                }
            }
        }
        return;
    }
    for (int64_t panel = begin; panel < end; panel++) {
        int64_t col = panel * widest, cols = pc_min(widest, job->n - col), width = WIDTH(panel_vectors(cols));
        float *dst = to + col * (job->ranks + 1), *biases = dst + job->ranks * width;
        memset(biases, 0, (size_t)width * sizeof(float));
        for (int t = 0; t < job->count; t++) {
            const pc_lowrank_term *term = &job->terms[t];
            fill_panel(job->dt, term->b, !job->swapped, job->swapped ? job->n : term->r, col, cols, 0, term->r, dst,
                       width);
            dst += term->r * width;
            float bias;
            for (int64_t j = 0; j < cols && term->bias != NULL; j++) {
                widen_row(job->dt, term->bias, col + j, 1, &bias);
                biases[j] += (float)term->scale * bias;
            }
        }
    }
}

/* Rows that go through packed weights together, and depth at a time. */
#define PACKED_ROWS 16
#define PACKED_SLICE 512

/* h (m, ranks) = x · aᵀ of all terms. */
static __attribute__((noinline)) void packed_down(const pc_lowrank_job *job, int64_t row, int64_t m, float *h,
                                                  int64_t ldh)
{
    ALIGNED float wide[PACKED_ROWS * PACKED_SLICE];
    for (int64_t k0 = 0; k0 == 0 || k0 < job->k; k0 += PACKED_SLICE) {
        int64_t depth = pc_min(PACKED_SLICE, job->k - k0), ldx = job->ldx;
        const float *x;
        if (job->dt != PC_F32) {
            for (int64_t i = 0; i < m; i++)
                isa_widen(job->dt, element(job->dt, job->x, (row + i) * job->ldx + k0), depth, wide + i * PACKED_SLICE);
            x = wide;
            ldx = PACKED_SLICE;
        } else {
            x = (const float *)job->x + row * job->ldx + k0;
        }
        for (int64_t col = 0; col < job->ranks; col += WIDTH(MAX_VECTORS)) {
            int64_t cols = pc_min(WIDTH(MAX_VECTORS), job->ranks - col), vectors = panel_vectors(cols);
            by_packed(m, depth, x, ldx, job->packed_a + col * job->k + k0 * WIDTH(vectors), vectors, h + col, ldh,
                      k0 > 0, cols - (vectors - 1) * VW);
        }
    }
}

/* The last column of h is 1, for the biases. */
static void packed_up(const pc_lowrank_job *job, const float *h, int64_t ldh, int64_t row, int64_t m)
{
    ALIGNED float room[PACKED_ROWS * WIDTH(MAX_VECTORS)];
    pc_dtype dt = job->dt;
    bool biased = false;
    for (int t = 0; t < job->count; t++)
        biased = biased || job->terms[t].bias != NULL;
    int64_t deep = job->ranks + (biased ? 1 : 0);
    for (int64_t col = 0; col < job->n; col += WIDTH(MAX_VECTORS)) {
        int64_t cols = pc_min(WIDTH(MAX_VECTORS), job->n - col), vectors = panel_vectors(cols);
        float *sums = dt == PC_F32 ? (float *)job->out + row * job->ldo + col : room;
        int64_t lds = dt == PC_F32 ? job->ldo : WIDTH(MAX_VECTORS);
        for (int64_t i = 0; i < m && job->y != NULL; i++) {
            const void *y = element(dt, job->y, (row + i) * job->ldy + col);
            if (y != sums + i * lds)
                widen_row(dt, y, 0, cols, sums + i * lds);
        }
        by_packed(m, deep, h, ldh, job->packed_b + col * (job->ranks + 1), vectors, sums, lds, job->y != NULL,
                  cols - (vectors - 1) * VW);
        for (int64_t i = 0; i < m && dt != PC_F32; i++)
            isa_narrow(dt, room + i * lds, cols, (uint16_t *)job->out + (row + i) * job->ldo + col);
    }
}

/* h (m,r) = x (m,k) · op(a): a (r,k), or (k,r) when swapped. */
static __attribute__((noinline)) void lowrank_down(const pc_lowrank_job *job, const pc_lowrank_term *term, int64_t row,
                                                   int64_t m, float *h, int64_t ldh)
{
    ALIGNED float wide[BLOCK_ROWS * SLICE];
    ALIGNED float panel[SLICE * WIDTH(MAX_VECTORS)];
    int64_t k = job->k, r = term->r;
    bool few = m <= DOT_ROWS && !job->swapped, narrow = job->dt != PC_F32;
    int64_t step = few ? (narrow ? DOT_SLICE : pc_max(k, 1)) : SLICE;
    for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += step) {
        int64_t depth = pc_min(step, k - k0), ldx = job->ldx;
        const float *x;
        if (narrow) {
            for (int64_t i = 0; i < m; i++)
                isa_widen(job->dt, element(job->dt, job->x, (row + i) * job->ldx + k0), depth, wide + i * step);
            x = wide;
            ldx = step;
        } else {
            x = (const float *)job->x + row * job->ldx + k0;
        }
        if (few) {
            few_by_rows(job->dt, m, r, depth, x, ldx, element(job->dt, term->a, k0), k, h, ldh, k0 > 0);
            continue;
        }
        for (int64_t col = 0; col < r; col += WIDTH(MAX_VECTORS)) {
            int64_t cols = pc_min(WIDTH(MAX_VECTORS), r - col), vectors = (cols + VW - 1) / VW, width = vectors * VW;
            const float *b = panel;
            int64_t ldb = width;
            if (job->swapped && !narrow && cols == width) { /* it lies there as a panel already */
                b = (const float *)term->a + k0 * r + col;
                ldb = r;
            } else {
                fill_panel(job->dt, term->a, !job->swapped, job->swapped ? r : k, col, cols, k0, depth, panel, width);
            }
            rows_by_panel(m, depth, x, ldx, b, ldb, vectors, h + col, ldh, k0 > 0, cols - (vectors - 1) * VW);
        }
    }
}

/* sums (m, cols) += h · bᵀ of every term, and biases, for columns from `col` on. */
static void lowrank_columns(const pc_lowrank_job *job, int64_t m, const float *h, int64_t col, int64_t cols,
                            float *sums, int64_t lds, float *panel)
{
    pc_dtype dt = job->dt;
    for (int t = 0; t < job->count; t++) {
        const pc_lowrank_term *term = &job->terms[t];
        int64_t r = term->r;
        if (m <= DOT_ROWS && !job->swapped) {
            ups[dt == PC_F32 ? 0 : dt == PC_F16 ? 1 : 2][m - 1](cols, r, h, job->ranks, element(dt, term->b, col * r),
                                                                sums, lds);
        } else {
            int64_t vectors = (cols + VW - 1) / VW, width = vectors * VW, last = cols - (vectors - 1) * VW;
            for (int64_t p0 = 0; p0 < r; p0 += SLICE) {
                int64_t depth = pc_min(SLICE, r - p0);
                const float *b = panel;
                int64_t ldb = width;
                if (job->swapped && dt == PC_F32 && cols == width && m <= TILE_ROWS) { /* used once: no copy */
                    b = (const float *)term->b + p0 * job->n + col;
                    ldb = job->n;
                } else {
                    fill_panel(dt, term->b, !job->swapped, job->swapped ? job->n : r, col, cols, p0, depth, panel,
                               width);
                }
                rows_by_panel(m, depth, h + p0, job->ranks, b, ldb, vectors, sums, lds, true, last);
            }
        }
        h += r;
        if (term->bias != NULL) {
            float scale = (float)term->scale, *bias = panel;
            for (int64_t j = 0; j < cols; j += WIDTH(MAX_VECTORS)) {
                int64_t part = pc_min(WIDTH(MAX_VECTORS), cols - j);
                widen_row(dt, term->bias, col + j, part, bias);
                for (int64_t i = 0; i < m; i++)
                    for (int64_t c = 0; c < part; c++)
                        sums[i * lds + j + c] += scale * bias[c];
            }
        }
    }
}

/* Rows [row, row + m) of out = y + …, a stretch of columns at a time. */
static __attribute__((noinline)) void lowrank_up(const pc_lowrank_job *job, const float *h, int64_t row, int64_t m)
{
    ALIGNED float panel[SLICE * WIDTH(MAX_VECTORS)];
    ALIGNED float room[BLOCK_ROWS * WIDTH(MAX_VECTORS)];
    _Static_assert(DOT_ROWS * DOT_COLUMNS <= BLOCK_ROWS * WIDTH(MAX_VECTORS), "few rows need no larger room");
    pc_dtype dt = job->dt;
    int64_t step = m <= DOT_ROWS && !job->swapped ? DOT_COLUMNS : WIDTH(MAX_VECTORS);
    for (int64_t col = 0; col < job->n; col += step) {
        int64_t cols = pc_min(step, job->n - col);
        float *sums = dt == PC_F32 ? (float *)job->out + row * job->ldo + col : room;
        int64_t lds = dt == PC_F32 ? job->ldo : step;
        for (int64_t i = 0; i < m; i++) {
            const void *y = job->y != NULL ? element(dt, job->y, (row + i) * job->ldy + col) : NULL;
            if (y == NULL)
                memset(sums + i * lds, 0, (size_t)cols * sizeof(float));
            else if (y != sums + i * lds)
                widen_row(dt, y, 0, cols, sums + i * lds);
        }
        lowrank_columns(job, m, h, col, cols, sums, lds, panel);
        for (int64_t i = 0; i < m && dt != PC_F32; i++)
            isa_narrow(dt, room + i * step, cols, (uint16_t *)job->out + (row + i) * job->ldo + col);
    }
}

/* h (m,r) from what is there already instead of x and a. */
static void take_given(const pc_lowrank_job *job, int64_t row, int64_t m, float *h, int64_t ldh)
{
    for (int64_t i = 0; i < m; i++) {
        if (!job->given_turned)
            widen_row(job->dt, job->given, (row + i) * job->ranks, job->ranks, h + i * ldh);
        for (int64_t p = 0; p < job->ranks && job->given_turned; p++)
            widen_row(job->dt, job->given, p * job->rows + row + i, 1, h + i * ldh + p);
    }
}

/* h ← h ⊙ e · scale, every term by itself. */
static void scale_hidden(const pc_lowrank_job *job, int64_t m, float *h, int64_t ldh)
{
    for (int t = 0; t < job->count; h += job->terms[t++].r) {
        const pc_lowrank_term *term = &job->terms[t];
        for (int64_t p = 0; p < term->r; p++) {
            float e = 1.0f, scale = (float)term->scale;
            if (term->e != NULL)
                widen_row(job->dt, term->e, p, 1, &e);
            for (int64_t i = 0; i < m; i++)
                h[i * ldh + p] *= e * scale;
        }
    }
}

static void isa_lowrank(const pc_lowrank_job *job, int64_t begin, int64_t end)
{
    ALIGNED float hidden[HIDDEN_FLOATS + PACKED_ROWS];
    bool packed = job->packed_a != NULL || job->packed_b != NULL;
    int64_t ldh = job->ranks + (packed ? 1 : 0);
    int64_t most = pc_max(1, pc_min(packed ? PACKED_ROWS : BLOCK_ROWS, HIDDEN_FLOATS / pc_max(job->ranks, 1)));
    for (int64_t row = begin; row < end; row += most) {
        int64_t m = pc_min(most, end - row);
        if (job->given != NULL) {
            take_given(job, row, m, hidden, ldh);
        } else if (job->packed_a != NULL) {
            packed_down(job, row, m, hidden, ldh);
        } else {
            float *h = hidden;
            for (int t = 0; t < job->count; h += job->terms[t++].r)
                if (job->terms[t].r > 0)
                    lowrank_down(job, &job->terms[t], row, m, h, ldh);
        }
        for (int64_t p = 0; p < job->ranks && job->keep != NULL; p++)
            for (int64_t i = 0; i < m; i++)
                job->keep[p * job->rows + row + i] = hidden[i * ldh + p];
        if (job->out == NULL)
            continue;
        scale_hidden(job, m, hidden, ldh);
        for (int64_t i = 0; i < m && packed; i++)
            hidden[i * ldh + job->ranks] = 1.0f;
        if (packed)
            packed_up(job, hidden, ldh, row, m);
        else
            lowrank_up(job, hidden, row, m);
    }
}

/* Rows of c at once. */
#define OUTER_RANKS 64

/* c (n,r), columns of ranks [p0, p0 + ranks) and rows from col on ← sums (ranks, cols). */
static void put_transposed(const pc_outer_job *job, const float *sums, int64_t width, int64_t col, int64_t cols,
                           int64_t p0, int64_t ranks)
{
    if (job->dt == PC_F32 && ranks == job->r && ranks % VW == 0) {
        pack_transposed(PC_F32, sums, 0, width, ranks, cols, (float *)job->c + col * ranks, ranks);
        return;
    }
    for (int64_t j = 0; j < cols; j++)
        for (int64_t p = 0; p < ranks; p++) {
            int64_t at = (col + j) * job->r + p0 + p;
            float sum = sums[p * width + j];
            if (job->dt == PC_F32)
                ((float *)job->c)[at] = sum;
            else
                ((uint16_t *)job->c)[at] = job->dt == PC_F16 ? pc_f32_to_f16(sum) : pc_f32_to_bf16(sum);
        }
}

/* c, ranks [p0, p0 + ranks) of columns [col, col + cols) ← sums (ranks, width) ⊙ e · scale. */
static void leave_sums(const pc_outer_job *job, float *sums, int64_t width, int64_t col, int64_t cols, int64_t p0,
                       int64_t ranks)
{
    for (int64_t p = 0; p < ranks; p++) {
        float e = 1.0f, *row = sums + p * width;
        if (job->e != NULL)
            widen_row(job->dt, job->e, p0 + p, 1, &e);
        row_scale(cols, row, (double)e * job->scale, row);
        if (job->transposed)
            continue;
        int64_t at = (p0 + p) * job->n + col;
        if (job->dt == PC_F32)
            memcpy((float *)job->c + at, row, (size_t)cols * sizeof(float));
        else
            isa_narrow(job->dt, row, cols, (uint16_t *)job->c + at);
    }
    if (job->transposed)
        put_transposed(job, sums, width, col, cols, p0, ranks);
}

static void isa_outer(const pc_outer_job *job, int64_t begin, int64_t end)
{
    ALIGNED float panel[SLICE * WIDTH(MAX_VECTORS)];
    ALIGNED float sums[OUTER_RANKS * WIDTH(MAX_VECTORS)];
    for (int64_t col = begin; col < end; col += WIDTH(MAX_VECTORS)) {
        int64_t cols = pc_min(WIDTH(MAX_VECTORS), end - col), vectors = (cols + VW - 1) / VW, width = vectors * VW;
        for (int64_t p0 = 0; p0 < job->r; p0 += OUTER_RANKS) {
            int64_t ranks = pc_min(OUTER_RANKS, job->r - p0);
            if (job->m == 0)
                memset(sums, 0, sizeof sums);
            for (int64_t i0 = 0; i0 < job->m; i0 += SLICE) {
                int64_t rows = pc_min(SLICE, job->m - i0);
                fill_panel(job->dt, job->x, false, job->ldx, col, cols, i0, rows, panel, width);
                rows_by_panel(ranks, rows, job->h + p0 * job->m + i0, job->m, panel, width, vectors, sums, width,
                              i0 > 0, VW);
            }
            leave_sums(job, sums, width, col, cols, p0, ranks);
        }
    }
}

/* The part of the sums that `rows` rows from `row` on make up. Whole panels are read where they lie: the caller has
 * just had these rows in hand. */
static void isa_outer_rows(const pc_outer_job *job, int64_t row, int64_t rows, float *part, int64_t ldp, bool accumulate)
{
    ALIGNED float panel[SLICE * WIDTH(MAX_VECTORS)];
    for (int64_t i0 = 0; i0 < rows; i0 += SLICE) {
        int64_t depth = pc_min(SLICE, rows - i0);
        for (int64_t col = 0; col < job->n; col += WIDTH(MAX_VECTORS)) {
            int64_t cols = pc_min(WIDTH(MAX_VECTORS), job->n - col), vectors = (cols + VW - 1) / VW, width = vectors * VW;
            const float *b = panel;
            int64_t ldb = width;
            if (job->dt == PC_F32 && cols == width) {
                b = (const float *)job->x + (row + i0) * job->ldx + col;
                ldb = job->ldx;
            } else {
                fill_panel(job->dt, job->x, false, job->ldx, col, cols, row + i0, depth, panel, width);
            }
            rows_by_panel(job->r, depth, job->h + row + i0, job->m, b, ldb, vectors, part + col, ldp,
                          accumulate || i0 > 0, VW);
        }
    }
}

static void isa_outer_join(const pc_outer_job *job, const float *parts, int64_t count, int64_t stride, int64_t ldp,
                           int64_t begin, int64_t end)
{
    ALIGNED float sums[OUTER_RANKS * WIDTH(MAX_VECTORS)];
    for (int64_t col = begin; col < end; col += WIDTH(MAX_VECTORS)) {
        int64_t cols = pc_min(WIDTH(MAX_VECTORS), end - col), vectors = (cols + VW - 1) / VW, width = vectors * VW;
        for (int64_t p0 = 0; p0 < job->r; p0 += OUTER_RANKS) {
            int64_t ranks = pc_min(OUTER_RANKS, job->r - p0);
            for (int64_t p = 0; p < ranks; p++)
                for (int64_t j = 0; j < width; j += VW) {
                    const float *from = parts + (p0 + p) * ldp + col + j;
                    V sum = v_load(from);
                    for (int64_t i = 1; i < count; i++)
                        sum = sum + v_load(from + i * stride);
                    v_store(sums + p * width + j, sum);
                }
            leave_sums(job, sums, width, col, cols, p0, ranks);
        }
    }
}
