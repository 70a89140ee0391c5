/* Attention of one query per sequence over heads that hold different numbers of rows, some of them packed: of each the
   packed rows, some at a time, and then those in full precision. */

#include "codes.h"

/* Coordinates of rows: M [D, D] float32, or int8 with what each column counts, and the mean, float16, or NULL. */
typedef struct {
    const float *matrix;
    const int8_t *codes;
    const float *span;
    const uint16_t *mean;
} coordinates;

/* Packed rows of a head: what their own loops take for keys and values. bits: of codes in blocks; 0 for others. */
typedef struct {
    const void *keys, *values;
    int64_t rows, bits;
} packed_part;

/* parts: packed rows, from number `first` on; `packed` rows in all. loose: rows in full precision. positions: of all
   rows, int32, -1 for an empty slot, or NULL. */
typedef struct {
    const void *keys, *values;
    const int32_t *positions;
    coordinates of_keys, of_values;
    int64_t first, parts, packed, loose;
} ragged_head;

void kvprune_dots(float *, long, long, const float *, const void *, long, float, long, int, long, long, long, int);
void kvprune_sums(float *, long, long, const float *, long, long, const void *, long, long, int, long, long, long, int);
void kvprune_softmax(float *, const int32_t *, long, const float *, long, long, long, int);
void kvprune_add_parts(float *, const float *, long, long, long);
void kvprune_packed_dots(float *, long, long, const float *, const void *, float, int, long, long, int);
void kvprune_packed_sums(float *, long, long, const float *, long, long, const void *, int, long, long, int);
void kvprune_rotated_dots(float *, long, long, const float *, const float *, const void *, long, long, int);
void kvprune_rotated_sums(float *, const float *, long, long, const void *, long, long, int);

INLINE floats row_of(const coordinates *c, long at) {
    if (c->matrix)
        return load(c->matrix + at);
    int32_t wide[LANES];
    for (int lane = 0; lane < LANES; lane++)
        wide[lane] = c->codes[at + lane];
    return __builtin_convertvector(load_ints(wide), floats);
}

/* M^T q of scaled queries q [G, D], and q.m. */
VECTORS static void turn(float *turned, float *means, const float *queries, const coordinates *c, long G, long D) {
    for (long g = 0; g < G; g++) {
        const float *query = queries + g * D;
        for (long j = 0; j < D; j += LANES) {
            floats sum = all(0.0f);
            for (long i = 0; i < D; i++)
                sum += query[i] * row_of(c, i * D + j);
            store(turned + g * D + j, c->matrix ? sum : sum * load(c->span + j));
        }
        means[g] = 0.0f;
        for (long i = 0; c->mean && i < D; i++)
            means[g] += query[i] * half_at(c->mean, i);
    }
}

/* Adds m w + M z for z [G, D], which is changed, and the sums w of weights [G]. */
VECTORS static void turn_back(float *output, float *z, const float *weights, const coordinates *c, long G, long D) {
    for (long g = 0; g < G; g++) {
        for (long j = 0; !c->matrix && j < D; j += LANES)
            store(z + g * D + j, load(z + g * D + j) * load(c->span + j));
        for (long i = 0; i < D; i++) {
            floats sum = all(0.0f);
            for (long j = 0; j < D; j += LANES)
                sum += load(z + g * D + j) * row_of(c, i * D + j);
            output[g * D + i] += sum_of(sum) + (c->mean ? weights[g] * half_at(c->mean, i) : 0.0f);
        }
    }
}

static void add_all(float *to, const float *from, long count) {
    for (long place = 0; place < count; place++)
        to[place] += from[place];
}

static long most_parts(const ragged_head *h, const packed_part *parts) {
    long most = (h->loose + PART - 1) / PART;
    for (long p = h->first; p < h->first + h->parts; p++)
        if ((parts[p].rows + PART - 1) / PART > most)
            most = (parts[p].rows + PART - 1) / PART;
    return most;
}

/* Output [G, Dv], and probabilities [G, rows], of queries [G, D] with the rows of a head. Returns whether there was no
   memory. */
