/* Matrix products: one function a weight format, which chooses among the instruction sets. */
#ifndef OFFRAMP_MATMUL_H
#define OFFRAMP_MATMUL_H

#include "matmul_amx.h"
#include "matmul_integer_amx.h"
#include "matmul_vector.h"

/* Phases of a product with the conversion of its inputs. */
enum { MATMUL_PHASES = 2 };

/* Floats of a thread's weight panel: AMX_OUTS rows, more than the PANEL_OUTS of vectors. */
static size_t panel_floats(int columns) {
    return (size_t)AMX_OUTS * columns;
}

/* Floats of prepared inputs, in fixed point or split for AMX. */
static size_t prepared_floats(int rows, int columns) {
    size_t split = (size_t)(rows + AMX_ROWS - 1) / AMX_ROWS * AMX_ROWS * columns;
    return MAX(split, fixed_point_floats(rows, columns));
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
    if (uses_amx(m, t->rows) && t->inputs == INPUTS_FINE)
        multiply_integer_amx(FORMAT_INT8, m, t, out, count, worker);
    else
        multiply_integer(FORMAT_INT8, m, t, out, count);
}

static void matmul_int4(const struct matrix *m, const struct operands *t, int out, int count,
                        struct worker *worker) {
    if (uses_amx(m, t->rows) && t->inputs == INPUTS_FINE)
        multiply_integer_amx(FORMAT_INT4, m, t, out, count, worker);
    else
        multiply_integer(FORMAT_INT4, m, t, out, count);
}

static matmul_outputs *const MATMUL[] = {
    [FORMAT_FP32] = matmul_fp32,
    [FORMAT_FP16] = matmul_fp16,
    [FORMAT_INT8] = matmul_int8,
    [FORMAT_INT4] = matmul_int4,
};

/* One row of ``t`` times a matrix of one set, to its ``out`` [outs], which has a stride of 0. */
static void multiply_row(const struct matrix *set, const struct operands *t, int row,
                         struct worker *worker) {
    struct operands one = *t;
    if (set->format < FORMAT_INT8) {
        one.x += row * t->x_stride, one.rows = 1;
        MATMUL[set->format](set, &one, 0, set->outs, worker);
    } else {
        for (int lane = 0; lane < SET; lane += INTEGER_WIDTH * PART_LANES)
            if (set->format == FORMAT_INT8)
                multiply_lanes(FORMAT_INT8, set->data, set->data, lane, 0, 1, set, &one, row, 0, 0,
                               set->outs, 1);
            else
                multiply_lanes(FORMAT_INT4, set->data, set->data, lane, 0, 1, set, &one, row, 0, 0,
                               set->outs, 1);
    }
}
/* Whether products with ``m`` take fixed point inputs. Who computes a row's inputs then converts
 * them at once, with ``prepare_columns``. */
INLINE int takes_fixed_point(const struct matrix *m) {
    return m->format >= FORMAT_INT8;
}

/* Convert columns [first, end) of a row of inputs, x [columns], if products with ``m`` need it. */
INLINE void prepare_columns(const struct matrix *m, const struct operands *t, int row,
                            const float *x, int first, int end) {
    if (takes_fixed_point(m)) quantize_inputs(m, t, row, x, first, end);
}

/* Where to put inputs [columns] of ``row`` that are converted at once: products in fixed point
 * read no others, so these need not leave the thread's cache. */
INLINE float *input_row(const struct matrix *m, const struct operands *t, int row,
                        const struct worker *worker) {
    return takes_fixed_point(m) ? worker->panel : (float *)t->x + row * t->x_stride;
}

/* What else products with ``m`` need of the inputs beforehand; a phase of its own, or none. */
static void prepare_inputs(const struct matrix *m, const struct operands *t,
                           struct worker *worker) {
    if (!takes_fixed_point(m) && uses_amx(m, t->rows)) amx_split_inputs(t, m->columns, worker);
}

/* How many of ``outs`` outputs make a chunk of a phase: a multiple of AMX_OUTS. */
static int matmul_chunk_size(int outs, const struct worker *worker) {
    return chunk_size((outs + AMX_OUTS - 1) / AMX_OUTS, worker) * AMX_OUTS;
}

/* Where the thread's share of ``outs`` outputs ends, in chunks of ``size``. */
static int own_end(int outs, int size, const struct worker *worker) {
    int shares = count_shares(worker);
    return MIN(share_of(worker->number % shares, shares, (outs + size - 1) / size).end * size,
               outs);
}

/* Let threads that wait fetch the first weights of a product to come, each those it is likely to
 * take; ``m`` NULL: of none. */
static void fetch_ahead(const struct matrix *m, struct worker *worker) {
    worker->ahead = worker->ahead_end = NULL;
    if (!m) return;
    int size = matmul_chunk_size(m->outs, worker), shares = count_shares(worker);
    struct share own = share_of(worker->number % shares, shares, (m->outs + size - 1) / size);
    size_t row = row_bytes(m->format, m->columns);
    worker->ahead = m->data + own.begin * size * row;
    worker->ahead_end = m->data + MIN(own.end * size, m->outs) * row;
}

/* All outputs, by all threads; fixed point inputs are there already. */
static void matmul(const struct matrix *m, const struct operands *t, struct worker *worker) {
    prepare_inputs(m, t, worker);
    int size = matmul_chunk_size(m->outs, worker), own = own_end(m->outs, size, worker);
    FOR_EACH_CHUNK(worker, out, end, size, m->outs) {
        struct operands some = *t;
        if (end == own) some.next = worker->ahead;
        MATMUL[m->format](m, &some, out, end - out, worker);
    }
}

/* A phase that converts fixed point inputs, for those who did not. */
static void prepare_rows(const struct matrix *m, const struct operands *t, struct worker *worker) {
    if (!takes_fixed_point(m)) return;
    int size = chunk_size(t->rows, worker);
    FOR_EACH_CHUNK(worker, row, end, size, t->rows)
        for (; row < end; row++)
            prepare_columns(m, t, row, t->x + row * t->x_stride, 0, m->columns);
}

#endif
