/* libFuzzer target: the safetensors reader, and the writer on what it read.
 *
 * The first byte chooses.  Even: the rest is a file.  Odd: two bytes give a
 * number of data bytes, the rest is the header, and the length prefix is made
 * to fit, so that the fuzzer need not learn to count.
 *
 * What must hold: no crash; whatever is accepted can be read whole and in part
 * and written again; and what is written is accepted, with the same content.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/formats/safetensors.h"

#define MUST(cond)                                                      \
    do {                                                                \
        if (!(cond)) {                                                  \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond); \
            abort();                                                    \
        }                                                               \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Every other element of the first axis, backwards, and the rest whole: compared with the whole tensor. */
static void check_slice(const pc_safetensors *st, const pc_tensor_info *info, size_t i, const uint8_t *whole)
{
    if (info->ndim == 0 || info->shape[0] == 0 || info->nbytes == 0 || pc_dtype_size(info->dtype) == 0)
        return;
    pc_axis axes[PC_MAX_DIMS];
    for (int d = 0; d < info->ndim; d++)
        axes[d] = (pc_axis){0, 1, info->shape[d]};
    uint64_t rows = (info->shape[0] + 1) / 2, row = info->nbytes / info->shape[0];
    axes[0] = (pc_axis){2 * (rows - 1), -2, rows};
    uint8_t *part = malloc((size_t)(rows * row));
    pc_error err;
    MUST(part != NULL && pc_safetensors_read_slice(st, i, axes, part, &err) == PC_OK);
    for (uint64_t r = 0; r < rows; r++)
        MUST(memcmp(part + r * row, whole + 2 * (rows - 1 - r) * row, (size_t)row) == 0);
    axes[0].start = info->shape[0];
    MUST(pc_safetensors_read_slice(st, i, axes, part, &err) == PC_ERR_INDEX);
    free(part);
}

static void check_written(const pc_tensor_view *views, size_t count, const pc_metadata_item *metadata, size_t fields,
                          bool has_metadata)
{
    pc_safetensors_layout layout;
    pc_error err;
    pc_status status = pc_safetensors_plan(views, count, metadata, fields, has_metadata, &layout, &err);
    MUST(status == PC_OK);
    uint8_t *file = malloc((size_t)layout.file_size);
    MUST(file != NULL && layout.header_len % 8 == 0);
    memcpy(file, layout.header, layout.header_len);
    size_t at = layout.header_len;
    for (size_t k = 0; k < count; k++) {
        const pc_tensor_view *view = &views[layout.order[k]];
        memcpy(file + at, view->data, (size_t)view->info.nbytes);
        at += (size_t)view->info.nbytes;
    }
    MUST(at == layout.file_size);
    pc_safetensors *again;
    MUST(pc_safetensors_parse(file, at, &again, &err) == PC_OK);
    const pc_weights *weights = pc_safetensors_weights(again);
    MUST(weights->count == count);
    for (size_t i = 0; i < count; i++) {
        const pc_tensor_info *want = &views[i].info;
        size_t k = pc_safetensors_find(again, want->name, want->name_len);
        MUST(k < count);
        const pc_tensor_info *got = &weights->tensors[k];
        MUST(got->dtype == want->dtype && got->ndim == want->ndim && got->nbytes == want->nbytes);
        MUST(got->ndim == 0 || memcmp(got->shape, want->shape, (size_t)got->ndim * sizeof *got->shape) == 0);
        MUST(memcmp(file + pc_safetensors_offset(again, k), views[i].data, (size_t)got->nbytes) == 0);
    }
    const pc_metadata_item *items;
    size_t item_count;
    MUST(pc_safetensors_metadata(again, &items, &item_count) == has_metadata && item_count == fields);
    pc_safetensors_close(again);
    pc_safetensors_layout_free(&layout);
    free(file);
}

static void check_file(const uint8_t *file, size_t size)
{
    pc_safetensors *st;
    pc_error err;
    if (pc_safetensors_parse(file, size, &st, &err) != PC_OK) {
        MUST(st == NULL && err.code == PC_ERR_FORMAT && err.text[0] != '\0');
        return;
    }
    pc_weights *weights = pc_safetensors_weights(st);
    pc_tensor_view *views = calloc(weights->count + 1, sizeof *views);
    void **buffers = calloc(weights->count + 1, sizeof *buffers);
    MUST(views != NULL && buffers != NULL);
    uint64_t total = 0;
    for (size_t i = 0; i < weights->count; i++) {
        const pc_tensor_info *info = &weights->tensors[i];
        total += info->nbytes;
        MUST(total <= size && pc_safetensors_find(st, info->name, info->name_len) == i);
        MUST(pc_safetensors_offset(st, i) + info->nbytes <= size);
        buffers[i] = malloc((size_t)info->nbytes + 1);
        MUST(buffers[i] != NULL && weights->read(weights, i, buffers[i], &err) == PC_OK);
        MUST(memcmp(buffers[i], file + pc_safetensors_offset(st, i), (size_t)info->nbytes) == 0);
        check_slice(st, info, i, buffers[i]);
        memset(buffers[i], 0, (size_t)info->nbytes);
        views[i] = (pc_tensor_view){*info, buffers[i]};
    }
    MUST(pc_safetensors_read_all(st, buffers, NULL, &err) == PC_OK);
    for (size_t i = 0; i < weights->count; i++)
        MUST(memcmp(buffers[i], file + pc_safetensors_offset(st, i), (size_t)weights->tensors[i].nbytes) == 0);
    const pc_metadata_item *items;
    size_t item_count;
    bool has_metadata = pc_safetensors_metadata(st, &items, &item_count);
    check_written(views, weights->count, items, item_count, has_metadata);
    for (size_t i = 0; i < weights->count; i++)
        free(buffers[i]);
    free(buffers);
    free(views);
    pc_safetensors_close(st);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    if (data[0] % 2 == 0) {
        check_file(data + 1, size - 1);
        return 0;
    }
    if (size < 3)
        return 0;
    size_t payload = (size_t)data[1] | (size_t)data[2] << 8, header = size - 3;
    uint8_t *file = malloc(8 + header + payload);
    MUST(file != NULL);
    for (int i = 0; i < 8; i++)
        file[i] = (uint8_t)((uint64_t)header >> (8 * i) & 0xFF);
    memcpy(file + 8, data + 3, header);
    for (size_t i = 0; i < payload; i++)
        file[8 + header + i] = (uint8_t)(i * 7);
    check_file(file, 8 + header + payload);
    free(file);
    return 0;
}
