/* The random numbers of torch's CPU generator, as many at a time as dropout asks for.
 *
 * torch draws them one by one; its masks are made here from the same numbers, several times faster, so that training
 * with dropout goes on as it would with torch's own dropout.
 */
#ifndef PEFTC_KERNELS_MERSENNE_H
#define PEFTC_KERNELS_MERSENNE_H

#include "kernels.h"

#define PC_MERSENNE_WORDS 624

/* MT19937: Matsumoto and Nishimura, Mersenne Twister (1998). */
typedef struct pc_mersenne {
    uint32_t words[PC_MERSENNE_WORDS];
    int used; /* words already given out, 0 … PC_MERSENNE_WORDS */
} pc_mersenne;

/* out (n), f32, f64, f16 or bf16, ← value where a number of 53 bits in [0, 1) is less than p, else 0. Every number is
 * made of two words, the first of them above. */
void pc_mersenne_keep(pc_mersenne *m, pc_dtype dt, int64_t n, double p, double value, void *out);

#endif
