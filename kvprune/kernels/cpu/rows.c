/* Rows of a table. */

#include "loops.h"

/* Counts the changes of what Python may call, and how: it calls no library that was compiled of other files. */
int kvprune_interface(void) { return 4; }

/* Scores of the 16 rows from `row` on, infinite where a row may not go, or `stay`, if not NULL, is above 0; NaN counts
   as -inf. */
INLINE floats candidates(
    const float *scores, long stride, const int32_t *positions, const int32_t *stay, long sinks, long recent, long row,
    long rows
) {
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
    x = pick(equal(x, x), x, all(-INFINITY));
    if (stay)
        x = pick(-load_some_ints(stay + row, rows - row, 0) >> 31, all(INFINITY), x);
    return pick(seen(places - (int32_t)sinks, (int32_t)(recent - sinks) - 1), x, all(INFINITY));
}

/* The row of least score among those at positions sinks .. recent - 1; of equal ones the oldest. */
VECTORS static long worst_row(
    const float *scores, long stride, const int32_t *positions, const int32_t *stay, long sinks, long recent, long rows
) {
    floats least = all(INFINITY);
    for (long row = 0; row < rows; row += LANES) {
        floats x = candidates(scores, stride, positions, stay, sinks, recent, row, rows);
        least = pick(greater(least, x), x, least);
    }
    float worst = INFINITY;
    for (int lane = 0; lane < LANES; lane++)
        if (least[lane] < worst)
            worst = least[lane];
    long slot = 0;
    int32_t oldest = INT32_MAX;
    for (long row = 0; row < rows; row += LANES) {
        floats x = candidates(scores, stride, positions, stay, sinks, recent, row, rows);
        if (sum_of(pick(equal(x, all(worst)), all(1.0f), all(0.0f))) == 0.0f)
            continue;
        for (int lane = 0; lane < LANES; lane++)
            if (x[lane] == worst && row + lane < rows && positions[row + lane] >= sinks &&
                positions[row + lane] < recent && positions[row + lane] < oldest)
                slot = row + lane, oldest = positions[row + lane];
    }
    if (oldest < INT32_MAX)
        return slot;
    for (long row = 0; row < rows; row++) /* all are kept anyway: the oldest beyond the sinks */
        if (positions[row] >= sinks && positions[row] < oldest)
            slot = row, oldest = positions[row];
    return slot;
}

/* slots [N], one for every head. Strides of scores: of a sequence, a head, a row. NaN counts as -inf, and +inf does
   where `stay` is above 0, which may be NULL. */
void kvprune_worst_rows(
    int64_t *slots, const float *scores, long of_sequence, long of_head, long of_row, const int32_t *positions,
    long stride, const int32_t *stay, long stay_stride, long sinks, long recent, long B, long H, long rows
) {
    for (long head = 0; head < B * H; head++)
        slots[head] = worst_row(
            scores + head / H * of_sequence + head % H * of_head, of_row, positions + head * stride,
            stay ? stay + head * stay_stride : NULL, sinks, recent, rows
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

/* -- heads one behind another: head `i` has `lengths[i]` rows, from row `starts[i]` on ----------------------------- */

/* A row more for every head, see kvprune_append_row; positions [N]. Lengths grow by one. */
void kvprune_append_rows(
    const column *columns, long count, const int64_t *starts, int64_t *lengths, const char *keys, long keys_sequence,
    long keys_head, const char *values, long values_sequence, long values_head, const int32_t *positions, long B, long H
) {
    for (long head = 0; head < B * H; head++) {
        for (long c = 0; c < count; c++) {
            char *row = columns[c].first + (starts[head] + lengths[head]) * columns[c].row_bytes;
            if (c == 0)
                memcpy(row, keys + head / H * keys_sequence + head % H * keys_head, columns[c].row_bytes);
            else if (c == 1)
                memcpy(row, values + head / H * values_sequence + head % H * values_head, columns[c].row_bytes);
            else if (c == 2)
                memcpy(row, positions + head, 4);
            else
                memset(row, 0, columns[c].row_bytes);
        }
        lengths[head]++;
    }
}

/* A row less for every head: its last one takes the place of that in slot `slots` [N], of `width` slots of which the
   head has the last ones. Returns 1, and does nothing, where a slot holds no row. */
int kvprune_drop_rows(
    const column *columns, long count, const int64_t *starts, int64_t *lengths, const int64_t *slots, long width, long N
) {
    for (long head = 0; head < N; head++)
        if (slots[head] < width - lengths[head] || slots[head] >= width)
            return 1;
    for (long head = 0; head < N; head++) {
        const long row = slots[head] - (width - lengths[head]), last = lengths[head] - 1;
        for (const column *c = columns; c < columns + count; c++) {
            char *rows = c->first + starts[head] * c->row_bytes;
            if (row != last)
                memcpy(rows + row * c->row_bytes, rows + last * c->row_bytes, c->row_bytes);
        }
        lengths[head]--;
    }
    return 0;
}

/* Rows of 4 bytes as padded [N, width], those of each head at its end and the filling before them. */
void kvprune_spread(
    uint32_t *padded, const uint32_t *rows, const int64_t *starts, const int64_t *lengths, uint32_t filling, long width,
    long N
) {
    for (long head = 0; head < N; head++, padded += width) {
        const long empty = width - lengths[head];
        for (long slot = 0; slot < empty; slot++)
            padded[slot] = filling;
        memcpy(padded + empty, rows + starts[head], 4 * lengths[head]);
    }
}

/* And back. */
void kvprune_collect(
    uint32_t *rows, const uint32_t *padded, const int64_t *starts, const int64_t *lengths, long width, long N
) {
    for (long head = 0; head < N; head++, padded += width)
        memcpy(rows + starts[head], padded + width - lengths[head], 4 * lengths[head]);
}
