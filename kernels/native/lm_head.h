/* The end of a pass: final norm, LM head and the likeliest token of the rows that need one. */
#ifndef OFFRAMP_LM_HEAD_H
#define OFFRAMP_LM_HEAD_H

#include "elementwise.h"
#include "layer.h"

/* Phases of ``run_head``. */
enum { HEAD_PHASES = 5 };

/* All logits of the rows, and the largest. */
static void run_whole_head(const struct lm_head *h, const struct head_rows *c,
                           struct worker *worker) {
    const struct workspace *w = worker->shared;
    int width = h->weight.columns, outs = h->weight.outs, rows = c->rows;
    const struct operands to_logits = {w->normed, width, c->logits,   outs,
                                       rows,      0,     w->prepared, NULL};
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

/* Screening: the likeliest tokens of few rows without reading the whole weight.
 *
 * A copy of the weight W in 4 bits, W4, gives coarse logits of all outputs. What it leaves out, in
 * the GROUP directions U that states mostly lie along, is stored in 4 bits too, as F: GROUP more
 * columns, whose inputs are U x. Of what both leave out, R = W - W4 - F U, an output's logit has at
 * most
 *
 *     |R x|  <=  |R U'| |U x|  +  |R - R U' U| |x - U' U x|        (Cauchy-Schwarz)
 *
 * ``along`` and ``across`` are the two norms of R, a little more for rounding. Whatever U is, this
 * holds; the better U fits, the closer it is. So the output whose coarse logit is largest is
 * multiplied exactly, and then those whose coarse logits are no further below than the bound, in
 * whole sets. All others are certainly smaller. */
struct reach {
    float along, across; /* the norms of a row's inputs */
    float least;         /* a logit that it has for certain */
};

/* How far inputs x [width] reach along the directions, and across them; their products with the
 * directions are put behind them. */
static struct reach measure_reach(const struct screen *s, float *x, int width) {
    float all = 0, along = 0;
    floats squares = {0};
    for (int i = 0; i < width; i += LANES) squares += *(floats *)(x + i) * *(floats *)(x + i);
    all = sum_lanes(squares);
    for (int d = 0; d < GROUP; d++) {
        floats sums = {0};
        for (int i = 0; i < width; i += LANES)
            sums += *(const floats *)(s->basis + d * width + i) * *(floats *)(x + i);
        x[width + d] = sum_lanes(sums);
        along += x[width + d] * x[width + d];
    }
    /* The difference of two rounded sums may be off by 1e-6 of them. */
    return (struct reach){sqrtf(along), sqrtf(MAX(all - along, 0) + 1e-5f * all), 0};
}

/* Whether one of a whole set of outputs from ``first`` on may have a row's largest logit. */
INLINE int may_be_largest(const struct screen *s, const struct head_rows *c, int first,
                          const struct reach *reach) {
    ints open = {0};
    for (int r = 0; r < c->rows; r++) {
        const float *logits = c->logits + (size_t)r * s->weight.outs;
        for (int i = first; i < first + SET; i += LANES) {
            floats off = *(const floats *)(s->along + i) * reach[r].along +
                         *(const floats *)(s->across + i) * reach[r].across;
            /* What is no number is not smaller. */
            open |= ~(*(const floats *)(logits + i) + off < reach[r].least);
        }
    }
    return largest_lane(open & 1);
}

/* The exact logits of one set of outputs, from ``first`` on; that from ``next`` on is used next. */
INLINE void multiply_one_set(const struct matrix *m, struct operands t, int first, int next,
                             struct worker *worker) {
    t.next = weight_rows(m, next);
    MATMUL[m->format](m, &t, first, MIN(SET, m->outs - first), worker);
}

/* The places of the rows' largest logits of outputs [out, end), to tops [rows]. */
static void find_tops(const struct head_rows *c, int outs, int out, int end, int32_t *tops) {
    for (int r = 0; r < c->rows; r++)
        tops[r] = out + largest(c->logits + (size_t)r * outs + out, end - out);
}

/* The largest of a row's logits at ``places`` [count], ``step`` apart: its place, that of the first
 * of equal ones and of any that are no numbers. */
static int largest_of(const float *logits, const int32_t *places, int count, int step) {
    int best = places[0];
    for (int i = 1; i < count; i++) {
        float x = logits[places[i * step]];
        if (x > logits[best] || (isnan(logits[best]) && !isnan(x))) best = places[i * step];
    }
    return best;
}

/* The largest logits of the rows; the others are coarse. */
static void run_screened_head(const struct lm_head *h, const struct head_rows *c,
                              struct worker *worker) {
    const struct workspace *w = worker->shared;
    const struct screen *s = h->screen;
    const struct matrix *m = &h->weight;
    int width = m->columns, wide = s->weight.columns, outs = m->outs, rows = c->rows;
    float *prepared = w->prepared + prepared_floats(rows, w->columns);
    struct reach *reach = (struct reach *)w->wide;
    int32_t *tops = (int32_t *)(reach + rows); /* [chunks, rows] the places of the largest */
    const struct operands exact = {w->normed, wide, c->logits, outs, rows, 0, w->prepared, NULL};
    const struct operands coarse = {w->normed, wide, c->logits, outs, rows, 0, prepared, NULL};
    FOR_EACH_CHUNK(worker, r, end, 1, rows)
        for (; r < end; r++) {
            float *inputs = w->normed + (size_t)r * wide;
            rms_norm(c->hidden + c->places[r] * width, h->norm, inputs, width, h->eps);
            reach[r] = measure_reach(s, inputs, width);
            prepare_columns(m, &exact, r, inputs, 0, width);
            prepare_columns(&s->weight, &coarse, r, inputs, 0, wide);
        }
    int size = matmul_chunk_size(outs, worker), chunks = (outs + size - 1) / size;
    FOR_EACH_CHUNK(worker, out, end, size, outs) {
        MATMUL[FORMAT_INT4](&s->weight, &coarse, out, end - out, worker);
        find_tops(c, outs, out, end, tops + out / size * rows);
    }
    /* One thread alone: rows may have their largest coarse logits in the same set. */
    FOR_EACH_CHUNK(worker, begin_row, end, rows, rows) {
        for (int r = begin_row; r < end; r++) {
            c->best[r] = largest_of(c->logits + (size_t)r * outs, tops + r, chunks, rows);
            int first = c->best[r] / SET * SET;
            multiply_one_set(m, exact, first, first, worker);
        }
        for (int r = begin_row; r < end; r++) {
            float least = c->logits[(size_t)r * outs + c->best[r]];
            int known = isfinite(least) && isfinite(reach[r].along) && isfinite(reach[r].across);
            reach[r].least = known ? least : -INFINITY;
        }
    }
    FOR_EACH_CHUNK(worker, out, end, size, outs) {
        int before = -1;
        for (int first = out; first < end; first += SET)
            if (end - first < SET || may_be_largest(s, c, first, reach)) {
                if (before >= 0) multiply_one_set(m, exact, before, first, worker);
                before = first;
            }
        if (before >= 0) multiply_one_set(m, exact, before, before, worker);
        find_tops(c, outs, out, end, tops + out / size * rows);
    }
    FOR_EACH_CHUNK(worker, r, end, 1, rows)
        for (; r < end; r++)
            c->best[r] = largest_of(c->logits + (size_t)r * outs, tops + r, chunks, rows);
}

static void run_head(const struct lm_head *h, const struct head_rows *c, struct worker *worker) {
    if (c->screened)
        run_screened_head(h, c, worker);
    else
        run_whole_head(h, c, worker);
}

#endif
