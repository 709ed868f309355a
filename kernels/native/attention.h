/* Attention over paged keys and values.
 *
 * Rows are taken in runs: up to RUN_ROWS consecutive tokens of one sequence, which read each key
 * and value once. A row's result does not depend on the run it is in.
 */
#ifndef OFFRAMP_ATTENTION_H
#define OFFRAMP_ATTENTION_H

#include "elementwise.h"

enum { RUN_ROWS = 8 };
/* Columns of values whose sums stay in registers for four queries, in vectors. */
enum { VALUE_VECTORS = LANES == 16 ? 4 : 2 };

/* Runs of the batch: run i is the rows starts[i] .. starts[i + 1] - 1. Returns their number. */
static int find_runs(const struct batch *b, int32_t *starts) {
    int runs = 0;
    for (int row = 0; row < b->rows; row++) {
        int same = row > 0 && b->first_blocks[row] == b->first_blocks[row - 1] &&
                   b->positions[row] == b->positions[row - 1] + 1;
        if (!same || row - starts[runs - 1] == RUN_ROWS) starts[runs++] = row;
    }
    starts[runs] = b->rows;
    return runs;
}

/* Floats between the scores of two queries: whole vectors are written. */
INLINE size_t score_stride(const struct batch *b) {
    return b->longest + LANES;
}

/* Floats for the scores that a call of ``attention`` makes. */
static size_t score_floats(const struct shape *s, const struct batch *b) {
    return MAX(RUN_ROWS * (s->heads / s->kv_heads), s->heads) * score_stride(b);
}

/* Keys and values are fp16 (HALF) or fp32; their addresses and the distances between them are in
 * bytes. */
INLINE size_t number_bytes(const int HALF) {
    return HALF ? 2 : 4;
}

INLINE floats load_kv(const uint8_t *at, const int HALF) {
    return HALF ? load_fp16(at) : *(const floats *)at;
}

/* Scores of QUERIES (up to four) queries q [QUERIES, dim] for ``count`` keys, up to LANES,
 * ``stride`` apart, to [QUERIES, span]; memory up to a multiple of LANES is written. Where
 * ``ahead`` is not 0, what lies so far behind each key is fetched into the cache. */
