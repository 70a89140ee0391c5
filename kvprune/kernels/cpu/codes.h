/* Sixteen codes of few bits: how they lie in bytes. */

#include "loops.h"

/* -- read --------------------------------------------------------------------------------------------------------- */

INLINE words four_bits(const uint8_t *at) {
    uint32_t low, high;
    memcpy(&low, at, 4);
    memcpy(&high, at + 4, 4);
    const words upper = {0, 0, 0, 0, 0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
    const words both = ((((words){} + high) & upper) | (((words){} + low) & ~upper));
    return both >> (words){0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28} & 15;
}

INLINE words two_bits(const uint8_t *at) {
    uint32_t two;
    memcpy(&two, at, 4);
    return ((words){} + two) >> (words){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30} & 3;
}

INLINE words one_bit(const uint8_t *at) {
    uint16_t one;
    memcpy(&one, at, 2);
    return ((words){} + one) >> (words){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} & 1;
}

/* The 16 codes from place `first` on of a row of `count` codes, see quantize.pack; 3 bits are stored as 2 and 1. */
INLINE words codes_at(const uint8_t *row, long first, long count, int bits) {
    if (bits == 8) {
        typedef uint8_t bytes __attribute__((vector_size(LANES)));
        bytes eight;
        memcpy(&eight, row + first, sizeof eight);
        return __builtin_convertvector(eight, words);
    }
    if (bits == 4)
        return four_bits(row + first / 2);
    words codes = two_bits(row + first / 4);
    return bits == 3 ? codes | one_bit(row + count / 4 + first / 8) << 2 : codes;
}

/* -- written: of each code, the lowest bits ------------------------------------------------------------------------ */

/* In the first lane of either half, all bits of the half. */
INLINE words joined(words x) {
    x |= __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x |= __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x | __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

INLINE void put_four(uint8_t *at, words codes) {
    const words four = joined((codes & 15) << (words){0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28});
    memcpy(at, &(uint32_t){four[0]}, 4);
    memcpy(at + 4, &(uint32_t){four[8]}, 4);
}

INLINE void put_two(uint8_t *at, words codes) {
    const words two = joined((codes & 3) << (words){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
    memcpy(at, &(uint32_t){two[0] | two[8]}, 4);
}

INLINE void put_one(uint8_t *at, words codes) {
    const words one = joined((codes & 1) << (words){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
    memcpy(at, &(uint16_t){one[0] | one[8]}, 2);
}

/* codes_at the other way round. */
INLINE void put_codes(uint8_t *row, words codes, long first, long count, int bits) {
    if (bits == 8) {
        typedef uint8_t bytes __attribute__((vector_size(LANES)));
        const bytes eight = __builtin_convertvector(codes, bytes);
        memcpy(row + first, &eight, sizeof eight);
        return;
    }
    if (bits == 4) {
        put_four(row + first / 2, codes);
        return;
    }
    put_two(row + first / 4, codes);
    if (bits == 3)
        put_one(row + count / 4 + first / 8, codes >> 2);
}
