/* Gradients of conv2d: the columns of conv.c, one image and group at a time, and their way back into the image. */
#include <string.h>

#include "../core/memory.h"
#include "gradients.h"
#include "table.h"

typedef struct columns_job {
    const pc_conv_shape *s;
    pc_dtype dt;
    int64_t channels; /* of a group */
    void *image, *columns;
    bool back; /* image += columns, else columns = image */
} columns_job;

/* columns (channel, ky, kx; position) of the channels [begin, end). */
static void columns_range(void *ctx, int64_t begin, int64_t end)
{
    const columns_job *j = ctx;
    const pc_conv_shape *s = j->s;
    const int64_t positions = s->out_height * s->out_width, kernel = s->kernel[0] * s->kernel[1];
    for (int64_t row = begin * kernel; row < end * kernel; row++) {
        const int64_t c = row / kernel, ky = row % kernel / s->kernel[1], kx = row % s->kernel[1];
        for (int64_t oy = 0; oy < s->out_height; oy++) {
            const int64_t iy = oy * s->stride[0] - s->padding[0] + ky * s->dilation[0];
            for (int64_t ox = 0; ox < s->out_width; ox++) {
                const int64_t ix = ox * s->stride[1] - s->padding[1] + kx * s->dilation[1];
                const int64_t at = row * positions + oy * s->out_width + ox, from = (c * s->height + iy) * s->width + ix;
                const bool inside = iy >= 0 && iy < s->height && ix >= 0 && ix < s->width;
                if (j->dt == PC_F64) {
                    double *image = j->image, *columns = j->columns;
                    if (!j->back)
                        columns[at] = inside ? image[from] : 0.0;
                    else if (inside)
                        image[from] += columns[at];
                } else {
                    float *image = j->image, *columns = j->columns;
                    if (!j->back)
                        columns[at] = inside ? image[from] : 0.0f;
                    else if (inside)
                        image[from] += columns[at];
                }
            }
        }
    }
}

static void move_columns(pc_runtime *rt, columns_job *j, void *image, bool back)
{
    const int64_t work = j->s->kernel[0] * j->s->kernel[1] * j->s->out_height * j->s->out_width;
    j->image = image;
    j->back = back;
    pc_parallel_for(rt, j->channels, pc_max(1, 16384 / pc_max(work, 1)), columns_range, j);
}

pc_status pc_conv2d_back(pc_runtime *rt, pc_dtype dt, const pc_conv_shape *s, const void *x, pc_dtype wdt,
                         const void *w, const void *dy, bool add, void *dx, void *dw, pc_error *err)
{
    const int64_t group_in = s->in_channels / s->groups, group_out = s->out_channels / s->groups;
    const int64_t depth = group_in * s->kernel[0] * s->kernel[1], positions = s->out_height * s->out_width;
    const size_t size = pc_dtype_size(dt);
    size_t image_bytes, columns_bytes, weight_bytes = 0, bytes;
    bool fits = pc_mul_size((size_t)(s->batch * s->in_channels), (size_t)(s->height * s->width), &image_bytes) &&
                pc_mul_size(image_bytes, size, &image_bytes) &&
                pc_mul_size((size_t)depth, (size_t)positions, &columns_bytes) &&
                pc_mul_size(columns_bytes, size, &columns_bytes);
    if (fits && dx != NULL && wdt != dt)
        weight_bytes = pc_align_up((size_t)(s->out_channels * depth) * size);
    char *scratch = fits && pc_add_size(columns_bytes, weight_bytes, &bytes) ? pc_malloc(bytes) : NULL;
    if (scratch == NULL)
        return pc_fail_nomem(err, "the scratch of conv2d's gradient");
    if (dx != NULL && !add)
        memset(dx, 0, image_bytes);
    if (weight_bytes != 0) {
        pc_convert(rt, dt, scratch, wdt, w, s->out_channels * depth);
        w = scratch;
    }
    columns_job j = {.s = s, .dt = dt, .channels = group_in, .columns = scratch + weight_bytes};
    pc_status status = PC_OK;
    for (int64_t i = 0; i < s->batch * s->groups && status == PC_OK; i++) {
        const int64_t b = i / s->groups, group = i % s->groups, channel = b * s->in_channels + group * group_in;
        const int64_t image = channel * s->height * s->width, out = group * group_out;
        const void *dy_here = pc_at(dt, dy, (b * s->out_channels + out) * positions);
        if (dw != NULL) {
            /* the image is only read */
            move_columns(rt, &j, (void *)(uintptr_t)pc_at(dt, x, image), false);
            status = pc_gemm(rt, dt, false, true, group_out, depth, positions, 1.0, dy_here, positions, j.columns,
                             positions, 1.0, pc_at_mut(dt, dw, out * depth), depth, err);
        }
        if (dx != NULL && status == PC_OK) {
            status = pc_gemm(rt, dt, true, false, depth, positions, group_out, 1.0, pc_at(dt, w, out * depth), depth,
                             dy_here, positions, 0.0, j.columns, positions, err);
            if (status == PC_OK)
                move_columns(rt, &j, pc_at_mut(dt, dx, image), true);
        }
    }
    pc_free(scratch);
    return status;
}
