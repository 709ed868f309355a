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

/* The context of the rows ``row`` to ``row + count - 1``, of heads from ``head`` on. */
INLINE struct context context_of(const struct shape *s, const struct layer *l,
                                 const struct batch *b, int row, int count, int head,
                                 const int HALF) {
    int size = b->block_size;
    size_t bytes = number_bytes(HALF);
    int64_t first = context_start(s, b->positions[row]), end = b->positions[row + count - 1] + 1;
    return (struct context){
        .batch = b,
        .blocks = b->blocks + b->first_blocks[row],
        .keys = layer_keys(l, b) + head * s->head_dim * bytes,
        .stride = s->kv_heads * s->head_dim * bytes,
        .values = b->page_size * bytes,
        .first = first,
        .end = end,
        .parts = (end - 1) / size - first / size + 1,
    };
}

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

/* Fetch ``bytes`` of each key or value of a part, if there is one. */
INLINE void fetch_part(const struct context *c, int index, size_t bytes) {
    if (index >= 2 * c->parts) return;
    struct part part = context_part(c, index);
    for (int i = 0; i < part.count; i++, part.at += c->stride)
        for (size_t line = 0; line < bytes; line += 64)
            __builtin_prefetch(part.at + line, 0, 3);
}

/* Up to LANES keys k of ``count``, ``stride`` apart, as columns: to [dim, LANES]. */
INLINE void transpose_keys(const uint8_t *k, size_t stride, int dim, int count, float *to,
                           const int HALF) {
    for (int column = 0; column < dim; column += LANES, to += LANES * LANES) {
        floats rows[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            rows[i] = load_kv(k + MIN(i, count - 1) * stride + column * number_bytes(HALF), HALF);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) *(floats *)(to + i * LANES) = rows[i];
    }
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

/* Scores of HEADS queries from number ``from`` on for ``number`` keys k, up to LANES, ``stride``
 * apart, to [HEADS, span]. Lanes of columns are multiplied and then added up. */
INLINE void score_rows(const struct run_heads *queries, int from, const uint8_t *k, size_t stride,
                       int number, float scale, float *to, size_t span, const int HEADS,
                       const int FULL, const int HALF) {
    float *q[MOST_HEADS];
    floats quarters[4][4];
    find_heads(queries, from, q, HEADS);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        floats sums[4][LANES / 4];
        const uint8_t *keys[LANES / 4];
#pragma GCC unroll 4
        for (int j = 0; j < LANES / 4; j++) {
            keys[j] = k + (FULL ? 4 * j + i : MIN(4 * j + i, number - 1)) * stride;
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) sums[h][j] = (floats){0};
        }
        for (int column = 0; column < queries->dim; column += LANES) {
            floats parts[LANES / 4];
#pragma GCC unroll 4
            for (int j = 0; j < LANES / 4; j++)
                parts[j] = in_register(load_kv(keys[j] + column * number_bytes(HALF), HALF));
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
    for (int h = 0; h < HEADS; h++) *(floats *)(to + h * span) = scale * sum_lanes_end(quarters[h]);
}

/* The same of ``count`` queries for the keys of a part. */
INLINE void score_few(const struct run_heads *queries, int count, struct part part, size_t stride,
                      float scale, float *to, size_t span, const int HALF) {
    for (; part.count > 0; part.count -= LANES, part.at += LANES * stride, to += LANES) {
        int from = 0;
#define SCORE_FULL(HEADS)                                                                          \
    score_rows(queries, from, part.at, stride, LANES, scale, to + from * span, span, HEADS, 1, HALF)
#define SCORE(HEADS)                                                                               \
    score_rows(queries, from, part.at, stride, part.count, scale, to + from * span, span, HEADS,   \
               0, HALF)
        if (part.count >= LANES) {
            TILES(4, SCORE_FULL);
            TILES(3, SCORE_FULL);
            TILES(2, SCORE_FULL);
            TILES(1, SCORE_FULL);
        } else {
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
INLINE void score_columns(const struct run_heads *queries, int from, const float *keys, float scale,
                          float *to, size_t span, const int HEADS, const int VECTORS) {
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
            *(floats *)(to + h * span + v * LANES) = scale * (halves[0][h][v] + halves[1][h][v]);
}

/* The same of ``count`` queries for the keys of a part, which become columns first: that pays for
 * many queries. ``panel`` [KEY_VECTORS, dim, LANES] is scratch. */
INLINE void score_many(const struct run_heads *queries, int count, struct part part, size_t stride,
                       float scale, float *to, size_t span, float *panel, const int HALF) {
    int dim = queries->dim;
    for (int i = 0; i < part.count; i += KEY_VECTORS * LANES) {
        int left = part.count - i, from = 0;
        for (int j = 0; j < KEY_VECTORS * LANES && j < left; j += LANES)
            transpose_keys(part.at + (i + j) * stride, stride, dim, left - j, panel + j * dim,
                           HALF);
#define SCORE_BOTH(HEADS)                                                                          \
    score_columns(queries, from, panel, scale, to + i + from * span, span, HEADS, KEY_VECTORS)
#define SCORE(HEADS)                                                                               \
    score_columns(queries, from, panel, scale, to + i + from * span, span, HEADS, 1)
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

/* Softmax of scores [count] in place; memory up to a multiple of LANES is written. */
static void softmax(float *scores, int64_t count) {
    int64_t whole = (count - 1) / LANES * LANES; /* what lies before the last vector */
    floats most = broadcast(-INFINITY), sums = {0};
    for (int64_t i = count; i < whole + LANES; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i <= whole; i += LANES) most = larger(*(floats *)(scores + i), most);
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (int64_t i = 0; i <= whole; i += LANES) {
        floats e = vector_exp(*(floats *)(scores + i) - top);
        *(floats *)(scores + i) = e;
        sums += e;
    }
    floats *last = (floats *)(scores + whole), e = *last;
    for (int i = count - whole; i < LANES; i++) e[i] = 0;
    sums += e - *last;
    *last = e;
    float share = 1 / sum_lanes(sums);
    for (int64_t i = 0; i <= whole; i += LANES) *(floats *)(scores + i) *= share;
}

/* Add to HEADS results from number ``from`` on, in WIDE * LANES columns from ``column`` on,
 * ``count`` values v, ``stride`` apart, times the weights [HEADS, span]. */
INLINE void value_tile(const struct run_heads *results, int from, const uint8_t *v, size_t stride,
                       int count, const float *weights, size_t span, int column, const int HEADS,
                       const int WIDE, const int HALF) {
    float *out[MOST_HEADS];
    floats sums[MOST_HEADS][VALUE_VECTORS];
    find_heads(results, from, out, HEADS);
#pragma GCC unroll 6
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) sums[h][i] = *(floats *)(out[h] + column + i * LANES);
    v += column * number_bytes(HALF);
    for (int p = 0; p < count; p++, v += stride)
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) {
            floats value = in_register(load_kv(v + i * LANES * number_bytes(HALF), HALF));
#pragma GCC unroll 6
            for (int h = 0; h < HEADS; h++) sums[h][i] += weights[h * span + p] * value;
        }
#pragma GCC unroll 6
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int i = 0; i < WIDE; i++) *(floats *)(out[h] + column + i * LANES) = sums[h][i];
}

/* The same for ``count`` results and the values of a part, in all columns. */
INLINE void add_values(const struct run_heads *results, int count, struct part part, size_t stride,
                       const float *weights, size_t span, const int HALF) {
    const int WIDTH = VALUE_VECTORS * LANES;
    int column = 0;
#define ADD(HEADS)                                                                                 \
    value_tile(results, from, part.at, stride, part.count, weights + from * span, span, column,    \
               HEADS, WIDE, HALF)
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

/* Attention of a run's rows ``row`` to ``row + count - 1``: of those queries that read the keys and
 * values of ``heads`` heads from ``head`` on. Queries q and results ``out`` of the rows are
 * ``q_stride`` and ``out_stride`` floats apart; ``scores`` [score_floats] is scratch. */
INLINE void run_attention(const struct shape *s, const struct layer *l, const struct batch *b,
                          const float *q, size_t q_stride, float *out, size_t out_stride, int row,
                          int count, int head, int heads, float *scores, float *panel,
                          const int HALF) {
    int dim = s->head_dim, group = s->heads / s->kv_heads;
    size_t bytes = number_bytes(HALF), stride = s->kv_heads * dim * bytes, span = score_stride(b);
    const int64_t *positions = b->positions + row;
    const struct context c = context_of(s, l, b, row, count, head, HALF);
    int64_t first = c.first, end = c.end;
    float scale = 1 / sqrtf(dim);
    size_t own = (size_t)head * group * dim;
    for (int i = 0; i < c.parts; i++) {
        struct part part = context_part(&c, i);
        fetch_part(&c, i + 1, heads * dim * bytes);
        for (int h = 0; h < heads; h++, part.at += dim * bytes) {
            struct run_heads queries = {(float *)q + own + h * group * dim, q_stride, dim, group};
            float *to = scores + h * count * group * span + part.first - first;
            if (count * group < MANY_QUERIES)
                score_few(&queries, count * group, part, stride, scale, to, span, HALF);
            else
                score_many(&queries, count * group, part, stride, scale, to, span, panel, HALF);
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
        struct part part = context_part(&c, i);
        fetch_part(&c, i + 1, heads * dim * bytes);
        for (int h = 0; h < heads; h++, part.at += dim * bytes) {
            struct run_heads results = {out + own + h * group * dim, out_stride, dim, group};
            add_values(&results, count * group, part, stride,
                       scores + h * count * group * span + part.first - first, span, HALF);
        }
    }
}

#define ATTENTION_OF(NAME, HALF)                                                                   \
    static void NAME(const struct shape *s, const struct layer *l, const struct batch *b,          \
                     const float *q, size_t q_stride, float *out, size_t out_stride, int row,      \
                     int count, int head, int heads, float *scores, float *panel) {                \
        run_attention(s, l, b, q, q_stride, out, out_stride, row, count, head, heads, scores,      \
                      panel, HALF);                                                                \
    }
ATTENTION_OF(attention_fp32, 0)
ATTENTION_OF(attention_fp16, 1)
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
            (b->half ? attention_fp16 : attention_fp32)(
                s, l, b, q + row * q_stride, q_stride, out + row * out_stride, out_stride, row,
                count, i / runs * together, together, worker->scores, worker->panel);
        }
}

#endif
