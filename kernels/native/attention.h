/* Attention over paged keys and values.
 *
 * Rows are taken in runs: up to RUN_ROWS consecutive tokens of one sequence, which read each key
 * and value once. A row's result does not depend on the run it is in.
 */
#ifndef OFFRAMP_ATTENTION_H
#define OFFRAMP_ATTENTION_H

#include "elementwise.h"

enum { RUN_ROWS = 16 };
/* Queries and vectors of keys whose scores stay in registers. */
enum { MOST_HEADS = 6, COLUMN_HEADS = 3, KEY_VECTORS = LANES == 16 ? 2 : 1 };
/* Queries of a run from which on its keys become columns. */
enum { MANY_QUERIES = 18 };
/* Values that become floats at once. */
enum { PANEL_VALUES = 32 };
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

/* LANES keys of a part from ``first`` on, as columns: to [dim, LANES]. */
INLINE void transpose_keys(const struct part *part, int first, float *to, const int FORMAT) {
    const uint8_t *keys = part->at + first * part->stride;
    int last = part->count - first - 1;
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

/* The heads of a run's rows that read the same keys and values, ``group`` of each row: where their
 * queries or results [dim] are. */
struct run_heads {
    float *first;
    size_t stride; /* floats from one row to the next */
    int dim, group;
};

/* Heads ``from`` to ``from + HEADS - 1``. */
INLINE void find_heads(const struct run_heads *all, int from, float **found, const int HEADS) {
    int row = from / all->group, head = from % all->group;
#pragma GCC unroll 6
    for (int i = 0; i < HEADS; i++) {
        found[i] = all->first + row * all->stride + head * all->dim;
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

/* Add to ``sums`` the products of lane ``lane`` of HEADS queries q and of VECTORS * LANES keys,
 * keys [VECTORS, dim, LANES]. */
INLINE void add_lane(float *const *q, const float *keys, int dim, int lane,
                     floats (*sums)[KEY_VECTORS], const int HEADS, const int VECTORS) {
    floats own[COLUMN_HEADS][KEY_VECTORS] = {0};
    for (int i = lane; i < dim; i += LANES) {
        floats parts[KEY_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++)
            parts[v] = in_register(*(const floats *)(keys + (v * dim + i) * LANES));
#pragma GCC unroll 3
        for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) own[h][v] += q[h][i] * parts[v];
    }
#pragma GCC unroll 3
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) sums[h][v] += own[h][v];
}

/* Scores of HEADS queries from number ``from`` on for these keys, to [HEADS, span]. The lanes that
 * score_rows has are added up in its order, that of sum_lanes. */
INLINE void score_columns(const struct run_heads *queries, int from, const float *keys,
                          const floats *scales, float *to, size_t span, const int HEADS,
                          const int VECTORS) {
    int dim = queries->dim;
    float *q[MOST_HEADS];
    find_heads(queries, from, q, HEADS);
    floats halves[2][COLUMN_HEADS][KEY_VECTORS] = {0};
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
        for (int lane = half; lane < 4; lane += 2) {
            floats quarter[COLUMN_HEADS][KEY_VECTORS] = {0}, other[COLUMN_HEADS][KEY_VECTORS] = {0};
            add_lane(q, keys, dim, lane, quarter, HEADS, VECTORS);
            if (LANES == 16) add_lane(q, keys, dim, lane + 8, quarter, HEADS, VECTORS);
            add_lane(q, keys, dim, lane + 4, other, HEADS, VECTORS);
            if (LANES == 16) add_lane(q, keys, dim, lane + 12, other, HEADS, VECTORS);
#pragma GCC unroll 3
            for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) halves[half][h][v] += quarter[h][v] + other[h][v];
        }
#pragma GCC unroll 3
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++)
            *(floats *)(to + h * span + v * LANES) =
                scales[v] * (halves[0][h][v] + halves[1][h][v]);
}

/* The same of ``count`` queries for all keys of a part, which become columns first: that pays for
 * many queries. ``panel`` [KEY_VECTORS, dim, LANES] is scratch. */
INLINE void score_many(const struct run_heads *queries, int count, const struct part *part,
                       float scale, float *to, size_t span, float *panel, const int FORMAT) {
    for (int i = 0; i < part->count; i += KEY_VECTORS * LANES) {
        int left = part->count - i, from = 0;
        floats scales[KEY_VECTORS];
        for (int v = 0; v < KEY_VECTORS && v * LANES < left; v++) {
            transpose_keys(part, i + v * LANES, panel + v * LANES * part->dim, FORMAT);
            scales[v] = score_scales(part, i + v * LANES, scale, FORMAT);
        }
#define SCORE_BOTH(HEADS)                                                                          \
    score_columns(queries, from, panel, scales, to + i + from * span, span, HEADS, KEY_VECTORS)
#define SCORE(HEADS)                                                                               \
    score_columns(queries, from, panel, scales, to + i + from * span, span, HEADS, 1)
        if (left > LANES) {
            TILES(3, SCORE_BOTH);
            TILES(1, SCORE_BOTH);
        } else {
            TILES(3, SCORE);
            TILES(1, SCORE);
        }
#undef SCORE_BOTH
#undef SCORE
    }
}

/* Softmax of scores [count] in place; memory up to a multiple of LANES is written: numbers next to
 * nothing, which no sum of the others is changed by. */
