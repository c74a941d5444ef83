/* The core's ground floor: memory, arena, dtype, errors, hash map. */
#include "check.h"

#include <errno.h>
#include <pthread.h>

#include "../../src/core/arena.h"
#include "../../src/core/dtype.h"
#include "../../src/core/strmap.h"

/* ------------------------------------------------------------------ memory */

static bool all_zero(const void *bytes, size_t n)
{
    const unsigned char *b = bytes;
    for (size_t i = 0; i < n; i++)
        if (b[i] != 0)
            return false;
    return true;
}

TEST(sizes_are_checked)
{
    size_t out = 7;
    CHECK(!pc_mul_size(SIZE_MAX, 2, &out));
    CHECK(!pc_mul_size((size_t)1 << 32, (size_t)1 << 32, &out));
    CHECK(!pc_add_size(SIZE_MAX, 1, &out));
    CHECK_INT(out, 7);
    CHECK(pc_mul_size((size_t)1 << 31, 2, &out));
    CHECK(out == (size_t)1 << 32);
    CHECK(pc_add_size(SIZE_MAX - 1, 1, &out));
    CHECK(out == SIZE_MAX);
    CHECK(pc_mul_size(SIZE_MAX, 0, &out));
    CHECK_INT(out, 0);
    CHECK_INT(pc_align_up(0), 0);
    CHECK_INT(pc_align_up(1), 64);
    CHECK_INT(pc_align_up(64), 64);
    CHECK_INT(pc_align_up(65), 128);
}

TEST(pieces)
{
    long live = pc_test_live_allocations();
    void *a = pc_malloc(0), *b = pc_malloc(0);
    CHECK(a != NULL && b != NULL && a != b);
    CHECK(pc_calloc(SIZE_MAX, 2) == NULL);
    CHECK(pc_calloc(SIZE_MAX / 2 + 1, 2) == NULL);
    CHECK(pc_malloc(SIZE_MAX) == NULL);
    char *c = pc_calloc(3, 5);
    REQUIRE(c != NULL);
    CHECK(all_zero(c, 15));
    memcpy(c, "twelve chars", 13);
    pc_test_fail_allocation(1);
    CHECK(pc_realloc(c, 4096) == NULL);
    CHECK(pc_test_allocation_failed());
    CHECK(strcmp(c, "twelve chars") == 0);
    c = pc_realloc(c, 4096);
    REQUIRE(c != NULL);
    CHECK(strcmp(c, "twelve chars") == 0);
    void *fresh = pc_realloc(NULL, 10);
    char *text = pc_strndup("abcdef", 3);
    REQUIRE(text != NULL);
    CHECK(strcmp(text, "abc") == 0);
    CHECK_INT(pc_test_live_allocations() - live, 5);
    pc_free(a);
    pc_free(b);
    pc_free(c);
    pc_free(fresh);
    pc_free(text);
    pc_free(NULL);
    CHECK_INT(pc_test_live_allocations(), live);
}

TEST(failures_are_counted_per_thread_and_happen_once)
{
    pc_test_fail_allocation(3);
    void *one = pc_malloc(8), *two = pc_malloc(8), *three = pc_malloc(8), *four = pc_malloc(8);
    CHECK(one != NULL && two != NULL && three == NULL && four != NULL);
    CHECK(pc_test_allocation_failed());
    pc_test_fail_allocation(0);
    CHECK(!pc_test_allocation_failed());
    pc_free(one);
    pc_free(two);
    pc_free(four);
}

/* Blocks change from heap to mapping at some size: walk over it, and over page sizes. */
TEST(blocks_are_zeroed_and_aligned)
{
    long live = pc_test_live_allocations();
    const size_t sizes[] = {0,     1,     63,    64,     65,     4095,    4096,   4097,
                            32767, 32768, 32769, 65536, 100001, 1 << 20, 3000001};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (int again = 0; again < 3; again++) { /* reused memory must be zero too */
            unsigned char *block = pc_block_alloc(sizes[i]);
            REQUIRE(block != NULL);
            CHECK((uintptr_t)block % PC_ALIGNMENT == 0);
            CHECK(all_zero(block, sizes[i]));
            memset(block, 0xA5, sizes[i]);
            pc_block_free(block, sizes[i]);
        }
    CHECK(pc_block_alloc(SIZE_MAX) == NULL);
    CHECK(pc_block_alloc((size_t)PTRDIFF_MAX) == NULL);
    CHECK(pc_block_alloc((size_t)PTRDIFF_MAX - PC_ALIGNMENT) == NULL);
    pc_block_free(NULL, 100);
    CHECK_INT(pc_test_live_allocations(), live);
}

