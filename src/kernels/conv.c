/* 2-D convolution: the input under the kernel is laid out as columns, a tile of output positions at a time, and
 * multiplied with the weight. */
#include <stdatomic.h>
#include <string.h>

#include "../core/memory.h"
#include "openblas.h"
#include "table.h"

pc_status pc_conv_output(pc_conv_shape *shape, pc_error *err)
{
    static const char *const axis[2] = {"height", "width"};
    const int64_t in[2] = {shape->height, shape->width};
    int64_t out[2];
    for (int i = 0; i < 2; i++) {
        int64_t reach = 0, padding = 0, padded = 0;
        bool fits = !__builtin_mul_overflow(shape->dilation[i], shape->kernel[i] - 1, &reach) &&
                    !__builtin_add_overflow(reach, 1, &reach) &&
                    !__builtin_mul_overflow(shape->padding[i], 2, &padding) &&
                    !__builtin_add_overflow(in[i], padding, &padded);
        if (shape->kernel[i] < 1 || shape->stride[i] < 1 || shape->dilation[i] < 1 || shape->padding[i] < 0)
            return pc_fail(err, PC_ERR_VALUE,
                           "conv2d: kernel size, stride and dilation must be at least 1 and padding at least 0; along "
                           "the %s they are %lld, %lld, %lld and %lld",
                           axis[i], (long long)shape->kernel[i], (long long)shape->stride[i],
                           (long long)shape->dilation[i], (long long)shape->padding[i]);
        if (!fits || padded < reach)
            return pc_fail(err, PC_ERR_VALUE,
                           "conv2d: a kernel of size %lld with dilation %lld does not fit an input of %s %lld with "
                           "padding %lld",
                           (long long)shape->kernel[i], (long long)shape->dilation[i], axis[i], (long long)in[i],
                           (long long)shape->padding[i]);
        out[i] = (padded - reach) / shape->stride[i] + 1;
    }
    shape->out_height = out[0];
    shape->out_width = out[1];
    return PC_OK;
}

/* Elements of a tile of columns. */
#define TILE_ELEMENTS ((int64_t)128 << 10)

typedef struct conv_job {
    const pc_conv_shape *s;
    pc_dtype dt;
    const void *x, *w, *bias; /* weight and bias widened */
    void *y;
    int64_t group_in, group_out, depth, positions, tile, tiles;
    char *scratch;
    int64_t slot_bytes;
    atomic_llong next;
} conv_job;

/* columns (depth, count): row (channel, ky, kx) holds that input element for each output position. */
static void fill_columns(const conv_job *j, const void *image, int64_t first, int64_t count, void *columns)
{
    const pc_conv_shape *s = j->s;
    size_t size = pc_dtype_size(j->dt);
    char *to = columns;
    for (int64_t c = 0; c < j->group_in; c++)
        for (int64_t ky = 0; ky < s->kernel[0]; ky++)
            for (int64_t kx = 0; kx < s->kernel[1]; kx++) {
                int64_t oy = first / s->out_width, ox = first % s->out_width;
                for (int64_t i = 0; i < count; i++, to += size) {
                    int64_t iy = oy * s->stride[0] - s->padding[0] + ky * s->dilation[0];
                    int64_t ix = ox * s->stride[1] - s->padding[1] + kx * s->dilation[1];
                    if (iy < 0 || iy >= s->height || ix < 0 || ix >= s->width)
                        memset(to, 0, size);
                    else if (size == 8)
                        memcpy(to, pc_at(PC_F64, image, (c * s->height + iy) * s->width + ix), 8);
                    else
                        memcpy(to, pc_at(PC_F32, image, (c * s->height + iy) * s->width + ix), 4);
                    if (++ox == s->out_width) {
                        ox = 0;
                        oy++;
                    }
                }
            }
}

