/* Loops for the CPU: what PyTorch can only do in many passes over memory, or in many small operations.

   Every function has a twin in plain PyTorch that gives the same to float32 rounding; kernels.py, which calls them, says
   which. Heads are flattened, N = B * Hkv; M rows of a head are its G query heads, one after the other, of R queries
   each. Strides count elements. Vectors are written out with the compiler's vector types, not left to its judgement;
   on x86 the loader picks the widest ones that the processor has. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
    #define VECTORS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
    #define VECTORS
#endif
#define INLINE static inline __attribute__((always_inline))

/* Rows that a thread takes at a time. */
enum { PART = 256 };

/* -- vectors ------------------------------------------------------------------------------------------------------ */

/* One number in every lane. GCC 12 makes sixteen broadcasts, each into one lane, of a list of sixteen. */
INLINE floats all(float x) {
    const floats first = {x};
    return __builtin_shufflevector(first, first, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
}

INLINE floats load(const float *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE ints load_ints(const void *from) {
    ints x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* Comparisons, half by half: GCC 12 takes those of a vector apart, number by number, that is wider than a register. So
   it does with shuffles of one, and with its way to memory: halves are copied, and stored one by one. */
typedef float floats8 __attribute__((vector_size(4 * LANES / 2)));
typedef int32_t ints8 __attribute__((vector_size(4 * LANES / 2)));

INLINE floats8 low_half(floats x) {
    floats8 half;
    memcpy(&half, &x, sizeof half);
    return half;
}

INLINE floats8 high_half(floats x) {
    floats8 half;
    memcpy(&half, (const char *)&x + sizeof half, sizeof half);
    return half;
}

INLINE void store(float *to, floats x) {
    const floats8 low = low_half(x), high = high_half(x);
    memcpy(to, &low, sizeof low);
    memcpy(to + LANES / 2, &high, sizeof high);
}

INLINE ints ints_of(ints8 low, ints8 high) {
    ints x;
    memcpy(&x, &low, sizeof low);
    memcpy((char *)&x + sizeof low, &high, sizeof high);
    return x;
}

INLINE ints greater(floats a, floats b) {
    return ints_of(low_half(a) > low_half(b), high_half(a) > high_half(b));
}

INLINE ints equal(floats a, floats b) { return ints_of(low_half(a) == low_half(b), high_half(a) == high_half(b)); }

INLINE floats pick(ints where, floats a, floats b) { return (floats)((where & (ints)a) | (~where & (ints)b)); }

INLINE floats larger(floats a, floats b) { return pick(greater(a, b), a, b); }

INLINE floats smaller(floats a, floats b) { return pick(greater(b, a), a, b); }

INLINE floats clamped(floats x, float least, float most) { return smaller(larger(x, all(least)), all(most)); }

/* Where 0 <= places <= query. GCC 12 takes comparisons of ints apart, so the signs are made to say it. */
INLINE ints seen(ints places, int32_t query) { return ~(((query - places) | places) >> 31); }

/* Sums that grow from one turn of a loop to the next: GCC 12 leaves a vector in memory there that is wider than a
   register, and keeps its halves. */
typedef struct {
    floats8 low, high;
} pair;

INLINE pair pair_of(floats x) { return (pair){low_half(x), high_half(x)}; }

INLINE void store_pair(float *to, pair x) {
    const floats8 low = x.low, high = x.high;
    memcpy(to, &low, sizeof low);
    memcpy(to + LANES / 2, &high, sizeof high);
}

INLINE floats floats_of(pair x) {
    float both[LANES];
    store_pair(both, x);
    return load(both);
}

INLINE void add(pair *sum, floats x) {
    sum->low += low_half(x);
    sum->high += high_half(x);
}

INLINE void add_product(pair *sum, floats a, floats b) {
    sum->low += low_half(a) * low_half(b);
    sum->high += high_half(a) * high_half(b);
}

/* The same of a number and a pair: a wider vector would go to memory and come back for its halves. */
INLINE void add_scaled(pair *sum, float a, pair b) {
    sum->low += a * b.low;
    sum->high += a * b.high;
}

INLINE float sum_of_pair(pair x) {
    typedef float floats4 __attribute__((vector_size(16)));
    floats8 eight = x.low + x.high;
    floats4 four =
        __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
    return four[0] + four[1];
}

INLINE float sum_of(floats x) { return sum_of_pair(pair_of(x)); }

INLINE float largest_of(floats x) {
    x = larger(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
    x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
    return x[0] > x[1] ? x[0] : x[1];
}

/* The first `count` lanes, and `rest` in those behind them. */
INLINE floats load_some(const float *from, long count, float rest) {
    if (count >= LANES)
        return load(from);
    floats x = all(rest);
    memcpy(&x, from, 4 * count);
    return x;
}

INLINE ints load_some_ints(const void *from, long count, int32_t rest) {
    if (count >= LANES)
        return load_ints(from);
    ints x = (ints){} + rest;
    memcpy(&x, from, 4 * count);
    return x;
}

INLINE void store_some(float *to, floats x, long count) {
    if (count >= LANES)
        store(to, x);
    else
        memcpy(to, &x, 4 * count);
}

/* exp of x <= 0, to 2e-7 of itself; 0 below -87. Adding 1.5 * 2**23 rounds to a whole number, found in the low bits. */
INLINE floats exp_of(floats x) {
    floats power = x * 1.44269504f, shifted = power + 12582912.0f;
    floats part = power - (shifted - 12582912.0f);
    floats series = all(1.327647188e-3f);
    series = series * part + 9.675541526e-3f;
    series = series * part + 5.550713276e-2f;
    series = series * part + 2.402211972e-1f;
    series = series * part + 6.931469671e-1f;
    series = series * part + 1.0f;
    return pick(greater(x, all(-87.0f)), series * (floats)(((ints)shifted << 23) + 0x3f800000), all(0.0f));
}

/* log of normal positive numbers, to 3e-7 of itself: of m 2**e with m in [sqrt(1/2), sqrt(2)), a series in m - 1. */
INLINE floats log_of(floats x) {
    ints above = ((ints)x - 0x3f3504f3) >> 23; /* e: 0x3f3504f3 is sqrt(1/2) */
    floats z = (floats)((ints)x - (above << 23)) - 1.0f;
    floats series = all(-1.010689303e-1f);
    series = series * z + 1.622258519e-1f;
    series = series * z - 1.725083233e-1f;
    series = series * z + 1.990016508e-1f;
    series = series * z - 2.496990884e-1f;
    series = series * z + 3.333505895e-1f;
    series = series * z - 5.000036513e-1f;
    series = series * z + 1.0f;
    return series * z + __builtin_convertvector(above, floats) * 0.693147181f;
}

/* Numbers of three kinds as float32; what `kind` means is agreed with cpu.py. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

INLINE floats load_as(const void *from, long index, int kind) {
    if (kind == FLOAT32)
        return load((const float *)from + index);
    halves half;
    memcpy(&half, (const uint16_t *)from + index, sizeof half);
    words bits = __builtin_convertvector(half, words);
    if (kind == BFLOAT16)
        return (floats)(bits << 16);
    /* Exponents of float16 are 112 less; numbers below 2**-14 have none, and come right by a product. */
    words magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    floats x = (floats)(magnitude << 13) * 0x1p112f;
    ints large = ((ints)(0x7bff - magnitude)) >> 31; /* infinities and NaN */
    x = pick(large, (floats)((magnitude << 13) | 0x7f800000), x);
    return (floats)((words)x | sign);
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* A finite float16. */
INLINE float half_at(const uint16_t *from, long index) {
    const uint32_t bits = from[index];
    const float magnitude = float_of((bits & 0x7fff) << 13) * 0x1p112f;
    return bits & 0x8000 ? -magnitude : magnitude;
}

/* -- noise, see noise.py ------------------------------------------------------------------------------------------ */

INLINE words mix(words bits) {
    bits ^= bits >> 16;
    bits *= 0x85EBCA6Bu;
    bits ^= bits >> 13;
    bits *= 0xC2B2AE35u;
    return bits ^ (bits >> 16);
}

/* Keys are hashed apart from queries, see noise.py. */
#define COLUMN 0x7FEB352Du

/* A hash of one counter more. */
INLINE uint32_t chained(uint32_t hash, uint32_t counter) { return mix((words){counter + hash * 0x9E3779B9u + 1})[0]; }

/* -log(u) of the uniform number u that a hash stands for. */
INLINE floats exponential(words hash) {
    return -log_of(__builtin_convertvector((ints)mix(hash) >> 9, floats) * 0x1p-23f + (0.5f + 0x1p-24f));
}

/* -- rows, as the model or a table has them ------------------------------------------------------------------------- */

/* Keys or values [B, H, S, D] of a kind, where the model has left them; strides count numbers. */
typedef struct {
    const char *first;
    int64_t of_sequence, of_head, of_row, kind, heads, count;
} strided_rows;

INLINE const char *row_at(const strided_rows *rows, long head, long row) {
    const long size = rows->kind == FLOAT32 ? 4 : 2;
    const long place = head / rows->heads * rows->of_sequence + head % rows->heads * rows->of_head + row * rows->of_row;
    return rows->first + place * size;
}

/* A tier of rows: codes, and float16 parameters. blocks [N, rows] are block numbers of 1, 2 or 4 bytes; or NULL where
   every row belongs to block 0. groups: of channels that share the parameters of a value. */
typedef struct {
    uint8_t *codes;
    uint16_t *scale, *zero_point, *channel_scale;
    const void *blocks;
    int64_t block_bytes, rows, count, dim, row_bytes, groups, channels;
} tier;

INLINE long block_of(const tier *t, long row) {
    switch (t->blocks ? t->block_bytes : 0) {
    case 1:
        return ((const uint8_t *)t->blocks)[row];
    case 2:
        return ((const int16_t *)t->blocks)[row];
    case 4:
        return ((const int32_t *)t->blocks)[row];
    default:
        return 0;
    }
}

/* The end of the rows from `first` on that belong to its block. */
INLINE long same_block(const tier *t, long first, long stop) {
    if (!t->blocks)
        return stop;
    long row = first + 1, block = block_of(t, first);
    while (row < stop && block_of(t, row) == block)
        row++;
    return row;
}
