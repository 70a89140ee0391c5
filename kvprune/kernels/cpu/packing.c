/* Packing rows: see PackedRows.encode, whose numbers these are bit for bit. */

#include "codes.h"

#define LARGEST 65504.0f /* of float16 */

/* The float16 that are not above numbers of their range, the largest ones, as float32. */
INLINE floats rounded_down(floats x) {
    const floats magnitude = (floats)((ints)x & 0x7fffffff);
    const words exponent = (words)larger(magnitude, all(0x1p-14f)) & 0x7f800000; /* below 2**-14, spacing is even */
    const floats steps = x * (floats)((264u << 23) - exponent); /* the last of a float16's 10 bits is one step */
    floats whole = __builtin_convertvector(__builtin_convertvector(steps, ints), floats);
    whole -= pick(greater(whole, steps), all(1.0f), all(0.0f));
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
    const floats step = pick(greater(scale, all(0.0f)), scale, all(1.0f));
    return (words)(clamped((x - zero_point) / step, 0.0f, levels) + 12582912.0f) - 0x4b400000;
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
    return clamped(pick(equal(x, x), x, all(0.0f)), -LARGEST, LARGEST);
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
