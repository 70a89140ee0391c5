/* Loops for the CPU: what PyTorch can only do in many passes over memory, or in many small operations.

   Every function has a twin in plain PyTorch that gives the same to float32 rounding; cpu.py, which calls them, says
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

/* Counts the changes of what cpu.py may call, and how: it calls no library that was compiled of another cpu.c. */
int kvprune_interface(void) { return 1; }

/* -- vectors ------------------------------------------------------------------------------------------------------ */

INLINE floats all(float x) { return (floats){} + x; }

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

INLINE void store(float *to, floats x) { memcpy(to, &x, sizeof x); }

INLINE floats pick(ints where, floats a, floats b) { return (floats)((where & (ints)a) | (~where & (ints)b)); }

INLINE floats larger(floats a, floats b) { return pick(a > b, a, b); }

INLINE floats smaller(floats a, floats b) { return pick(a < b, a, b); }

INLINE floats clamped(floats x, float least, float most) { return smaller(larger(x, all(least)), all(most)); }

/* Where 0 <= places <= query. GCC 12 takes comparisons of ints apart, so the signs are made to say it. */
INLINE ints seen(ints places, int32_t query) { return ~(((query - places) | places) >> 31); }

INLINE float sum_of(floats x) {
    typedef float floats8 __attribute__((vector_size(32)));
    typedef float floats4 __attribute__((vector_size(16)));
    floats8 eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    floats4 four =
        __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    four += __builtin_shufflevector(four, four, 2, 3, 0, 1);
    return four[0] + four[1];
}

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
    floats power = larger(x, all(-87.5f)) * 1.44269504f, shifted = power + 12582912.0f;
    floats part = power - (shifted - 12582912.0f);
    floats series = all(1.327647188e-3f);
    series = series * part + 9.675541526e-3f;
    series = series * part + 5.550713276e-2f;
    series = series * part + 2.402211972e-1f;
    series = series * part + 6.931469671e-1f;
    series = series * part + 1.0f;
    return pick(x > -87.0f, series * (floats)(((ints)shifted << 23) + 0x3f800000), all(0.0f));
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

/* The 16 codes from place `first` on of a row of `count` codes, see quantize.pack; 3 bits are stored as 2 and 1. */
INLINE words codes_at(const uint8_t *row, long first, long count, int bits) {
    if (bits == 8) {
        typedef uint8_t bytes __attribute__((vector_size(LANES)));
        bytes eight;
        memcpy(&eight, row + first, sizeof eight);
        return __builtin_convertvector(eight, words);
    }
    if (bits == 4) {
        uint32_t low, high;
        memcpy(&low, row + first / 2, 4);
        memcpy(&high, row + first / 2 + 4, 4);
        const words upper = {0, 0, 0, 0, 0, 0, 0, 0, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
        words both = ((((words){} + high) & upper) | (((words){} + low) & ~upper));
        return both >> (words){0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28} & 15;
    }
    uint32_t two;
    memcpy(&two, row + first / 4, 4);
    words codes = ((words){} + two) >> (words){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30} & 3;
    if (bits == 3) {
        uint16_t one;
        memcpy(&one, row + count / 4 + first / 8, 2);
        codes |= (((words){} + one) >> (words){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} & 1) << 2;
    }
    return codes;
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
static uint32_t chained(uint32_t hash, uint32_t counter) { return mix((words){counter + hash * 0x9E3779B9u + 1})[0]; }

/* -log(u) of the uniform number u that a hash stands for. */
INLINE floats exponential(words hash) {
    return -log_of(__builtin_convertvector((ints)mix(hash) >> 9, floats) * 0x1p-23f + (0.5f + 0x1p-24f));
}

/* One row of noisy weights; returns the sum of the weights.

   With u uniform, the noise is -log(-log u): at temperature 1 the exponential of a noisy logit is that of the plain one
   over -log u, and a logarithm is saved. Then the log-sum-exp of the plain logits, where it is known, does for the
   maximum that keeps exponentials small, and a pass is saved, too. */
INLINE float noisy_row(
    float *row, long keys, const int32_t *positions, int32_t query, const uint32_t *columns, uint32_t word, float sink,
    float lse, float scale, float temperature, const int plain
) {
    const float cold = 1.0f / temperature;
    float top = lse;
    if (!plain || lse == INFINITY) {
        floats most = all(sink);
        for (long key = 0; key < keys; key += LANES) {
            const long count = keys - key < LANES ? keys - key : LANES;
            floats x = load_some(row + key, count, 0.0f);
            if (!plain) {
                words hash = (words)load_some_ints(columns + key, count, 0) ^ word;
                x = (x - scale * log_of(exponential(hash))) * cold;
            }
            ints places = load_some_ints(positions + key, count, -1);
            x = pick(seen(places, query), x, all(-INFINITY));
            most = larger(x, most);
            store_some(row + key, x, count);
        }
        top = sink;
        for (int lane = 0; lane < LANES; lane++)
            if (most[lane] > top)
                top = most[lane];
        if (top == -INFINITY) {
            memset(row, 0, 4 * keys);
            return 1.0f;
        }
    }
    floats sums = all(0.0f);
    for (long key = 0; key < keys; key += LANES) {
        const long count = keys - key < LANES ? keys - key : LANES;
        floats weight = exp_of(load_some(row + key, count, -INFINITY) - top);
        if (plain) {
            ints places = load_some_ints(positions + key, count, -1);
            words hash = (words)load_some_ints(columns + key, count, 0) ^ word;
            weight = pick(seen(places, query), weight / exponential(hash), all(0.0f));
        }
        sums += weight;
        store_some(row + key, weight, count);
    }
    const float total = sum_of(sums) + expf(sink - top);
    return total > 0.0f ? total : 1.0f; /* of padding, which sees nothing */
}

VECTORS static float noisy_row_of(
    float *row, long keys, const int32_t *positions, int32_t query, const uint32_t *columns, uint32_t word, float sink,
    float lse, float scale, float temperature
) {
    if (scale == 1.0f && temperature == 1.0f)
        return noisy_row(row, keys, positions, query, columns, word, sink, lse, scale, temperature, 1);
    return noisy_row(row, keys, positions, query, columns, word, sink, lse, scale, temperature, 0);
}

/* logits [N, M, S] become the weights of a noisy, tempered softmax, and totals [N, M] what they are to be divided by; a
   key that a query does not see has the weight 0. positions [N, S], queries [N, R]; columns [N, S] and rows [N, M] are
   hashes; sinks [N, G] or NULL; lse [N, M] of the plain logits, or NULL; temperatures [R]. */
void kvprune_noisy_weights(
    float *logits, float *totals, const int32_t *positions, const int32_t *queries, const uint32_t *columns,
    const uint32_t *rows, const float *sinks, const float *lse, const float *temperatures, float scale, long N, long G,
    long R, long S, int threads
) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * G * R; item++) {
        const long head = item / (G * R), row = item % (G * R);
        totals[item] = noisy_row_of(
            logits + item * S, S, positions + head * S, queries[head * R + row % R], columns + head * S, rows[item],
            sinks ? sinks[head * G + row / R] : -INFINITY, lse ? lse[item] : INFINITY, scale, temperatures[row % R]
        );
    }
}

