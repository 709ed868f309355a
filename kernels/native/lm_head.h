/* The end of a pass: final norm, LM head and the likeliest token of the rows that need one. */
#ifndef OFFRAMP_LM_HEAD_H
#define OFFRAMP_LM_HEAD_H

#include "elementwise.h"
#include "layer.h"
#include "noise.h"

/* Phases of ``run_head``. */
enum { HEAD_PHASES = 5 };

/* All logits of the rows, and the largest. */
static void run_whole_head(const struct lm_head *h, const struct head_rows *c,
                           struct worker *worker) {
    const struct workspace *w = worker->shared;
    int width = h->weight.columns, outs = h->weight.outs, rows = c->rows;
    const struct operands to_logits = {w->normed, width, c->logits,   outs,
                                       rows,      0,     w->prepared, .next = NULL};
    int size = chunk_size(rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, rows)
        for (; r < end; r++) {
            float *inputs = input_row(&h->weight, &to_logits, r, worker);
            rms_norm(c->hidden + c->places[r] * width, h->norm, inputs, width, h->eps);
            prepare_columns(&h->weight, &to_logits, r, inputs, 0, width);
        }
    matmul(&h->weight, &to_logits, worker);
    FOR_EACH_CHUNK(worker, r, end, size, rows)
        for (; r < end; r++) c->best[r] = largest(c->logits + (size_t)r * outs, outs);
}

/* Screening: the likeliest tokens without the exact products of most outputs.
 *
 * Coarse logits are made of the weight W and of 8 bits of each input, or of all bits and a copy of
 * W in 4 bits. What 8 bits leave out of the inputs, e, adds at most |W_i| |e| to the logit of
 * output i (Cauchy-Schwarz). The copy has GROUP more columns: what its 4 bits lose in the
 * directions U that states mostly lie along, whose inputs are U x. Of what it still leaves out of a
 * row of W, R_i, the logit has at most
 *
 *     |R_i x|  <=  |R_i U'| |U x|  +  |R_i - R_i U' U| |x - U' U x|
 *
 * Whatever U is, this holds; the better it fits, the closer it is. So the set of outputs that holds
 * the largest logit for certain, or nearly, is multiplied exactly, and then those sets that may
 * hold a larger one. All others are certainly smaller.
 *
 * A row that is random has keys in the place of logits, these over the temperature plus noise. The
 * noise is exact from the start. */

/* What rounding may add to a logit, of the norms of state and row: inputs in fixed point (9e-5),
 * and sums in fp32. */
static const float ROUNDING = 0x1p-12f;

/* Norms of a row's inputs: along the directions, across them, and of what coarse ones and rounding
 * leave out. */
struct reach {
    float along, across, rest;
};

/* What is known of logits, or keys, of each row in turn. */
struct bounds {
    int chunks;
    struct reach *reach; /* [rows] */
    float *highest;      /* [sets, rows] what the largest of a set is at most */
    float *certain;      /* [chunks, rows] what the largest of a chunk is at least, and */
    int32_t *sets;       /* [chunks, rows] the set where it is */
    float *values;       /* [chunks, rows] the largest that was made exactly, and */
    int32_t *places;     /* [chunks, rows] its place, or -1 */
    float *of_threads;   /* [threads, rows, SET] */
};

/* Floats of a row in ``wide``. */
static int screening_floats(int outs, int threads) {
    int reach = sizeof(struct reach) / sizeof(float), sets = (outs + SET - 1) / SET;
    return reach + sets + threads * (4 * CHUNKS_PER_THREAD + SET);
}

static struct bounds find_bounds(int outs, int rows, const struct worker *worker) {
    int sets = (outs + SET - 1) / SET, size = matmul_chunk_size(outs, worker);
    int chunks = (outs + size - 1) / size;
    struct reach *reach = (struct reach *)worker->shared->wide;
    float *highest = (float *)(reach + rows), *all = highest + sets * rows;
    int count = chunks * rows;
    return (struct bounds){chunks,
                           reach,
                           highest,
                           all,
                           (int32_t *)(all + count),
                           all + 2 * count,
                           (int32_t *)(all + 3 * count),
                           all + 4 * count};
}

/* The squared norm of x [width]. */
static float squared_norm(const float *x, int width) {
    floats squares = {0};
    for (int i = 0; i < width; i += LANES) squares += *(floats *)(x + i) * *(floats *)(x + i);
    return sum_lanes(squares);
}

