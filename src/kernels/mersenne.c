#include "mersenne.h"

#include <math.h>

#include "table.h"

void pc_mersenne_keep(pc_mersenne *m, pc_dtype dt, int64_t n, double p, double value, void *out)
{
    double limit = ceil(ldexp(p, 53));
    uint64_t below = limit <= 0.0 ? 0 : limit >= 0x1p53 ? (uint64_t)1 << 53 : (uint64_t)limit;
    union {
        float f32;
        uint32_t bits32;
        double f64;
        uint64_t bits64;
        uint16_t bits16;
    } pattern = {.bits64 = 0};
    if (dt == PC_F64)
        pattern.f64 = value;
    else if (dt == PC_F32)
        pattern.f32 = (float)value;
    else
        pc_put_double(dt, &pattern.bits16, 0, value);
    uint64_t bits = dt == PC_F64 ? pattern.bits64 : dt == PC_F32 ? pattern.bits32 : pattern.bits16;
    for (int64_t done = 0; done < n;) {
        uint32_t numbers[PC_MERSENNE_WORDS + 2];
        int64_t wanted = pc_min(2 * (n - done), PC_MERSENNE_WORDS), have = 0;
        while (have < wanted) {
            if (m->used == PC_MERSENNE_WORDS) {
                pc_kernels()->twist(m->words);
                m->used = 0;
            }
            int64_t count = pc_min(wanted - have, PC_MERSENNE_WORDS - m->used);
            pc_kernels()->temper(m->words + m->used, count, numbers + have);
            m->used += (int)count;
            have += count;
        }
        pc_kernels()->choose(numbers, wanted / 2, below, bits, (int)pc_dtype_size(dt),
                             (char *)out + (size_t)done * pc_dtype_size(dt));
        done += wanted / 2;
    }
}