/* -- attention mass from the log-sum-exp -------------------------------------------------------------------------- */

enum { TILE = 4 * LANES };

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

/* Products of `count` <= 4 rows of queries with a tile of keys. */
INLINE void tile_dots(floats products[4][4], const float *columns, const float *queries, long D, const int count) {
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

/* Of 16 keys, those before the limit. */
INLINE floats below(long limit, floats x) {
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return limit >= LANES ? x : limit <= 0 ? all(0.0f) : pick(seen(lanes, (int32_t)limit - 1), x, all(0.0f));
}

/* Add to the mass of a tile of keys what `count` <= 4 rows of queries give it. */
INLINE void add_mass(
    float *mass, const float *columns, const float *queries, const float *lse, const float *weights,
    const int64_t *limits, long first, long D, const int count
) {
    floats products[4][4];
    tile_dots(products, columns, queries, D, count);
    for (int part = 0; part < 4; part++) {
        floats sum = load(mass + part * LANES);
        for (int row = 0; row < count; row++)
            sum += below(limits[row] - first - part * LANES, weights[row] * exp_of(products[row][part] - lse[row]));
        store(mass + part * LANES, sum);
    }
}

VECTORS static void mass_of_tile(
    float *mass, const void *keys, int kind, long stride, const float *queries, const float *lse, const float *weights,
    const int64_t *limits, long first, long count, long G, long R, long D
) {
    float columns[D * TILE], sums[TILE] = {0};
    transpose(columns, keys, kind, stride, count, D);
    long begin = 0;
    while (begin < R && limits[begin] <= first)
        begin++; /* those before see none of it: limits ascend */
    for (long g = 0; g < G; g++) {
        const float *rows = queries + g * R * D, *of_rows = lse + g * R;
        long row = begin;
        for (; row + 4 <= R; row += 4)
            add_mass(sums, columns, rows + row * D, of_rows + row, weights + row, limits + row, first, D, 4);
        for (; row < R; row++)
            add_mass(sums, columns, rows + row * D, of_rows + row, weights + row, limits + row, first, D, 1);
    }
    memcpy(mass, sums, 4 * count);
}

/* mass [N, S] = sums over rows of weight * exp(logit - lse). queries [N, G, R, D], float32 and scaled; keys [N, S, D]
   of a kind, with a stride from head to head; lse [N, G, R], weights [N, R]. A row sees the first limits [N, R] keys;
   limits ascend. A thread owns a tile of keys, so sums have one order. */
void kvprune_mass_from_lse(
    float *mass, const strided_rows *keys, const float *queries, const float *lse, const float *weights,
    const int64_t *limits, long N, long G, long R, long S, long D, int threads
) {
    const long tiles = (S + TILE - 1) / TILE;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (long item = 0; item < N * tiles; item++) {
        const long head = item / tiles, first = item % tiles * TILE;
        mass_of_tile(
            mass + head * S + first, row_at(keys, head, first), keys->kind, keys->of_row, queries + head * G * R * D,
            lse + head * G * R, weights + head * R, limits + head * R, first, S - first < TILE ? S - first : TILE, G, R,
            D
        );
    }
}

/* Of `count` <= 4 rows: the weights of their noisy softmax into `scratch` [4, seen], and their sums into mass. */
INLINE void add_noisy_mass(
    float *mass, float *scratch, const float *columns, const float *queries, const uint32_t *key_words,
    const uint32_t *row_words, const float *lse, const float *weights, const int64_t *limits, long D, const int count
) {
    const long seen = (limits[count - 1] + TILE - 1) / TILE * TILE;
    floats totals[4];
    for (int row = 0; row < count; row++)
        totals[row] = all(0.0f);
    for (long first = 0; first < seen; first += TILE) {
        floats products[4][4];
        tile_dots(products, columns + first * D, queries, D, count);
        for (int part = 0; part < 4; part++) {
            const long key = first + part * LANES;
            words of_keys = (words)load_ints(key_words + key);
            for (int row = 0; row < count; row++) {
                floats weight = exp_of(products[row][part] - lse[row]) / exponential(of_keys ^ row_words[row]);
                weight = below(limits[row] - key, weight);
                totals[row] += weight;
                store(scratch + row * seen + key, weight);
            }
        }
    }
    for (int row = 0; row < count; row++) {
        const float part = weights[row] / sum_of(totals[row]);
        for (long key = 0; key < seen; key += LANES)
            store(mass + key, load(mass + key) + part * load(scratch + row * seen + key));
    }
}

VECTORS static void noisy_mass_of_rows(
    float *mass, float *scratch, const float *columns, const float *queries, const uint32_t *key_words,
    const uint32_t *row_words, const float *lse, const float *weights, const int64_t *limits, long rows, long D
) {
    long row = 0;
    for (; row + 4 <= rows; row += 4)
        add_noisy_mass(
            mass, scratch, columns, queries + row * D, key_words, row_words + row, lse + row, weights + row,
            limits + row, D, 4
        );
    for (; row < rows; row++)
        add_noisy_mass(
            mass, scratch, columns, queries + row * D, key_words, row_words + row, lse + row, weights + row,
            limits + row, D, 1
        );
}

VECTORS static void transposed(float *columns, const void *keys, int kind, long stride, long count, long D) {
    transpose(columns, keys, kind, stride, count, D);
}

VECTORS static void add_up(float *sums, const float *parts, long count, long stride, long size) {
    for (long place = 0; place < size; place++) {
        float sum = 0.0f;
        for (long part = 0; part < count; part++)
            sum += parts[part * stride + place];
        sums[place] = sum;
    }
}

/* The same of a noisy softmax at temperature 1. key_words [N, S'] and row_words [N, G, R] are hashes; S' is S rounded
   up to whole tiles. columns: [N, S', D], scratch. parts: [N, STRETCHES, S'], scratch: the rows are taken in stretches,
   each of which has sums of its own, so that the order of additions does not depend on the threads. */
enum { STRETCHES = 16 };
int kvprune_noisy_mass_from_lse(
    float *mass, float *columns, float *parts, const strided_rows *keys, const float *queries,
    const uint32_t *key_words, const uint32_t *row_words, const float *lse, const float *weights, const int64_t *limits,
    long N, long G, long R, long S, long D, int threads
) {
    const long tiles = (S + TILE - 1) / TILE, padded = tiles * TILE;
    const long each = (R + STRETCHES - 1) / STRETCHES;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long item = 0; item < N * tiles; item++) {
            const long head = item / tiles, first = item % tiles * TILE;
            transposed(
                columns + (head * padded + first) * D, row_at(keys, head, first), keys->kind, keys->of_row,
                S - first < TILE ? S - first : TILE, D
            );
        }
        float *scratch = malloc(4 * 4 * padded);
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < N * STRETCHES; item++) {
            const long head = item % N, stretch = STRETCHES - 1 - item / N; /* the longest rows first */
            const long first = stretch * each < R ? stretch * each : R, rows = R - first < each ? R - first : each;
            float *sums = parts + (head * STRETCHES + stretch) * padded;
            memset(sums, 0, 4 * padded);
            if (!scratch) {
                failed = 1;
                continue;
            }
            for (long g = 0; g < G; g++) {
                const long at = (head * G + g) * R + first;
                noisy_mass_of_rows(
                    sums, scratch, columns + head * padded * D, queries + at * D, key_words + head * padded,
                    row_words + at, lse + at, weights + head * R + first, limits + head * R + first, rows, D
                );
            }
        }
        free(scratch);
