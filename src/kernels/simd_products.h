/* Matrix products on f32 vectors.  Included by the ISA files, which define besides the vector operations
 *   TILE_ROWS  how many rows of scalars a register tile takes (VW is a multiple of it)
 *   MAX_VECTORS and TILES(R): the widths of a tile in vectors, 1 … MAX_VECTORS
 *
 * The heart is one tile: out[i][v] (+)= Σ_p a[i][p] · b[p][v], where each a[i][p] is broadcast and b is a panel of a
 * few whole vectors.  For x · wᵀ the *weight* is a, read row by row where it lies (memory-mapped, never copied), and x,
 * which is small, is transposed into panels: the lanes of a vector are rows of x.  Each weight is then read once per
 * panel, and a strip of VW weight rows stays in the first-level cache while the panels pass.  For many rows (isa_block)
 * the weight is packed into panels and x is a.
 *
 * Stack: at most 72 KB per call (isa_linear); nothing here calls itself.
 */

#define WIDTH(nv) ((nv)*VW)

/* Extents of the depth of one pass: a strip of weights and a panel must share the nearer caches. */
#define DEPTH 1024
/* The same where a panel is built on the stack. */
#define PANEL_DEPTH 256
/* Rows of the widened copy of a strip start in different cache sets. */
#define WIDE_STRIDE (DEPTH + VW)

