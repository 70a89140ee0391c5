/* Attention of one query per sequence over rows in the coordinates of a basis: see rotated_rows.py. */

#include "codes.h"

/* Keys or values: codes [N, rows, row_bytes], float16 scales [N, rows], widths [N, dim / 16], and
   steps by width. */
typedef struct {
    const uint8_t *codes;
    const uint16_t *scale;
    const uint8_t *widths;
    const float *steps;
    int64_t rows, dim, row_bytes;
} rotated;

enum { MOST_GROUPS = 64 };

/* 16 codes of a width: parts of 4, 4 or 2, and 1 bit, 2 bytes for each bit. */
INLINE floats group_at(const uint8_t *at, int width) {
    words codes;
    switch (width) {
    case 1:
        codes = one_bit(at);
        break;
    case 2:
        codes = two_bits(at);
        break;
    case 3:
        codes = two_bits(at) | one_bit(at + 4) << 2;
        break;
    case 4:
        codes = four_bits(at);
        break;
    case 5:
        codes = four_bits(at) | one_bit(at + 8) << 4;
        break;
    case 6:
        codes = four_bits(at) | two_bits(at + 8) << 4;
        break;
    case 7:
        codes = four_bits(at) | two_bits(at + 8) << 4 | one_bit(at + 12) << 6;
        break;
    default:
        codes = four_bits(at) | four_bits(at + 8) << 4;
    }
    return __builtin_convertvector((ints)codes, floats);
}

/* The groups of a head that have bits: their widths, where they begin in a row, and their first components. */
typedef struct {
    int count, width[MOST_GROUPS];
    long byte[MOST_GROUPS], first[MOST_GROUPS];
} layout;

INLINE layout layout_of(const rotated *r, long head) {
    layout l = {0};
    long byte = 0;
    for (long group = 0; group < r->dim / LANES; group++) {
        const int width = r->widths[head * (r->dim / LANES) + group];
        if (width) {
            l.width[l.count] = width;
            l.byte[l.count] = byte;
            l.first[l.count++] = group * LANES;
        }
        byte += 2 * width;
    }
    return l;
}

/* Rows that are added up at a time: their sums stay in the nearest cache. */
enum { TILE_ROWS = 16 };

INLINE void rotated_dots(
    float *logits, long S, const floats *folded, const float *constant, const rotated *r, const layout *l, long at,
    long rows, const long G
) {
    floats sums[4 * TILE_ROWS];
    for (long first = 0; first < rows; first += TILE_ROWS) {
        const long some = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
        memset(sums, 0, sizeof(floats) * G * TILE_ROWS);
        for (int i = 0; i < l->count; i++) {
            const uint8_t *codes = r->codes + (at + first) * r->row_bytes + l->byte[i];
#define EACH_KEY(WIDTH)                                                                                                \
    case WIDTH:                                                                                                        \
        for (long row = 0; row < some; row++) {                                                                        \
            const floats key = group_at(codes + row * r->row_bytes, WIDTH);                                            \
            for (long g = 0; g < G; g++)                                                                               \
                sums[row * G + g] += folded[g * MOST_GROUPS + i] * key;                                                \
        }                                                                                                              \
        break;
            switch (l->width[i]) {
                EACH_KEY(1)
                EACH_KEY(2)
                EACH_KEY(3)
                EACH_KEY(4)
                EACH_KEY(5)
                EACH_KEY(6)
                EACH_KEY(7)
                EACH_KEY(8)
            }
        }
        for (long row = 0; row < some; row++) {
            const float scale = half_at(r->scale, at + first + row);
            for (long g = 0; g < G; g++)
                logits[g * S + first + row] =
                    scale * (sum_of(sums[row * G + g]) + constant[2 * g]) + constant[2 * g + 1];
        }
    }
}

#define FOR_SO_MANY(CALL)                                                                                              \
    switch (some) {                                                                                                    \
    case 4:                                                                                                            \
        CALL(4);                                                                                                       \
        break;                                                                                                         \
    case 3:                                                                                                            \
        CALL(3);                                                                                                       \
        break;                                                                                                         \
    case 2:                                                                                                            \
        CALL(2);                                                                                                       \
        break;                                                                                                         \
    default:                                                                                                           \
        CALL(1);                                                                                                       \
    }