#pragma omp for schedule(static)
        for (long head = 0; head < N; head++)
            add_up(mass + head * S, parts + head * STRETCHES * padded, STRETCHES, padded, S);
    }
    return failed;
}

/* -- one query per sequence --------------------------------------------------------------------------------------- */

enum { PART = 256 };

/* Of `rows` keys, the products with G queries; G and kind are constants where this is used. */
INLINE void key_dots(
    float *logits, long S, const float *queries, const void *keys, float scale, long rows, const long G, long D,
    int kind
) {
    for (long row = 0; row < rows; row++) {
        floats sums[4];
        for (long g = 0; g < G; g++)
            sums[g] = all(0.0f);
        for (long d = 0; d < D; d += LANES) {
            floats key = load_as(keys, row * D + d, kind);
            for (long g = 0; g < G; g++)
                sums[g] += load(queries + g * D + d) * key;
        }
        for (long g = 0; g < G; g++)
            logits[g * S + row] = scale * sum_of(sums[g]);
    }
}

/* Weighted sums of `rows` values, for G rows of weights. */
INLINE void
value_sums(float *output, const float *weights, long S, const void *values, long rows, const long G, long D, int kind) {
    for (long d = 0; d < D; d += 2 * LANES) {
        const int two = d + LANES < D;
        floats low[4], high[4];
        for (long g = 0; g < G; g++)
            low[g] = high[g] = all(0.0f);
        for (long row = 0; row < rows; row++) {
            floats first = load_as(values, row * D + d, kind),
                   second = load_as(values, row * D + d + two * LANES, kind);
            for (long g = 0; g < G; g++) {
                low[g] += weights[g * S + row] * first;
                high[g] += weights[g * S + row] * second;
            }
        }
        for (long g = 0; g < G; g++) {
            store(output + g * D + d, low[g]);
            if (two)
                store(output + g * D + d + LANES, high[g]);
        }
    }
}

#define FOR_EACH_KIND(CALL, G)                                                                                         \
    switch (kind) {                                                                                                    \
    case FLOAT32:                                                                                                      \
        CALL(G, FLOAT32);                                                                                              \
        break;                                                                                                         \
    case BFLOAT16:                                                                                                     \
        CALL(G, BFLOAT16);                                                                                             \
        break;                                                                                                         \
    default:                                                                                                           \
        CALL(G, FLOAT16);                                                                                              \
    }

VECTORS static void dots_of(
    float *logits, long S, const float *queries, const void *keys, float scale, long rows, long G, long D, int kind
) {
#define DOTS(COUNT, KIND) key_dots(logits + g * S, S, queries + g * D, keys, scale, rows, COUNT, D, KIND)
    long g = 0;
    for (; g + 4 <= G; g += 4)
        FOR_EACH_KIND(DOTS, 4)
    for (; g + 2 <= G; g += 2)
        FOR_EACH_KIND(DOTS, 2)
    for (; g < G; g++)
        FOR_EACH_KIND(DOTS, 1)
}

VECTORS static void
sums_of(float *output, const float *weights, long S, const void *values, long rows, long G, long D, int kind) {
#define SUMS(COUNT, KIND) value_sums(output + g * D, weights + g * S, S, values, rows, COUNT, D, KIND)
    long g = 0;
    for (; g + 4 <= G; g += 4)
        FOR_EACH_KIND(SUMS, 4)
    for (; g + 2 <= G; g += 2)
        FOR_EACH_KIND(SUMS, 2)
    for (; g < G; g++)
        FOR_EACH_KIND(SUMS, 1)
}