INLINE void score_keys(const float *q, const uint8_t *k, size_t stride, int dim, int count,
                       float scale, float *to, size_t span, ptrdiff_t ahead, const int QUERIES,
                       const int FULL, const int HALF) {
    floats quarters[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        floats sums[4][LANES / 4];
        const uint8_t *keys[LANES / 4];
#pragma GCC unroll 4
        for (int j = 0; j < LANES / 4; j++) {
            keys[j] = k + (FULL ? 4 * j + i : MIN(4 * j + i, count - 1)) * stride;
#pragma GCC unroll 4
            for (int g = 0; g < QUERIES; g++) sums[g][j] = (floats){0};
        }
        for (int column = 0; column < dim; column += LANES) {
            floats parts[LANES / 4];
#pragma GCC unroll 4
            for (int j = 0; j < LANES / 4; j++) {
                const uint8_t *at = keys[j] + column * number_bytes(HALF);
                if (ahead) __builtin_prefetch(at + ahead);
                parts[j] = in_register(load_kv(at, HALF));
            }
#pragma GCC unroll 4
            for (int g = 0; g < QUERIES; g++) {
                floats query = *(const floats *)(q + g * dim + column);
#pragma GCC unroll 4
                for (int j = 0; j < LANES / 4; j++) sums[g][j] += query * parts[j];
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < QUERIES; g++) quarters[g][i] = sum_lanes_begin(sums[g]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < QUERIES; g++)
        *(floats *)(to + g * span) = scale * sum_lanes_end(quarters[g]);
}

INLINE void score_queries(const float *q, const uint8_t *k, size_t stride, int dim, int count,
                          float scale, float *to, size_t span, ptrdiff_t ahead, const int QUERIES,
                          const int HALF) {
    for (; count >= LANES; count -= LANES, k += LANES * stride, to += LANES) {
        if (ahead)
            score_keys(q, k, stride, dim, LANES, scale, to, span, ahead, QUERIES, 1, HALF);
        else
            score_keys(q, k, stride, dim, LANES, scale, to, span, 0, QUERIES, 1, HALF);
    }
    if (count) score_keys(q, k, stride, dim, count, scale, to, span, ahead, QUERIES, 0, HALF);
}

#define SCORE_QUERIES(QUERIES)                                                                     \
    score_queries(q, k, stride, dim, count, scale, to, span, ahead, QUERIES, HALF)

/* The same for ``count`` keys in a block and ``group`` queries. */
INLINE void score_block(const float *q, const uint8_t *k, size_t stride, int dim, int count,
                        float scale, float *to, size_t span, ptrdiff_t ahead, int group,
                        const int HALF) {
    for (; group >= 4; group -= 4, q += 4 * dim, to += 4 * span, ahead = 0) SCORE_QUERIES(4);
    switch (group) {
    case 3: SCORE_QUERIES(3); break;
    case 2: SCORE_QUERIES(2); break;
    case 1: SCORE_QUERIES(1); break;
    default: break;
    }
}

#undef SCORE_QUERIES

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

/* Add to out [QUERIES, dim], in WIDE * LANES columns, ``count`` values v, ``stride`` apart, times
 * the weights [QUERIES, span] of QUERIES (up to four) queries; ``ahead`` as above. */
INLINE void weighted_values_columns(const uint8_t *v, size_t stride, int count,
                                    const float *weights, size_t span, float *out, int dim,
                                    ptrdiff_t ahead, const int QUERIES, const int WIDE,
                                    const int HALF) {
    floats sums[4][VALUE_VECTORS];
#pragma GCC unroll 4
    for (int g = 0; g < QUERIES; g++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) sums[g][i] = *(floats *)(out + g * dim + i * LANES);
    for (int p = 0; p < count; p++, v += stride)
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) {
            const uint8_t *at = v + i * LANES * number_bytes(HALF);
            if (ahead) __builtin_prefetch(at + ahead);
            floats value = in_register(load_kv(at, HALF));
#pragma GCC unroll 4
            for (int g = 0; g < QUERIES; g++) sums[g][i] += weights[g * span + p] * value;
        }
#pragma GCC unroll 4
    for (int g = 0; g < QUERIES; g++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) *(floats *)(out + g * dim + i * LANES) = sums[g][i];
}

#define WEIGHTED_VALUES(AHEAD, WIDE)                                                               \
    weighted_values_columns(v + i * number_bytes(HALF), stride, count, weights, span, out + i,     \
                            dim, AHEAD, QUERIES, WIDE, HALF)

/* The same in all columns. */
INLINE void weighted_values_queries(const uint8_t *v, size_t stride, int count,
                                    const float *weights, size_t span, float *out, int dim,
                                    ptrdiff_t ahead, const int QUERIES, const int HALF) {
    const int WIDTH = VALUE_VECTORS * LANES;
    int i = 0;
    for (; dim - i >= WIDTH; i += WIDTH) {
        if (ahead)
            WEIGHTED_VALUES(ahead, VALUE_VECTORS);
        else
            WEIGHTED_VALUES(0, VALUE_VECTORS);
    }
    for (; i < dim; i += LANES) WEIGHTED_VALUES(ahead, 1);
}

#undef WEIGHTED_VALUES
#define WEIGHTED_VALUES(QUERIES)                                                                   \
    weighted_values_queries(v, stride, count, weights, span, out, dim, ahead, QUERIES, HALF)

/* The same for ``group`` queries. */
INLINE void weighted_values(const uint8_t *v, size_t stride, int count, const float *weights,
                            size_t span, float *out, int dim, ptrdiff_t ahead, int group,
                            const int HALF) {
    for (; group >= 4; group -= 4, weights += 4 * span, out += 4 * dim, ahead = 0)
        WEIGHTED_VALUES(4);
    switch (group) {
    case 3: WEIGHTED_VALUES(3); break;
    case 2: WEIGHTED_VALUES(2); break;
    case 1: WEIGHTED_VALUES(1); break;
    default: break;
    }
}

#undef WEIGHTED_VALUES

/* The first position that a row at ``position`` sees. */
INLINE int64_t context_start(const struct shape *s, int64_t position) {
    return s->window && position >= s->window ? position + 1 - s->window : 0;
}

/* What a run reads of some heads' keys and values: a part for each block of its context, first of
 * the keys, then of the values. */
struct context {
    const struct batch *batch;
    const int64_t *blocks;
    const uint8_t *keys;
    size_t stride, values; /* bytes from one key to the next, and from keys to values */
    int64_t first, end;
    int parts; /* of the keys alone */
};

/* ``count`` keys, or values, from position ``first`` on. */
struct part {
    const uint8_t *at;
    int64_t first;
    int count;
};

INLINE struct part context_part(const struct context *c, int index) {
    int size = c->batch->block_size, values = index >= c->parts;
    int64_t block = c->first / size + index - (values ? c->parts : 0);
    int64_t first = MAX(c->first, block * size), after = MIN((block + 1) * size, c->end);
    int64_t place = c->blocks[block] * size + first - block * size;
    const uint8_t *at = c->keys + (values ? c->values : 0) + place * c->stride;
    return (struct part){at, first, after - first};
}

/* Attention of a run's rows ``row`` to ``row + count - 1``: of those queries that read the keys and
 * values of ``heads`` heads from ``head`` on. Queries q and results ``out`` of the rows are
 * ``q_stride`` and ``out_stride`` floats apart; ``scores`` [score_floats] is scratch. */
INLINE void run_attention(const struct shape *s, const struct layer *l, const struct batch *b,
                          const float *q, size_t q_stride, float *out, size_t out_stride, int row,
                          int count, int head, int heads, float *scores, const int HALF) {
    int dim = s->head_dim, group = s->heads / s->kv_heads, size = b->block_size;
    size_t bytes = number_bytes(HALF), stride = s->kv_heads * dim * bytes, span = score_stride(b);
    const int64_t *positions = b->positions + row;
    int64_t first = context_start(s, positions[0]), end = positions[count - 1] + 1;
    const struct context c = {
        .batch = b,
        .blocks = b->blocks + b->first_blocks[row],
        .keys = layer_keys(l, b) + head * dim * bytes,
        .stride = stride,
        .values = b->page_size * bytes,
        .first = first,
        .end = end,
        .parts = (end - 1) / size - first / size + 1,
    };
    float scale = 1 / sqrtf(dim);
    q += (size_t)head * group * dim;
    out += (size_t)head * group * dim;
    struct part part = context_part(&c, 0), next;
    for (int i = 0; i < c.parts; i++, part = next) {
        next = context_part(&c, i + 1);
        float *to = scores + part.first - first;
        for (int r = 0; r < count; r++)
            for (int h = 0; h < heads; h++, to += group * span) {
                score_block(q + r * q_stride + h * group * dim, part.at + h * dim * bytes, stride,
                            dim, part.count, scale, to, span, r ? 0 : next.at - part.at, group,
                            HALF);
            }
    }
    for (int r = 0; r < count; r++) {
        int64_t own_first = context_start(s, positions[r]) - first;
        int64_t own_end = positions[r] + 1 - first;
        for (int j = 0; j < heads * group; j++) {
            float *own = scores + (r * heads * group + j) * span;
            softmax(own + own_first, own_end - own_first);
            memset(own, 0, sizeof(float) * own_first);
            memset(own + own_end, 0, sizeof(float) * (end - first - own_end));
        }
        memset(out + r * out_stride, 0, sizeof(float) * heads * group * dim);
    }
    for (int i = c.parts; i < 2 * c.parts; i++, part = next) {
        next = context_part(&c, MIN(i + 1, 2 * c.parts - 1));
        const float *weights = scores + part.first - first;
        for (int r = 0; r < count; r++)
            for (int h = 0; h < heads; h++, weights += group * span)
                weighted_values(part.at + h * dim * bytes, stride, part.count, weights, span,
                                out + r * out_stride + h * group * dim, dim,
                                r ? 0 : next.at - part.at, group, HALF);
    }
}

#define ATTENTION_OF(NAME, HALF)                                                                   \
    static void NAME(const struct shape *s, const struct layer *l, const struct batch *b,          \
                     const float *q, size_t q_stride, float *out, size_t out_stride, int row,      \
                     int count, int head, int heads, float *scores) {                              \
        run_attention(s, l, b, q, q_stride, out, out_stride, row, count, head, heads, scores,      \
                      HALF);                                                                       \
    }
ATTENTION_OF(attention_fp32, 0)
ATTENTION_OF(attention_fp16, 1)
#undef ATTENTION_OF

/* Attention of all rows, one phase. Queries q and results ``out`` of the rows are ``q_stride`` and
 * ``out_stride`` floats apart. */
static void attention(const struct shape *s, const struct layer *l, const struct batch *b, int runs,
                      const float *q, size_t q_stride, float *out, size_t out_stride,
                      struct worker *worker) {
    /* Reading all heads of a context at once reads memory in order; with runs of several rows or
     * few runs, parallel work counts for more. */
    int together = runs == b->rows && runs >= 2 * worker->shared->threads ? s->kv_heads : 1;
    int items = runs * s->kv_heads / together, size = chunk_size(items, worker);
    FOR_EACH_CHUNK(worker, i, end, size, items)
        for (; i < end; i++) {
            const int32_t *run = worker->shared->run_starts + i * together / s->kv_heads;
            int row = run[0], count = run[1] - row;
            (b->half ? attention_fp16 : attention_fp32)(
                s, l, b, q + row * q_stride, q_stride, out + row * out_stride, out_stride, row,
                count, i * together % s->kv_heads, together, worker->scores);
        }
}

#endif
