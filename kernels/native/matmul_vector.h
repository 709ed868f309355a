/* Matrix products with fp32 vectors, for weights in fp32 and fp16.
 *
 * A dot product adds its columns, a vector at a time, into one vector of sums, whose lanes are
 * added at the end. The order is the same whatever else is computed, so a row's result depends
 * neither on the rows beside it nor on the number of threads.
 */
#ifndef OFFRAMP_MATMUL_VECTOR_H
#define OFFRAMP_MATMUL_VECTOR_H

#include "threads.h"
#include "weight_formats.h"

/* Dot products computed together, TILE_OUTS x TILE_ROWS at most: their sums stay in registers. */
#if defined(__AVX512F__)
enum { TILE_OUTS = 4, TILE_ROWS = 6 };
#else
enum { TILE_OUTS = 4, TILE_ROWS = 2 };
#endif
/* For more inputs than a tile has, PANEL_OUTS rows of weights are unpacked once, into memory, and
 * multiplied with PANEL_INPUTS inputs at a time; both stay in the cache. */
enum { PANEL_OUTS = 8, PANEL_INPUTS = 96 };
/* Rows of weights between the one in use and the one that is prefetched. */
enum { PREFETCH_ROWS = 8 };

/* Inputs of integer products (matmul_integer.h): of 16 bits, of 8 bits, or of either. */
enum inputs { INPUTS_FINE, INPUTS_COARSE, INPUTS_MIXED };

/* Inputs and outputs: x [rows, columns] with x_stride, out [rows, outs] with out_stride. */
struct operands {
    const float *x;
    size_t x_stride;
    float *out;
    size_t out_stride;
    int rows;
    int add;             /* add to what is in ``out``, instead of replacing it */
    float *prepared;     /* x as integer products (matmul_integer.h) or AMX take it */
    const uint8_t *next; /* weights that are used after the last ones; NULL: those behind them */
    int inputs;
    const uint8_t *coarse; /* [rows], of mixed inputs: whether the row's are rounded to 8 bits */
};

/* OUTS x ROWS dot products. */
INLINE void multiply_tile(int format, const uint8_t *w, size_t w_stride, int columns,
                          const float *bias, const struct operands *t, int row, int out,
                          int prefetch, const int OUTS, const int ROWS) {
    part_floats sums[TILE_OUTS][TILE_ROWS][PARTS];
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int i = 0; i < PARTS; i++) sums[o][r][i] = (part_floats){0};
    const float *x = t->x + row * t->x_stride;
    int groups = columns / GROUP;
    for (int g = 0; g < groups; g++, x += GROUP) {
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; o++) {
            part_floats values[GROUP_PARTS];
            const uint8_t *weights = w + o * w_stride;
            dequantize(format, weights, g, values);
            if (prefetch)
                __builtin_prefetch(weights + g * LEVEL_BYTES[format] + PREFETCH_ROWS * w_stride);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const float *at = x + r * t->x_stride;
#pragma GCC unroll 8
                for (int i = 0; i < GROUP_PARTS; i++)
                    sums[o][r][i % PARTS] +=
                        values[i] * *(const part_floats *)(at + i * PART_LANES);
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            float *to = t->out + (row + r) * t->out_stride + out + o;
            float sum = sum_parts(sums[o][r]) + (bias ? bias[out + o] : 0);
            *to = t->add ? *to + sum : sum;
        }
}

#define MULTIPLY_TILE(OUTS, ROWS)                                                                  \
    multiply_tile(format, w, w_stride, columns, bias, t, row, out, prefetch, OUTS, ROWS)

/* ``count`` rows of weights at ``w``, for outputs from ``out`` on, with inputs [first, last). */
INLINE void multiply_tiles(int format, const uint8_t *w, size_t w_stride, int columns,
                           const float *bias, const struct operands *t, int first, int last,
                           int out, int count, int prefetch) {
    for (; count >= TILE_OUTS; count -= TILE_OUTS, out += TILE_OUTS, w += TILE_OUTS * w_stride) {
        int row = first;
#if defined(__AVX512F__)
        for (; last - row >= 6; row += 6) MULTIPLY_TILE(4, 6);
        for (; last - row >= 4; row += 4) MULTIPLY_TILE(4, 4);
#endif
        for (; last - row >= 2; row += 2) MULTIPLY_TILE(4, 2);
        for (; last - row >= 1; row += 1) MULTIPLY_TILE(4, 1);
    }
    for (; count > 0; count--, out++, w += w_stride) {
        int row = first;
        for (; last - row >= 2; row += 2) MULTIPLY_TILE(1, 2);
        for (; last - row >= 1; row += 1) MULTIPLY_TILE(1, 1);
    }
}

#undef MULTIPLY_TILE

/* ``count`` unpacked rows of weights, for outputs from ``out`` on, with all inputs. One function
 * for all formats, whose loops get the registers to themselves. */
static __attribute__((noinline)) void multiply_panel(const float *panel, int columns,
                                                     const float *bias, const struct operands *t,
                                                     int out, int count) {
    for (int row = 0; row < t->rows; row += PANEL_INPUTS)
        multiply_tiles(FORMAT_FP32, (const uint8_t *)panel, 4 * (size_t)columns, columns, bias, t,
                       row, MIN(row + PANEL_INPUTS, t->rows), out, count, 0);
}

/* Outputs [out, out + count) of all rows. */
INLINE void multiply_vectors(int format, const struct matrix *m, const struct operands *t, int out,
                             int count, struct worker *worker) {
    int columns = m->columns;
    size_t stride = row_bytes(format, columns);
    const uint8_t *w = m->data + out * stride;
    if (format == FORMAT_FP32 || t->rows <= TILE_ROWS) {
        multiply_tiles(format, w, stride, columns, m->bias, t, 0, t->rows, out, count, 1);
        return;
    }
    float *panel = worker->panel;
    for (int done = 0; done < count; done += PANEL_OUTS) {
        int outs = MIN(PANEL_OUTS, count - done);
        for (int o = 0; o < outs; o++) {
            const uint8_t *weights = w + (done + o) * stride;
            float *to = panel + (size_t)o * columns;
            for (int g = 0; g < columns / GROUP; g++, to += GROUP) {
                __builtin_prefetch(weights + g * LEVEL_BYTES[format] + PREFETCH_ROWS * stride);
                dequantize_to(format, weights, g, to);
            }
        }
        multiply_panel(panel, columns, m->bias, t, out + done, outs);
    }
}

#endif