/* The reach of inputs x [width]; their products with directions are put behind them. */
static struct reach measure_reach(const struct screen *s, float *x, int width) {
    float all = squared_norm(x, width), along = 0, lost = 0, rounded = ROUNDING * sqrtf(all);
    if (!s->basis) {
        for (int i = 0; i < width; i += GROUP) lost += coarse_loss(x + i);
        return (struct reach){0, 0, sqrtf(lost) + rounded};
    }
    for (int d = 0; d < GROUP; d++) {
        floats sums = {0};
        for (int i = 0; i < width; i += LANES)
            sums += *(const floats *)(s->basis + d * width + i) * *(floats *)(x + i);
        x[width + d] = sum_lanes(sums);
        along += x[width + d] * x[width + d];
    }
    /* The difference of two rounded sums may be off by 1e-6 of them. */
    return (struct reach){sqrtf(along), sqrtf(MAX(all - along, 0) + 1e-5f * all), rounded};
}

/* One set of outputs, from ``first`` on, as a matrix. */
INLINE struct matrix one_set(const struct matrix *m, int first) {
    struct matrix set = *m;
    set.outs = MIN(SET, m->outs - first);
    set.data = weight_rows(m, first);
    if (m->bias) set.bias += first;
    return set;
}

/* What the largest key of a set is at most, if its logits lie between ``low`` and ``high``, or -inf
 * if that is less than ``known``; else ``least`` becomes what it is at least. */
INLINE float bound_keys(const struct noise *n, int first, const floats low[SET_VECTORS],
                        const floats high[SET_VECTORS], float known, float *least) {
    float inverse = inverse_temperature(n);
    floats noise[SET_VECTORS], most = high[0], certain = broadcast(-INFINITY);
    for (int i = 1; i < SET_VECTORS; i++) most = larger(high[i], most);
    if (!any_lane(most * inverse + MOST_NOISE >= known)) return -INFINITY;
    uniform_set(n, first, noise);
    ints may = {0};
    for (int i = 0; i < SET_VECTORS; i++)
        may |= high[i] * inverse + gumbel_at_most(noise[i]) >= known;
    if (!any_lane(may)) return -INFINITY;
    most = certain;
    for (int i = 0; i < SET_VECTORS; i++) {
        floats own = gumbel(noise[i]);
        most = larger(high[i] * inverse + own, most);
        certain = larger(low[i] * inverse + own, certain);
    }
    *least = largest_number(certain);
    return largest_number(most);
}

/* What the largest of a whole set of coarse logits, that from ``first`` on, or of their keys, is at
 * most, or -inf if that is certainly less than ``known``; ``least`` becomes what it is at least. */
INLINE float bound_set(const struct screen *s, const float *logits, int first, struct reach reach,
                       const struct noise *n, float known, float *least) {
    floats high[SET_VECTORS], low[SET_VECTORS];
    for (int i = 0; i < SET_VECTORS; i++) {
        int out = first + i * LANES;
        floats x = *(const floats *)(logits + i * LANES);
        floats off = *(const floats *)(s->norms + out) * reach.rest;
        if (s->basis)
            off += *(const floats *)(s->along + out) * reach.along +
                   *(const floats *)(s->across + out) * reach.across;
        floats most = x + off;
        high[i] = select_lanes(most == most, most, broadcast(INFINITY));
        low[i] = x - off;
    }
    *least = -INFINITY;
    if (n) return bound_keys(n, first, low, high, known, least);
    for (int i = 1; i < SET_VECTORS; i++) {
        high[0] = larger(high[i], high[0]);
        low[0] = larger(low[i], low[0]);
    }
    *least = largest_number(low[0]);
    return largest_number(high[0]);
}

/* The noise of a row; NULL if it is not random. */
INLINE const struct noise *noise_of(const struct head_rows *c, int row) {
    return c->noise && c->noise[row].temperature > 0 ? c->noise + row : NULL;
}

/* Coarse logits of outputs [out, end), the ``chunk``-th chunk, and what they tell. */
static void bound_chunk(const struct head_rows *c, const struct bounds *b, struct operands coarse,
                        int chunk, int out, int end, struct worker *worker) {
    const struct screen *s = c->screen;
    int rows = coarse.rows;
    float *certain = b->certain + chunk * rows;
    int32_t *sets = b->sets + chunk * rows;
    for (int r = 0; r < rows; r++) certain[r] = -INFINITY, sets[r] = out;
    for (int first = out; first < end; first += SET) {
        struct matrix set = one_set(&s->weight, first);
        float *highest = b->highest + (size_t)(first / SET) * rows, least;
        coarse.next = weight_rows(&s->weight, first + SET);
        MATMUL[set.format](&set, &coarse, 0, set.outs, worker);
        for (int r = 0; r < rows; r++) {
            highest[r] = INFINITY;
            if (set.outs < SET) continue;
            highest[r] = bound_set(s, coarse.out + r * SET, first, b->reach[r], noise_of(c, r),
                                   certain[r], &least);
            if (least > certain[r]) certain[r] = least, sets[r] = first;
        }
    }
}

/* Whether x is larger than ``best``, as any number is than what is none. */
INLINE int is_larger(float x, float best) {
    return x > best || (isnan(best) && !isnan(x));
}