/* Of turned queries [G, D] with the rows first .. stop - 1; what does not depend on a row goes into constants. */
VECTORS static void dots_part(
    float *logits, long S, const float *queries, const float *means, const rotated *r, long head, long first, long stop,
    long G
) {
    const layout l = layout_of(r, head);
    floats folded[4 * MOST_GROUPS];
    float constant[8];
    for (long g = 0; g < G;) {
        const long some = G - g < 4 ? G - g : 4;
        for (long each = 0; each < some; each++) {
            floats sum = all(0.0f);
            for (int i = 0; i < l.count; i++) {
                const floats query = load(queries + (g + each) * r->dim + l.first[i]) * r->steps[l.width[i]];
                folded[each * MOST_GROUPS + i] = query;
                sum += query * (0.5f * (float)((1 << l.width[i]) - 1));
            }
            constant[2 * each] = -sum_of(sum);
            constant[2 * each + 1] = means ? means[g + each] : 0.0f;
        }
        const long at = head * r->rows + first;
#define DOTS(COUNT) rotated_dots(logits + g * S, S, folded, constant, r, &l, at, stop - first, COUNT)
        FOR_SO_MANY(DOTS)
        g += some;
    }
}

INLINE void rotated_sums(
    float *output, const float *scaled, const rotated *r, const layout *l, long at, long rows, const long G
) {
    for (int i = 0; i < l->count; i++) {
        pair sums[4];
        for (long g = 0; g < G; g++)
            sums[g] = pair_of(all(0.0f));
        const uint8_t *codes = r->codes + at * r->row_bytes + l->byte[i];
#define EACH_ROW(WIDTH)                                                                                                \
    case WIDTH:                                                                                                        \
        for (long row = 0; row < rows; row++) {                                                                        \
            const pair value = pair_of(group_at(codes + row * r->row_bytes, WIDTH));                                   \
            for (long g = 0; g < G; g++)                                                                               \
                add_scaled(&sums[g], scaled[g * PART + row], value);                                                   \
        }                                                                                                              \
        break;
        switch (l->width[i]) {
            EACH_ROW(1)
            EACH_ROW(2)
            EACH_ROW(3)
            EACH_ROW(4)
            EACH_ROW(5)
            EACH_ROW(6)
            EACH_ROW(7)
            EACH_ROW(8)
        }
        for (long g = 0; g < G; g++)
            store_pair(output + g * r->dim + l->first[i], sums[g]);
    }
}

VECTORS static void sums_part(
    float *output, const float *weights, long S, const rotated *r, long head, long first, long stop, long G
) {
    const layout l = layout_of(r, head);
    const long rows = stop - first, at = head * r->rows + first;
    float scaled[4 * PART];
    memset(output, 0, 4 * G * r->dim);
    for (long g = 0; g < G;) {
        const long some = G - g < 4 ? G - g : 4;
        float total[4] = {0};
        for (long each = 0; each < some; each++)
            for (long row = 0; row < rows; row++)
                total[each] += scaled[each * PART + row] = weights[(g + each) * S + row] * half_at(r->scale, at + row);
        float *own = output + g * r->dim;
#define SUMS(COUNT) rotated_sums(own, scaled, r, &l, at, rows, COUNT)
        FOR_SO_MANY(SUMS)
        for (long each = 0; each < some; each++)
            for (int i = 0; i < l.count; i++) {
                float *to = own + each * r->dim + l.first[i];
                const float middle = 0.5f * (float)((1 << l.width[i]) - 1);
                store(to, (load(to) - total[each] * middle) * r->steps[l.width[i]]);
            }
        g += some;
    }
}

/* -- packing ------------------------------------------------------------------------------------------------------ */

/* group_at the other way round. */
INLINE void put_group(uint8_t *at, words codes, int width) {
    int done = 0;
    if (width >= 4)
        put_four(at, codes), done = 4;
    if (width == 8)
        put_four(at + 8, codes >> 4);
    else if (width & 2)
        put_two(at + 2 * done, codes >> done), done += 2;
    if (width < 8 && width & 1)
        put_one(at + 2 * done, codes >> done);
}

/* The components of a head that have bits, one behind another. */
typedef struct {
    long count;
    float inverse[MOST_GROUPS * LANES], step[MOST_GROUPS * LANES], middle[MOST_GROUPS * LANES];
} levels;

