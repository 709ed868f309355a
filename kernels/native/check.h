/* The check of an exit: the gate of each row; where it fires, the exit's head, and how sure that
 * is.
 *
 * The threads of a call see the rows that fired only once they are all known.
 */
#ifndef OFFRAMP_CHECK_H
#define OFFRAMP_CHECK_H

#include "draft.h"

/* Phases of ``check_rows``. */
enum { CHECK_PHASES = 7 + 4 * MATMUL_PHASES };

/* silu(inner [count] + bias) times weight, summed, through a sigmoid. */
static float gate_score(const float *inner, const struct exit_head *h) {
    floats sums = {0};
    for (int i = 0; i < h->router_up.outs; i += LANES) {
        floats x = *(const floats *)(inner + i) + *(const floats *)(h->router_up_bias + i);
        sums += x / (1.0f + vector_exp(-x)) * *(const floats *)(h->router_down + i);
    }
    return 1 / (1 + expf(-(sum_lanes(sums) + h->router_down_bias)));
}

/* The place of the largest of ``count`` logits, its probability, and that of the next one. */
static int two_likeliest(const float *logits, int count, float *top, float *second) {
    int best = likeliest(logits, count, INFINITY, top);
    float next = -INFINITY;
    for (int i = 0; i < count; i++)
        if (i != best && logits[i] > next) next = logits[i];
    *second = *top * expf(next - logits[best]);
    return best;
}

/* Gates of all rows, and the rows whose gate reaches the floor. */
static void run_gates(const struct exit_head *h, const struct exit_check *c,
                      struct worker *worker) {
    const struct workspace *w = worker->shared;
    int width = h->router_up.columns, inner = h->router_up.outs, rows = c->rows;
    const struct operands up = {w->normed, width, w->wide,     inner,
                                rows,      0,     w->prepared, .next = NULL};
    int size = chunk_size(rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, rows)
        for (; r < end; r++) {
            const float *state = c->hidden + c->places[r] * width;
            float *inputs = input_row(&h->router_up, &up, r, worker);
            scale_to_unit(state, inputs, width, h->eps);
            prepare_columns(&h->router_up, &up, r, inputs, 0, width);
        }
    matmul(&h->router_up, &up, worker);
    ONE_THREAD(worker) {
        int fired = 0;
        for (int r = 0; r < rows; r++) {
            c->gates[r] = gate_score(w->wide + (size_t)r * inner, h);
            c->best[r] = -1;
            if (c->gates[r] >= h->floor) c->fired[fired++] = r;
        }
        *c->count = fired;
    }
}

/* Logits of the rows that fired, through adapter, norm and LM head, and what is likely. */
static void run_exit_head(const struct exit_head *h, const struct exit_check *c, int rows,
                          struct worker *worker) {
    const struct workspace *w = worker->shared;
    int width = h->layer.gate_up.columns, wide = h->layer.gate_up.outs;
    int outs = h->lm_head.outs, stride = (outs + LANES - 1) / LANES * LANES;
    float *next = w->prepared + prepared_floats(rows, w->columns);
    const struct operands to_gate_up = {w->normed, width, w->wide,     wide,
                                        rows,      0,     w->prepared, .next = NULL};
    const struct operands to_down = {w->wide, wide, c->states, width, rows, 1, next, .next = NULL};
    const struct operands to_logits = {w->normed, width, c->logits,   stride,
                                       rows,      0,     w->prepared, .next = NULL};
    int size = chunk_size(rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, rows)
        for (; r < end; r++) {
            const float *state = c->hidden + c->places[c->fired[r]] * width;
            float *scaled = c->states + (size_t)r * width;
            for (int i = 0; i < width; i += LANES)
                *(floats *)(scaled + i) =
                    *(const floats *)(state + i) * *(const floats *)(h->scale + i);
            float *inputs = input_row(&h->layer.gate_up, &to_gate_up, r, worker);
            scale_to_unit(state, inputs, width, h->eps);
            prepare_columns(&h->layer.gate_up, &to_gate_up, r, inputs, 0, width);
        }
    run_gate_up(&h->layer, &to_gate_up, &to_down, worker);
    matmul(&h->layer.down, &to_down, worker);
    norm_inputs(c->states, h->norm, h->eps, &h->lm_head, &to_logits, worker);
    matmul(&h->lm_head, &to_logits, worker);
    size = chunk_size(rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, rows)
        for (; r < end; r++) {
            int to = c->fired[r];
            c->best[to] =
                two_likeliest(c->logits + (size_t)r * stride, outs, c->tops + to, c->seconds + to);
        }
}

static void check_rows(const struct exit_head *h, const struct exit_check *c,
                       struct worker *worker) {
    run_gates(h, c, worker);
    if (*c->count) run_exit_head(h, c, *c->count, worker);
}

#endif
