/* Matrix products: one function a weight format, which chooses among the instruction sets. */
#ifndef OFFRAMP_MATMUL_H
#define OFFRAMP_MATMUL_H

#include "matmul_amx.h"
#include "matmul_integer.h"
#include "matmul_vector.h"

/* Phases of ``matmul``; inputs are converted in the first, where they have to be. */
enum { MATMUL_PHASES = 2 };

/* Floats of a thread's weight panel: AMX_OUTS rows, more than the PANEL_OUTS of vectors. */
static size_t panel_floats(int columns) {
    return (size_t)AMX_OUTS * columns;
}

/* Floats of the inputs as ``matmul_prepare`` stores them; AMX needs more than fixed point. */
static size_t split_input_floats(int rows, int columns) {
    return (size_t)(rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS * columns;
}

/* Outputs [out, out + count) of all rows of ``t``: x times the matrix transposed, plus its bias. */
typedef void matmul_outputs(const struct matrix *m, const struct operands *t, int out, int count,
                            struct worker *worker);

static void matmul_fp32(const struct matrix *m, const struct operands *t, int out, int count,
                        struct worker *worker) {
    multiply_vectors(FORMAT_FP32, m, t, out, count, worker);
}

static void matmul_fp16(const struct matrix *m, const struct operands *t, int out, int count,
                        struct worker *worker) {
    if (uses_amx(m, t->rows))
        multiply_amx(FORMAT_FP16, m, t, out, count, worker);
    else
        multiply_vectors(FORMAT_FP16, m, t, out, count, worker);
}

static void matmul_int8(const struct matrix *m, const struct operands *t, int out, int count,
                        struct worker *worker) {
    multiply_integer(FORMAT_INT8, m, t, out, count, worker);
}

static void matmul_int4(const struct matrix *m, const struct operands *t, int out, int count,
                        struct worker *worker) {
    multiply_integer(FORMAT_INT4, m, t, out, count, worker);
}

static matmul_outputs *const MATMUL[] = {
    [FORMAT_FP32] = matmul_fp32,
    [FORMAT_FP16] = matmul_fp16,
    [FORMAT_INT8] = matmul_int8,
    [FORMAT_INT4] = matmul_int4,
};

/* What each product with ``m`` needs of the inputs ``t`` beforehand; a phase of its own, or none.
 */
static void matmul_prepare(const struct matrix *m, const struct operands *t,
                           struct worker *worker) {
    if (m->format >= FORMAT_INT8)
        quantize_inputs(t, m->columns, worker);
    else if (uses_amx(m, t->rows))
        amx_split_inputs(t, m->columns, worker);
}

/* How many of ``outs`` outputs make a chunk of a phase: a multiple of AMX_OUTS. */
static int matmul_chunk_size(int outs, const struct worker *worker) {
    return chunk_size((outs + AMX_OUTS - 1) / AMX_OUTS, worker) * AMX_OUTS;
}

/* All outputs, by all threads. */
static void matmul(const struct matrix *m, const struct operands *t, struct worker *worker) {
    matmul_prepare(m, t, worker);
    int size = matmul_chunk_size(m->outs, worker);
    FOR_EACH_CHUNK(worker, out, end, size, m->outs) MATMUL[m->format](m, t, out, end - out, worker);
}

#endif
