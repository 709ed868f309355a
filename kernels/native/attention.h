/* Attention over paged keys and values.
 *
 * Rows are taken in runs: up to RUN_ROWS consecutive tokens of one sequence, which read each key
 * and value once. Contexts are taken in splits, SPLIT_KEYS positions each: their scores stay in the
 * nearest caches, and threads can share a context (flash-decoding, Dao et al. 2023). A row's
 * result does not depend on the run it is in, nor on who made its splits: these are joined in their
 * order.
 */
#ifndef OFFRAMP_ATTENTION_H
#define OFFRAMP_ATTENTION_H

#include "attention_products.h"

enum { RUN_ROWS = 16, SPLIT_KEYS = 512 };
/* Rows of a batch up to which threads share contexts. */
enum { SPLIT_ROWS = 16 };

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
enum { SCORE_STRIDE = SPLIT_KEYS + LANES };

/* What a query has of some keys: their values [dim], each times exp(its score - the largest), then
 * the largest score and the sum of these factors. Where there are no keys the sum is 0. */
INLINE size_t partial_floats(const struct shape *s) {
    return s->head_dim + LANES; /* so that vectors stay in lines of the cache */
}

/* Queries of an item of attention. */
INLINE size_t item_queries(const struct shape *s) {
    return MAX(RUN_ROWS * (s->heads / s->kv_heads), s->heads);
}

/* Floats of scratch memory for the attention of a thread. */
static size_t attention_floats(const struct shape *s) {
    return item_queries(s) * (SCORE_STRIDE + 2 * partial_floats(s));
}

INLINE int count_splits(const struct batch *b) {
    return (b->longest + SPLIT_KEYS - 1) / SPLIT_KEYS;
}

INLINE int shares_contexts(const struct batch *b) {
    return b->rows <= SPLIT_ROWS && b->longest > SPLIT_KEYS;
}

/* Floats of scratch memory for what threads make of contexts that they share, in batches of up to
 * as many rows and up to as long contexts. */
static size_t shared_partial_floats(const struct shape *s, const struct batch *b) {
    if (b->longest <= SPLIT_KEYS) return 0;
    return (size_t)MIN(b->rows, SPLIT_ROWS) * s->heads * count_splits(b) * partial_floats(s);
}

/* Scores [count] become exp(score - the largest), in place, which with their sum go to ``found``.
 * Memory up to a multiple of LANES is written. */
static void exponentials(float *scores, int64_t count, float found[2]) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    floats most[2] = {broadcast(-INFINITY), broadcast(-INFINITY)}, sums = {0};
    for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
    int64_t i = 0;
    for (; i + LANES < padded; i += 2 * LANES) {
        most[0] = larger(*(floats *)(scores + i), most[0]);
        most[1] = larger(*(floats *)(scores + i + LANES), most[1]);
    }
    if (i < padded) most[0] = larger(*(floats *)(scores + i), most[0]);
    float top = largest_number(larger(most[0], most[1]));
    for (i = 0; i < padded; i += LANES) {
        floats e = exp_below_88(*(floats *)(scores + i) - top);
        *(floats *)(scores + i) = e;
        sums += e;
    }
    found[0] = top;
    found[1] = sum_lanes(sums);
}

/* e to the power of x. */
INLINE float exponential(float x) {
    return vector_exp(broadcast(x))[0];
}

/* Add what a query has of later keys to what it has of earlier ones, both [dim + 2]. */
static void join_partial(float *earlier, const float *later, int dim) {
    float *most = earlier + dim, *sum = most + 1;
    if (later[dim + 1] == 0) return;
    /* One of the two factors is 1: sums are rounded alike wherever this is compiled. */
    if (later[dim] > *most) {
        float factor = exponential(*most - later[dim]);
        for (int i = 0; i < dim; i += LANES)
            *(floats *)(earlier + i) =
                *(floats *)(earlier + i) * factor + *(const floats *)(later + i);
        *sum = *sum * factor + later[dim + 1];
        *most = later[dim];
    } else {
        float factor = exponential(later[dim] - *most);
        for (int i = 0; i < dim; i += LANES)
            *(floats *)(earlier + i) += *(const floats *)(later + i) * factor;
        *sum += later[dim + 1] * factor;
    }
}

/* The result of a query that has all its keys. */
static void finish_partial(const float *partial, float *out, int dim) {
    float share = 1 / partial[dim + 1];
    for (int i = 0; i < dim; i += LANES)
        *(floats *)(out + i) = *(const floats *)(partial + i) * share;
}

