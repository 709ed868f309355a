/* The products of attention: scores of queries and keys, and sums of weighted values.
 *
 * Keys and values come in parts, what a block has of them (kv_pages.h). However a score or a sum is
 * made, its numbers are added up in the same order.
 */
#ifndef OFFRAMP_ATTENTION_PRODUCTS_H
#define OFFRAMP_ATTENTION_PRODUCTS_H

#include "elementwise.h"

/* Queries whose scores stay in registers, most and for keys as columns. */
enum { MOST_HEADS = 6, COLUMN_HEADS = LANES == 16 ? 6 : 4 };
/* Queries of a run from which on its keys become columns. */
enum { MANY_QUERIES = 18 };
/* Values that become floats at once. */
enum { PANEL_VALUES = 32 };
/* Columns of values whose sums stay in registers for four queries, in vectors. */
enum { VALUE_VECTORS = LANES == 16 ? 4 : 2 };

/* LANES keys of a part from ``first`` on, as columns: to [dim, LANES]. */
INLINE void transpose_keys(const struct part *part, int first, float *to, const int FORMAT) {
    const uint8_t *keys = part->at + first * part->stride;
    int last = part->count - first - 1;
    size_t row_bytes = part->dim * number_bytes(FORMAT);
    for (int i = 0; i <= MIN(last, LANES - 1); i++)
        fetch(keys + i * part->stride + part->ahead, row_bytes);
    for (int column = 0; column < part->dim; column += LANES, to += LANES * LANES) {
        floats rows[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            rows[i] =
                load_kv(keys + MIN(i, last) * part->stride + column * number_bytes(FORMAT), FORMAT);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) *(floats *)(to + i * LANES) = rows[i];
    }
}

/* What products of queries with LANES keys of a part, from ``first`` on, are multiplied with. */
INLINE floats score_scales(const struct part *part, int first, float scale, const int FORMAT) {
    if (FORMAT != KV_INT16) return broadcast(scale);
    return scale * load_scales(part->scales + first, part->count - first, 0);
}

/* Heads of a run's rows, of which ``group`` of each row read the same keys and values: where their
 * queries or results [dim] are. */
struct run_heads {
    float *first;
    size_t row_step, head_step; /* floats from one to the next */
    int dim, group;
};

/* Heads ``from`` to ``from + HEADS - 1``. */
INLINE void find_heads(const struct run_heads *all, int from, float **found, const int HEADS) {
    int row = from / all->group, head = from % all->group;
#pragma GCC unroll 6
    for (int i = 0; i < HEADS; i++) {
        found[i] = all->first + row * all->row_step + head * all->head_step;
        if (++head == all->group) head = 0, row++;
    }
}

/* DO(HEADS) for the next HEADS of ``count`` heads, as often as there are so many left. */
#define TILES(HEADS, DO)                                                                           \
    for (; count - from >= HEADS; from += HEADS) DO(HEADS)

/* Scores of HEADS queries from number ``from`` on for LANES keys of a part, the ``first`` and those
 * behind it, to [HEADS, span]. Lanes of columns are multiplied and then added up. FULL says that
 * there are so many keys. */
