/* Noisy, tempered softmaxes: see noise.py. */

#include "loops.h"

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
    pair sums = pair_of(all(0.0f));
    for (long key = 0; key < keys; key += LANES) {
        const long count = keys - key < LANES ? keys - key : LANES;
        floats weight = exp_of(load_some(row + key, count, -INFINITY) - top);
        if (plain) {
            ints places = load_some_ints(positions + key, count, -1);
            words hash = (words)load_some_ints(columns + key, count, 0) ^ word;
            weight = pick(seen(places, query), weight / exponential(hash), all(0.0f));
        }
        add(&sums, weight);
        store_some(row + key, weight, count);
    }
    const float total = sum_of_pair(sums) + expf(sink - top);
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

/* Add to mass the noisy, tempered softmax whose logits are the logarithms of probabilities: (p / E**scale)**(1 / tau),
   E being -log u of a uniform u, over their sum. */
VECTORS static void add_noisy_query(
    float *mass, float *weights, const float *probabilities, const int32_t *positions, uint32_t word, float scale,
    float temperature, float share, long keys
) {
    const float cold = 1.0f / temperature;
    pair sums = pair_of(all(0.0f));
    for (long key = 0; key < keys; key += LANES) {
        const long count = keys - key;
        floats p = load_some(probabilities + key, count, 0.0f);
        ints possible = greater(p, all(1e-37f)); /* so the logarithm is that of a normal number */
        p = pick(possible, p, all(1.0f));
        floats noise = exponential(mix((words)load_some_ints(positions + key, count, -1) ^ COLUMN) ^ word);
        if (scale == 1.0f)
            p /= noise;
        if (scale != 1.0f)
            p = exp_of(cold * (log_of(p) - scale * log_of(noise)));
        else if (temperature != 1.0f)
            p = exp_of(cold * log_of(p));
        p = pick(possible, p, all(0.0f));
        add(&sums, p);
        store_some(weights + key, p, count);
    }
    const float total = sum_of_pair(sums), part = total > 0.0f ? share / total : 0.0f;
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
