#include "rng.h"

#include <math.h>

/* Multipliers and key increments of Philox4x32, from the paper. */
#define PHILOX_M0 0xD2511F53u
#define PHILOX_M1 0xCD9E8D57u
#define PHILOX_W0 0x9E3779B9u
#define PHILOX_W1 0xBB67AE85u
#define PHILOX_ROUNDS 10

void pc_rng_block(pc_rng rng, uint64_t block, uint32_t out[4])
{
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32);
    uint32_t c2 = (uint32_t)rng.stream, c3 = (uint32_t)(rng.stream >> 32);
    uint32_t k0 = (uint32_t)rng.seed, k1 = (uint32_t)(rng.seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; round++) {
        uint64_t p0 = (uint64_t)PHILOX_M0 * c0;
        uint64_t p1 = (uint64_t)PHILOX_M1 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += PHILOX_W0;
        k1 += PHILOX_W1;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

float pc_rng_unit(pc_rng rng, uint64_t index)
{
    uint32_t bits[4];
    pc_rng_block(rng, index / 4, bits);
    return (float)(bits[index % 4] >> 8) * 0x1p-24f;
}

typedef struct fill {
    pc_rng rng;
    pc_dtype dtype;
    void *dst;
    int64_t n;
    double a, b;
} fill;

static void fill_uniform(void *ctx, int64_t begin, int64_t end)
{
    const fill *f = ctx;
    for (int64_t block = begin; block < end; block++) {
        uint32_t bits[4];
        pc_rng_block(f->rng, (uint64_t)block, bits);
        for (int64_t j = 0; j < 4 && block * 4 + j < f->n; j++)
            pc_put_double(f->dtype, f->dst, block * 4 + j, f->a + (f->b - f->a) * ((double)(bits[j] >> 8) * 0x1p-24));
    }
}

static void fill_normal(void *ctx, int64_t begin, int64_t end)
{
    const double two_pi = 6.283185307179586;
    const fill *f = ctx;
    for (int64_t block = begin; block < end; block++) {
        uint32_t bits[4];
        double draws[4];
        pc_rng_block(f->rng, (uint64_t)block, bits);
        for (int pair = 0; pair < 2; pair++) {
            double u = ((double)bits[2 * pair] + 1.0) * 0x1p-32; /* (0, 1]: its log is finite */
            double radius = sqrt(-2.0 * log(u));
            double angle = two_pi * ((double)bits[2 * pair + 1] * 0x1p-32);
            draws[2 * pair] = radius * cos(angle);
            draws[2 * pair + 1] = radius * sin(angle);
        }
        for (int64_t j = 0; j < 4 && block * 4 + j < f->n; j++)
            pc_put_double(f->dtype, f->dst, block * 4 + j, f->a + f->b * draws[j]);
    }
}

void pc_fill_uniform(pc_runtime *rt, pc_rng rng, pc_dtype dtype, void *dst, int64_t n, double low, double high)
{
    fill f = {rng, dtype, dst, n, low, high};
    pc_parallel_for(rt, (n + 3) / 4, 4096, fill_uniform, &f);
}

void pc_fill_normal(pc_runtime *rt, pc_rng rng, pc_dtype dtype, void *dst, int64_t n, double mean, double std)
{
    fill f = {rng, dtype, dst, n, mean, std};
    pc_parallel_for(rt, (n + 3) / 4, 1024, fill_normal, &f);
}
