/* Attention of one query per sequence over packed rows: see packed_rows.py. */

#include "codes.h"

INLINE void code_dots(
    float *logits, long S, const float *folded, const float *constant, const uint8_t *codes, long rows, long row_bytes,
    const long G, long D, const int bits
) {
    for (long row = 0; row < rows; row++) {
        pair sums[4];
        for (long g = 0; g < G; g++)
            sums[g] = pair_of(all(0.0f));
        for (long d = 0; d < D; d += LANES) {
            floats key = __builtin_convertvector((ints)codes_at(codes + row * row_bytes, d, D, bits), floats);
            for (long g = 0; g < G; g++)
                add_product(&sums[g], load(folded + g * D + d), key);
        }
        for (long g = 0; g < G; g++)
            logits[g * S + row] = sum_of_pair(sums[g]) + constant[g];
    }
}

INLINE void code_sums(
    float *output, const float *weights, long stride, const uint8_t *codes, long rows, long row_bytes, long d,
    const long G, long D, const int bits
) {
    pair sums[4];
    for (long g = 0; g < G; g++)
        sums[g] = pair_of(all(0.0f));
    for (long row = 0; row < rows; row++) {
        pair value = pair_of(__builtin_convertvector((ints)codes_at(codes + row * row_bytes, d, D, bits), floats));
        for (long g = 0; g < G; g++)
            add_scaled(&sums[g], weights[g * stride + row], value);
    }
    for (long g = 0; g < G; g++)
        store_pair(output + g * D + d, sums[g]);
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
