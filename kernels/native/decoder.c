/* Decoder layers on a CPU: weights of any format, one call for consecutive layers.
 *
 * The functions exported, which native.py calls. A token's result does not depend on the rows
 * beside it, on the chunk of its prompt or on the number of threads; only products of FP16
 * weights on AMX (matmul_amx.h) are rounded differently from those of few rows.
 */
#include "attention.h"
#include "elementwise.h"
#include "matmul.h"
#include "structures.h"
#include "threads.h"
#include "weight_formats.h"

/* Phases of ``run_layer``. */
enum { LAYER_PHASES = 4 + 4 * MATMUL_PHASES };
/* The same on every processor, so that the same models run everywhere. */
enum { HEAD_DIM_MULTIPLE = 16 };

/* RMSNorm of the rows of x [rows, m->columns] into the inputs of products with ``m``, one phase. */
static void norm_inputs(const float *x, const float *weight, float eps, const struct matrix *m,
                        const struct operands *t, struct worker *worker) {
    int columns = m->columns, size = chunk_size(t->rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, t->rows)
        for (; r < end; r++) {
            rms_norm(x + (size_t)r * columns, weight, (float *)t->x + r * t->x_stride, columns,
                     eps);
            prepare_columns(m, t, r, 0, columns);
        }
}

/* Products with gate and up, and the activation, one phase (two with AMX). Gate and up of a column
 * are by one thread, which has both in its cache then. */
static void run_gate_up(const struct layer *l, const struct operands *in,
                        const struct operands *down, struct worker *worker) {
    int inner = l->down.columns, size = matmul_chunk_size(inner, worker);
    matmul_outputs *multiply = MATMUL[l->gate_up.format];
    prepare_inputs(&l->gate_up, in, worker);
    FOR_EACH_CHUNK(worker, c, end, size, inner) {
        multiply(&l->gate_up, in, c, end - c, worker);
        multiply(&l->gate_up, in, inner + c, end - c, worker);
        swiglu(in->out, inner, in->rows, c, end - c);
        for (int r = 0; r < in->rows; r++) prepare_columns(&l->down, down, r, c, end);
    }
}

static void run_layer(const struct shape *s, const struct layer *l, const struct batch *b, int runs,
                      float *hidden, struct worker *worker) {
    const struct workspace *w = worker->shared;
    int rows = b->rows, width = s->width, queries = s->heads * s->head_dim;
    int qkv = queries + 2 * s->kv_heads * s->head_dim, wide = 2 * s->inner;
    float *next = w->prepared + prepared_floats(rows, w->columns);
    const struct operands to_qkv = {w->normed, width, w->wide, qkv, rows, 0, w->prepared};
    const struct operands to_o = {w->normed, queries, hidden, width, rows, 1, next};
    const struct operands to_gate_up = {w->normed, width, w->wide, wide, rows, 0, w->prepared};
    const struct operands to_down = {w->wide, wide, hidden, width, rows, 1, next};
    norm_inputs(hidden, l->attn_norm, s->eps, &l->qkv, &to_qkv, worker);
    add_time(worker, TIME_NORMS);
    matmul(&l->qkv, &to_qkv, worker);
    add_time(worker, TIME_QKV);
    int size = chunk_size(rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, rows)
        for (; r < end; r++) rope_and_store(s, l, b, w->wide + (size_t)r * qkv, r);
    add_time(worker, TIME_ROPE);
    attention(s, l, b, runs, w->wide, qkv, w->normed, queries, worker);
    add_time(worker, TIME_ATTENTION);
    prepare_rows(&l->o, &to_o, worker);
    matmul(&l->o, &to_o, worker);
    add_time(worker, TIME_OUTPUT);
    norm_inputs(hidden, l->mlp_norm, s->eps, &l->gate_up, &to_gate_up, worker);
    add_time(worker, TIME_NORMS);
    run_gate_up(l, &to_gate_up, &to_down, worker);
    add_time(worker, TIME_GATE_UP);
    matmul(&l->down, &to_down, worker);
    add_time(worker, TIME_DOWN);
}

/* This thread, with its part of the workspace. */
static struct worker start_worker(const struct workspace *w) {
    int thread = thread_number();
    float *panel = w->per_thread + w->per_thread_floats * thread;
    float *scores = panel + panel_floats(w->columns);
    int64_t *timers = thread ? NULL : w->timers;
    return (struct worker){w, w->phases, panel, scores, 0, timers, timers ? nanoseconds() : 0};
}

