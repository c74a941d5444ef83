/* y = act(x · wᵀ + bias) in f32 for many rows: the weight is packed once per call, the rows of x are read where they lie.
 *
 * Three levels of blocks, for the three levels of caches.  A tile of the result stays in registers while a slice of the
 * depth passes; the panel that it reads (a slice deep, a few vectors of weight rows wide) stays in the first-level
 * cache while a block of rows passes; that block of x stays in the second-level cache while the panels of a slab pass;
 * and the packed slab stays in the last-level cache while the blocks pass.  Lanes are columns of y, so that tiles are
 * stored without a transposition, and bias and activation are applied while the tile is in the first-level cache.
 */
#include "../core/memory.h"
#include "linear.h"

/* Depth that is packed at a time. */
#define PASS_DEPTH 768
/* Floats of x that a thread works on: half of a second-level cache of 2 MB. */
#define BLOCK_FLOATS ((int64_t)256 << 10)
/* Floats of packed weight. */
#define SLAB_FLOATS ((int64_t)768 << 10)
/* Floats of x that are copied at a time, where they are. */
#define COPY_FLOATS ((int64_t)1 << 20)

typedef struct many_work {
    const pc_kernel_table *table;
    pc_block_job job;
    pc_panels panels;
    pc_dtype wdt;
    const void *w;
    int64_t at, stride; /* first element of the slab in w, and from row to row */
    const float *x;     /* what is copied to `copy` */
    float *copy;
    int64_t k, block;
    bool turned;
} many_work;

/* dst (depth, width) ← the columns that begin at element `at` of w (k, n); those past `cols` become zero. */
static void pack_plain(const many_work *w, int64_t at, int64_t cols, float *dst, int64_t width)
{
    for (int64_t p = 0; p < w->job.depth; p++, dst += width) {
        pc_widen_to(PC_F32, dst, w->wdt, pc_at(w->wdt, w->w, at + p * w->stride), cols);
        for (int64_t j = cols; j < width; j++)
            dst[j] = 0.0f;
    }
}

static void pack_range(void *ctx, int64_t begin, int64_t end)
{
    const many_work *w = ctx;
    int64_t lanes = w->table->lanes, depth = w->job.depth;
    for (int64_t i = begin; i < end; i++) {
        int64_t start = pc_panel_start(&w->panels, i) * lanes, stop = pc_panel_start(&w->panels, i + 1) * lanes;
        if (w->turned) {
            pack_plain(w, w->at + start, pc_min(w->panels.rows, stop) - start, w->panels.data + start * depth,
                       stop - start);
            continue;
        }
        w->table->pack_rows(w->wdt, w->w, w->at + start * w->stride, w->stride, pc_min(w->panels.rows, stop) - start,
                            depth, w->panels.data + start * depth, stop - start);
    }
}

static void copy_range(void *ctx, int64_t begin, int64_t end)
{
    const many_work *w = ctx;
    for (int64_t i = begin; i < end; i++)
        memcpy(w->copy + i * w->job.ldx, w->x + i * w->k, (size_t)w->job.depth * sizeof *w->x);
}

static void block_range(void *ctx, int64_t begin, int64_t end)
{
    const many_work *w = ctx;
    while (begin < end) { /* the range may cross from one block of rows into the next */
        int64_t block = begin / w->panels.count, panel = begin % w->panels.count;
        int64_t stop = pc_min(w->panels.count, panel + (end - begin));
        w->table->block(&w->job, block * w->block, pc_min(w->job.m, (block + 1) * w->block), panel, stop);
        begin += stop - panel;
    }
}

static int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

pc_status pc_linear_many(pc_runtime *rt, const pc_linear_job *job, pc_error *err)
{
    const pc_kernel_table *table = pc_kernels();
    int64_t lanes = table->lanes, k = job->k, n = job->n;
    int64_t passes = (k + PASS_DEPTH - 1) / PASS_DEPTH, step = round_up((k + passes - 1) / passes, lanes);
    int64_t widest = lanes * table->max_vectors;
    int64_t slab = pc_max(widest, SLAB_FLOATS / step / widest * widest);
    int64_t packed = pc_min(slab, round_up(n, lanes)) * step;
    /* Parts of rows that lie whole pages apart would meet in few sets of the caches: they are copied closer. */
    bool copies = passes > 1 && (k * 4) % 4096 == 0;
    int64_t ldx = copies ? step + lanes : k;
    int64_t rows = copies ? pc_min(job->m, pc_max(64, COPY_FLOATS / ldx / 64 * 64)) : job->m;
    float *base = pc_malloc((size_t)(packed + (copies ? rows * ldx : 0)) * sizeof(float) + PC_ALIGNMENT);
    if (base == NULL)
        return pc_fail_nomem(err, "the scratch of a linear layer");
    float *data = (float *)(void *)pc_align_up((uintptr_t)base);
    many_work work = {.table = table, .wdt = job->wdt, .w = job->w, .stride = job->turned ? n : k, .copy = data + packed, .k = k};
    work.turned = job->turned;
    work.job = (pc_block_job){.panels = &work.panels, .ldx = ldx, .act = job->act, .ldy = n};
    for (int64_t row = 0; row < job->m; row += rows) {
        work.job.m = pc_min(rows, job->m - row);
        for (int64_t k0 = 0; k0 < k; k0 += step) {
            work.job.depth = pc_min(step, k - k0);
            work.job.first = k0 == 0 && !job->accumulate;
            work.job.last = k0 + step >= k;
            work.x = job->x + row * k + k0;
            work.job.x = work.x;
            if (copies) {
                work.job.x = work.copy;
                pc_parallel_for(rt, work.job.m, 64, copy_range, &work);
            }
            for (int64_t col = 0; col < n; col += slab) {
                pc_panels_plan(&work.panels, table, pc_min(slab, n - col), work.job.depth);
                work.panels.data = data;
                work.at = job->turned ? k0 * n + col : col * k + k0;
                work.job.y = job->y + row * n + col;
                work.job.bias = job->bias != NULL ? job->bias + col : NULL;
                pc_parallel_for(rt, work.panels.count, 2, pack_range, &work);
                work.block = pc_max(64, BLOCK_FLOATS / step / 16 * 16);
                int64_t blocks = (work.job.m + work.block - 1) / work.block;
                work.block = round_up((work.job.m + blocks - 1) / blocks, 16);
                pc_parallel_for(rt, blocks * work.panels.count, 1, block_range, &work);
            }
        }
    }
    pc_free(base);
    return PC_OK;
}