/* Queries that attend to the same keys: those of the rows ``row`` to ``row + count - 1`` of a run
 * and of the heads that read ``heads`` heads of keys and values from ``head`` on. */
struct item {
    int row, count, head, heads;
};

/* Those of its heads that read the ``head``-th of its heads of keys and values. */
INLINE struct run_heads heads_of(const struct run_heads *all, int head) {
    struct run_heads found = *all;
    found.first += head * all->group * all->head_step;
    return found;
}

/* What an item's queries q have of the keys of a split, to ``partials``. ``scores``
 * [item_queries, SCORE_STRIDE] and ``panel`` are scratch. */
INLINE void attend(const struct shape *s, const struct layer *l, const struct batch *b,
                   const struct item *item, int split, const struct run_heads *q,
                   const struct run_heads *partials, float *scores, float *panel,
                   const int FORMAT) {
    int dim = q->dim, group = q->group, count = item->count;
    int queries = count * group;
    const int64_t *positions = b->positions + item->row;
    const struct context c = context_of(s, l, b, item->row, count, (int64_t)split * SPLIT_KEYS,
                                        (int64_t)(split + 1) * SPLIT_KEYS, FORMAT);
    float scale = 1 / sqrtf(dim);
    for (int i = 0; i < c.parts; i++)
        for (int h = 0; h < item->heads; h++) {
            struct part part = context_part(&c, i, item->head + h, FORMAT);
            const struct run_heads own = heads_of(q, h);
            float *to = scores + h * queries * SCORE_STRIDE + part.first - c.first;
            if (queries < MANY_QUERIES)
                score_few(&own, queries, &part, scale, to, SCORE_STRIDE, FORMAT);
            else
                score_many(&own, queries, &part, scale, to, SCORE_STRIDE, panel, FORMAT);
        }
    for (int r = 0; r < count; r++) {
        int64_t first = MAX(context_start(s, positions[r]), c.first) - c.first;
        int64_t end = MAX(MIN(positions[r] + 1, c.end) - c.first, first);
        for (int j = 0; j < item->heads * group; j++) {
            float *weights = scores + ((j / group * count + r) * group + j % group) * SCORE_STRIDE;
            float *partial = partials->first + r * partials->row_step + j * partials->head_step;
            exponentials(weights + first, end - first, partial + dim);
            if (first > 0) memset(weights, 0, sizeof(float) * first);
            if (end < c.end - c.first)
                memset(weights + end, 0, sizeof(float) * (c.end - c.first - end));
            for (int i = 0; i < dim; i += LANES) *(floats *)(partial + i) = (floats){0};
        }
    }
    for (int i = c.parts; i < 2 * c.parts; i++)
        for (int h = 0; h < item->heads; h++) {
            struct part part = context_part(&c, i, item->head + h, FORMAT);
            const struct run_heads own = heads_of(partials, h);
            float *weights = scores + h * queries * SCORE_STRIDE + part.first - c.first;
            add_values(&own, queries, &part, weights, SCORE_STRIDE, panel, FORMAT);
        }
}

#define ATTEND(FORMAT)                                                                             \
    static void attend_##FORMAT(const struct shape *s, const struct layer *l,                      \
                                const struct batch *b, const struct item *item, int split,         \
                                const struct run_heads *q, const struct run_heads *partials,       \
                                float *scores, float *panel) {                                     \
        attend(s, l, b, item, split, q, partials, scores, panel, FORMAT);                          \
    }
ATTEND(KV_FP32)
ATTEND(KV_FP16)
ATTEND(KV_INT16)
#undef ATTEND

typedef void attend_function(const struct shape *, const struct layer *, const struct batch *,
                             const struct item *, int, const struct run_heads *,
                             const struct run_heads *, float *, float *);
static attend_function *const ATTEND[] = {
    [KV_FP32] = attend_KV_FP32, [KV_FP16] = attend_KV_FP16, [KV_INT16] = attend_KV_INT16};

/* The splits [first, end) that a run's rows ``row`` to ``row + count - 1`` have keys in. */
INLINE void find_splits(const struct shape *s, const struct batch *b, int row, int count,
                        int *first, int *end) {
    *first = context_start(s, b->positions[row]) / SPLIT_KEYS;
    *end = b->positions[row + count - 1] / SPLIT_KEYS + 1;
}