TEST(pool_pieces_are_separate_zeroed_and_aligned)
{
    enum { PIECES = 4000 };
    static struct {
        unsigned char *at;
        size_t bytes;
    } pieces[PIECES];
    long live = pc_test_live_allocations();
    pc_pool pool;
    pc_pool_init(&pool);
    uint32_t x = 1;
    for (size_t i = 0; i < PIECES; i++) {
        x = x * 1664525u + 1013904223u;
        size_t bytes = i % 500 == 499 ? 300000 : (x >> 16) % 200; /* now and then larger than any chunk */
        pieces[i].at = pc_pool_alloc(&pool, bytes);
        pieces[i].bytes = bytes;
        REQUIRE(pieces[i].at != NULL);
        CHECK((uintptr_t)pieces[i].at % 16 == 0);
        CHECK(all_zero(pieces[i].at, bytes));
        memset(pieces[i].at, (int)(i % 255) + 1, bytes);
    }
    for (size_t i = 0; i < PIECES; i++) /* nobody wrote over a neighbour */
        for (size_t j = 0; j < pieces[i].bytes; j++)
            if (pieces[i].at[j] != i % 255 + 1) {
                CHECK(!"pieces overlap");
                break;
            }
    pc_pool_free(&pool);
    CHECK_INT(pc_test_live_allocations(), live);
    CHECK(pc_pool_alloc(&pool, 10) != NULL); /* usable again */
    char *text = pc_pool_strndup(&pool, "name.of.module", 7);
    CHECK(text != NULL && strcmp(text, "name.of") == 0);
    CHECK(pc_pool_array(&pool, SIZE_MAX / 4, 8) == NULL);
    CHECK(pc_pool_alloc(&pool, SIZE_MAX) == NULL);
    CHECK(pc_pool_alloc(&pool, (size_t)PTRDIFF_MAX) == NULL);
    CHECK(pc_pool_strndup(&pool, "x", SIZE_MAX) == NULL);
    pc_pool_free(&pool);
    pc_pool_free(&pool);
    CHECK_INT(pc_test_live_allocations(), live);
}

TEST(pool_stays_usable_after_a_failed_allocation)
{
    long live = pc_test_live_allocations();
    FOR_EACH_ALLOCATION (n) {
        pc_pool pool;
        pc_pool_init(&pool);
        int failures = 0;
        for (int i = 0; i < 100; i++)
            failures += pc_pool_alloc(&pool, 1000) == NULL;
        CHECK_INT(failures, pc_test_allocation_failed() ? 1 : 0);
        pc_pool_free(&pool);
    }
    CHECK_INT(pc_test_live_allocations(), live);
}

/* ------------------------------------------------------------------- arena */

static void *retain_and_release(void *arg)
{
    for (int i = 0; i < 20000; i++) {
        pc_arena *mine = pc_arena_retain(arg);
        CHECK(pc_arena_data(mine) != NULL);
        pc_arena_release(mine);
    }
    pc_arena_release(arg);
    return NULL;
}

TEST(arena_lives_as_long_as_its_last_reference)
{
    long live = pc_test_live_allocations();
    pc_error err;
    pc_arena *arena = NULL;
    REQUIRE_STATUS(pc_arena_new(100000, &arena, &err), PC_OK);
    CHECK_INT(pc_arena_size(arena), 100000);
    CHECK((uintptr_t)pc_arena_data(arena) % PC_ALIGNMENT == 0);
    CHECK(all_zero(pc_arena_data(arena), 100000));
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        pc_arena_retain(arena);
        REQUIRE(pthread_create(&threads[i], NULL, retain_and_release, arena) == 0);
    }
    pc_arena_release(arena);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    CHECK_INT(pc_test_live_allocations(), live);
    pc_arena_release(NULL);

    REQUIRE_STATUS(pc_arena_new(0, &arena, &err), PC_OK);
    CHECK_INT(pc_arena_size(arena), 0);
    pc_arena_release(arena);

    arena = NULL;
    CHECK_STATUS(pc_arena_new(SIZE_MAX, &arena, &err), PC_ERR_NOMEM);
    CHECK(arena == NULL);
    CHECK_CONTAINS(err.text, "18446744073709551615 bytes");
    CHECK_STATUS(pc_arena_new(SIZE_MAX, &arena, NULL), PC_ERR_NOMEM);
    FOR_EACH_ALLOCATION (n) {
        arena = NULL;
        pc_status status = pc_arena_new(64, &arena, &err);
        CHECK_STATUS(status, pc_test_allocation_failed() ? PC_ERR_NOMEM : PC_OK);
        pc_arena_release(arena);
    }
    CHECK_INT(pc_test_live_allocations(), live);
}

