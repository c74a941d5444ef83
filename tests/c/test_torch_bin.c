/* The .bin reader: right values, clean failure of every allocation, and
 * thousands of damaged files under the sanitizers. */
#define _XOPEN_SOURCE 700
#include "check.h"

#include <stdio.h>
#include <unistd.h>

#include "../../src/formats/torch_bin.h"
#include "bin_builder.h"

static const float storage[24] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11,
                                  12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23};

/* Tensors of every kind over one storage, in a nested dict with attributes. */
static bytes sample_pickle(bool legacy)
{
    const uint64_t whole[] = {4, 6}, rows[] = {6, 1}, turned[] = {6, 4}, columns[] = {1, 6}, wide[] = {2, 4, 6},
                   repeat[] = {0, 6, 1}, two[] = {2}, far[] = {23}, none[] = {0, 3};
    bytes b = {0};
    PUT(&b, "\x80\x02" "ccollections\nOrderedDict\n)Rq\x00(");
    put_tensor(&b, "whole", 24, 0, 2, whole, rows, legacy);
    put_tensor(&b, "turned", 24, 0, 2, turned, columns, legacy);
    put_tensor(&b, "repeated", 24, 0, 3, wide, repeat, legacy);
    put_tensor(&b, "ends", 24, 0, 1, two, far, legacy);
    put_tensor(&b, "scalar", 24, 7, 0, NULL, NULL, legacy);
    put_tensor(&b, "empty", 24, 0, 2, none, rows, legacy);
    PUT(&b, "X\x06\x00\x00\x00" "nested}(");
    put_tensor(&b, "w", 24, 4, 1, two, columns, legacy);
    PUT(&b, "K\x03(K\x01K\x02K\x03K\x04tq\x01X\x01\x00\x00\x00k]q\x02(h\x01h\x02" "euu");
    PUT(&b, "}X\x09\x00\x00\x00_metadata}sb.");
    return b;
}

static pc_status read_all(pc_weights *weights, pc_error *err)
{
    pc_status status = PC_OK;
    for (size_t i = 0; i < weights->count && status == PC_OK; i++) {
        size_t len = (size_t)weights->tensors[i].nbytes;
        if (len > (size_t)1 << 20)
            continue;
        void *exact = malloc(len != 0 ? len : 1); /* the sanitizer sees one byte too many */
        if (exact == NULL)
            abort();
        status = weights->read(weights, i, exact, err);
        free(exact);
    }
    return status;
}

/* Open, read everything, close. */
static pc_status try_bytes(const bytes *file, pc_error *err)
{
    pc_weights *weights = NULL;
    uint8_t *exact = malloc(file->len != 0 ? file->len : 1);
    if (exact == NULL)
        abort();
    memcpy(exact, file->data, file->len);
    pc_status status = pc_torch_bin_parse(exact, file->len, "x.bin", &weights, err);
    if (status == PC_OK) {
        status = read_all(weights, err);
        weights->close(weights);
    }
    free(exact);
    return status;
}

static void check_values(pc_weights *weights)
{
    static const float turned[] = {0, 6, 12, 18, 1, 7, 13, 19, 2, 8, 14, 20, 3, 9, 15, 21, 4, 10, 16, 22, 5, 11, 17, 23};
    float got[48];
    pc_error err;
    REQUIRE(weights->count == 7);
    CHECK(weights->tensors[6].name_len == 8 && memcmp(weights->tensors[6].name, "nested.w", 8) == 0);
    CHECK_STATUS(weights->read(weights, 0, got, &err), PC_OK);
    CHECK(memcmp(got, storage, sizeof storage) == 0);
    CHECK_STATUS(weights->read(weights, 1, got, &err), PC_OK);
    CHECK(memcmp(got, turned, sizeof turned) == 0);
    CHECK_STATUS(weights->read(weights, 2, got, &err), PC_OK);
    CHECK(memcmp(got, storage, sizeof storage) == 0 && memcmp(got + 24, storage, sizeof storage) == 0);
    CHECK_STATUS(weights->read(weights, 3, got, &err), PC_OK);
    CHECK(got[0] == 0.0f && got[1] == 23.0f);
    CHECK_STATUS(weights->read(weights, 4, got, &err), PC_OK);
    CHECK(got[0] == 7.0f);
    CHECK_INT(weights->tensors[5].nbytes, 0);
    CHECK_STATUS(weights->read(weights, 5, NULL, &err), PC_OK);
    CHECK_STATUS(weights->read(weights, 6, got, &err), PC_OK);
    CHECK(got[0] == 4.0f && got[1] == 5.0f);
    /* in any order, and again */
    CHECK_STATUS(weights->read(weights, 1, got, &err), PC_OK);
    CHECK(memcmp(got, turned, sizeof turned) == 0);
    CHECK_STATUS(weights->read(weights, 3, got, &err), PC_OK);
    CHECK(got[1] == 23.0f);
}

