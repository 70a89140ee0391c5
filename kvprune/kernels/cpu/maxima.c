/* Attention of many queries, and the most that any of them gives to a key, while their products are at hand. */

#include "tiles.h"

/* Rows of queries at a time: their logits over all keys stay in the cache of the processor. A multiple of TALL, the
   most whose products fit into registers with one part of a tile. */
enum { ROWS = 18, TALL = 6 };

/* What all rows of a head share. columns [tiles, D, TILE]. positions [tiles * TILE], -1 for an empty slot. least
   [tiles]: the smallest position in a tile, empty slots left out. */
typedef struct {
    const float *columns;
    const void *values;
    const int32_t *positions, *least;
    long kind, stride, S, tiles, D, Dv;
} keys_of_head;

INLINE pair larger_pair(pair a, floats x) {
    const ints8 low = a.low > low_half(x), high = a.high > high_half(x);
    return (pair){
        (floats8)((low & (ints8)a.low) | (~low & (ints8)low_half(x))),
        (floats8)((high & (ints8)a.high) | (~high & (ints8)high_half(x))),
    };
}

INLINE void dots_of_rows(
    float *logits, long width, const float *columns, const float *queries, long D, const int count, const int parts
) {
    if (parts == 1) {
        for (long key = 0; key < TILE; key += LANES) {
            pair sums[TALL];
            part_dots(sums, columns + key, queries, D, count);
            for (int row = 0; row < count; row++)
                store_pair(logits + row * width + key, sums[row]);
        }
        return;
    }
    floats products[4][4];
    tile_dots(products, columns, queries, D, count, parts);
    for (int part = 0; part < parts; part++)
        for (int row = 0; row < count; row++)
            store(logits + row * width + part * LANES, products[row][part]);
}

INLINE void dots_of_block(
    float *logits, const keys_of_head *head, const float *queries, long rows, int32_t newest, const int parts
) {
    const long width = head->tiles * TILE, D = head->D;
    for (long tile = 0; tile < head->tiles; tile++) {
        if (head->least[tile] > newest)
            continue;
        const float *columns = head->columns + tile * TILE * D;
        float *here = logits + tile * TILE;
        long row = 0;
        for (; parts == 1 && row + TALL <= rows; row += TALL)
            dots_of_rows(here + row * width, width, columns, queries + row * D, D, TALL, parts);
        for (; row + 4 <= rows; row += 4)
            dots_of_rows(here + row * width, width, columns, queries + row * D, D, 4, parts);
        for (; row < rows; row++)
            dots_of_rows(here + row * width, width, columns, queries + row * D, D, 1, parts);
    }
}

/* Logits of one row become exp(logit - largest). Returns what these are to be multiplied by. */
INLINE float exponentials(float *row, const keys_of_head *head, int32_t query, float sink) {
    pair most = pair_of(all(sink)), total = pair_of(all(0.0f));
    for (long tile = 0; tile < head->tiles; tile++) {
        if (head->least[tile] > query)
            continue;
        for (long key = tile * TILE; key < (tile + 1) * TILE; key += LANES) {
            floats x = pick(seen(load_ints(head->positions + key), query), load(row + key), all(-INFINITY));
            store(row + key, x);
            most = larger_pair(most, x);
        }
    }
    const float top = largest_of(floats_of(most));
    if (top == -INFINITY)
        return 0.0f;
    for (long tile = 0; tile < head->tiles; tile++) {
        if (head->least[tile] > query)
            continue;
        for (long key = tile * TILE; key < (tile + 1) * TILE; key += LANES) {
            floats x = exp_of(load(row + key) - top);
            store(row + key, x);
            add(&total, x);
        }
    }
    return 1.0f / (sum_of_pair(total) + expf(sink - top));
}

/* Of `best`, what is less than an exponential of `rows` rows times the factor of its row becomes that. */
INLINE void take_larger(
    float *best, const float *weights, const float *factors, const keys_of_head *head, long rows, int32_t newest
) {
    const long width = head->tiles * TILE;
    for (long tile = 0; tile < head->tiles; tile++) {
        if (head->least[tile] > newest)
            continue;
        for (long key = tile * TILE; key < (tile + 1) * TILE; key += LANES) {
            pair most = pair_of(load(best + key));
            for (long row = 0; row < rows; row++)
                most = larger_pair(most, factors[row] * load(weights + row * width + key));
            store_pair(best + key, most);
        }
    }
}

INLINE void add_values(
    float *output, const float *weights, long width, const float *values, long stride, long keys, long Dv,
    const int count
) {
    for (long d = 0; d < Dv; d += LANES) {
        pair sums[TALL];
        for (int row = 0; row < count; row++)
            sums[row] = pair_of(load(output + row * Dv + d));
        for (long key = 0; key < keys; key++) {
            pair value = pair_of(load(values + key * stride + d));
            for (int row = 0; row < count; row++)
                add_scaled(&sums[row], weights[row * width + key], value);
        }
        for (int row = 0; row < count; row++)
            store_pair(output + row * Dv + d, sums[row]);
    }
}

INLINE void values_of_block(
    float *output, const float *weights, const keys_of_head *head, long rows, int32_t newest
) {
    const long width = head->tiles * TILE, Dv = head->Dv;
    float wide[head->kind == FLOAT32 ? 1 : TILE * Dv];
    memset(output, 0, 4 * rows * Dv);
    for (long tile = 0; tile < head->tiles; tile++) {
        if (head->least[tile] > newest)
            continue;
        const long first = tile * TILE, keys = head->S - first < TILE ? head->S - first : TILE;
        const float *values = (const float *)head->values + first * head->stride;
        long stride = head->stride;
        if (head->kind != FLOAT32) {
            for (long key = 0; key < keys; key++)
                for (long d = 0; d < Dv; d += LANES)
                    store(wide + key * Dv + d, load_as(head->values, (first + key) * head->stride + d, head->kind));
            values = wide;
            stride = Dv;
        }
        long row = 0;
        for (; row + TALL <= rows; row += TALL)
            add_values(output + row * Dv, weights + row * width + first, width, values, stride, keys, Dv, TALL);
        for (; row + 4 <= rows; row += 4)
            add_values(output + row * Dv, weights + row * width + first, width, values, stride, keys, Dv, 4);
        for (; row < rows; row++)
            add_values(output + row * Dv, weights + row * width + first, width, values, stride, keys, Dv, 1);
    }
}