VECTORS static void softmax_row(float *row, long keys, const int32_t *positions, float sink) {
    floats most = all(sink), total = all(0.0f);
    for (long key = 0; key < keys; key += LANES) {
        const long count = keys - key;
        floats x = load_some(row + key, count, -INFINITY);
        if (positions) {
            x = pick(~(load_some_ints(positions + key, count, -1) >> 31), x, all(-INFINITY));
            store_some(row + key, x, count);
        }
        most = larger(x, most);
    }
    float top = sink;
    for (int lane = 0; lane < LANES; lane++)
        if (most[lane] > top)
            top = most[lane];
    for (long key = 0; key < keys; key += LANES) {
        const long count = keys - key;
        floats x = exp_of(load_some(row + key, count, -INFINITY) - top);
        total += x;
        store_some(row + key, x, count);
    }
    const float part = 1.0f / (sum_of(total) + expf(sink - top));
    for (long key = 0; key < keys; key++)
        row[key] *= part;
}

/* logits [N, G, S] from `offset` on: of float32 queries [N, G, D] with `rows` keys of a kind. */
void kvprune_dots(
    float *logits, long S, long offset, const float *queries, const void *keys, long stride, float scale, long rows,
    int kind, long N, long G, long D, int threads
) {
    const long parts = (rows + PART - 1) / PART, size = kind == FLOAT32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * parts; item++) {
        long head = item / parts, first = item % parts * PART, some = rows - first < PART ? rows - first : PART;
        dots_of(
            logits + head * G * S + offset + first, S, queries + head * G * D,
            (const char *)keys + (head * stride + first * D) * size, scale, some, G, D, kind
        );
    }
}

/* logits [N, G, S] become probabilities. positions: int32, -1 for an empty slot, or NULL. sinks [N, G] or NULL. */
void kvprune_softmax(
    float *logits, const int32_t *positions, long stride, const float *sinks, long N, long G, long S, int threads
) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * G; item++)
        softmax_row(
            logits + item * S, S, positions ? positions + item / G * stride : 0, sinks ? sinks[item] : -INFINITY
        );
}

/* Partial sums [N, parts in all, G, Dv] of `rows` values of a kind, from part `part` on; weights [N, G, S] from
 * `offset` on. */
void kvprune_sums(
    float *scratch, long parts_in_all, long part, const float *weights, long S, long offset, const void *values,
    long stride, long rows, int kind, long N, long G, long D, int threads
) {
    const long parts = (rows + PART - 1) / PART, size = kind == FLOAT32 ? 4 : 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * parts; item++) {
        long head = item / parts, p = item % parts, first = p * PART, some = rows - first < PART ? rows - first : PART;
        sums_of(
            scratch + (head * parts_in_all + part + p) * G * D, weights + head * G * S + offset + first, S,
            (const char *)values + (head * stride + first * D) * size, some, G, D, kind
        );
    }
}

/* output [N, size] = the sum of the parts [N, parts, size]. */
void kvprune_add_parts(float *output, const float *scratch, long N, long parts, long size) {
    for (long head = 0; head < N; head++)
        for (long place = 0; place < size; place++) {
            float sum = 0.0f;
            for (long part = 0; part < parts; part++)
                sum += scratch[(head * parts + part) * size + place];
            output[head * size + place] = sum;
        }
}

/* All of it for rows of one kind: output [N, G, Dv] and probabilities [N, G, S]. scratch: [N, ceil(S / 256), G, Dv]. */
void kvprune_single_query(
    float *output, float *probabilities, const float *queries, const void *keys, long key_stride, const void *values,
    long value_stride, const int32_t *positions, long position_stride, const float *sinks, float *scratch, float scale,
    int kind, long N, long G, long S, long D, long Dv, int threads
) {
    const long parts = (S + PART - 1) / PART;
    kvprune_dots(probabilities, S, 0, queries, keys, key_stride, scale, S, kind, N, G, D, threads);
    kvprune_softmax(probabilities, positions, position_stride, sinks, N, G, S, threads);
    kvprune_sums(scratch, parts, 0, probabilities, S, 0, values, value_stride, S, kind, N, G, Dv, threads);
    kvprune_add_parts(output, scratch, N, parts, G * Dv);
}

VECTORS static void mean_of(float *mass, const float *probabilities, long G, long S) {
    const float part = 1.0f / (float)G;
    for (long key = 0; key < S; key += LANES) {
        floats sum = load_some(probabilities + key, S - key, 0.0f);
        for (long g = 1; g < G; g++)
            sum += load_some(probabilities + g * S + key, S - key, 0.0f);
        store_some(mass + key, sum * part, S - key);
    }
}

/* mass [N, S]: the mean over query heads of probabilities [N, G, S]. */
void kvprune_mean(float *mass, const float *probabilities, long N, long G, long S, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long head = 0; head < N; head++)
        mean_of(mass + head * S, probabilities + head * G * S, G, S);
}

/* Add to mass the noisy, tempered softmax whose logits are the logarithms of probabilities: (p / E**scale)**(1 / tau),
   E being -log u of a uniform u, over their sum. */
VECTORS static void add_noisy_query(
    float *mass, float *weights, const float *probabilities, const int32_t *positions, uint32_t word, float scale,
    float temperature, float share, long keys
) {
    const float cold = 1.0f / temperature;
    floats sums = all(0.0f);
    for (long key = 0; key < keys; key += LANES) {
        const long count = keys - key;
        floats p = load_some(probabilities + key, count, 0.0f);
        ints possible = p > 1e-37f; /* so the logarithm is that of a normal number */
        p = pick(possible, p, all(1.0f));
        floats noise = exponential(mix((words)load_some_ints(positions + key, count, -1) ^ COLUMN) ^ word);
        if (scale == 1.0f)
            p /= noise;
        if (scale != 1.0f)
            p = exp_of(cold * (log_of(p) - scale * log_of(noise)));
        else if (temperature != 1.0f)
            p = exp_of(cold * log_of(p));
        p = pick(possible, p, all(0.0f));
        sums += p;
        store_some(weights + key, p, count);
    }
    const float total = sum_of(sums), part = total > 0.0f ? share / total : 0.0f;
    for (long key = 0; key < keys; key += LANES)
        store_some(
            mass + key, load_some(mass + key, keys - key, 0.0f) + part * load_some(weights + key, keys - key, 0.0f),
            keys - key
        );
}