static bytes sample(int layout)
{
    bytes pickle = sample_pickle(layout == 1);
    bytes file = layout == 1 ? make_legacy(pickle.data, pickle.len, storage, sizeof storage)
                             : make_archive(pickle.data, pickle.len, storage, sizeof storage, layout == 0);
    free(pickle.data);
    return file;
}

static bool write_file(char *path, const bytes *file)
{
    int fd = mkstemp(path);
    bool ok = fd >= 0 && write(fd, file->data, file->len) == (ssize_t)file->len;
    return fd >= 0 && close(fd) == 0 && ok;
}

TEST(values)
{
    for (int layout = 0; layout < 3; layout++) {
        bytes file = sample(layout);
        pc_weights *weights = NULL;
        pc_error err = {0};
        REQUIRE_STATUS(pc_torch_bin_parse(file.data, file.len, "x.bin", &weights, &err), PC_OK);
        check_values(weights);
        weights->close(weights);

        char path[] = "/tmp/peftc-test-XXXXXX";
        REQUIRE(write_file(path, &file));
        REQUIRE_STATUS(pc_torch_bin_open(path, &weights, &err), PC_OK);
        check_values(weights);
        weights->close(weights);
        unlink(path);
        free(file.data);
    }
}

TEST(every_allocation_may_fail)
{
    for (int layout = 0; layout < 2; layout++) {
        bytes file = sample(layout);
        char path[] = "/tmp/peftc-test-XXXXXX";
        REQUIRE(write_file(path, &file));
        long live = pc_test_live_allocations();
        FOR_EACH_ALLOCATION(n)
        {
            pc_error err = {0};
            pc_weights *weights = NULL;
            pc_status status = pc_torch_bin_open(path, &weights, &err);
            if (status == PC_OK) {
                status = read_all(weights, &err);
                weights->close(weights);
            } else {
                CHECK(weights == NULL);
            }
            CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
            CHECK_INT(pc_test_live_allocations(), live);
        }
        unlink(path);
        free(file.data);
    }
}

TEST(a_file_that_shrinks)
{
    bytes file = sample(0);
    char path[] = "/tmp/peftc-test-XXXXXX";
    REQUIRE(write_file(path, &file));
    pc_weights *weights = NULL;
    pc_error err = {0};
    REQUIRE_STATUS(pc_torch_bin_open(path, &weights, &err), PC_OK);
    CHECK(truncate(path, 10) == 0);
    float got[24];
    CHECK_STATUS(weights->read(weights, 0, got, &err), PC_ERR_UNPICKLE);
    CHECK_CONTAINS(err.text, "shorter");
    CHECK_STATUS(weights->read(weights, 1, got, &err), PC_ERR_UNPICKLE);
    weights->close(weights);
    unlink(path);
    free(file.data);
}

TEST(every_truncation_is_refused)
{
    for (int layout = 0; layout < 3; layout++) {
        bytes file = sample(layout);
        size_t all = file.len;
        for (file.len = 0; file.len < all; file.len++) {
            pc_error err = {0};
            pc_status status = try_bytes(&file, &err);
            CHECK_STATUS(status, PC_ERR_UNPICKLE);
            CHECK_CONTAINS(err.text, "x.bin");
        }
        free(file.data);
    }
}

/* xorshift: the damage must be the same on every run. */
static uint32_t draw(uint64_t *state, uint32_t below)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (uint32_t)((*state >> 32) % below);
}

static const char opcodes[] = "(.NJKMGXTUBC)t]a}esuqrhjcRbQ0oiPIL2\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d"
                              "\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98";

