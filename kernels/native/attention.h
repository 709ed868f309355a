/* Attention of single rows over paged keys and values. */
#ifndef OFFRAMP_ATTENTION_H
#define OFFRAMP_ATTENTION_H

#include "elementwise.h"

/* Keys or values between the one in use and the one that is prefetched. */
enum { PREFETCH_KEYS = 16 };

/* Floats between the scores of two queries: ``softmax`` writes whole vectors. */
INLINE size_t score_stride(const struct batch *b) {
    return b->longest + LANES;
}

/* Floats for the scores of the queries that share a head of keys and values. */
static size_t score_floats(const struct shape *s, const struct batch *b) {
    return s->heads / s->kv_heads * score_stride(b);
}

/* Scores of queries q [group, dim] for ``count`` keys, ``stride`` floats apart. */
INLINE void query_key_scores(const float *q, const float *k, size_t stride, int dim, int group,
                             int count, float scale, float *scores, size_t span) {
    for (int p = 0; p < count; p++, k += stride) {
        for (int i = 0; i < dim; i += LANES) __builtin_prefetch(k + PREFETCH_KEYS * stride + i);
        for (int g = 0; g < group; g++) {
            floats sums = {0};
            for (int i = 0; i < dim; i += LANES)
                sums += *(const floats *)(q + g * dim + i) * *(const floats *)(k + i);
            scores[g * span + p] = sum_lanes(sums) * scale;
        }
    }
}

/* Softmax of scores [count] in place; memory up to a multiple of LANES is written. */
static void softmax(float *scores, int64_t count) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    floats most = broadcast(-INFINITY), sums = {0};
    for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) {
        floats v = *(floats *)(scores + i);
        most = select_lanes(v > most, v, most);
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (int64_t i = 0; i < padded; i += LANES) {
        floats v = *(floats *)(scores + i);
        floats e = select_lanes(v == -INFINITY, (floats){0}, vector_exp(v - top));
        *(floats *)(scores + i) = e;
        sums += e;
    }
    float share = 1 / sum_lanes(sums);
    for (int64_t i = 0; i < padded; i += LANES) *(floats *)(scores + i) *= share;
}

/* Add to out [QUERIES, dim], in WIDE * LANES columns, ``count`` values v, ``stride`` floats apart,
 * times the weights [QUERIES, span] of QUERIES (up to four) queries. */
INLINE void weighted_values_columns(const float *v, size_t stride, int count, const float *weights,
                                    size_t span, float *out, int dim, const int QUERIES,
                                    const int WIDE) {
    floats sums[4][2];
#pragma GCC unroll 4
    for (int g = 0; g < QUERIES; g++)
#pragma GCC unroll 2
        for (int i = 0; i < WIDE; i++) sums[g][i] = *(floats *)(out + g * dim + i * LANES);
    for (int p = 0; p < count; p++, v += stride)
#pragma GCC unroll 2
        for (int i = 0; i < WIDE; i++) {
            __builtin_prefetch(v + PREFETCH_KEYS * stride + i * LANES);
            floats value = *(const floats *)(v + i * LANES);
#pragma GCC unroll 4
            for (int g = 0; g < QUERIES; g++) sums[g][i] += weights[g * span + p] * value;
        }
#pragma GCC unroll 4
    for (int g = 0; g < QUERIES; g++)
#pragma GCC unroll 2
        for (int i = 0; i < WIDE; i++) *(floats *)(out + g * dim + i * LANES) = sums[g][i];
}

/* The same in all columns. */
INLINE void weighted_values_queries(const float *v, size_t stride, int count, const float *weights,
                                    size_t span, float *out, int dim, const int QUERIES) {
    int i = 0;
    for (; dim - i >= 2 * LANES; i += 2 * LANES)
        weighted_values_columns(v + i, stride, count, weights, span, out + i, dim, QUERIES, 2);
    if (i < dim)
        weighted_values_columns(v + i, stride, count, weights, span, out + i, dim, QUERIES, 1);
}

/* The same for ``group`` queries. */
static void weighted_values(const float *v, size_t stride, int count, const float *weights,
                            size_t span, float *out, int dim, int group) {
    for (; group >= 4; group -= 4, weights += 4 * span, out += 4 * dim)
        weighted_values_queries(v, stride, count, weights, span, out, dim, 4);
    switch (group) {
    case 3: weighted_values_queries(v, stride, count, weights, span, out, dim, 3); break;
    case 2: weighted_values_queries(v, stride, count, weights, span, out, dim, 2); break;
    case 1: weighted_values_queries(v, stride, count, weights, span, out, dim, 1); break;
    default: break;
    }
}

/* Attention of the queries q [group, head_dim] of one row that share the keys and values of
 * ``head``, into out [group, head_dim]; ``scores`` [score_floats] is scratch. The context is walked
 * block by block of the row's table. */
static void attention(const struct shape *s, const struct layer *l, const struct batch *b,
                      const float *q, float *out, int row, int head, float *scores) {
    int dim = s->head_dim, group = s->heads / s->kv_heads, size = b->block_size;
    size_t stride = (size_t)s->kv_heads * dim, span = score_stride(b);
    const int64_t *blocks = b->blocks + b->first_blocks[row];
    int64_t last = b->positions[row], end = last + 1;
    int64_t first = s->window && end > s->window ? end - s->window : 0;
    const float *k = layer_keys(l, b) + head * dim, *v = k + b->page_size;
    float scale = 1 / sqrtf(dim);
    for (int64_t p = first, to; p < end; p = to) {
        to = MIN((p / size + 1) * size, end);
        query_key_scores(q, k + (blocks[p / size] * size + p % size) * stride, stride, dim, group,
                         to - p, scale, scores + p - first, span);
    }
    for (int g = 0; g < group; g++) softmax(scores + g * span, end - first);
    memset(out, 0, sizeof(float) * group * dim);
    for (int64_t p = first, to; p < end; p = to) {
        to = MIN((p / size + 1) * size, end);
        weighted_values(v + (blocks[p / size] * size + p % size) * stride, stride, to - p,
                        scores + p - first, span, out, dim, group);
    }
}

#endif
