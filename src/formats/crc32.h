/* CRC-32 as in zip files (reflected polynomial 0xEDB88320). */
#ifndef PEFTC_FORMATS_CRC32_H
#define PEFTC_FORMATS_CRC32_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Tables for eight bytes a step.  They belong to their user: the library keeps
 * no global state, and filling them takes a few microseconds. */
typedef struct pc_crc32 {
    uint32_t table[8][256];
    bool carryless; /* the CPU multiplies polynomials: several times faster */
} pc_crc32;

void pc_crc32_init(pc_crc32 *crc);

/* The checksum of what came before (0 for nothing) followed by len bytes. */
uint32_t pc_crc32_update(const pc_crc32 *crc, uint32_t before, const void *bytes, size_t len);

#endif