#define DEFINE_TILE(R, NV)                                                                                             \
    static void tile_##R##_##NV(int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t ahead,    \
                                float *out, int64_t ldo, bool accumulate, int64_t last)                                \
    {                                                                                                                  \
        V acc[R][NV];                                                                                                  \
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int v = 0; v < NV; v++) acc[i][v] = v_set1(0);                  \
        for (int64_t p0 = 0; p0 < k; p0 += 16) {                                                                       \
            if (ahead != 0)                                                                                            \
                for (int i = 0; i < R; i++)                                                                            \
                    __builtin_prefetch((const void *)((uintptr_t)(a + i * lda + p0) + (uintptr_t)ahead));              \
            int64_t p1 = k - p0 < 16 ? k : p0 + 16;                                                                    \
            for (int64_t p = p0; p < p1; p++) {                                                                        \
                V bv[NV];                                                                                              \
                UNROLL for (int v = 0; v < NV; v++) bv[v] = v_load(b + p * ldb + v * VW);                              \
                UNROLL for (int i = 0; i < R; i++)                                                                     \
                {                                                                                                      \
                    V s = v_set1(a[i * lda + p]);                                                                      \
                    UNROLL for (int v = 0; v < NV; v++) acc[i][v] = v_fma(s, bv[v], acc[i][v]);                        \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int v = 0; v < NV; v++)                                         \
        {                                                                                                              \
            float *o = out + i * ldo + v * VW;                                                                         \
            if (last == VW || v + 1 < NV) {                                                                            \
                if (accumulate)                                                                                        \
                    acc[i][v] = acc[i][v] + v_load(o);                                                                 \
                v_store(o, acc[i][v]);                                                                                 \
            } else {                                                                                                   \
                if (accumulate)                                                                                        \
                    acc[i][v] = acc[i][v] + v_loadn(o, last);                                                          \
                v_storen(o, acc[i][v], last);                                                                          \
            }                                                                                                          \
        }                                                                                                              \
    }

typedef void (*tile_fn)(int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb, int64_t ahead, float *out,
                        int64_t ldo, bool accumulate, int64_t last);

DEFINE_TILES

/* dst[0 … n) ← src of any weight dtype, from element `at` on. */
static void widen_row(pc_dtype dt, const void *src, int64_t at, int64_t n, float *dst)
{
    if (dt == PC_F32)
        memcpy(dst, (const float *)src + at, (size_t)n * sizeof *dst);
    else if (dt == PC_F64)
        for (int64_t i = 0; i < n; i++)
            dst[i] = (float)((const double *)src)[at + i];
    else
        isa_widen(dt, (const uint16_t *)src + at, n, dst);
}

/* dst[p][j] (k × width) ← src[j][p], j < rows; columns past rows become zero.  src starts at element `at`, its rows
 * lie `stride` elements apart. */
static void pack_transposed(pc_dtype dt, const void *src, int64_t at, int64_t stride, int64_t rows, int64_t k,
                            float *dst, int64_t width)
{
    for (int64_t j0 = 0; j0 < width; j0 += VW) {
        int64_t have = rows - j0;
        for (int64_t p0 = 0; p0 < k; p0 += VW) {
            int64_t depth = k - p0 < VW ? k - p0 : VW;
            V block[VW];
            for (int64_t j = 0; j < VW; j++) {
                int64_t from = at + (j0 + j) * stride + p0;
                if (j >= have) {
                    block[j] = v_set1(0);
                } else if (dt == PC_F32) {
                    const float *f = (const float *)src + from;
                    block[j] = depth == VW ? v_load(f) : v_loadn(f, depth);
                } else {
                    float wide[VW];
                    widen_row(dt, src, from, depth, wide);
                    block[j] = depth == VW ? v_load(wide) : v_loadn(wide, depth);
                }
            }
            v_transpose(block);
            for (int64_t p = 0; p < depth; p++)
                v_store(dst + (p0 + p) * width + j0, block[p]);
        }
    }
}

static void isa_pack(const pc_panels *p, const float *x, int64_t begin, int64_t end)
{
    for (int64_t i = begin; i < end; i++) {
        int64_t start = pc_panel_start(p, i) * VW, width = (pc_panel_start(p, i + 1) * VW) - start;
        pack_transposed(PC_F32, x, start * p->k, p->k, pc_min(p->rows - start, width), p->k, p->data + start * p->k,
                        width);
    }
}

/* Write a tile (VW weight rows × width rows of x) where it belongs in y, adding bias and applying act after the last
 * pass over the depth. */
static void put_tile(const pc_linear_job *job, const float *tile, int64_t width, int64_t row, int64_t col, bool first,
                     bool last)
{
    int64_t cols = pc_min(VW, job->n - col);
    V bias = v_set1(0);
    if (last && job->bias != NULL)
        bias = cols == VW ? v_load(job->bias + col) : v_loadn(job->bias + col, cols);
    for (int64_t r0 = 0; r0 < width && row + r0 < job->m; r0 += VW) {
        V block[VW];
        for (int j = 0; j < VW; j++)
            block[j] = v_load(tile + j * width + r0);
        v_transpose(block);
        int64_t rows = pc_min(VW, job->m - row - r0);
        for (int64_t i = 0; i < rows; i++) {
            float *y = job->y + (row + r0 + i) * job->n + col;
            V v = block[i];
            if (!first)
                v = v + (cols == VW ? v_load(y) : v_loadn(y, cols));
            if (last)
                v = v_act(job->act, v + bias);
            if (cols == VW)
                v_store(y, v);
            else
                v_storen(y, v, cols);
        }
    }
}

static void isa_linear(const pc_linear_job *job, int64_t panel_begin, int64_t panel_end, int64_t begin, int64_t end)
{
    const pc_panels *panels = job->panels;
    ALIGNED float tile[VW * WIDTH(MAX_VECTORS)];
    ALIGNED float wide[VW * WIDE_STRIDE];
    int64_t passes = job->k > 0 ? (job->k + DEPTH - 1) / DEPTH : 1;
    int64_t step = ((job->k + passes - 1) / passes + VW - 1) / VW * VW;
    if (step < VW)
        step = VW;
    /* Rows that lie a multiple of a page apart fall into the same cache sets: a copy pays when it is used twice. */
    bool clash = (job->k * 4) % 2048 == 0 && panel_end - panel_begin >= 2;
    for (int64_t k0 = 0; k0 == 0 || k0 < job->k; k0 += step) {
        int64_t depth = pc_min(step, job->k - k0);
        bool first = k0 == 0, last = k0 + step >= job->k;
        for (int64_t strip = begin; strip < end; strip++) {
            int64_t col = strip * VW, rows = pc_min(VW, job->n - col);
            const float *a;
            int64_t lda, ahead = 0;
            if (job->wdt == PC_F32 && rows == VW && !clash) {
                a = (const float *)job->w + col * job->k + k0;
                lda = job->k;
                ahead = TILE_ROWS * lda * (int64_t)sizeof(float);
            } else {
                for (int64_t i = 0; i < rows; i++)
                    widen_row(job->wdt, job->w, (col + i) * job->k + k0, depth, wide + i * WIDE_STRIDE);
                for (int64_t i = rows; i < VW; i++)
                    memset(wide + i * WIDE_STRIDE, 0, (size_t)depth * sizeof(float));
                a = wide;
                lda = WIDE_STRIDE;
            }
            for (int64_t i = panel_begin; i < panel_end; i++) {
                int64_t start = pc_panel_start(panels, i), vectors = pc_panel_start(panels, i + 1) - start;
                int64_t width = vectors * VW;
                const float *b = panels->data + start * VW * job->k + k0 * width;
                for (int g = 0; g < VW; g += TILE_ROWS)
                    tiles[vectors - 1](depth, a + g * lda, lda, b, width, i == panel_begin ? ahead : 0,
                                       tile + g * width, width, false, VW);
                put_tile(job, tile, width, start * VW, col, first, last);
            }
        }
    }
}

/* ------------------------------------------------------------ few rows: dots */

/* out[i][j] = x row i · w row j for up to four of each: vectors run along the depth. */
#define DEFINE_DOT(NAME, ELEMENT, R, LOAD, LOADN)                                                                      \
    static void dot_##NAME##_##R(int64_t k, const float *x, int64_t ldx, const void *w_, int64_t ldw, float out[R][4]) \
    {                                                                                                                  \
        const ELEMENT *w = w_;                                                                                         \
        V acc[R][4];                                                                                                   \
        UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < 4; j++) acc[i][j] = v_set1(0);                   \
        int64_t p = 0;                                                                                                 \
        for (; p + VW <= k; p += VW) {                                                                                 \
            V xv[R];                                                                                                   \
            UNROLL for (int i = 0; i < R; i++) xv[i] = v_load(x + i * ldx + p);                                        \
            UNROLL for (int j = 0; j < 4; j++)                                                                         \
            {                                                                                                          \
                __builtin_prefetch((const void *)((uintptr_t)(w + (4 + j) * ldw + p)));                                \
                V wv = LOAD(w + j * ldw + p);                                                                          \
                UNROLL for (int i = 0; i < R; i++) acc[i][j] = v_fma(xv[i], wv, acc[i][j]);                            \
            }                                                                                                          \
        }                                                                                                              \
        if (p < k) {                                                                                                   \
            V xv[R];                                                                                                   \
            UNROLL for (int i = 0; i < R; i++) xv[i] = v_loadn(x + i * ldx + p, k - p);                                \
            UNROLL for (int j = 0; j < 4; j++)                                                                         \
            {                                                                                                          \
                V wv = LOADN(w + j * ldw + p, k - p);                                                                  \
                UNROLL for (int i = 0; i < R; i++) acc[i][j] = v_fma(xv[i], wv, acc[i][j]);                            \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int i = 0; i < R; i++) v_sum4(acc[i], out[i]);                                                     \
    }

#ifndef LOADN_16_BITS /* the instruction set has nothing better */
static inline V loadn_f16(const uint16_t *p, int64_t n)
{
    uint16_t part[VW] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return v_load_f16(part);
}

static inline V loadn_bf16(const uint16_t *p, int64_t n)
{
    uint16_t part[VW] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return v_load_bf16(part);
}
#endif

#define DEFINE_DOTS(R)                                                                                                 \
    DEFINE_DOT(f32, float, R, v_load, v_loadn)                                                                         \
    DEFINE_DOT(f16, uint16_t, R, v_load_f16, loadn_f16)                                                                \
    DEFINE_DOT(bf16, uint16_t, R, v_load_bf16, loadn_bf16)
DEFINE_DOTS(1)
DEFINE_DOTS(2)
DEFINE_DOTS(3)
DEFINE_DOTS(4)

typedef void (*dot_fn)(int64_t k, const float *x, int64_t ldx, const void *w, int64_t ldw, float (*out)[4]);
static const dot_fn dots[3][4] = {{dot_f32_1, dot_f32_2, dot_f32_3, dot_f32_4},
                                  {dot_f16_1, dot_f16_2, dot_f16_3, dot_f16_4},
                                  {dot_bf16_1, dot_bf16_2, dot_bf16_3, dot_bf16_4}};

/* For weights of f32, f16 or bf16. */
static void isa_dot(const pc_linear_job *job, int64_t begin, int64_t end)
{
    const dot_fn *dot = dots[job->wdt == PC_F32 ? 0 : job->wdt == PC_F16 ? 1 : 2];
    int64_t k = job->k, size = job->wdt == PC_F32 ? 4 : 2;
    for (int64_t j = begin; j < end; j += 4) {
        int64_t cols = pc_min(4, end - j);
        const char *w = (const char *)job->w + j * k * size;
        for (int64_t i = 0; i < job->m; i += 4) {
            float out[4][4];
            int64_t rows = pc_min(4, job->m - i);
            if (cols == 4) {
                dot[rows - 1](k, job->x + i * k, k, w, k, out);
            } else { /* a stride of 0 reads the one row four times */
                for (int64_t c = 0; c < cols; c++) {
                    float one[4][4];
                    dot[rows - 1](k, job->x + i * k, k, w + c * k * size, 0, one);
                    for (int64_t r = 0; r < rows; r++)
                        out[r][c] = one[r][0];
                }
            }
            for (int64_t r = 0; r < rows; r++)
                memcpy(job->y + (i + r) * job->n + j, out[r], (size_t)cols * sizeof(float));
        }
    }
    for (int64_t i = 0; i < job->m; i++)
        row_finish(job->act, end - begin, job->bias != NULL ? job->bias + begin : NULL, job->y + i * job->n + begin);
}

/* --------------------------------------------------- rows times a panel of b */

/* c rows [0, m) × one panel: as many full tiles as fit, then single rows. */
static void rows_by_panel(int64_t m, int64_t k, const float *a, int64_t lda, const float *b, int64_t ldb,
                          int64_t vectors, float *c, int64_t ldc, bool accumulate, int64_t last)
{
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        tiles[vectors - 1](k, a + i * lda, lda, b, ldb, 0, c + i * ldc, ldc, accumulate, last);
    for (; i < m; i++)
        single[vectors - 1](k, a + i * lda, lda, b, ldb, 0, c + i * ldc, ldc, accumulate, last);
}

/* Depth of a panel that stays in the first-level cache beside a few rows of x, and rows whose sums wait on the stack. */
#define PANEL_SLICE 192
#define ROOM_ROWS 192

/* y rows ← act(rows of `room` [+ y] [+ bias]). */
static void leave_room(const pc_block_job *job, int64_t rows, int64_t cols, const float *room, int64_t width,
                       const float *bias, float *y)
{
    for (int64_t r = 0; r < rows; r++, room += width, y += job->ldy)
        for (int64_t j = 0; j < cols; j += VW) {
            int64_t left = cols - j;
            V v = v_load(room + j);
            if (!job->first)
                v = v + (left >= VW ? v_load(y + j) : v_loadn(y + j, left));
            if (job->last) {
                if (bias != NULL)
                    v = v + (left >= VW ? v_load(bias + j) : v_loadn(bias + j, left));
                v = v_act(job->act, v);
            }
            if (left >= VW)
                v_store(y + j, v);
            else
                v_storen(y + j, v, left);
        }
}

static void isa_block(const pc_block_job *job, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end)
{
    ALIGNED float room[ROOM_ROWS * WIDTH(MAX_VECTORS)];
    const pc_panels *panels = job->panels;
    int64_t slices = (job->depth + PANEL_SLICE - 1) / PANEL_SLICE, step = (job->depth + slices - 1) / slices;
    for (int64_t i = begin; i < end; i++) {
        int64_t start = pc_panel_start(panels, i), vectors = pc_panel_start(panels, i + 1) - start;
        int64_t width = vectors * VW, col = start * VW, cols = pc_min(width, panels->rows - col);
        const float *b = panels->data + col * job->depth, *bias = job->bias != NULL ? job->bias + col : NULL;
        for (int64_t top = row_begin; top < row_end; top += ROOM_ROWS) {
            int64_t bottom = pc_min(row_end, top + ROOM_ROWS);
            for (int64_t k0 = 0; k0 < job->depth; k0 += step) {
                int64_t depth = pc_min(step, job->depth - k0);
                for (int64_t row = top; row < bottom; row += TILE_ROWS) {
                    int64_t rows = pc_min(TILE_ROWS, bottom - row);
                    float *sums = room + (row - top) * width;
                    rows_by_panel(rows, depth, job->x + row * job->ldx + k0, job->ldx, b + k0 * width, width, vectors,
                                  sums, width, k0 > 0, VW);
                    if (k0 + step >= job->depth)
                        leave_room(job, rows, cols, sums, width, bias, job->y + row * job->ldy + col);
                }
            }
        }
    }
}

static void isa_product(const pc_product_job *job, int64_t row_begin, int64_t row_end, int64_t col_begin,
                        int64_t col_end)
{
    ALIGNED float panel[PANEL_DEPTH * WIDTH(MAX_VECTORS)];
    int64_t m = row_end - row_begin;
    const float *a = job->a + row_begin * job->lda;
    for (int64_t col = col_begin; col < col_end; col += WIDTH(MAX_VECTORS)) {
        int64_t cols = pc_min(WIDTH(MAX_VECTORS), col_end - col);
        int64_t vectors = (cols + VW - 1) / VW, width = vectors * VW, last = cols - (vectors - 1) * VW;
        float *c = job->c + row_begin * job->ldc + col;
        /* A whole panel of f32 that few rows use is read where it lies. */
        bool direct = !job->b_rows && job->bdt == PC_F32 && last == VW && m < 2 * TILE_ROWS;
        int64_t step = direct ? pc_max(job->k, 1) : PANEL_DEPTH;
        for (int64_t k0 = 0; k0 == 0 || k0 < job->k; k0 += step) {
            int64_t depth = pc_min(step, job->k - k0), ldb = width;
            const float *b = panel;
            if (direct) {
                b = (const float *)job->b + col;
                ldb = job->n;
            } else if (job->b_rows) {
                pack_transposed(job->bdt, job->b, col * job->k + k0, job->k, cols, depth, panel, width);
            } else {
                for (int64_t p = 0; p < depth; p++) {
                    widen_row(job->bdt, job->b, (k0 + p) * job->n + col, cols, panel + p * width);
                    for (int64_t j = cols; j < width; j++)
                        panel[p * width + j] = 0.0f;
                }
            }
            rows_by_panel(m, depth, a + k0, job->lda, b, ldb, vectors, c, job->ldc, job->accumulate || k0 > 0, last);
        }
        if (job->bias != NULL || job->act != PC_ACT_NONE)
            for (int64_t i = 0; i < m; i++)
                row_finish(job->act, cols, job->bias != NULL ? job->bias + col : NULL, c + i * job->ldc);
    }
}

static void isa_narrow(pc_dtype dt, const float *src, int64_t n, void *dst_)
{
    uint16_t *dst = dst_;
    int64_t i = 0;
    if (dt == PC_F16) {
        for (; i + VW <= n; i += VW)
            v_store_f16(dst + i, v_load(src + i));
        for (; i < n; i++)
            dst[i] = pc_f32_to_f16(src[i]);
    } else {
        for (; i + VW <= n; i += VW)
            v_store_bf16(dst + i, v_load(src + i));
        for (; i < n; i++)
            dst[i] = pc_f32_to_bf16(src[i]);
    }
}

#include "simd_attention.h"
#include "simd_lowrank.h"
#include "simd_mersenne.h"

const pc_kernel_table TABLE_NAME = {
    .name = TABLE_TEXT,
    .lanes = VW,
    .max_vectors = MAX_VECTORS,
    .rows = &ROW_OPS_NAME,
    .widen = isa_widen,
    .narrow = isa_narrow,
    .keep = isa_keep,
    .drop = isa_drop,
    .pack = isa_pack,
    .linear = isa_linear,
    .pack_rows = pack_transposed,
    .block = isa_block,
    .dot = isa_dot,
    .product = isa_product,
    .lowrank = isa_lowrank,
    .pack_lowrank = isa_pack_lowrank,
    .outer = isa_outer,
    .outer_rows = isa_outer_rows,
    .outer_join = isa_outer_join,
    .twist = isa_twist,
    .temper = isa_temper,
    .choose = isa_choose,
    .head_scratch = isa_head_scratch,
    .head = isa_head,
    .head_back_scratch = isa_head_back_scratch,
    .head_back = isa_head_back,
};