INLINE void levels_of(levels *to, const rotated *r, const layout *l) {
    to->count = l->count * LANES;
    for (long d = 0; d < to->count; d++) {
        const int width = l->width[d / LANES];
        to->step[d] = r->steps[width];
        to->inverse[d] = 1.0f / r->steps[width];
        to->middle[d] = 0.5f * (float)((1 << width) - 1);
    }
}

/* Rounds, half to even. Loops over numbers, which GCC makes vectors of: it takes comparisons of vectors apart. */
INLINE float code_of(float x, float middle) {
    const float code = x + middle, above = code > 0.0f ? code : 0.0f, most = 2.0f * middle;
    return (above < most ? above : most) + 12582912.0f - 12582912.0f;
}

/* Of rows first .. stop - 1 of a head, numbers [rows, D]: of the scales tried, the one whose codes come nearest. */
VECTORS static void encode_part(
    const rotated *r, uint8_t *codes, uint16_t *scales, const float *numbers, const float *tried, const uint16_t *tried_half,
    long count, long head, long first, long stop
) {
    const layout l = layout_of(r, head);
    levels each;
    float own[MOST_GROUPS * LANES], in_steps[MOST_GROUPS * LANES];
    levels_of(&each, r, &l);
    for (long row = head * r->rows + first; row < head * r->rows + stop; row++) {
        for (int i = 0; i < l.count; i++)
            memcpy(own + i * LANES, numbers + row * r->dim + l.first[i], sizeof(float) * LANES);
        for (long d = 0; d < each.count; d++)
            in_steps[d] = own[d] * each.inverse[d];
        float least = INFINITY;
        long best = 0;
        for (long t = 0; t < count; t++) {
            const float scale = tried[row * count + t], inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
            float cost = 0.0f;
#pragma omp simd reduction(+ : cost)
            for (long d = 0; d < each.count; d++) {
                const float code = code_of(in_steps[d] * inverse, each.middle[d]);
                const float off = own[d] - (code - each.middle[d]) * (each.step[d] * scale);
                cost += off * off;
            }
            if (cost < least)
                least = cost, best = t;
        }
        const float scale = tried[row * count + best], inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        scales[row] = tried_half[row * count + best];
        for (int i = 0; i < l.count; i++) {
            int32_t found[LANES];
            for (long d = 0; d < LANES; d++)
                found[d] = (int32_t)code_of(in_steps[i * LANES + d] * inverse, each.middle[i * LANES + d]);
            put_group(codes + row * r->row_bytes + l.byte[i], (words)load_ints(found), l.width[i]);
        }
    }
}

/* Codes and scales of z [N, rows, D]; tried [N, rows, count] scales, float32, and the same as float16. */
void kvprune_rotated_encode(
    const rotated *r, uint8_t *codes, uint16_t *scales, const float *numbers, const float *tried,
    const uint16_t *tried_half, long count, long N, int threads
) {
    const long parts = (r->rows + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * parts; item++) {
        long head = item / parts, first = item % parts * PART, stop = first + PART < r->rows ? first + PART : r->rows;
        encode_part(r, codes, scales, numbers, tried, tried_half, count, head, first, stop);
    }
}

/* -- entries ------------------------------------------------------------------------------------------------------ */

/* logits [N, G, S] from `offset` on: of turned and scaled queries [N, G, D] with rows; means [N, G], or NULL. */
void kvprune_rotated_dots(
    float *logits, long S, long offset, const float *queries, const float *means, const rotated *r, long N, long G,
    int threads
) {
    const long parts = (r->rows + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * parts; item++) {
        long head = item / parts, first = item % parts * PART, stop = first + PART < r->rows ? first + PART : r->rows;
        dots_part(
            logits + head * G * S + offset + first, S, queries + head * G * r->dim, means ? means + head * G : NULL, r,
            head, first, stop, G
        );
    }
}

/* partial sums [N, parts, G, Dv] of z of values; weights [N, G, S] from `offset` on. */
void kvprune_rotated_sums(
    float *scratch, const float *weights, long S, long offset, const rotated *r, long N, long G, int threads
) {
    const long parts = (r->rows + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long item = 0; item < N * parts; item++) {
        long head = item / parts, p = item % parts, first = p * PART;
        long stop = first + PART < r->rows ? first + PART : r->rows;
        sums_part(
            scratch + (head * parts + p) * G * r->dim, weights + head * G * S + offset + first, S, r, head, first, stop,
            G
        );
    }
}
