/* libFuzzer target of the .bin reader.  The first byte chooses what the rest is:
 * a whole file, the pickle of an archive, or the pickle of a legacy file; with
 * the right file around it, a changed pickle is not stopped by a checksum.
 * Seeds: tests/fuzz/seeds_torch_bin.py. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../../src/formats/torch_bin.h"
#include "../c/bin_builder.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const float storage[24] = {1, 2, 3};

static void read_file(const void *file, size_t len)
{
    static pc_error err;
    pc_weights *weights;
    pc_status status = pc_torch_bin_parse(file, len, "x.bin", &weights, &err);
    if (status != PC_OK) {
        if (status != PC_ERR_UNPICKLE || strstr(err.text, "x.bin") == NULL)
            abort();
        return;
    }
    size_t budget = (size_t)4 << 20; /* of bytes read: more would only be slow */
    for (size_t i = 0; i < weights->count; i++) {
        size_t nbytes = (size_t)weights->tensors[i].nbytes;
        if (nbytes > budget)
            continue;
        budget -= nbytes;
        void *exact = malloc(nbytes != 0 ? nbytes : 1);
        if (exact == NULL)
            abort();
        status = weights->read(weights, i, exact, &err);
        if (status != PC_OK && status != PC_ERR_UNPICKLE)
            abort();
        free(exact);
    }
    weights->close(weights);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    if (data[0] == 1 || data[0] == 2) {
        bytes file = data[0] == 1 ? make_archive(data + 1, size - 1, storage, sizeof storage, false)
                                  : make_legacy(data + 1, size - 1, storage, sizeof storage);
        uint8_t *exact = malloc(file.len);
        if (exact == NULL)
            abort();
        memcpy(exact, file.data, file.len);
        read_file(exact, file.len);
        free(exact);
        free(file.data);
    } else {
        read_file(data + 1, size - 1);
    }
    return 0;
}
