/* One decoder layer. */
#ifndef OFFRAMP_LAYER_H
#define OFFRAMP_LAYER_H

#include "attention.h"
#include "elementwise.h"
#include "matmul.h"

/* Phases of ``run_layer``. */
enum { LAYER_PHASES = 6 + 4 * MATMUL_PHASES };

/* The operands ``t`` of a product for the rows of a batch, some of which may be coarse. */
static struct operands of_batch(const struct batch *b, struct operands t) {
    t.inputs = b->coarse ? INPUTS_MIXED : INPUTS_FINE;
    t.coarse = b->coarse;
    return t;
}

/* RMSNorm of the rows of x [rows, m->columns] into the inputs of products with ``m``, one phase. */
static void norm_inputs(const float *x, const float *weight, float eps, const struct matrix *m,
                        const struct operands *t, struct worker *worker) {
    int columns = m->columns, size = chunk_size(t->rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, t->rows)
        for (; r < end; r++) {
            float *inputs = input_row(m, t, r, worker);
            rms_norm(x + (size_t)r * columns, weight, inputs, columns, eps);
            prepare_columns(m, t, r, inputs, 0, columns);
        }
}

/* Products with gate and up, and the activation, one phase (two with AMX). Gate and up of a column
 * are by one thread, which has both in its cache then. */
static void run_gate_up(const struct layer *l, const struct operands *in,
                        const struct operands *down, struct worker *worker) {
    int inner = l->down.columns, size = matmul_chunk_size(inner, worker);
    int own = own_end(inner, size, worker);
    matmul_outputs *multiply = MATMUL[l->gate_up.format];
    prepare_inputs(&l->gate_up, in, worker);
    FOR_EACH_CHUNK(worker, c, end, size, inner) {
        struct operands gate = *in, up = *in;
        gate.next = weight_rows(&l->gate_up, inner + c);
        up.next = end == own ? worker->ahead : weight_rows(&l->gate_up, end);
        multiply(&l->gate_up, &gate, c, end - c, worker);
        multiply(&l->gate_up, &up, inner + c, end - c, worker);
        swiglu(in->out, inner, in->rows, c, end - c);
        for (int r = 0; r < in->rows; r++)
            prepare_columns(&l->down, down, r, down->x + r * down->x_stride, c, end);
    }
}

/* Keep the rows' states after a layer, if they are wanted; one phase, or none. */
static void keep_states(const struct shape *s, const struct layer *l, const struct batch *b,
                        const float *hidden, struct worker *worker) {
    if (!b->states || b->state_slots[l->index] < 0) return;
    float *to = b->states + b->state_slots[l->index] * s->width;
    int size = chunk_size(b->rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, b->rows)
        for (; r < end; r++)
            memcpy(to + b->state_rows[r] * b->state_stride, hidden + (size_t)r * s->width,
                   sizeof(float) * s->width);
}

/* Queries, keys and values of the rows, the first in w->wide [rows, qkv] and the others in the
 * pages. */
static void make_keys_values(const struct shape *s, const struct layer *l, const struct batch *b,
                             const float *hidden, struct worker *worker) {
    const struct workspace *w = worker->shared;
    int rows = b->rows, width = s->width, qkv = l->qkv.outs;
    const struct operands to_qkv = of_batch(
        b, (struct operands){w->normed, width, w->wide, qkv, rows, 0, w->prepared, .next = NULL});
    norm_inputs(hidden, l->attn_norm, s->eps, &l->qkv, &to_qkv, worker);
    add_time(worker, TIME_NORMS);
    fetch_ahead(&l->o, worker);
    matmul(&l->qkv, &to_qkv, worker);
    add_time(worker, TIME_QKV);
    int size = chunk_size(rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, rows)
        for (; r < end; r++) rope_and_store(s, l, b, w->wide + (size_t)r * qkv, r);
    add_time(worker, TIME_ROPE);
}

/* The rest of the layer for rows whose queries are in w->wide; ``next`` is the product behind it,
 * or NULL. */
static void attend_and_transform(const struct shape *s, const struct layer *l,
                                 const struct matrix *next, const struct batch *b, int runs,
                                 float *hidden, struct worker *worker) {
    const struct workspace *w = worker->shared;
    int rows = b->rows, width = s->width, queries = s->heads * s->head_dim;
    int qkv = l->qkv.outs, wide = 2 * s->inner;
    float *prepared = w->prepared + prepared_floats(rows, w->columns);
    const struct operands to_o = of_batch(
        b, (struct operands){w->normed, queries, hidden, width, rows, 1, prepared, .next = NULL});
    const struct operands to_gate_up = of_batch(
        b, (struct operands){w->normed, width, w->wide, wide, rows, 0, w->prepared, .next = NULL});
    const struct operands to_down = of_batch(
        b, (struct operands){w->wide, wide, hidden, width, rows, 1, prepared, .next = NULL});
    attention(s, l, b, runs, w->wide, qkv, w->normed, queries, worker);
    add_time(worker, TIME_ATTENTION);
    prepare_rows(&l->o, &to_o, worker);
    fetch_ahead(&l->gate_up, worker);
    matmul(&l->o, &to_o, worker);
    add_time(worker, TIME_OUTPUT);
    norm_inputs(hidden, l->mlp_norm, s->eps, &l->gate_up, &to_gate_up, worker);
    add_time(worker, TIME_NORMS);
    fetch_ahead(&l->down, worker);
    run_gate_up(l, &to_gate_up, &to_down, worker);
    add_time(worker, TIME_GATE_UP);
    fetch_ahead(next, worker);
    matmul(&l->down, &to_down, worker);
    add_time(worker, TIME_DOWN);
}

static void run_layer(const struct shape *s, const struct layer *l, const struct matrix *next,
                      const struct batch *b, int runs, float *hidden, struct worker *worker) {
    make_keys_values(s, l, b, hidden, worker);
    attend_and_transform(s, l, next, b, runs, hidden, worker);
    keep_states(s, l, b, hidden, worker);
}

#endif
