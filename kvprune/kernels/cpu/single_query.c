/* Attention of one query per sequence. */

#include "loops.h"

/* Of `rows` keys, the products with G queries; G and kind are constants where this is used. */
INLINE void key_dots(
    float *logits, long S, const float *queries, const void *keys, float scale, long rows, const long G, long D,
    int kind
) {
    for (long row = 0; row < rows; row++) {
        pair sums[4];
        for (long g = 0; g < G; g++)
            sums[g] = pair_of(all(0.0f));
        for (long d = 0; d < D; d += LANES) {
            floats key = load_as(keys, row * D + d, kind);
            for (long g = 0; g < G; g++)
                add_product(&sums[g], load(queries + g * D + d), key);
        }
        for (long g = 0; g < G; g++)
            logits[g * S + row] = scale * sum_of_pair(sums[g]);
    }
}

/* Weighted sums of `rows` values, for G rows of weights. */
INLINE void
value_sums(float *output, const float *weights, long S, const void *values, long rows, const long G, long D, int kind) {
    for (long d = 0; d < D; d += 2 * LANES) {
        const int two = d + LANES < D;
        pair low[4], high[4];
        for (long g = 0; g < G; g++)
            low[g] = high[g] = pair_of(all(0.0f));
        for (long row = 0; row < rows; row++) {
            pair first = pair_of(load_as(values, row * D + d, kind)),
                 second = pair_of(load_as(values, row * D + d + two * LANES, kind));
            for (long g = 0; g < G; g++) {
                add_scaled(&low[g], weights[g * S + row], first);
                add_scaled(&high[g], weights[g * S + row], second);
            }
        }
        for (long g = 0; g < G; g++) {
            store_pair(output + g * D + d, low[g]);
            if (two)
                store_pair(output + g * D + d + LANES, high[g]);
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
    floats most = all(sink);
    pair total = pair_of(all(0.0f));
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
        add(&total, x);
        store_some(row + key, x, count);
    }
    const float part = 1.0f / (sum_of_pair(total) + expf(sink - top));
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

/* Of all parts of PART rows over heads of lengths [N], the head and the part in it that number `item` is. */
INLINE void part_at(long item, const int64_t *lengths, long *head, long *part) {
    for (*head = 0; item >= (lengths[*head] + PART - 1) / PART; (*head)++)
        item -= (lengths[*head] + PART - 1) / PART;
    *part = item;
}

/* The same over heads one behind another, of which each has `lengths` [N] rows from row `starts` [N + 1] on.
   probabilities [N, G, S] of which a head has the last ones; 0 before them. scratch: [parts of all heads, G, Dv]. */
void kvprune_flat_query(
    float *output, float *probabilities, const float *queries, const void *keys, const void *values,
    const int64_t *starts, const int64_t *lengths, const float *sinks, float *scratch, float scale, int kind, long N,
    long G, long S, long D, long Dv, int threads
) {
    const long size = kind == FLOAT32 ? 4 : 2;
    long parts = 0;
    for (long head = 0; head < N; head++)
        parts += (lengths[head] + PART - 1) / PART;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long item = 0; item < parts; item++) {
            long head, part;
            part_at(item, lengths, &head, &part);
            const long first = part * PART, rows = lengths[head], some = rows - first < PART ? rows - first : PART;
            dots_of(
                probabilities + head * G * S + S - rows + first, S, queries + head * G * D,
                (const char *)keys + (starts[head] + first) * D * size, scale, some, G, D, kind
            );
        }
#pragma omp for schedule(static)
        for (long item = 0; item < N * G; item++) {
            const long rows = lengths[item / G];
            memset(probabilities + item * S, 0, 4 * (S - rows));
            softmax_row(probabilities + item * S + S - rows, rows, 0, sinks ? sinks[item] : -INFINITY);
        }
#pragma omp for schedule(static)
        for (long item = 0; item < parts; item++) {
            long head, part;
            part_at(item, lengths, &head, &part);
            const long first = part * PART, rows = lengths[head], some = rows - first < PART ? rows - first : PART;
            sums_of(
                scratch + item * G * Dv, probabilities + head * G * S + S - rows + first, S,
                (const char *)values + (starts[head] + first) * Dv * size, some, G, Dv, kind
            );
        }
    }
    for (long head = 0; head < N; head++) {
        const long own = (lengths[head] + PART - 1) / PART;
        kvprune_add_parts(output + head * G * Dv, scratch, 1, own, G * Dv);
        scratch += own * G * Dv;
    }
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