/* `rows` <= ROWS rows, of which row number `first` is the first of a head's G * R. */
VECTORS static void attend_block(
    float *output, float *best, float *logits, const keys_of_head *head, const float *queries,
    const int32_t *query_positions, const float *weights, const float *sinks, long first, long rows, long R
) {
    const long width = head->tiles * TILE;
    float parts[ROWS], given[ROWS];
    int32_t newest = -1, of_rows[ROWS];
    for (long row = 0; row < rows; row++) {
        of_rows[row] = query_positions[(first + row) % R];
        newest = of_rows[row] > newest ? of_rows[row] : newest;
    }
    if (is_wide())
        dots_of_block(logits, head, queries + first * head->D, rows, newest, 4);
    else
        dots_of_block(logits, head, queries + first * head->D, rows, newest, 1);
    for (long row = 0; row < rows; row++) {
        float *own = logits + row * width;
        parts[row] = exponentials(own, head, of_rows[row], sinks ? sinks[(first + row) / R] : -INFINITY);
        given[row] = parts[row] * weights[(first + row) % R];
        for (long tile = 0; tile < head->tiles; tile++) /* tiles that other rows of the block see */
            if (head->least[tile] <= newest && (head->least[tile] > of_rows[row] || parts[row] == 0.0f))
                memset(own + tile * TILE, 0, 4 * TILE);
    }
    for (long row = 0, end; row < rows; row = end) { /* those of one query head at a time */
        const long g = (first + row) / R;
        end = (g + 1) * R - first < rows ? (g + 1) * R - first : rows;
        take_larger(best + g * width, logits + row * width, given + row, head, end - row, newest);
    }
    if (!output)
        return;
    values_of_block(output + first * head->Dv, logits, head, rows, newest);
    for (long row = 0; row < rows; row++)
        for (long d = 0; d < head->Dv; d += LANES) {
            float *sums = output + (first + row) * head->Dv + d;
            store(sums, parts[row] * load(sums));
        }
}

VECTORS static void turn_tile(
    float *columns, int32_t *least, const void *keys, int kind, long stride, long count, long D,
    const int32_t *positions
) {
    transpose(columns, keys, kind, stride, count, D);
    *least = INT32_MAX;
    for (long key = 0; key < TILE; key++)
        if (positions[key] >= 0 && positions[key] < *least)
            *least = positions[key];
}

/* output [N, G, R, Dv], or NULL where it is not wanted; best [N, G, S'] = the largest of weight * probability of any
   row, 0 where no row sees a key; S' is S rounded up to whole tiles. queries [N, G, R, D], float32 and scaled; keys
   [N, S, D], values [N, S, Dv] of a kind. A row sees the keys with 0 <= key_positions [N, S'] <= query_positions
   [N, R].
   weights [N, R] >= 0. sinks [N, G] or NULL. columns [N, S', D], least [N, S' / TILE] and bests [threads, N, G, S'] are
   scratch; of maxima, the order makes no difference. Returns whether memory was wanting. */
int kvprune_attend_maxima(
    float *output, float *best, float *columns, int32_t *least, float *bests, const strided_rows *keys,
    const strided_rows *values, const float *queries, const int32_t *key_positions, const int32_t *query_positions,
    const float *weights, const float *sinks, long N, long G, long R, long S, long D, long Dv, int threads
) {
    const long tiles = (S + TILE - 1) / TILE, width = tiles * TILE, blocks = (G * R + ROWS - 1) / ROWS;
    const long size = N * G * width;
    int failed = 0, next = 0;
#pragma omp parallel num_threads(threads)
    {
        int number;
#pragma omp atomic capture
        number = next++;
        float *mine = bests + number * size, *logits = malloc(4 * ROWS * width);
        memset(mine, 0, 4 * size);
#pragma omp for schedule(static)
        for (long item = 0; item < N * tiles; item++) {
            const long head = item / tiles, first = item % tiles * TILE;
            turn_tile(
                columns + item * TILE * D, least + item, row_at(keys, head, first), keys->kind, keys->of_row,
                S - first < TILE ? S - first : TILE, D, key_positions + item * TILE
            );
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < N * blocks; item++) {
            const long head = item / blocks, first = item % blocks * ROWS;
            const keys_of_head own = {
                columns + head * width * D, output ? row_at(values, head, 0) : 0, key_positions + head * width,
                least + head * tiles, output ? values->kind : FLOAT32, output ? values->of_row : 0, S, tiles, D, Dv,
            };
            if (!logits) {
                failed = 1;
                continue;
            }
            attend_block(
                output ? output + head * G * R * Dv : 0, mine + head * G * width, logits, &own,
                queries + head * G * R * D, query_positions + head * R, weights + head * R,
                sinks ? sinks + head * G : 0, first, G * R - first < ROWS ? G * R - first : ROWS, R
            );
        }
        free(logits);
    }
    memcpy(best, bests, 4 * size);
    for (int part = 1; part < next; part++)
        for (long place = 0; place < size; place++)
            if (bests[part * size + place] > best[place])
                best[place] = bests[part * size + place];
    return failed;
}