INLINE void score_rows(const struct run_heads *queries, int from, const struct part *part,
                       int first, floats scales, float *to, size_t span, const int HEADS,
                       const int FULL, const int FORMAT) {
    const uint8_t *k = part->at + first * part->stride;
    int last = part->count - first - 1;
    size_t row_bytes = part->dim * number_bytes(FORMAT);
    float *q[MOST_HEADS];
    floats quarters[4][4];
    find_heads(queries, from, q, HEADS);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        floats sums[4][LANES / 4];
        const uint8_t *keys[LANES / 4];
#pragma GCC unroll 4
        for (int j = 0; j < LANES / 4; j++) {
            keys[j] = k + (FULL ? 4 * j + i : MIN(4 * j + i, last)) * part->stride;
            if (!from) fetch(keys[j] + part->ahead, row_bytes);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sums[h][j] = (floats){0};
        }
        for (int column = 0; column < queries->dim; column += LANES) {
            floats parts[LANES / 4];
#pragma GCC unroll 4
            for (int j = 0; j < LANES / 4; j++)
                parts[j] = in_register(load_kv(keys[j] + column * number_bytes(FORMAT), FORMAT));
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                floats query = *(const floats *)(q[h] + column);
#pragma GCC unroll 4
                for (int j = 0; j < LANES / 4; j++) sums[h][j] += query * parts[j];
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) quarters[h][i] = sum_lanes_begin(sums[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
        *(floats *)(to + h * span) = scales * sum_lanes_end(quarters[h]);
}

/* The same of ``count`` queries for all keys of a part. */
INLINE void score_few(const struct run_heads *queries, int count, const struct part *part,
                      float scale, float *to, size_t span, const int FORMAT) {
    for (int i = 0; i < part->count; i += LANES, to += LANES) {
        int from = 0;
        floats scales = score_scales(part, i, scale, FORMAT);
#define SCORE_FULL(HEADS)                                                                          \
    score_rows(queries, from, part, i, scales, to + from * span, span, HEADS, 1, FORMAT)
#define SCORE(HEADS)                                                                               \
    score_rows(queries, from, part, i, scales, to + from * span, span, HEADS, 0, FORMAT)
        if (part->count - i >= LANES) {
            TILES(4, SCORE_FULL);
            TILES(3, SCORE_FULL);
            TILES(2, SCORE_FULL);
            TILES(1, SCORE_FULL);
        } else {
            TILES(3, SCORE);
            TILES(1, SCORE);
        }
#undef SCORE_FULL
#undef SCORE
    }
}

/* The products of lane ``lane`` of HEADS queries q and of LANES keys [dim, LANES], added up. */
INLINE void sum_lane(float *const *q, const float *keys, int dim, int lane, floats *sums,
                     const int HEADS) {
    floats key = in_register(*(const floats *)(keys + lane * LANES));
#pragma GCC unroll 6
    for (int h = 0; h < HEADS; h++) sums[h] = q[h][lane] * key;
    for (int i = lane + LANES; i < dim; i += LANES) {
        key = in_register(*(const floats *)(keys + i * LANES));
#pragma GCC unroll 6
        for (int h = 0; h < HEADS; h++) sums[h] += q[h][i] * key;
    }
}

/* The same of a lane of the lower eight and, of 16, the one that sum_lanes adds to it first. */
INLINE void sum_lane_of_eight(float *const *q, const float *keys, int dim, int lane, floats *sums,
                              const int HEADS) {
    sum_lane(q, keys, dim, lane, sums, HEADS);
    if (LANES == 8) return;
    floats upper[COLUMN_HEADS];
    sum_lane(q, keys, dim, lane + 8, upper, HEADS);
#pragma GCC unroll 6
    for (int h = 0; h < HEADS; h++) sums[h] += upper[h];
}

/* Scores of HEADS queries from number ``from`` on for these keys, to [HEADS, span]. The lanes that
 * score_rows has are added up in its order, that of sum_lanes. */
INLINE void score_columns(const struct run_heads *queries, int from, const float *keys,
                          floats scales, float *to, size_t span, const int HEADS) {
    int dim = queries->dim;
    float *q[MOST_HEADS];
    find_heads(queries, from, q, HEADS);
    floats halves[2][COLUMN_HEADS];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
        for (int lane = half; lane < 4; lane += 2) {
            floats quarter[COLUMN_HEADS], other[COLUMN_HEADS];
            sum_lane_of_eight(q, keys, dim, lane, quarter, HEADS);
            sum_lane_of_eight(q, keys, dim, lane + 4, other, HEADS);
#pragma GCC unroll 6
            for (int h = 0; h < HEADS; h++) {
                floats both = quarter[h] + other[h];
                if (lane > half) both += halves[half][h];
                halves[half][h] = both;
            }
        }
#pragma GCC unroll 6
    for (int h = 0; h < HEADS; h++)
        *(floats *)(to + h * span) = scales * (halves[0][h] + halves[1][h]);
}

/* The same of ``count`` queries. */
static void score_panel(const struct run_heads *queries, int count, const float *keys,
                        floats scales, float *to, size_t span) {
    int from = 0;
#define SCORE(HEADS) score_columns(queries, from, keys, scales, to + from * span, span, HEADS)
    TILES(COLUMN_HEADS, SCORE);
    TILES(3, SCORE);
    TILES(1, SCORE);
#undef SCORE
}

/* The same for all keys of a part, which become columns first: that pays for many queries.
 * ``panel`` [dim, LANES] is scratch. */
INLINE void score_many(const struct run_heads *queries, int count, const struct part *part,
                       float scale, float *to, size_t span, float *panel, const int FORMAT) {
    for (int i = 0; i < part->count; i += LANES) {
        transpose_keys(part, i, panel, FORMAT);
        score_panel(queries, count, panel, score_scales(part, i, scale, FORMAT), to + i, span);
    }
}

/* Add to HEADS results from number ``from`` on, in WIDE * LANES columns from ``column`` on,
 * ``count`` values v, ``stride`` apart, times the weights [HEADS, span]. */
INLINE void value_tile(const struct run_heads *results, int from, const uint8_t *v, size_t stride,
                       ptrdiff_t ahead, int count, const float *weights, size_t span, int column,
                       const int HEADS, const int WIDE, const int FORMAT) {
    float *out[MOST_HEADS];
    floats sums[MOST_HEADS][VALUE_VECTORS];
    find_heads(results, from, out, HEADS);
#pragma GCC unroll 6
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) sums[h][i] = *(floats *)(out[h] + column + i * LANES);
    v += column * number_bytes(FORMAT);
    for (int p = 0; p < count; p++, v += stride) {
        if (ahead && !from) fetch(v + ahead, WIDE * LANES * number_bytes(FORMAT));
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) {
            floats value = in_register(load_kv(v + i * LANES * number_bytes(FORMAT), FORMAT));
#pragma GCC unroll 6
            for (int h = 0; h < HEADS; h++) sums[h][i] += weights[h * span + p] * value;
        }
    }
#pragma GCC unroll 6
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) *(floats *)(out[h] + column + i * LANES) = sums[h][i];
}