static void conv_slots(void *ctx, int64_t begin, int64_t end)
{
    conv_job *j = ctx;
    const pc_conv_shape *s = j->s;
    int64_t items = s->batch * s->groups * j->tiles;
    for (int64_t slot = begin; slot < end; slot++) {
        void *columns = j->scratch + slot * j->slot_bytes;
        for (;;) {
            int64_t item = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed);
            if (item >= items)
                break;
            int64_t tile = item % j->tiles, group = item / j->tiles % s->groups, b = item / j->tiles / s->groups;
            int64_t first = tile * j->tile, count = pc_min(j->tile, j->positions - first);
            int64_t channel = b * s->in_channels + group * j->group_in;
            fill_columns(j, pc_at(j->dt, j->x, channel * s->height * s->width), first, count, columns);
            int64_t out = group * j->group_out;
            void *y = pc_at_mut(j->dt, j->y, (b * s->out_channels + out) * j->positions + first);
            for (int64_t o = 0; o < j->group_out && j->bias != NULL; o++)
                for (int64_t i = 0; i < count; i++)
                    memcpy(pc_at_mut(j->dt, y, o * j->positions + i), pc_at(j->dt, j->bias, out + o),
                           pc_dtype_size(j->dt));
            /* cannot fail: the extents were checked before */
            (void)pc_gemm(NULL, j->dt, false, false, j->group_out, count, j->depth, 1.0,
                          pc_at(j->dt, j->w, out * j->depth), j->depth, columns, count, j->bias != NULL ? 1.0 : 0.0, y,
                          j->positions, NULL);
        }
    }
}

pc_status pc_conv2d(pc_runtime *rt, pc_dtype dt, const pc_conv_shape *s, const void *x, pc_dtype wdt, const void *w,
                    const void *bias, void *y, pc_error *err)
{
    if (s->batch <= 0 || s->out_channels <= 0 || s->out_height <= 0 || s->out_width <= 0)
        return PC_OK;
    conv_job j = {.s = s, .dt = dt, .x = x, .w = w, .bias = bias, .y = y};
    size_t size = pc_dtype_size(dt), weight_bytes = 0, bytes, slot;
    j.group_in = s->in_channels / s->groups;
    j.group_out = s->out_channels / s->groups;
    j.depth = j.group_in * s->kernel[0] * s->kernel[1];
    j.positions = s->out_height * s->out_width;
    j.tile = pc_min(j.positions, pc_max(16, TILE_ELEMENTS / pc_max(j.depth, 1)));
    j.tiles = (j.positions + j.tile - 1) / j.tile;
    if (j.positions > INT32_MAX || j.depth > INT32_MAX)
        return pc_fail(err, PC_ERR_VALUE, "conv2d: %lld output positions and %lld inputs each: at most %ld are supported",
                       (long long)j.positions, (long long)j.depth, (long)INT32_MAX);
    int64_t slots = rt != NULL ? pc_runtime_threads(rt) : 1;
    slots = pc_min(slots, s->batch * s->groups * j.tiles);
    if (wdt != dt)
        weight_bytes = pc_align_up((size_t)(s->out_channels * (j.depth + 1)) * size);
    if (!pc_mul_size((size_t)(j.depth * j.tile), size, &slot) || !pc_mul_size(pc_align_up(slot), (size_t)slots, &bytes) ||
        !pc_add_size(bytes, weight_bytes, &bytes))
        return pc_fail_nomem(err, "the scratch of conv2d");
    char *scratch = pc_malloc(bytes);
    if (scratch == NULL)
        return pc_fail_nomem(err, "the scratch of conv2d");
    if (wdt != dt) {
        pc_convert(rt, dt, scratch, wdt, w, s->out_channels * j.depth);
        j.w = scratch;
        if (bias != NULL) {
            j.bias = scratch + (size_t)(s->out_channels * j.depth) * size;
            pc_convert(rt, dt, scratch + (size_t)(s->out_channels * j.depth) * size, wdt, bias, s->out_channels);
        }
    }
    j.scratch = scratch + weight_bytes;
    j.slot_bytes = (int64_t)pc_align_up(slot);
    atomic_init(&j.next, 0);
    pc_parallel_for(rt, slots, 1, conv_slots, &j);
    pc_free(scratch);
    return PC_OK;
}