/* mass [N, S]: the mean over query heads of the noisy softmax of one query at position `query`. probabilities [N, G, S]
   of the plain one; `hash` is that of seed and layer; scratch [N, S]. */
void kvprune_noisy_query(
    float *mass, float *scratch, const float *probabilities, const int32_t *positions, long stride, uint32_t hash,
    long query, float scale, float temperature, long B, long H, long G, long S, int threads
) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long head = 0; head < B * H; head++) {
        memset(mass + head * S, 0, 4 * S);
        for (long g = 0; g < G; g++) {
            const uint32_t of_head = chained(hash, (uint32_t)(head % H * G + g));
            add_noisy_query(
                mass + head * S, scratch + head * S, probabilities + (head * G + g) * S, positions + head * stride,
                chained(of_head, (uint32_t)query), scale, temperature, 1.0f / (float)G, S
            );
        }
    }
}

/* -- one query per sequence, over packed rows: see packed_rows.py ------------------------------------------------- */

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

INLINE void code_dots(
    float *logits, long S, const float *folded, const float *constant, const uint8_t *codes, long rows, long row_bytes,
    const long G, long D, const int bits
) {
    for (long row = 0; row < rows; row++) {
        floats sums[4];
        for (long g = 0; g < G; g++)
            sums[g] = all(0.0f);
        for (long d = 0; d < D; d += LANES) {
            floats key = __builtin_convertvector((ints)codes_at(codes + row * row_bytes, d, D, bits), floats);
            for (long g = 0; g < G; g++)
                sums[g] += load(folded + g * D + d) * key;
        }
        for (long g = 0; g < G; g++)
            logits[g * S + row] = sum_of(sums[g]) + constant[g];
    }
}

INLINE void code_sums(
    float *output, const float *weights, long stride, const uint8_t *codes, long rows, long row_bytes, long d,
    const long G, long D, const int bits
) {
    floats sums[4];
    for (long g = 0; g < G; g++)
        sums[g] = all(0.0f);
    for (long row = 0; row < rows; row++) {
        floats value = __builtin_convertvector((ints)codes_at(codes + row * row_bytes, d, D, bits), floats);
        for (long g = 0; g < G; g++)
            sums[g] += weights[g * stride + row] * value;
    }
    for (long g = 0; g < G; g++)
        store(output + g * D + d, sums[g]);
}

#define FOR_EACH_WIDTH(CALL, G)                                                                                        \
    switch (bits) {                                                                                                    \
    case 2:                                                                                                            \
        CALL(G, 2);                                                                                                    \
        break;                                                                                                         \
    case 3:                                                                                                            \
        CALL(G, 3);                                                                                                    \
        break;                                                                                                         \
    case 4:                                                                                                            \
        CALL(G, 4);                                                                                                    \
        break;                                                                                                         \
    default:                                                                                                           \
        CALL(G, 8);                                                                                                    \
    }

#define FOR_EACH_GROUP(LOOP, CALL)                                                                                     \
    {                                                                                                                  \
        long g = 0;                                                                                                    \
        for (; g + 4 <= G; g += 4)                                                                                     \
            LOOP(CALL, 4)                                                                                              \
        for (; g + 2 <= G; g += 2)                                                                                     \
            LOOP(CALL, 2)                                                                                              \
        for (; g < G; g++)                                                                                             \
            LOOP(CALL, 1)                                                                                              \
    }

/* Products of G queries with the rows first .. stop - 1. Parameters go into the queries: q.(s c + z) = (q s).c + q.z */
VECTORS static void packed_dots_of(
    float *logits, long S, const float *queries, const tier *t, float scale, long head, long first, long stop, long G,
    int bits
) {
    const long D = t->dim;
    float folded[G * D], constant[G];
    tier mine = *t;
    if (t->blocks)
        mine.blocks = (const char *)t->blocks + head * t->rows * t->block_bytes;
    for (long row = first; row < stop;) {
        const long end = same_block(&mine, row, stop), parameters = (head * t->count + block_of(&mine, row)) * D;
        for (long g = 0; g < G; g++) {
            floats sum = all(0.0f);
            for (long d = 0; d < D; d += LANES) {
                floats query = scale * load(queries + g * D + d);
                store(folded + g * D + d, query * load_as(t->scale, parameters + d, FLOAT16));
                sum += query * load_as(t->zero_point, parameters + d, FLOAT16);
            }
            constant[g] = sum_of(sum);
        }
        const uint8_t *codes = t->codes + (head * t->rows + row) * t->row_bytes;
#define CODE_DOTS(COUNT, BITS)                                                                                         \
    code_dots(                                                                                                         \
        logits + g * S + row - first, S, folded + g * D, constant + g, codes, end - row, t->row_bytes, COUNT, D, BITS  \
    )
        FOR_EACH_GROUP(FOR_EACH_WIDTH, CODE_DOTS)
        row = end;
    }
}

/* Parameters of one group of channels of `rows` tokens, and zeros up to a whole vector. */
INLINE void parameters_of(float *wide, const uint16_t *from, long at, long rows, long group, long groups) {
    long r = 0;
    if (groups == 1)
        for (; r + LANES <= rows; r += LANES)
            store(wide + r, load_as(from, at + r, FLOAT16));
    for (; r < rows; r++)
        wide[r] = half_at(from, (at + r) * groups + group);
    for (; r % LANES; r++)
        wide[r] = 0.0f;
}

