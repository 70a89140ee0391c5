/* Attention mass from the log-sum-exp: no row of probabilities is written down. */

#include "tiles.h"

/* Of 16 keys, those before the limit. */
INLINE floats below(long limit, floats x) {
    const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return limit >= LANES ? x : limit <= 0 ? all(0.0f) : pick(seen(lanes, (int32_t)limit - 1), x, all(0.0f));
}

/* Add to the mass of a tile of keys what `count` <= 4 rows of queries give it. */
INLINE void add_mass(
    float *mass, const float *columns, const float *queries, const float *lse, const float *weights,
    const int64_t *limits, long first, long D, const int count, const int parts
) {
    for (int from = 0; from < 4; from += parts) {
        floats products[4][4];
        tile_dots(products, columns + from * LANES, queries, D, count, parts);
        for (int part = 0; part < parts; part++) {
            const long key = (from + part) * LANES;
            floats sum = load(mass + key);
            for (int row = 0; row < count; row++)
                sum += below(limits[row] - first - key, weights[row] * exp_of(products[row][part] - lse[row]));
            store(mass + key, sum);
        }
    }
}

INLINE void add_rows(
    float *mass, const float *columns, const float *queries, const float *lse, const float *weights,
    const int64_t *limits, long first, long begin, long R, long D, const int parts
) {
    long row = begin;
    for (; row + 4 <= R; row += 4)
        add_mass(mass, columns, queries + row * D, lse + row, weights + row, limits + row, first, D, 4, parts);
    for (; row < R; row++)
        add_mass(mass, columns, queries + row * D, lse + row, weights + row, limits + row, first, D, 1, parts);
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
        if (is_wide())
            add_rows(sums, columns, rows, of_rows, weights, limits, first, begin, R, D, 4);
        else
            add_rows(sums, columns, rows, of_rows, weights, limits, first, begin, R, D, 1);
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
    const uint32_t *row_words, const float *lse, const float *weights, const int64_t *limits, long D, const int count,
    const int parts
) {
    const long seen = (limits[count - 1] + TILE - 1) / TILE * TILE;
    pair totals[4];
    for (int row = 0; row < count; row++)
        totals[row] = pair_of(all(0.0f));
    for (long begin = 0; begin < seen; begin += parts * LANES) {
        floats products[4][4];
        tile_dots(products, columns + begin / TILE * TILE * D + begin % TILE, queries, D, count, parts);
        for (int part = 0; part < parts; part++) {
            const long key = begin + part * LANES;
            words of_keys = (words)load_ints(key_words + key);
            for (int row = 0; row < count; row++) {
                floats weight = exp_of(products[row][part] - lse[row]) / exponential(of_keys ^ row_words[row]);
                weight = below(limits[row] - key, weight);
                add(&totals[row], weight);
                store(scratch + row * seen + key, weight);
            }
        }
    }
    for (int row = 0; row < count; row++) {
        const float part = weights[row] / sum_of_pair(totals[row]);
        for (long key = 0; key < seen; key += LANES)
            store(mass + key, load(mass + key) + part * load(scratch + row * seen + key));
    }
}

INLINE void add_noisy_rows(
    float *mass, float *scratch, const float *columns, const float *queries, const uint32_t *key_words,
    const uint32_t *row_words, const float *lse, const float *weights, const int64_t *limits, long rows, long D,
    const int parts
) {
    long row = 0;
    for (; row + 4 <= rows; row += 4)
        add_noisy_mass(
            mass, scratch, columns, queries + row * D, key_words, row_words + row, lse + row, weights + row,
            limits + row, D, 4, parts
        );
    for (; row < rows; row++)
        add_noisy_mass(
            mass, scratch, columns, queries + row * D, key_words, row_words + row, lse + row, weights + row,
            limits + row, D, 1, parts
        );
}

VECTORS static void noisy_mass_of_rows(
    float *mass, float *scratch, const float *columns, const float *queries, const uint32_t *key_words,
    const uint32_t *row_words, const float *lse, const float *weights, const int64_t *limits, long rows, long D
) {
    if (is_wide())
        add_noisy_rows(mass, scratch, columns, queries, key_words, row_words, lse, weights, limits, rows, D, 4);
    else
        add_noisy_rows(mass, scratch, columns, queries, key_words, row_words, lse, weights, limits, rows, D, 1);
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