static int attend(
    float *output, float *probabilities, const float *queries, const ragged_head *h, const packed_part *parts,
    const float *sinks, float scale, int kind, long G, long D, long Dv
) {
    const long rows = h->packed + h->loose, pieces = most_parts(h, parts);
    float *memory = malloc(sizeof(float) * (2 * G * D + 2 * G * Dv + 2 * G + pieces * G * Dv));
    if (!memory)
        return 1;
    float *scaled = memory, *turned = scaled + G * D, *sums = turned + G * D, *z = sums + G * Dv;
    float *means = z + G * Dv, *weights = means + G, *scratch = weights + G;
    int rotated = 0;
    long offset = 0;
    for (long p = h->first; p < h->first + h->parts; offset += parts[p++].rows) {
        if (parts[p].bits) {
            kvprune_packed_dots(
                probabilities, rows, offset, queries, parts[p].keys, scale, (int)parts[p].bits, 1, G, 1
            );
            continue;
        }
        if (!rotated) {
            rotated = 1;
            for (long place = 0; place < G * D; place++)
                scaled[place] = queries[place] * scale;
            turn(turned, means, scaled, &h->of_keys, G, D);
        }
        kvprune_rotated_dots(probabilities, rows, offset, turned, means, parts[p].keys, 1, G, 1);
    }
    kvprune_dots(probabilities, rows, offset, queries, h->keys, 0, scale, h->loose, kind, 1, G, D, 1);
    kvprune_softmax(probabilities, h->positions, 0, sinks, 1, G, rows, 1);

    memset(z, 0, sizeof(float) * G * Dv);
    memset(weights, 0, sizeof(float) * G);
    kvprune_sums(scratch, pieces, 0, probabilities, rows, offset, h->values, 0, h->loose, kind, 1, G, Dv, 1);
    kvprune_add_parts(output, scratch, 1, (h->loose + PART - 1) / PART, G * Dv);
    offset = 0;
    for (long p = h->first; p < h->first + h->parts; offset += parts[p++].rows) {
        if (parts[p].bits)
            kvprune_packed_sums(
                scratch, pieces, 0, probabilities, rows, offset, parts[p].values, (int)parts[p].bits, 1, G, 1
            );
        else
            kvprune_rotated_sums(scratch, probabilities, rows, offset, parts[p].values, 1, G, 1);
        kvprune_add_parts(sums, scratch, 1, (parts[p].rows + PART - 1) / PART, G * Dv);
        add_all(parts[p].bits ? output : z, sums, G * Dv);
        for (long g = 0; !parts[p].bits && h->of_values.mean && g < G; g++)
            for (long row = 0; row < parts[p].rows; row++)
                weights[g] += probabilities[g * rows + offset + row];
    }
    if (rotated)
        turn_back(output, z, weights, &h->of_values, G, Dv);
    free(memory);
    return 0;
}

/* output [N, G, Dv] and probabilities [N, G, S] of queries [N, G, D]: of packed rows a head has the last ones of the
   first P, of the others the last ones; 0 before either. Returns whether there was no memory. */
int kvprune_ragged_query(
    float *output, float *probabilities, const float *queries, const ragged_head *heads, const packed_part *parts,
    const float *sinks, float scale, int kind, long N, long G, long S, long P, long D, long Dv, int threads
) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(| : failed)
    for (long head = 0; head < N; head++) {
        const ragged_head *h = heads + head;
        const long rows = h->packed + h->loose;
        float *own = malloc(sizeof(float) * (G * rows + 1)), *shown = probabilities + head * G * S;
        if (!own || attend(
                output + head * G * Dv, own, queries + head * G * D, h, parts, sinks ? sinks + head * G : 0, scale,
                kind, G, D, Dv
            ))
            failed = 1;
        memset(shown, 0, sizeof(float) * G * S);
        for (long g = 0; own && g < G; g++) {
            memcpy(shown + g * S + P - h->packed, own + g * rows, sizeof(float) * h->packed);
            memcpy(shown + (g + 1) * S - h->loose, own + g * rows + h->packed, sizeof(float) * h->loose);
        }
        free(own);
    }
    return failed;
}
