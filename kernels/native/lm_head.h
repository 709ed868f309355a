/* The end of a pass: final norm, LM head and the likeliest token of the rows that need one. */
#ifndef OFFRAMP_LM_HEAD_H
#define OFFRAMP_LM_HEAD_H

#include "elementwise.h"
#include "layer.h"

/* Phases of ``run_head``. */
enum { HEAD_PHASES = 2 + MATMUL_PHASES };

static void run_head(const struct lm_head *h, const struct head_rows *c, struct worker *worker) {
    const struct workspace *w = worker->shared;
    int width = h->weight.columns, outs = h->weight.outs, rows = c->rows;
    const struct operands to_logits = {w->normed, width, c->logits, outs, rows, 0, w->prepared};
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

#endif