/* The same for ``count`` results, in all columns. */
INLINE void value_tiles(const struct run_heads *results, int count, const uint8_t *v, size_t stride,
                        ptrdiff_t ahead, int values, const float *weights, size_t span,
                        const int FORMAT) {
    const int WIDTH = VALUE_VECTORS * LANES;
    int column = 0;
#define ADD(HEADS)                                                                                 \
    value_tile(results, from, v, stride, ahead, values, weights + from * span, span, column,       \
               HEADS, WIDE, FORMAT)
#define ADD_ALL                                                                                    \
    TILES(6, ADD);                                                                                 \
    TILES(4, ADD);                                                                                 \
    TILES(3, ADD);                                                                                 \
    TILES(2, ADD);                                                                                 \
    TILES(1, ADD)
    for (; results->dim - column >= WIDTH; column += WIDTH) {
        const int WIDE = VALUE_VECTORS;
        int from = 0;
        ADD_ALL;
    }
    for (; column < results->dim; column += LANES) {
        const int WIDE = 1;
        int from = 0;
        ADD_ALL;
    }
#undef ADD
#undef ADD_ALL
}

#undef TILES

static void float_value_tiles(const struct run_heads *results, int count, const uint8_t *v,
                              size_t stride, ptrdiff_t ahead, int values, const float *weights,
                              size_t span) {
    value_tiles(results, count, v, stride, ahead, values, weights, span, KV_FP32);
}

/* Multiply the weights [queries, span] of a part's values with the values' scales. */
INLINE void scale_weights(float *weights, size_t span, int queries, const struct part *part) {
    for (int i = 0; i < part->count; i += LANES) {
        /* What lies behind belongs to other values. */
        floats scales = load_scales(part->scales + i, part->count - i, 1);
        for (int j = 0; j < queries; j++) *(floats *)(weights + j * span + i) *= scales;
    }
}

/* Add the values of a part, times the weights [count, span], to ``count`` results. For many results
 * the values become floats first, in ``panel`` [PANEL_VALUES, dim]. */
INLINE void add_values(const struct run_heads *results, int count, const struct part *part,
                       float *weights, size_t span, float *panel, const int FORMAT) {
    if (FORMAT == KV_INT16) scale_weights(weights, span, count, part);
    if (FORMAT == KV_FP32) {
        float_value_tiles(results, count, part->at, part->stride, part->ahead, part->count, weights,
                          span);
        return;
    }
    if (count < MANY_QUERIES) {
        value_tiles(results, count, part->at, part->stride, part->ahead, part->count, weights, span,
                    FORMAT);
        return;
    }
    int dim = part->dim;
    size_t row_bytes = dim * number_bytes(FORMAT);
    for (int i = 0; i < part->count; i += PANEL_VALUES) {
        int values = MIN(PANEL_VALUES, part->count - i);
        for (int j = 0; j < values; j++) {
            const uint8_t *v = part->at + (i + j) * part->stride;
            fetch(v + part->ahead, row_bytes);
            for (int c = 0; c < dim; c += LANES)
                *(floats *)(panel + j * dim + c) = load_kv(v + c * number_bytes(FORMAT), FORMAT);
        }
        float_value_tiles(results, count, (const uint8_t *)panel, sizeof(float) * dim, 0, values,
                          weights + i, span);
    }
}

#endif