/* ------------------------------------------------------------------- dtype */

TEST(dtype_names_go_both_ways)
{
    for (int i = PC_DTYPE_NONE + 1; i < PC_DTYPE_COUNT; i++) {
        const pc_dtype_info *info = pc_dtype_get((pc_dtype)i);
        CHECK(info->name != NULL && info->bits != 0);
        CHECK_INT(pc_dtype_from_name(info->name, strlen(info->name)), i);
        CHECK_INT(pc_dtype_from_name(info->name, strlen(info->name) - 1), PC_DTYPE_NONE);
    }
    CHECK_INT(pc_dtype_from_name("f32", 3), PC_DTYPE_NONE);
    CHECK_INT(pc_dtype_from_name("F32\0", 4), PC_DTYPE_NONE);
    CHECK_INT(pc_dtype_from_name("", 0), PC_DTYPE_NONE);
    CHECK_INT(pc_dtype_from_name("?", 1), PC_DTYPE_NONE);
    CHECK_INT(pc_dtype_get(PC_DTYPE_NONE)->bits, 0);
    CHECK_INT(pc_dtype_get((pc_dtype)-1)->bits, 0);
    CHECK_INT(pc_dtype_get((pc_dtype)1000)->bits, 0);
    CHECK_INT(pc_dtype_size(PC_BF16), 2);
    CHECK_INT(pc_dtype_size(PC_F4), 0);
    CHECK_INT(pc_dtype_size(PC_C64), 8);
    CHECK_INT(pc_compute_dtype(PC_BF16), PC_F32);
    CHECK_INT(pc_compute_dtype(PC_F64), PC_F64);
}

/* The value of a half by the definition of the format: the reference for the bit tricks. */
static double value_of_half(uint16_t h, int exponent_bits, int fraction_bits)
{
    int bias = (1 << (exponent_bits - 1)) - 1;
    int exponent = (h >> fraction_bits) & ((1 << exponent_bits) - 1);
    int fraction = h & ((1 << fraction_bits) - 1);
    double sign = (h & 0x8000) != 0 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1)
        return fraction != 0 ? (double)NAN : sign * (double)INFINITY;
    if (exponent == 0)
        return sign * ldexp(fraction, 1 - bias - fraction_bits);
    return sign * ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
}