/* Before any other function: whether AMX is used. */
int32_t offramp_initialize(void) {
    return amx_initialize();
}

/* Advance hidden [rows, width] by ``count`` layers, in place. */
void offramp_run_layers(const struct shape *s, const struct layer *layers, int32_t count,
                        const struct batch *b, float *hidden, const struct workspace *w) {
    int runs = find_runs(b, w->run_starts);
    memset(w->phases, 0, sizeof(struct phase) * LAYER_PHASES * count);
#pragma omp parallel num_threads(w->threads)
    {
        struct worker worker = start_worker(w);
        amx_configure();
        for (int i = 0; i < count; i++) run_layer(s, layers + i, b, runs, hidden, &worker);
        amx_release();
    }
}

/* x [rows, columns] times the matrix transposed, plus its bias, into out [rows, outs]. */
void offramp_matmul(const struct matrix *m, const float *x, float *out, int32_t rows,
                    const struct workspace *w) {
    const struct operands t = {x, m->columns, out, m->outs, rows, 0, w->prepared};
    memset(w->phases, 0, sizeof(struct phase) * MATMUL_PHASES);
#pragma omp parallel num_threads(w->threads)
    {
        struct worker worker = start_worker(w);
        amx_configure();
        prepare_rows(m, &t, &worker);
        matmul(m, &t, &worker);
        amx_release();
    }
}

/* Rows ``ids`` [count] of a matrix as fp32, out [count, columns]. */
void offramp_rows(const struct matrix *m, const int64_t *ids, int32_t count, float *out) {
    size_t stride = row_bytes(m->format, m->columns);
    for (int i = 0; i < count; i++, out += m->columns) {
        int row = ids[i] % SET;
        if (m->format >= FORMAT_INT8)
            dequantize_from_set(m->format, m->data + (ids[i] - row) * stride, m->columns, row, out);
        else
            for (int g = 0; g < m->columns / GROUP; g++)
                dequantize_to(m->format, m->data + ids[i] * stride, g, out + g * GROUP);
    }
}

/* Floats of scratch memory for the inputs of a matrix, shared by all threads. */
int64_t offramp_prepared_floats(int32_t rows, int32_t columns) {
    return prepared_floats(rows, columns);
}

/* Floats of scratch memory for the products of each thread. */
int64_t offramp_matmul_floats(int32_t columns) {
    return panel_floats(columns);
}

/* Floats of scratch memory for the attention of each thread, behind those for products. */
int64_t offramp_score_floats(const struct shape *s, const struct batch *b) {
    return score_floats(s, b);
}

/* The constant or size of this name; -1 if there is none. */
int64_t offramp_constant(const char *name) {
#define CONSTANT(name) {#name, name}
#define SIZE_OF(type)                                                                              \
    {                                                                                              \
        #type, (int64_t)sizeof(type)                                                               \
    }
    static const struct {
        const char *name;
        int64_t value;
    } constants[] = {
        CONSTANT(FORMAT_FP32),  CONSTANT(FORMAT_FP16),     CONSTANT(FORMAT_INT8),
        CONSTANT(FORMAT_INT4),  CONSTANT(GROUP),           CONSTANT(SET),
        CONSTANT(LAYER_PHASES), CONSTANT(MATMUL_PHASES),   CONSTANT(HEAD_DIM_MULTIPLE),
        SIZE_OF(struct matrix), SIZE_OF(struct layer),     SIZE_OF(struct shape),
        SIZE_OF(struct batch),  SIZE_OF(struct workspace), SIZE_OF(struct phase),
    };
#undef CONSTANT
#undef SIZE_OF
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++)
        if (strcmp(name, constants[i].name) == 0) return constants[i].value;
    return -1;
}

/* Names of the timers, in their order; NULL behind the last. */
const char *offramp_timer_name(int32_t timer) {
    static const char *const names[TIMERS] = {
        [TIME_NORMS] = "norms",
        [TIME_QKV] = "q, k, v",
        [TIME_ROPE] = "positions",
        [TIME_ATTENTION] = "attention",
        [TIME_OUTPUT] = "attention output",
        [TIME_GATE_UP] = "gate, up",
        [TIME_DOWN] = "down",
    };
    return timer < TIMERS ? names[timer] : NULL;
}
