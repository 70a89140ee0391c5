/* Scores of rows over neighbouring positions. */

#include "loops.h"

/* Which positions a head has: a bit for each, and how many lie before each word of 64. */
typedef struct {
    uint64_t *bits;
    int32_t *before;
    long words;
} held;

INLINE long rank_of(const held *h, int32_t position) {
    const uint64_t below = h->bits[position >> 6] & (((uint64_t)1 << (position & 63)) - 1);
    return h->before[position >> 6] + __builtin_popcountll(below);
}

INLINE long count_positions(held *h, const int32_t *positions, long rows) {
    long count = 0;
    memset(h->bits, 0, 8 * h->words);
    for (long row = 0; row < rows; row++)
        if (positions[row] >= 0)
            h->bits[positions[row] >> 6] |= (uint64_t)1 << (positions[row] & 63);
    for (long word = 0; word < h->words; word++) {
        h->before[word] = count;
        count += __builtin_popcountll(h->bits[word]);
    }
    return count;
}

/* How far neighbours may be: in positions, and so in rows, of which there are not more. */
typedef struct {
    int32_t before, after;
    long rows_before, rows_after;
} reach;

/* The largest of what neighbours lend, of each of the 8 rows from `place` on, in the order of their positions. */
INLINE floats8 largest_around(const int32_t *place, const float *lent, const reach *far) {
    ints8 here, there;
    floats8 largest = (floats8){} - INFINITY, score;
    memcpy(&here, place, sizeof here);
    for (long away = -far->rows_before; away <= far->rows_after; away++) {
        memcpy(&there, place + away, sizeof there);
        memcpy(&score, lent + away, sizeof score);
        there -= here;
        const ints8 larger = (there >= -far->before) & (there <= far->after) & (score > largest);
        largest = (floats8)((larger & (ints8)score) | (~larger & (ints8)largest));
    }
    return largest;
}

/* places, lent, found: room for the rows, those of nobody around them, and 8 each. */
VECTORS static void pool_head(
    float *pooled, const float *scores, long stride, const int32_t *positions, long recent, const reach *far,
    long rows, held *h, int32_t *places, float *lent, float *found
) {
    const long count = count_positions(h, positions, rows), before = far->rows_before;
    for (long row = 0; row < before + count + far->rows_after + 8; row++)
        places[row] = 0, lent[row] = -INFINITY;
    for (long row = 0; row < rows; row++)
        if (positions[row] >= 0) {
            const long at = before + rank_of(h, positions[row]);
            places[at] = positions[row];
            if (positions[row] < recent && scores[row * stride] > -INFINITY)
                lent[at] = scores[row * stride];
        }
    for (long at = 0; at < count; at += 8) {
        const floats8 largest = largest_around(places + before + at, lent + before + at, far);
        memcpy(found + at, &largest, sizeof largest);
    }
    for (long row = 0; row < rows; row++)
        pooled[row] = positions[row] >= 0 && scores[row * stride] > -INFINITY ? found[rank_of(h, positions[row])]
                                                                               : -INFINITY;
}

/* pooled [B, H, rows]: of each row, the largest score among rows from `before` positions before it to `after` behind it.
   Rows from position recent [B] on lend nothing; those that score -inf or NaN neither lend nor borrow. Strides of
   scores: of a sequence, a head, a row. Returns 1 where there is no memory. */
int kvprune_largest_near(
    float *pooled, const float *scores, long of_sequence, long of_head, long of_row, const int32_t *positions,
    long stride, const int64_t *recent, int32_t before, int32_t after, long B, long H, long rows, int threads
) {
    const reach far = {before, after, before < rows ? before : rows - 1, after < rows ? after : rows - 1};
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long head = 0; head < B * H; head++) {
        const int32_t *own = positions + head * stride;
        int32_t last = 0;
        for (long row = 0; row < rows; row++)
            last = own[row] > last ? own[row] : last;
        const long words = last / 64 + 1, room = far.rows_before + rows + far.rows_after + 8;
        uint64_t *memory = malloc(12 * words + 12 * room);
        if (!memory) {
            failed = 1;
            continue;
        }
        held h = {memory, (int32_t *)(memory + words), words};
        int32_t *places = h.before + words;
        pool_head(
            pooled + head * rows, scores + head / H * of_sequence + head % H * of_head, of_row, own, recent[head / H],
            &far, rows, &h, places, (float *)places + room, (float *)places + 2 * room
        );
        free(memory);
    }
    return failed;
}