static uint32_t bits_of(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Widening: all 65,536 halves.  Narrowing: rounding is monotonic, so it is enough to look at every half, at
 * the midpoint between it and the next, and one float above and below that midpoint. */
static void check_half(float (*widen)(uint16_t), uint16_t (*narrow)(float), int exponent_bits, int fraction_bits)
{
    const uint16_t infinity = (uint16_t)(((1 << exponent_bits) - 1) << fraction_bits);
    int bad = 0;
    for (uint32_t i = 0; i < 0x10000u; i++) {
        uint16_t h = (uint16_t)i;
        double want = value_of_half(h, exponent_bits, fraction_bits);
        float got = widen(h);
        if (isnan(want)) {
            bad += !isnan(got) || !isnan(widen(narrow(got)));
            bad += (bits_of(got) >> 31) != (uint32_t)(h >> 15);
            continue;
        }
        bad += (double)got != want || (bits_of(got) >> 31) != (uint32_t)(h >> 15); /* -0.0 too */
        bad += narrow(got) != h;
        uint16_t magnitude = h & 0x7FFF;
        if (magnitude >= infinity)
            continue;
        /* where the next would be if the format went on: the largest finite half rounds up to infinity from there */
        double next = magnitude + 1 == infinity ? ldexp(1.0, 1 << (exponent_bits - 1))
                                                : value_of_half((uint16_t)(magnitude + 1), exponent_bits, fraction_bits);
        double here = fabs(want);
        float middle = (float)((here + next) / 2);
        if (isinf(middle) || (double)middle != (here + next) / 2)
            continue; /* bf16 subnormals: the midpoint is still a float; only overflow can get here */
        uint16_t sign = h & 0x8000;
        uint32_t sign32 = (uint32_t)sign << 16;
        uint16_t up = (uint16_t)(sign | (magnitude + 1)), even = (magnitude & 1) != 0 ? up : h;
        bad += narrow(float_of(bits_of(middle) | sign32)) != even;
        bad += narrow(float_of((bits_of(middle) + 1) | sign32)) != up;
        bad += narrow(float_of((bits_of(middle) - 1) | sign32)) != h;
    }
    CHECK_INT(bad, 0);
    CHECK_INT(narrow(INFINITY), infinity);
    CHECK_INT(narrow(-INFINITY), infinity | 0x8000);
    CHECK_INT(narrow(float_of(0x7F7FFFFFu)), infinity); /* FLT_MAX */
    CHECK(isnan(widen(narrow(NAN))));
    CHECK(isnan(widen(narrow(float_of(0x7F800001u))))); /* a NaN whose payload lies in the bits that go */
    CHECK(isnan(widen(narrow(float_of(0xFF800001u)))));
    CHECK_INT(narrow(float_of(1)), 0); /* smallest float */
    CHECK_INT(narrow(float_of(0x80000001u)), 0x8000);
}

static float widen_bf16(uint16_t h) { return pc_bf16_to_f32(h); }
static uint16_t narrow_bf16(float f) { return pc_f32_to_bf16(f); }

TEST(f16_converts_exactly) { check_half(pc_f16_to_f32, pc_f32_to_f16, 5, 10); }
TEST(bf16_converts_exactly) { check_half(widen_bf16, narrow_bf16, 8, 7); }

TEST(doubles_go_through_every_float_dtype)
{
    const pc_dtype dtypes[] = {PC_F64, PC_F32, PC_F16, PC_BF16};
    for (int d = 0; d < 4; d++) {
        double buffer[4] = {0};
        const double values[] = {1.5, -0.375, 0.0, 1024.0};
        for (int i = 0; i < 4; i++)
            pc_put_double(dtypes[d], buffer, i, values[i]);
        for (int i = 0; i < 4; i++)
            CHECK_CLOSE(pc_get_double(dtypes[d], buffer, i), values[i], 0);
    }
    double untouched = 3;
    pc_put_double(PC_I64, &untouched, 0, 7);
    CHECK_CLOSE(untouched, 3, 0);
    CHECK_CLOSE(pc_get_double(PC_I64, &untouched, 0), 0, 0);
}

/* ------------------------------------------------------------------ errors */

TEST(error_text_is_utf8_even_when_cut)
{
    static char longer[PC_ERROR_TEXT * 2];
    pc_error err;
    CHECK_STATUS(pc_fail(&err, PC_ERR_KEY, "no module '%s'", "layer.0"), PC_ERR_KEY);
    CHECK_INT(err.code, PC_ERR_KEY);
    CHECK(strcmp(err.text, "no module 'layer.0'") == 0);
    CHECK_STATUS(pc_fail(NULL, PC_ERR_VALUE, "%d", 1), PC_ERR_VALUE);
    const char *characters[] = {"x", "é", "√", "😀"};
    for (size_t c = 0; c < 4; c++)
        for (size_t shift = 0; shift < 4; shift++) { /* the cut falls at every place within a character */
            size_t len = strlen(characters[c]), at = shift;
            memset(longer, 'a', shift);
            for (; at + len < sizeof longer; at += len)
                memcpy(longer + at, characters[c], len);
            longer[at] = '\0';
            pc_fail(&err, PC_ERR_VALUE, "%s", longer);
            size_t got = strlen(err.text);
            CHECK(got < PC_ERROR_TEXT && got + 4 >= PC_ERROR_TEXT);
            CHECK((got - shift) % len == 0);
            CHECK(memcmp(err.text, longer, got) == 0);
        }
    CHECK_STATUS(pc_fail_errno(&err, ENOENT, "cannot open '%s'", "x.bin"), PC_ERR_IO);
    CHECK_INT(err.sys_errno, ENOENT);
    CHECK_CONTAINS(err.text, "cannot open 'x.bin': ");
    CHECK_STATUS(pc_fail_errno(&err, EIO, "%s", longer), PC_ERR_IO);
    CHECK(strlen(err.text) < PC_ERROR_TEXT);
    CHECK_STATUS(pc_fail_errno(NULL, EIO, "x"), PC_ERR_IO);
    CHECK_STATUS(pc_fail_nomem(&err, "the plan"), PC_ERR_NOMEM);
    CHECK_CONTAINS(err.text, "the plan");
}

/* ---------------------------------------------------------------- hash map */

TEST(strmap_keeps_every_key)
{
    enum { KEYS = 50000, WIDTH = 48 };
    static char names[KEYS][WIDTH];
    static size_t lens[KEYS];
    static bool present[KEYS];
    long live = pc_test_live_allocations();
    pc_strmap map;
    pc_strmap_init(&map);
    size_t value = 99;
    CHECK(!pc_strmap_get(&map, "x", 1, &value));
    CHECK(!pc_strmap_remove(&map, "x", 1));
    for (size_t i = 0; i < KEYS; i++) {
        lens[i] = (size_t)snprintf(names[i], WIDTH, "model.layers.%zu.self_attn.q_proj", i);
        REQUIRE(pc_strmap_put(&map, names[i], lens[i], i));
    }
    CHECK_INT(map.count, KEYS);
    for (size_t i = 0; i < KEYS; i++) {
        char copy[WIDTH];
        memcpy(copy, names[i], lens[i]); /* by content, not by address */
        value = SIZE_MAX;
        CHECK(pc_strmap_get(&map, copy, lens[i], &value) && value == i);
        present[i] = true;
    }
    value = 99;
    CHECK(!pc_strmap_get(&map, names[0], lens[0] - 1, &value));
    CHECK_INT(value, 99);

    /* put, replace and remove at random against a plain table */
    uint64_t x = 88172645463325252u;
    size_t count = KEYS, wrong = 0;
    static size_t values[KEYS];
    for (size_t i = 0; i < KEYS; i++)
        values[i] = i;
    for (size_t step = 0; step < 400000; step++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        size_t i = (size_t)(x >> 20) % KEYS;
        if ((x & 3) != 0) {
            wrong += pc_strmap_remove(&map, names[i], lens[i]) != present[i];
            count -= present[i];
            present[i] = false;
        } else {
            values[i] = step;
            wrong += !pc_strmap_put(&map, names[i], lens[i], step);
            count += !present[i];
            present[i] = true;
        }
    }
    CHECK_INT(wrong, 0);
    CHECK_INT(map.count, count);
    for (size_t i = 0; i < KEYS; i++) {
        bool found = pc_strmap_get(&map, names[i], lens[i], &value);
        wrong += found != present[i] || (found && value != values[i]);
    }
    CHECK_INT(wrong, 0);
    for (size_t i = 0; i < KEYS; i++)
        wrong += pc_strmap_remove(&map, names[i], lens[i]) != present[i];
    CHECK_INT(wrong, 0);
    CHECK_INT(map.count, 0);
    pc_strmap_free(&map);
    CHECK_INT(pc_test_live_allocations(), live);
}

TEST(strmap_has_the_room_that_was_asked_for)
{
    enum { KEYS = 1000, WIDTH = 16 };
    static char names[KEYS][WIDTH];
    long live = pc_test_live_allocations();
    pc_strmap map;
    pc_strmap_init(&map);
    CHECK(pc_strmap_reserve(&map, 0));
    CHECK(pc_strmap_put(&map, "first", 5, 7));
    CHECK(pc_strmap_reserve(&map, KEYS));
    CHECK(pc_strmap_reserve(&map, 3)); /* less than there is */
    const struct pc_strmap_entry *entries = map.entries;
    for (size_t i = 1; i < KEYS; i++) {
        size_t len = (size_t)snprintf(names[i], WIDTH, "key %zu", i);
        REQUIRE(pc_strmap_put(&map, names[i], len, i));
    }
    CHECK(map.entries == entries);
    size_t value;
    CHECK(pc_strmap_get(&map, "first", 5, &value) && value == 7);
    CHECK(pc_strmap_get(&map, "key 999", 7, &value) && value == 999);
    CHECK(!pc_strmap_reserve(&map, SIZE_MAX));
    CHECK_INT(map.count, KEYS);
    pc_strmap_free(&map);
    CHECK_INT(pc_test_live_allocations(), live);
}

/* Keys that differ in one bit, one byte of length or in what follows a NUL. */
TEST(strmap_tells_similar_keys_apart)
{
    enum { LONGEST = 40 };
    static char keys[(LONGEST + 1) * 2][LONGEST + 1];
    pc_strmap map;
    pc_strmap_init(&map);
    size_t count = 0, value;
    for (size_t len = 0; len <= LONGEST; len++) { /* NULs of every length, "" included */
        REQUIRE(pc_strmap_put(&map, keys[count], len, count));
        count++;
        if (len != 0) {
            keys[count][len - 1] = 1;
            REQUIRE(pc_strmap_put(&map, keys[count], len, count));
            count++;
        }
    }
    CHECK_INT(map.count, count);
    char key[LONGEST + 1] = {0};
    for (size_t len = 0, i = 0; len <= LONGEST; len++) {
        CHECK(pc_strmap_get(&map, key, len, &value) && value == i++);
        if (len != 0) {
            key[len - 1] = 1;
            CHECK(pc_strmap_get(&map, key, len, &value) && value == i++);
            key[len - 1] = 2;
            CHECK(!pc_strmap_get(&map, key, len, &value));
            key[len - 1] = 0;
        }
    }
    REQUIRE(pc_strmap_put(&map, keys[0], 0, 1234));
    CHECK(pc_strmap_get(&map, "", 0, &value) && value == 1234);
    CHECK_INT(map.count, count);
    pc_strmap_free(&map);
    CHECK_INT(map.count, 0);
    CHECK(!pc_strmap_get(&map, "", 0, &value));
    pc_strmap_free(&map);
}

TEST(strmap_is_unchanged_when_it_cannot_grow)
{
    static char names[100][16];
    long live = pc_test_live_allocations();
    for (int i = 0; i < 100; i++)
        snprintf(names[i], sizeof names[i], "k%d", i);
    FOR_EACH_ALLOCATION (n) {
        pc_strmap map;
        pc_strmap_init(&map);
        size_t refused = 0, value;
        for (size_t i = 0; i < 100; i++)
            if (!pc_strmap_put(&map, names[i], strlen(names[i]), i)) {
                refused++;
                CHECK_INT(map.count, i);
                CHECK(!pc_strmap_get(&map, names[i], strlen(names[i]), &value));
                for (size_t j = 0; j < i; j++)
                    CHECK(pc_strmap_get(&map, names[j], strlen(names[j]), &value) && value == j);
                REQUIRE(pc_strmap_put(&map, names[i], strlen(names[i]), i)); /* the failure happens once */
            }
        CHECK_INT(refused, pc_test_allocation_failed() ? 1 : 0);
        CHECK_INT(map.count, 100);
        pc_strmap_free(&map);
    }
    CHECK_INT(pc_test_live_allocations(), live);
}

int main(void)
{
    RUN(sizes_are_checked);
    RUN(pieces);
    RUN(failures_are_counted_per_thread_and_happen_once);
    RUN(blocks_are_zeroed_and_aligned);
    RUN(pool_pieces_are_separate_zeroed_and_aligned);
    RUN(pool_stays_usable_after_a_failed_allocation);
    RUN(arena_lives_as_long_as_its_last_reference);
    RUN(dtype_names_go_both_ways);
    RUN(f16_converts_exactly);
    RUN(bf16_converts_exactly);
    RUN(doubles_go_through_every_float_dtype);
    RUN(error_text_is_utf8_even_when_cut);
    RUN(strmap_keeps_every_key);
    RUN(strmap_has_the_room_that_was_asked_for);
    RUN(strmap_tells_similar_keys_apart);
    RUN(strmap_is_unchanged_when_it_cannot_grow);
    return check_done();
}