static void softmax(float *scores, int64_t count) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    floats most = broadcast(-INFINITY), sums = {0};
    for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) most = larger(*(floats *)(scores + i), most);
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (int64_t i = 0; i < padded; i += LANES) {
        floats e = vector_exp(*(floats *)(scores + i) - top);
        *(floats *)(scores + i) = e;
        sums += e;
    }
    float share = 1 / sum_lanes(sums);
    for (int64_t i = 0; i < padded; i += LANES) *(floats *)(scores + i) *= share;
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
    if (FORMAT == KV_FP32 || count < MANY_QUERIES) {
        value_tiles(results, count, part->at, part->stride, part->ahead, part->count, weights, span,
                    FORMAT);
        return;
    }
    int dim = part->dim;
    for (int i = 0; i < part->count; i += PANEL_VALUES) {
        int values = MIN(PANEL_VALUES, part->count - i);
        for (int j = 0; j < values; j++)
            for (int c = 0; c < dim; c += LANES)
                *(floats *)(panel + j * dim + c) =
                    load_kv(part->at + (i + j) * part->stride + c * number_bytes(FORMAT), FORMAT);
        value_tiles(results, count, (const uint8_t *)panel, sizeof(float) * dim, 0, values,
                    weights + i, span, KV_FP32);
    }
}

/* Attention of a run's rows ``row`` to ``row + count - 1``: of those queries that read the keys and
 * values of ``heads`` heads from ``head`` on. Queries q and results ``out`` of the rows are
 * ``q_stride`` and ``out_stride`` floats apart; ``scores`` [score_floats] is scratch. */
INLINE void run_attention(const struct shape *s, const struct layer *l, const struct batch *b,
                          const float *q, size_t q_stride, float *out, size_t out_stride, int row,
                          int count, int head, int heads, float *scores, float *panel,
                          const int FORMAT) {
    int dim = s->head_dim, group = s->heads / s->kv_heads;
    size_t span = score_stride(b);
    const int64_t *positions = b->positions + row;
    const struct context c = context_of(s, l, b, row, count, FORMAT);
    int64_t first = c.first, end = c.end;
    float scale = 1 / sqrtf(dim);
    size_t own = (size_t)head * group * dim;
    for (int i = 0; i < c.parts; i++) {
        for (int h = 0; h < heads; h++) {
            struct part part = context_part(&c, i, head + h, FORMAT);
            struct run_heads queries = {(float *)q + own + h * group * dim, q_stride, dim, group};
            float *to = scores + h * count * group * span + part.first - first;
            if (count * group < MANY_QUERIES)
                score_few(&queries, count * group, &part, scale, to, span, FORMAT);
            else
                score_many(&queries, count * group, &part, scale, to, span, panel, FORMAT);
        }
    }
    for (int r = 0; r < count; r++) {
        int64_t own_first = context_start(s, positions[r]) - first;
        int64_t own_end = positions[r] + 1 - first;
        for (int j = 0; j < heads * group; j++) {
            float *weights = scores + ((j / group * count + r) * group + j % group) * span;
            softmax(weights + own_first, own_end - own_first);
            memset(weights, 0, sizeof(float) * own_first);
            memset(weights + own_end, 0, sizeof(float) * (end - first - own_end));
        }
        memset(out + r * out_stride + own, 0, sizeof(float) * heads * group * dim);
    }
    for (int i = c.parts; i < 2 * c.parts; i++) {
        for (int h = 0; h < heads; h++) {
            struct part part = context_part(&c, i, head + h, FORMAT);
            struct run_heads results = {out + own + h * group * dim, out_stride, dim, group};
            float *weights = scores + h * count * group * span + part.first - first;
            add_values(&results, count * group, &part, weights, span, panel, FORMAT);
        }
    }
}

#define ATTENTION_OF(FORMAT)                                                                       \
    static void attention_##FORMAT(const struct shape *s, const struct layer *l,                   \
                                   const struct batch *b, const float *q, size_t q_stride,         \
                                   float *out, size_t out_stride, int row, int count, int head,    \
                                   int heads, float *scores, float *panel) {                       \
        run_attention(s, l, b, q, q_stride, out, out_stride, row, count, head, heads, scores,      \
                      panel, FORMAT);                                                              \
    }
ATTENTION_OF(KV_FP32)
ATTENTION_OF(KV_FP16)
ATTENTION_OF(KV_INT16)
#undef ATTENTION_OF

/* The heads of keys and values whose attention is an item of work. Reading all heads of a context
 * at once reads memory in order; with runs of several rows or few runs, parallel work counts for
 * more. */
INLINE int heads_together(const struct shape *s, const struct batch *b, int runs,
                          const struct worker *worker) {
    return runs == b->rows && runs >= 2 * worker->shared->threads ? s->kv_heads : 1;
}

/* Items of the phase that make a chunk. Later rows of a prompt read more: in large chunks threads
 * would wait for the last one. */
INLINE int attention_chunk(const struct batch *b, int runs, int items,
                           const struct worker *worker) {
    return runs == b->rows ? chunk_size(items, worker) : 1;
}

/* Attention of all rows, one phase. Queries q and results ``out`` of the rows are ``q_stride`` and
 * ``out_stride`` floats apart. */
static void attention(const struct shape *s, const struct layer *l, const struct batch *b, int runs,
                      const float *q, size_t q_stride, float *out, size_t out_stride,
                      struct worker *worker) {
    int together = heads_together(s, b, runs, worker), items = runs * s->kv_heads / together;
    int size = attention_chunk(b, runs, items, worker);
    FOR_EACH_CHUNK(worker, i, end, size, items)
        for (; i < end; i++) {
            const int32_t *run = worker->shared->run_starts + i % runs;
            int row = run[0], count = run[1] - row;
            (b->kv_format == KV_FP32   ? attention_KV_FP32
             : b->kv_format == KV_FP16 ? attention_KV_FP16
                                       : attention_KV_INT16)(
                s, l, b, q + row * q_stride, q_stride, out + row * out_stride, out_stride, row,
                count, i / runs * together, together, worker->scores, worker->panel);
        }
}

#endif