/* Of a row's ``values`` in all chunks, where the largest is: the first of equal ones, and of any
 * that are no numbers. Those without a place, if there are any, do not count. */
static int largest_chunk(const struct bounds *b, const float *values, const int32_t *places,
                         int row, int rows) {
    int best = row;
    for (int i = row + rows; i < b->chunks * rows; i += rows)
        if (places[i] >= 0 && (places[best] < 0 || is_larger(values[i], values[best]))) best = i;
    return best;
}

/* The largest of a row's exact logits, or keys, of the set from ``first`` on; ``place`` becomes its
 * place. */
static float largest_of_set(const struct matrix *m, const struct operands *exact,
                            const struct noise *n, int row, int first, int *place,
                            struct worker *worker) {
    struct matrix set = one_set(m, first);
    multiply_row(&set, exact, row, worker);
    if (n) add_noise(n, first, exact->out);
    int best = largest(exact->out, set.outs);
    *place = first + best;
    return exact->out[best];
}

/* The largest logit, or key, of a row in the ``chunk``-th chunk, outputs [out, end), if it may be
 * ``least`` or more; how many sets were multiplied. */
static int find_largest(const struct matrix *m, const struct bounds *b,
                        const struct operands *exact, const struct noise *n, int row, float least,
                        int chunk, int out, int end, struct worker *worker) {
    int rows = exact->rows, multiplied = 0, found;
    float *best = b->values + chunk * rows + row;
    int32_t *place = b->places + chunk * rows + row;
    *place = -1;
    for (int first = out; first < end; first += SET) {
        if (b->highest[(size_t)(first / SET) * rows + row] < least) continue;
        float value = largest_of_set(m, exact, n, row, first, &found, worker);
        if (*place < 0 || is_larger(value, *best)) *best = value, *place = found;
        multiplied++;
    }
    return multiplied;
}

/* The places of the largest logits, or keys, alone. */
static void run_screened_head(const struct lm_head *h, const struct head_rows *c,
                              struct worker *worker) {
    const struct workspace *w = worker->shared;
    const struct screen *s = c->screen;
    const struct matrix *m = &h->weight;
    int width = m->columns, wide = s->weight.columns, outs = m->outs, rows = c->rows;
    int size = matmul_chunk_size(outs, worker);
    struct bounds b = find_bounds(outs, rows, worker);
    float *prepared = w->prepared + prepared_floats(rows, w->columns);
    float *logits = b.of_threads + (size_t)worker->number * rows * SET;
    const struct operands exact = {w->normed, wide, logits, 0, rows, 0, w->prepared, .next = NULL};
    struct operands coarse = {w->normed, wide, logits, SET, rows, 0, prepared, .next = NULL};
    /* Without a copy of the weight it is the inputs that make logits coarse. */
    coarse.inputs = s->basis ? INPUTS_FINE : INPUTS_COARSE;
    FOR_EACH_CHUNK(worker, r, end, 1, rows)
        for (; r < end; r++) {
            float *inputs = w->normed + (size_t)r * wide;
            rms_norm(c->hidden + c->places[r] * width, h->norm, inputs, width, h->eps);
            b.reach[r] = measure_reach(s, inputs, width);
            prepare_columns(m, &exact, r, inputs, 0, width);
            prepare_columns(&s->weight, &coarse, r, inputs, 0, wide);
        }
    FOR_EACH_CHUNK(worker, out, end, size, outs)
        bound_chunk(c, &b, coarse, out / size, out, end, worker);
    float *least = b.certain; /* [rows], of the first chunk's */
    FOR_EACH_CHUNK(worker, r, end, 1, rows)
        for (; r < end; r++) {
            int chunk = largest_chunk(&b, b.certain, b.sets, r, rows), place;
            struct reach reach = b.reach[r];
            least[r] = largest_of_set(m, &exact, noise_of(c, r), r, b.sets[chunk], &place, worker);
            if (!isfinite(least[r] + reach.along + reach.across + reach.rest)) least[r] = -INFINITY;
            c->multiplied[r] = 1;
        }
    FOR_EACH_CHUNK(worker, out, end, size, outs)
        for (int r = 0; r < rows; r++)
            __atomic_fetch_add(&c->multiplied[r],
                               find_largest(m, &b, &exact, noise_of(c, r), r, least[r], out / size,
                                            out, end, worker),
                               __ATOMIC_RELAXED);
    FOR_EACH_CHUNK(worker, r, end, 1, rows)
        for (; r < end; r++) c->best[r] = b.places[largest_chunk(&b, b.values, b.places, r, rows)];
}

static void run_head(const struct lm_head *h, const struct head_rows *c, struct worker *worker) {
    if (c->screen)
        run_screened_head(h, c, worker);
    else
        run_whole_head(h, c, worker);
}

#endif
