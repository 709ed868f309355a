/* Decoder layers on a CPU: weights of any format, one call for consecutive layers.
 *
 * The functions exported, which native.py calls. A token's result does not depend on the rows
 * beside it, on the chunk of its prompt or on the number of threads; only products of FP16
 * weights on AMX (matmul_amx.h) are rounded differently from those of few rows.
 */
#include "check.h"
#include "draft.h"
#include "layer.h"
#include "lm_head.h"
#include "sampling.h"
#include "structures.h"
#include "threads.h"
#include "weight_formats.h"

/* The same on every processor, so that the same models run everywhere. */
enum { HEAD_DIM_MULTIPLE = 16 };
/* Phases of a pass before its layers. */
enum { EMBED_PHASES = 1 };

/* This thread, with its part of the workspace. */
static struct worker start_worker(const struct workspace *w) {
    int thread = thread_number();
    float *panel = w->per_thread + w->per_thread_floats * thread;
    float *scores = panel + panel_floats(w->columns);
    int64_t *timers = thread ? NULL : w->timers;
    return (struct worker){.shared = w,
                           .phase = w->phases,
                           .panel = panel,
                           .scores = scores,
                           .number = thread,
                           .timers = timers,
                           .since = timers ? nanoseconds() : 0};
}

/* Before any other function: whether AMX is used. */
int32_t offramp_initialize(void) {
    return amx_initialize();
}

/* Advance hidden [rows, width] by ``count`` layers, in place; with ``ids`` it begins as these rows
 * of ``embeddings``. */
void offramp_run_layers(const struct shape *s, const struct layer *layers, int32_t count,
                        const struct batch *b, float *hidden, const struct matrix *embeddings,
                        const int64_t *ids, const struct workspace *w) {
    int runs = find_runs(b, w->run_starts);
    memset(w->phases, 0, sizeof(struct phase) * (EMBED_PHASES + LAYER_PHASES * count));
#pragma omp parallel num_threads(w->threads)
    {
        struct worker worker = start_worker(w);
        if (ids) {
            int size = chunk_size(b->rows, &worker);
            FOR_EACH_CHUNK(&worker, r, end, size, b->rows)
                for (; r < end; r++) read_row(embeddings, ids[r], hidden + (size_t)r * s->width);
        }
        for (int i = 0; i < count; i++)
            run_layer(s, layers + i, i + 1 < count ? &layers[i + 1].qkv : NULL, b, runs, hidden,
                      &worker);
        amx_release();
    }
}

/* x [rows, columns] times the matrix transposed, plus its bias, into out [rows, outs]; ``coarse``
 * [rows] are rounded to 8 bits, where weights are in 8 or 4; NULL: none. */
void offramp_matmul(const struct matrix *m, const float *x, float *out, int32_t rows,
                    const uint8_t *coarse, const struct workspace *w) {
    struct operands t = {x, m->columns, out, m->outs, rows, 0, w->prepared, .next = NULL};
    if (coarse) t.inputs = INPUTS_MIXED, t.coarse = coarse;
    memset(w->phases, 0, sizeof(struct phase) * MATMUL_PHASES);
#pragma omp parallel num_threads(w->threads)
    {
        struct worker worker = start_worker(w);
        prepare_rows(m, &t, &worker);
        matmul(m, &t, &worker);
        amx_release();
    }
}

/* Logits of rows behind the last layer, and the largest of each. */
void offramp_head(const struct lm_head *h, const struct head_rows *c, const struct workspace *w) {
    memset(w->phases, 0, sizeof(struct phase) * HEAD_PHASES);
#pragma omp parallel num_threads(w->threads)
    {
        struct worker worker = start_worker(w);
        run_head(h, c, &worker);
        amx_release();
    }
}

/* Tokens by chance. */
void offramp_sample(const struct sampling *s, const struct workspace *w) {
    memset(w->phases, 0, sizeof(struct phase) * SAMPLING_PHASES);
#pragma omp parallel num_threads(w->threads)
    {
        struct worker worker = start_worker(w);
        draw_tokens(s, &worker);
    }
}

/* Rows ``ids`` [count] of a matrix as fp32, out [count, columns]. */
void offramp_rows(const struct matrix *m, const int64_t *ids, int32_t count, float *out) {
    for (int i = 0; i < count; i++, out += m->columns) read_row(m, ids[i], out);
}

/* Make the entries of a draft, and its guesses. */
void offramp_draft(const struct shape *s, const struct draft_head *h, struct draft *d,
                   const struct workspace *w) {
    d->begun = nanoseconds();
    memset(w->phases, 0, sizeof(struct phase) * DRAFT_PHASES * MAX(d->guesses, 1));
    take_entries(d, w);
#pragma omp parallel num_threads(w->threads)
    {
        struct worker worker = start_worker(w);
        draft_step(s, h, d, 0, &worker);
        for (int i = 1; i < d->guesses && d->steps[1 + i].rows; i++)
            draft_step(s, h, d, i, &worker);
        amx_release();
    }
}

/* Check rows at an exit. */
void offramp_check(const struct exit_head *h, const struct exit_check *c,
                   const struct workspace *w) {
    memset(w->phases, 0, sizeof(struct phase) * CHECK_PHASES);
#pragma omp parallel num_threads(w->threads)
    {
        struct worker worker = start_worker(w);
        check_rows(h, c, &worker);
        amx_release();
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
int64_t offramp_attention_floats(const struct shape *s) {
    return attention_floats(s);
}

/* Floats of scratch memory for attention, shared by all threads. */
int64_t offramp_partial_floats(const struct shape *s, const struct batch *b) {
    return shared_partial_floats(s, b);
}

/* Floats of scratch memory for a row whose logits are screened, in ``wide``. */
int64_t offramp_screening_floats(int32_t outs, int32_t threads) {
    return screening_floats(outs, threads);
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
        CONSTANT(FORMAT_FP32),
        CONSTANT(FORMAT_FP16),
        CONSTANT(FORMAT_INT8),
        CONSTANT(FORMAT_INT4),
        CONSTANT(KV_FP32),
        CONSTANT(KV_FP16),
        CONSTANT(KV_INT16),
        CONSTANT(GROUP),
        CONSTANT(SET),
        CONSTANT(EMBED_PHASES),
        CONSTANT(LAYER_PHASES),
        CONSTANT(HEAD_PHASES),
        CONSTANT(MATMUL_PHASES),
        CONSTANT(HEAD_DIM_MULTIPLE),
        SIZE_OF(struct matrix),
        SIZE_OF(struct layer),
        SIZE_OF(struct shape),
        SIZE_OF(struct batch),
        SIZE_OF(struct workspace),
        SIZE_OF(struct phase),
        SIZE_OF(struct draft),
        SIZE_OF(struct draft_span),
        SIZE_OF(struct draft_head),
        CONSTANT(DRAFT_PHASES),
        CONSTANT(FEWEST_COARSE),
        SIZE_OF(struct screen),
        SIZE_OF(struct lm_head),
        SIZE_OF(struct head_rows),
        SIZE_OF(struct choice),
        SIZE_OF(struct sampling),
        CONSTANT(SAMPLING_PHASES),
        SIZE_OF(struct exit_head),
        SIZE_OF(struct exit_check),
        CONSTANT(CHECK_PHASES),
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