/* Weighted sums of values; parameters of tokens go into the weights, and those of channels into the sum. */
VECTORS static void packed_sums_of(
    float *output, const float *weights, long S, const tier *t, long head, long first, long stop, long G, int bits
) {
    const long D = t->dim;
    float scaled[G * PART], part[G * D], constant[G], scale[PART + LANES], zero_point[PART + LANES];
    tier mine = *t;
    if (t->blocks)
        mine.blocks = (const char *)t->blocks + head * t->rows * t->block_bytes;
    memset(output, 0, 4 * G * D);
    for (long row = first; row < stop;) {
        const long end = same_block(&mine, row, stop), rows = end - row, at = head * t->rows + row;
        const uint8_t *codes = t->codes + at * t->row_bytes;
        for (long group = 0; group < t->groups; group++) {
            parameters_of(scale, t->scale, at, rows, group, t->groups);
            parameters_of(zero_point, t->zero_point, at, rows, group, t->groups);
            for (long g = 0; g < G; g++) {
                const float *given = weights + g * S + row - first;
                floats sum = all(0.0f);
                for (long r = 0; r < rows; r += LANES) {
                    floats weight = load_some(given + r, rows - r, 0.0f);
                    store_some(scaled + g * PART + r, weight * load(scale + r), rows - r);
                    sum += weight * load(zero_point + r);
                }
                constant[g] = sum_of(sum);
            }
            const long begin = group * t->channels, stop_ = begin + t->channels < D ? begin + t->channels : D;
            for (long d = begin; d < stop_; d += LANES) {
#define CODE_SUMS(COUNT, BITS)                                                                                         \
    code_sums(part + g * D, scaled + g * PART, PART, codes, rows, t->row_bytes, d, COUNT, D, BITS)
                FOR_EACH_GROUP(FOR_EACH_WIDTH, CODE_SUMS)
                floats channel = all(1.0f);
                if (t->channel_scale)
                    channel = load_as(t->channel_scale, (head * t->count + block_of(&mine, row)) * D + d, FLOAT16);
                for (long g = 0; g < G; g++)
                    store(
                        output + g * D + d, load(output + g * D + d) + (load(part + g * D + d) + constant[g]) * channel
                    );
            }
        }
        row = end;
    }
}

/* logits [N, G, S] from `offset` on: of queries [N, G, D] with the rows of a tier. */
void kvprune_packed_dots(
    float *logits, long S, long offset, const float *queries, const tier *t, float scale, int bits, long N, long G,
    int threads
) {
    const long parts = (t->rows + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * parts; item++) {
        long head = item / parts, first = item % parts * PART, stop = first + PART < t->rows ? first + PART : t->rows;
        packed_dots_of(
            logits + head * G * S + offset + first, S, queries + head * G * t->dim, t, scale, head, first, stop, G, bits
        );
    }
}

/* partial sums [N, parts, G, Dv] of the values of a tier, from part `part` on; weights [N, G, S] from `offset` on. */
void kvprune_packed_sums(
    float *scratch, long parts_in_all, long part, const float *weights, long S, long offset, const tier *t, int bits,
    long N, long G, int threads
) {
    const long parts = (t->rows + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * parts; item++) {
        long head = item / parts, p = item % parts, first = p * PART;
        long stop = first + PART < t->rows ? first + PART : t->rows;
        packed_sums_of(
            scratch + (head * parts_in_all + part + p) * G * t->dim, weights + head * G * S + offset + first, S, t,
            head, first, stop, G, bits
        );
    }
}

/* -- packing rows: see PackedRows.encode, whose numbers these are bit for bit ---------------------------------------
 */

#define LARGEST 65504.0f /* of float16 */

/* The float16 that are not above numbers of their range, the largest ones, as float32. */
INLINE floats rounded_down(floats x) {
    const floats magnitude = (floats)((ints)x & 0x7fffffff);
    const words exponent = (words)larger(magnitude, all(0x1p-14f)) & 0x7f800000; /* below 2**-14, spacing is even */
    const floats steps = x * (floats)((264u << 23) - exponent); /* the last of a float16's 10 bits is one step */
    floats whole = __builtin_convertvector(__builtin_convertvector(steps, ints), floats);
    whole -= pick(whole > steps, all(1.0f), all(0.0f));
    return whole * (floats)(exponent - (10u << 23));
}

/* Numbers that float16 has: load_as the other way round. */
INLINE void store_halves(uint16_t *to, floats x) {
    const words sign = (words)x >> 16 & 0x8000;
    const floats magnitude = (floats)((words)x & 0x7fffffff) * 0x1p-112f;
    const halves half = __builtin_convertvector((words)magnitude >> 13 | sign, halves);
    memcpy(to, &half, sizeof half);
}

/* The largest code. */
INLINE float most_of(int bits) { return (float)((1 << bits) - 1); }

/* Parameters of groups of numbers that span lowest .. highest. */
INLINE void parameters_for(floats *scale, floats *zero_point, floats lowest, floats highest, float levels) {
    *zero_point = rounded_down(clamped(lowest, -LARGEST, LARGEST));
    const floats span = larger(clamped(highest, -LARGEST, LARGEST) - *zero_point, all(0.0f));
    *scale = 0.0f - rounded_down(-span / levels);
}

/* Adding 1.5 * 2**23 rounds to a whole number, half to even, found in the low bits. */
INLINE words codes_for(floats x, floats scale, floats zero_point, float levels) {
    const floats step = pick(scale > 0.0f, scale, all(1.0f));
    return (words)(clamped((x - zero_point) / step, 0.0f, levels) + 12582912.0f) - 0x4b400000;
}

