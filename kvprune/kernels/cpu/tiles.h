/* Products of many queries with keys, tile by tile. */

#include "loops.h"

enum { TILE = 4 * LANES };

/* A tile of keys, column by column `[D, TILE]`; zeros where there are less than TILE. */
INLINE void transpose(float *columns, const void *keys, int kind, long stride, long count, long D) {
    const uint16_t *halves_ = keys;
    for (long key = 0; key < TILE; key++)
        for (long d = 0; d < D; d++)
            columns[d * TILE + key] = key >= count       ? 0.0f
                                      : kind == FLOAT32  ? ((const float *)keys)[key * stride + d]
                                      : kind == BFLOAT16 ? float_of((uint32_t)halves_[key * stride + d] << 16)
                                                         : half_at(halves_, key * stride + d);
}

/* Whether 32 registers of 16 numbers hold the products of four rows with a whole tile. Elsewhere there is room for one
   part of it, of 16 keys, at a time. */
INLINE int is_wide(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    return __builtin_cpu_supports("avx512f");
#else
    return 0;
#endif
}

/* Products of `count` rows of queries, of which 16 registers of 8 numbers hold 6, with one part of a tile of keys. */
INLINE void part_dots(pair *sums, const float *columns, const float *queries, long D, const int count) {
    for (int row = 0; row < count; row++)
        sums[row] = pair_of(all(0.0f));
    for (long d = 0; d < D; d++)
        for (int row = 0; row < count; row++)
            add_scaled(&sums[row], queries[row * D + d], pair_of(load(columns + d * TILE)));
}

/* The same with `parts` parts, all of them or one. */
INLINE void tile_dots(
    floats products[4][4], const float *columns, const float *queries, long D, const int count, const int parts
) {
    if (parts == 1) {
        pair sums[4];
        part_dots(sums, columns, queries, D, count);
        for (int row = 0; row < count; row++)
            products[row][0] = floats_of(sums[row]);
        return;
    }
    for (int row = 0; row < count; row++)
        for (int part = 0; part < 4; part++)
            products[row][part] = all(0.0f);
    for (long d = 0; d < D; d++) {
        floats keys[4];
        for (int part = 0; part < 4; part++)
            keys[part] = load(columns + d * TILE + part * LANES);
        for (int row = 0; row < count; row++)
            for (int part = 0; part < 4; part++)
                products[row][part] += queries[row * D + d] * keys[part];
    }
}