/* Attention of an item, one split after another, to ``out``. */
static void attend_all(const struct shape *s, const struct layer *l, const struct batch *b,
                       const struct item *item, const struct run_heads *q,
                       const struct run_heads *out, const struct worker *worker) {
    int dim = q->dim, heads = item->heads * q->group, first, end;
    size_t step = partial_floats(s);
    float *joined = worker->scores + item_queries(s) * SCORE_STRIDE;
    const struct run_heads all = {joined, heads * step, step, dim, q->group};
    const struct run_heads later = {joined + item_queries(s) * step, heads * step, step, dim,
                                    q->group};
    find_splits(s, b, item->row, item->count, &first, &end);
    for (int split = first; split < end; split++) {
        ATTEND[b->kv_format](s, l, b, item, split, q, split == first ? &all : &later,
                             worker->scores, worker->panel);
        if (split > first)
            for (int i = 0; i < item->count * heads; i++)
                join_partial(joined + i * step, later.first + i * step, dim);
    }
    for (int i = 0; i < item->count * heads; i++)
        finish_partial(joined + i * step,
                       out->first + i / heads * out->row_step + i % heads * out->head_step, dim);
}

/* Join what threads have made of the splits of query ``head`` of a row; its result to ``out``. */
static void join_splits(const struct shape *s, const struct batch *b, int row, int head,
                        float *partials, float *out) {
    size_t step = partial_floats(s);
    int first, end;
    find_splits(s, b, row, 1, &first, &end);
    partials += ((size_t)row * s->heads + head) * count_splits(b) * step;
    for (int split = first + 1; split < end; split++)
        join_partial(partials + first * step, partials + split * step, s->head_dim);
    finish_partial(partials + first * step, out, s->head_dim);
}

/* The heads of keys and values whose attention is an item of work. Reading all heads of a context
 * at once reads memory in order; with runs of several rows or few runs, parallel work counts for
 * more. */
INLINE int heads_together(const struct shape *s, const struct batch *b, int runs,
                          const struct worker *worker) {
    return runs == b->rows && runs >= 2 * worker->shared->threads ? s->kv_heads : 1;
}

/* Items of the phase that make a chunk. Later rows of a prompt read more, contexts that are shared
 * are of any length: in large chunks threads would wait for the last one. */
INLINE int attention_chunk(const struct batch *b, int runs, int items,
                           const struct worker *worker) {
    return runs == b->rows && !shares_contexts(b) ? chunk_size(items, worker) : 1;
}

/* Attention of all rows, one phase or, where contexts are shared, two. Queries q and results
 * ``out`` of the rows are ``q_step`` and ``out_step`` floats apart. */
static void attention(const struct shape *s, const struct layer *l, const struct batch *b, int runs,
                      float *q, size_t q_step, float *out, size_t out_step, struct worker *worker) {
    const struct workspace *w = worker->shared;
    int dim = s->head_dim, group = s->heads / s->kv_heads;
    int together = heads_together(s, b, runs, worker), shared = shares_contexts(b);
    int splits = shared ? count_splits(b) : 1;
    int items = runs * (s->kv_heads / together) * splits;
    int size = attention_chunk(b, runs, items, worker);
    size_t step = partial_floats(s);
    FOR_EACH_CHUNK(worker, i, end, size, items)
        for (; i < end; i++) {
            int run = i / splits % runs, head = i / splits / runs * together, split = i % splits;
            int row = w->run_starts[run], count = w->run_starts[run + 1] - row;
            const struct item item = {row, count, head, together};
            size_t first = (size_t)head * group * dim;
            const struct run_heads queries = {q + row * q_step + first, q_step, dim, dim, group};
            if (!shared) {
                const struct run_heads to = {out + row * out_step + first, out_step, dim, dim,
                                             group};
                attend_all(s, l, b, &item, &queries, &to, worker);
                continue;
            }
            int from, to;
            find_splits(s, b, row, count, &from, &to);
            if (split < from || split >= to) continue;
            const struct run_heads partials = {
                w->partials + (((size_t)row * s->heads + head * group) * splits + split) * step,
                s->heads * splits * step, splits * step, dim, group};
            ATTEND[b->kv_format](s, l, b, &item, split, &queries, &partials, worker->scores,
                                 worker->panel);
        }
    if (!shared) return;
    items = b->rows * s->heads, size = chunk_size(items, worker);
    FOR_EACH_CHUNK(worker, i, end, size, items)
        for (; i < end; i++) {
            int row = i / s->heads, head = i % s->heads;
            join_splits(s, b, row, head, w->partials, out + row * out_step + head * dim);
        }
}

#endif