/* In the first lane of either half, all bits of the half. */
INLINE words joined(words x) {
    x |= __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x |= __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x | __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
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
        const words four = joined(codes << (words){0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28});
        memcpy(row + first / 2, &(uint32_t){four[0]}, 4);
        memcpy(row + first / 2 + 4, &(uint32_t){four[8]}, 4);
        return;
    }
    const words two = joined((codes & 3) << (words){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
    memcpy(row + first / 4, &(uint32_t){two[0] | two[8]}, 4);
    if (bits == 3) {
        const words one = joined((codes >> 2) << (words){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
        memcpy(row + count / 4 + first / 8, &(uint16_t){one[0] | one[8]}, 2);
    }
}

/* The rows to pack: of every head those in `slots` [N, R], -1 for nothing, `tokens` of them to a block. What a row that
   is nothing has for numbers no parameter shows; they are those of slot 0. */
typedef struct {
    const strided_rows *rows;
    const int64_t *slots;
    int64_t count, tokens;
} selection;

/* Those of one head. */
typedef struct {
    const char *first;
    const int64_t *slots;
    long row_bytes;
    int kind;
} picked;

INLINE picked rows_of(const selection *s, long head) {
    const strided_rows *rows = s->rows;
    const long size = rows->kind == FLOAT32 ? 4 : 2;
    return (picked){row_at(rows, head, 0), s->slots + head * s->count, rows->of_row * size, (int)rows->kind};
}

/* 16 numbers as they are quantized: NaN is 0, and none is beyond the largest float16. */
INLINE floats numbers_at(picked p, long row, long d) {
    const int64_t slot = p.slots[row] < 0 ? 0 : p.slots[row];
    const floats x = load_as(p.first + slot * p.row_bytes, d, p.kind);
    return clamped(pick(x == x, x, all(0.0f)), -LARGEST, LARGEST);
}

INLINE long end_of_block(const selection *s, long row, long stop) {
    const long end = (row / s->tokens + 1) * s->tokens;
    return end < stop ? end : stop;
}

/* What 16 channels of a block span; infinite, the wrong way round, where all its rows are nothing. */
INLINE void range_of(floats *lowest, floats *highest, const selection *s, long head, long block, long d) {
    const picked p = rows_of(s, head);
    const long first = block * s->tokens, stop = end_of_block(s, first, s->count);
    floats least = all(INFINITY), most = all(-INFINITY);
    for (long row = first; row < stop; row++)
        if (p.slots[row] >= 0) {
            const floats x = numbers_at(p, row, d);
            least = smaller(x, least);
            most = larger(x, most);
        }
    *lowest = least;
    *highest = most;
}

VECTORS static void key_parameters(const tier *t, const selection *s, long head, long block, long d, int bits) {
    const long at = (head * t->count + block) * t->dim + d;
    floats lowest, highest, scale, zero_point;
    range_of(&lowest, &highest, s, head, block, d);
    parameters_for(&scale, &zero_point, lowest, highest, most_of(bits));
    store_halves(t->scale + at, scale);
    store_halves(t->zero_point + at, zero_point);
}

VECTORS static void encode_keys(const tier *t, const selection *s, long head, long first, long stop, int bits) {
    const picked p = rows_of(s, head);
    const float levels = most_of(bits);
    for (long row = first; row < stop;) {
        const long end = end_of_block(s, row, stop), at = (head * t->count + row / s->tokens) * t->dim;
        for (long d = 0; d < t->dim; d += LANES) {
            const floats scale = load_as(t->scale, at + d, FLOAT16),
                         zero_point = load_as(t->zero_point, at + d, FLOAT16);
            for (long r = row; r < end; r++) {
                uint8_t *codes = t->codes + (head * t->rows + r) * t->row_bytes;
                put_codes(codes, codes_for(numbers_at(p, r, d), scale, zero_point, levels), d, t->dim, bits);
            }
        }
        row = end;
    }
}

VECTORS static void channel_size(float *sizes, const selection *s, long head, long block, long d) {
    floats lowest, highest;
    range_of(&lowest, &highest, s, head, block, d);
    store(sizes, larger(larger(-lowest, highest), all(0.0f)));
}

/* At most 16 rows, of one block: their parameters are made together. */
VECTORS static void encode_values(const tier *t, const selection *s, long head, long first, long stop, int bits) {
    const picked p = rows_of(s, head);
    const float levels = most_of(bits);
    const long D = t->dim, at = (head * t->count + first / s->tokens) * D;
    float numbers[LANES * D];
    for (long d = 0; d < D; d += LANES) {
        const floats channel = t->channel_scale ? load_as(t->channel_scale, at + d, FLOAT16) : all(1.0f);
        for (long r = 0; r < stop - first; r++) {
            const floats x = numbers_at(p, first + r, d);
            store(numbers + r * D + d, t->channel_scale ? x / channel : x);
        }
    }
    for (long group = 0; group < t->groups; group++) {
        const long begin = group * t->channels, end = begin + t->channels < D ? begin + t->channels : D;
        float lowest[LANES] = {0}, highest[LANES] = {0}, scale[LANES], zero_point[LANES];
        for (long r = 0; r < stop - first; r++) {
            floats least = all(INFINITY), most = all(-INFINITY);
            for (long d = begin; d < end; d += LANES) {
                const floats x = load(numbers + r * D + d);
                least = smaller(x, least);
                most = larger(x, most);
            }
            lowest[r] = -largest_of(-least);
            highest[r] = largest_of(most);
        }
        floats scales, zero_points;
        parameters_for(&scales, &zero_points, load(lowest), load(highest), levels);
        store(scale, scales);
        store(zero_point, zero_points);
        uint16_t half_scale[LANES], half_zero_point[LANES];
        store_halves(half_scale, scales);
        store_halves(half_zero_point, zero_points);
        for (long r = 0; r < stop - first; r++) {
            const long row = head * t->rows + first + r;
            t->scale[row * t->groups + group] = half_scale[r];
            t->zero_point[row * t->groups + group] = half_zero_point[r];
            for (long d = begin; d < end; d += LANES) {
                const floats x = load(numbers + r * D + d);
                const words codes = codes_for(x, all(scale[r]), all(zero_point[r]), levels);
                put_codes(t->codes + row * t->row_bytes, codes, d, D, bits);
            }
        }
    }
}

/* Whether all slots are in use. */
INLINE int in_use(const selection *s, long N) {
    for (long row = 0; row < N * s->count; row++)
        if (s->slots[row] >= s->rows->count)
            return 0;
    return 1;
}

/* Codes and parameters of keys. Returns 1, and does nothing, where a slot is not in use. */
int kvprune_encode_keys(const tier *t, const selection *s, int bits, long N, int threads) {
    const long groups = t->dim / LANES, parts = (t->rows + PART - 1) / PART;
    if (!in_use(s, N))
        return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long item = 0; item < N * t->count * groups; item++)
            key_parameters(t, s, item / groups / t->count, item / groups % t->count, item % groups * LANES, bits);
#pragma omp for schedule(static)
        for (long item = 0; item < N * parts; item++) {
            const long first = item % parts * PART, stop = first + PART < t->rows ? first + PART : t->rows;
            encode_keys(t, s, item / parts, first, stop, bits);
        }
    }
    return 0;
}

/* sizes [N, blocks, D]: the largest magnitude of every channel in every block. */
int kvprune_channel_sizes(float *sizes, const selection *s, long N, long D, int threads) {
    const long groups = D / LANES, blocks = (s->count + s->tokens - 1) / s->tokens;
    if (!in_use(s, N))
        return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * blocks * groups; item++)
        channel_size(sizes + item * LANES, s, item / groups / blocks, item / groups % blocks, item % groups * LANES);
    return 0;
}