static void damage(uint64_t *seed, bytes *b)
{
    for (uint32_t times = 1 + draw(seed, 4); times != 0; times--) {
        size_t at = draw(seed, (uint32_t)b->len), len = 1 + draw(seed, 24);
        switch (draw(seed, 7)) {
        case 0:
            b->data[at] ^= (uint8_t)(1u << draw(seed, 8));
            break;
        case 1:
            b->data[at] = (uint8_t)draw(seed, 256);
            break;
        case 2:
            b->data[at] = (uint8_t)opcodes[draw(seed, sizeof opcodes - 1)];
            break;
        case 3: { /* an extreme number */
            static const uint64_t extremes[] = {0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, UINT64_MAX, 0x100000};
            uint64_t value = extremes[draw(seed, 7)];
            for (size_t i = 0; i < 8 && at + i < b->len; i++)
                b->data[at + i] = (uint8_t)(value >> (8 * i));
            break;
        }
        case 4: /* take a piece out */
            len = len < b->len - at ? len : b->len - at;
            memmove(b->data + at, b->data + at + len, b->len - at - len);
            b->len -= len;
            break;
        default: { /* copy a piece to another place */
            size_t from = draw(seed, (uint32_t)b->len);
            len = len < b->len - from ? len : b->len - from;
            uint8_t piece[24];
            memcpy(piece, b->data + from, len);
            put(b, piece, len);
            memmove(b->data + at + len, b->data + at, b->len - at - len);
            memcpy(b->data + at, piece, len);
            break;
        }
        }
        if (b->len == 0)
            PUT(b, "x");
    }
}

static void check_damaged(const bytes *file)
{
    pc_error err = {0};
    pc_status status = try_bytes(file, &err);
    CHECK(status == PC_OK || status == PC_ERR_UNPICKLE);
    CHECK(status == PC_OK || strstr(err.text, "x.bin") != NULL);
}

TEST(damaged_files)
{
    uint64_t seed = 88172645463325252u;
    for (int layout = 0; layout < 3; layout++)
        for (int i = 0; i < 6000; i++) {
            bytes file = sample(layout);
            damage(&seed, &file);
            check_damaged(&file);
            free(file.data);
        }
}

/* The file around the pickle is right, so that every change reaches the machine. */
TEST(damaged_pickles)
{
    uint64_t seed = 2463534242u;
    for (int layout = 0; layout < 2; layout++)
        for (int i = 0; i < 12000; i++) {
            bytes pickle = sample_pickle(layout == 1);
            damage(&seed, &pickle);
            bytes file = layout == 1 ? make_legacy(pickle.data, pickle.len, storage, sizeof storage)
                                     : make_archive(pickle.data, pickle.len, storage, sizeof storage, true);
            check_damaged(&file);
            free(pickle.data);
            free(file.data);
        }
}

TEST(crc32_matches_its_definition)
{
    pc_crc32 crc, plain;
    pc_crc32_init(&crc);
    plain = crc;
    plain.carryless = false;
    CHECK(pc_crc32_update(&crc, 0, "123456789", 9) == 0xCBF43926u);
    uint8_t data[700];
    uint64_t seed = 7;
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)draw(&seed, 256);
    for (size_t len = 0; len <= 600; len++) {
        size_t start = len % 16, half = len / 3;
        uint32_t want = 0xFFFFFFFFu; /* bit by bit */
        for (size_t i = 0; i < len; i++) {
            want ^= data[start + i];
            for (int bit = 0; bit < 8; bit++)
                want = (want >> 1) ^ ((want & 1u) != 0 ? 0xEDB88320u : 0u);
        }
        want = ~want;
        CHECK(pc_crc32_update(&crc, 0, data + start, len) == want);
        CHECK(pc_crc32_update(&plain, 0, data + start, len) == want);
        uint32_t first = pc_crc32_update(&crc, 0, data + start, half);
        CHECK(pc_crc32_update(&crc, first, data + start + half, len - half) == want);
    }
}

int main(void)
{
    RUN(values);
    RUN(every_allocation_may_fail);
    RUN(a_file_that_shrinks);
    RUN(every_truncation_is_refused);
    RUN(damaged_files);
    RUN(damaged_pickles);
    RUN(crc32_matches_its_definition);
    return check_done();
}
