/* Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random
 * numbers: as easy as 1, 2, 3", SC'11).
 *
 * Element i of a stream depends on (seed, stream, i) alone, so a draw is the
 * same whatever the number of threads and in whatever order it is computed.
 */
#ifndef PEFTC_CORE_RNG_H
#define PEFTC_CORE_RNG_H

#include <math.h>
#include <stdint.h>

#include "dtype.h"
#include "parallel.h"

typedef struct pc_rng {
    uint64_t seed;
    uint64_t stream; /* take a new one for every independent draw */
} pc_rng;

/* The 128 random bits with index `block` of the stream. */
void pc_rng_block(pc_rng rng, uint64_t block, uint32_t out[4]);

/* Element `index` of the stream, uniform in [0, 1) with 24 random bits. */
float pc_rng_unit(pc_rng rng, uint64_t index);

/* keep[i] = 1 with probability 1 - p, else 0, for elements first … first + n of the stream: 1 where pc_rng_unit is at
 * least p.  first is a multiple of 4. */
void pc_rng_keep(pc_rng rng, uint64_t first, int64_t n, double p, float *keep);
/* The same comparison in integers: keep when the draw's 24 bits are at least this. */
static inline uint32_t pc_rng_least(double p) { return (uint32_t)ceil((p < 0.0 ? 0.0 : p > 1.0 ? 1.0 : p) * 0x1p24); }

/* Multipliers and key increments of Philox4x32, from the paper: for kernels that draw many blocks at once. */
#define PC_PHILOX_M0 0xD2511F53u
#define PC_PHILOX_M1 0xCD9E8D57u
#define PC_PHILOX_W0 0x9E3779B9u
#define PC_PHILOX_W1 0xBB67AE85u
#define PC_PHILOX_ROUNDS 10

/* dst (n,), a float dtype: uniform in [low, high) or normal (Box-Muller).
 * A uniform value is computed in double and then rounded to the dtype, so that a
 * narrow one can give `high` itself; a normal one has the 24 bits of a float in
 * every dtype.  The result does not depend on the thread count
 * of `rt`; rt may be NULL. */
void pc_fill_uniform(pc_runtime *rt, pc_rng rng, pc_dtype dtype, void *dst, int64_t n, double low, double high);
void pc_fill_normal(pc_runtime *rt, pc_rng rng, pc_dtype dtype, void *dst, int64_t n, double mean, double std);

#endif