/* Codes and parameters of values, whose channel_scale is there already. */
int kvprune_encode_values(const tier *t, const selection *s, int bits, long N, int threads) {
    const long parts = (t->rows + PART - 1) / PART;
    if (!in_use(s, N))
        return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * parts; item++) {
        const long stop = (item % parts + 1) * PART < t->rows ? (item % parts + 1) * PART : t->rows;
        for (long row = item % parts * PART; row < stop;) {
            const long end = end_of_block(s, row, row + LANES < stop ? row + LANES : stop);
            encode_values(t, s, item / parts, row, end, bits);
            row = end;
        }
    }
    return 0;
}

/* -- rows of a table ---------------------------------------------------------------------------------------------- */

/* Scores of the 16 rows from `row` on, infinite where a row may not go; NaN counts as -inf. */
INLINE floats
candidates(const float *scores, long stride, const int32_t *positions, long sinks, long recent, long row, long rows) {
    floats x;
    if (stride == 1) {
        x = load_some(scores + row, rows - row, INFINITY);
    } else {
        float some[LANES];
        for (int lane = 0; lane < LANES; lane++)
            some[lane] = row + lane < rows ? scores[(row + lane) * stride] : INFINITY;
        x = load(some);
    }
    ints places = load_some_ints(positions + row, rows - row, -1);
    x = pick(x == x, x, all(-INFINITY));
    return pick(seen(places - (int32_t)sinks, (int32_t)(recent - sinks) - 1), x, all(INFINITY));
}

/* The row of least score among those at positions sinks .. recent - 1; of equal ones the oldest. */
VECTORS static long
worst_row(const float *scores, long stride, const int32_t *positions, long sinks, long recent, long rows) {
    floats least = all(INFINITY);
    for (long row = 0; row < rows; row += LANES) {
        floats x = candidates(scores, stride, positions, sinks, recent, row, rows);
        least = pick(x < least, x, least);
    }
    float worst = INFINITY;
    for (int lane = 0; lane < LANES; lane++)
        if (least[lane] < worst)
            worst = least[lane];
    long slot = 0;
    int32_t oldest = INT32_MAX;
    for (long row = 0; row < rows; row += LANES) {
        floats x = candidates(scores, stride, positions, sinks, recent, row, rows);
        if (sum_of(pick(x == worst, all(1.0f), all(0.0f))) == 0.0f)
            continue;
        for (int lane = 0; lane < LANES; lane++)
            if (x[lane] == worst && row + lane < rows && positions[row + lane] >= sinks &&
                positions[row + lane] < recent && positions[row + lane] < oldest)
                slot = row + lane, oldest = positions[row + lane];
    }
    return slot;
}

/* slots [N], one for every head. Strides of scores: of a sequence, a head, a row. NaN counts as -inf. */
void kvprune_worst_rows(
    int64_t *slots, const float *scores, long of_sequence, long of_head, long of_row, const int32_t *positions,
    long stride, long sinks, long recent, long B, long H, long rows
) {
    for (long head = 0; head < B * H; head++)
        slots[head] = worst_row(
            scores + head / H * of_sequence + head % H * of_head, of_row, positions + head * stride, sinks, recent, rows
        );
}

/* A tensor of a table: rows of so many bytes, `capacity` of them for every head. */
typedef struct {
    char *first;
    int64_t row_bytes;
} column;

/* In every column, the row in slot `newest` takes the place of the one that `slots` [N] names. Returns 1, and does
   nothing, where a slot is not among 0 .. newest. */
int kvprune_move_rows(const column *columns, long count, long capacity, const int64_t *slots, long newest, long N) {
    for (long head = 0; head < N; head++)
        if (slots[head] < 0 || slots[head] > newest)
            return 1;
    for (const column *c = columns; c < columns + count; c++)
        for (long head = 0; head < N; head++) {
            char *rows = c->first + head * capacity * c->row_bytes;
            if (slots[head] != newest)
                memcpy(rows + slots[head] * c->row_bytes, rows + newest * c->row_bytes, c->row_bytes);
        }
    return 0;
}

/* Fill slot `slot` of every head: keys and values (the first two columns) from a step's, strides in bytes of a sequence
   and of a head; positions (the third); zeros in the others. */
void kvprune_append_row(
    const column *columns, long count, long capacity, long slot, const char *keys, long keys_sequence, long keys_head,
    const char *values, long values_sequence, long values_head, int32_t position, long B, long H
) {
    for (long head = 0; head < B * H; head++)
        for (long c = 0; c < count; c++) {
            char *row = columns[c].first + (head * capacity + slot) * columns[c].row_bytes;
            if (c == 0)
                memcpy(row, keys + head / H * keys_sequence + head % H * keys_head, columns[c].row_bytes);
            else if (c == 1)
                memcpy(row, values + head / H * values_sequence + head % H * values_head, columns[c].row_bytes);
            else if (c == 2)
                memcpy(row, &position, 4);
            else
                memset(row, 0, columns[c].row_bytes);
        }
}
