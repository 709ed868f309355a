/* Matrix products of weights in 8 and 4 bits, with sums of integers.
 *
 * Inputs become 16-bit fixed point, with a scale for each group of 32 columns: x = scale * q, where
 * q = -32512 .. 32512. For a group of a row of weights with scale d, minimum m and levels w
 *
 *     sum (d w + m) x  =  d * scale * sum(w q)  +  m * scale * sum(q)
 *
 * and both sums on the right are exact in 32 bits. Integers can be added in any order, and groups
 * are always added in order of columns, so a row's result depends neither on the rows beside it nor
 * on the number of threads. Rounding the inputs leaves an error of 1e-4 of an output's typical
 * size.
 */
#ifndef OFFRAMP_MATMUL_INTEGER_H
#define OFFRAMP_MATMUL_INTEGER_H

#include "integer_sums.h"
#include "matmul_vector.h"

enum { LARGEST_INPUT = 32512 };
/* Bytes between the weights in use and those prefetched: what memory delivers in the time it needs
 * to answer, and more. */
enum { PREFETCH_BYTES = 8192 };

/* Floats of a row of inputs in fixed point. */
INLINE size_t fixed_point_floats(int columns) {
    return columns / 2 + 2 * (columns / GROUP);
}

INLINE struct fixed_point_row fixed_point_row(const struct operands *t, int row, int columns) {
    float *at = t->prepared + row * fixed_point_floats(columns);
    float *scales = at + columns / 2;
    return (struct fixed_point_row){(int16_t *)at, scales, scales + columns / GROUP};
}

/* One group of a row of inputs. */
INLINE void quantize_group(int format, const float *x, int g, const struct fixed_point_row *to) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    const floats *values = (const floats *)(x + g * GROUP);
    ints largest = {0};
    for (int i = 0; i < VECTORS; i++) {
        /* Floats without their sign are ordered like integers; NaN is the largest. */
        ints size = (ints)values[i] & 0x7fffffff;
        largest = (ints)select_lanes(size > largest, (floats)size, (floats)largest);
    }
    int32_t most = 0;
    for (int i = 0; i < LANES; i++) most = largest[i] > most ? largest[i] : most;
    float size;
    memcpy(&size, &most, sizeof size);
    /* Of a smaller group the reciprocal overflows. */
    const float smallest = 1e-30f;
    float inverse = size < smallest ? 0 : LARGEST_INPUT / size;
    uints sum = {0};
    for (int i = 0; i < VECTORS; i++) {
        uints fixed = (uints)(values[i] * inverse + magic) - (uints)broadcast(magic);
        sum += fixed;
        store_inputs(format, __builtin_convertvector((ints)fixed, shorts), i * LANES,
                     to->columns + g * GROUP);
    }
    uint32_t total = 0; /* of inputs that are no numbers, any */
    for (int i = 0; i < LANES; i++) total += sum[i];
    to->scales[g] = size < smallest ? 0 : size / LARGEST_INPUT;
    to->sums[g] = to->scales[g] * (int32_t)total;
}

/* Columns [first, end) of one row of inputs. */
static void quantize_inputs(const struct matrix *m, const struct operands *t, int row, int first,
                            int end) {
    struct fixed_point_row to = fixed_point_row(t, row, m->columns);
    for (int g = first / GROUP; g < end / GROUP; g++)
        quantize_group(m->format, t->x + row * t->x_stride, g, &to);
}

/* Store lanes [begin, end) of a row's sums. */
static __attribute__((noinline)) void store_lanes(part_floats sums, const float *bias, float *to,
                                                  int begin, int end, int add) {
    for (int i = begin; i < end; i++) {
        float sum = sums[i] + (bias ? bias[i] : 0);
        to[i] = add ? to[i] + sum : sum;
    }
}

/* Weights of INTEGER_WIDTH vectors of outputs, the first of which starts at ``lane`` of ``set``,
 * times ROWS rows of inputs. Of these outputs, ``begin`` to ``end`` are stored; ``out`` is the
 * number of the set's first output. */
INLINE void multiply_lanes(int format, const uint8_t *set, int lane, const struct matrix *m,
                           const struct operands *t, int row, int out, int begin, int end,
                           const int ROWS) {
    int columns = m->columns, groups = columns / GROUP;
    struct fixed_point_row inputs[INTEGER_ROWS];
    part_floats sums[INTEGER_ROWS][INTEGER_WIDTH];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        inputs[r] = fixed_point_row(t, row + r, columns);
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) sums[r][v] = (part_floats){0};
    }
    for (int g = 0; g < groups; g++, set += set_group_bytes(format)) {
        part_ints dots[INTEGER_ROWS][INTEGER_WIDTH];
        for (size_t i = 0; i < set_group_bytes(format); i += 64)
            __builtin_prefetch(set + PREFETCH_BYTES + i);
        add_up_group(format, set + SET * SCALE_BYTES[format] + 4 * lane, inputs, g, dots, ROWS);
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            part_floats scale = load_fp16_part(set + 2 * (lane + PART_LANES * v));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                sums[r][v] += __builtin_convertvector(dots[r][v], part_floats) *
                              (inputs[r].scales[g] * scale);
            if (format == FORMAT_INT4) {
                part_floats minimum = load_fp16_part(set + 2 * (SET + lane + PART_LANES * v));
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) sums[r][v] += minimum * inputs[r].sums[g];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            int first = lane + v * PART_LANES;
            float *to = t->out + (row + r) * t->out_stride + out + first;
            const float *bias = m->bias ? m->bias + out + first : NULL;
            if (begin <= first && first + PART_LANES <= end) {
                part_floats sum = sums[r][v];
                if (bias) sum += *(const part_floats *)bias;
                if (t->add) sum += *(const part_floats *)to;
                *(part_floats *)to = sum;
            } else {
                store_lanes(sums[r][v], bias, to, MAX(begin - first, 0),
                            MIN(end - first, PART_LANES), t->add);
            }
        }
}

#define MULTIPLY_ROWS(ROWS)                                                                        \
    case ROWS: multiply_lanes(format, set, lane, m, t, row, out, begin, end, ROWS); break;

/* The same for all rows: as many at a time as keep their sums in registers, about as many each
 * time. */
INLINE void multiply_all_rows(int format, const uint8_t *set, int lane, const struct matrix *m,
                              const struct operands *t, int out, int begin, int end) {
    int tiles = (t->rows + INTEGER_ROWS - 1) / INTEGER_ROWS;
    for (int row = 0, rows; row < t->rows; row += rows, tiles--) {
        rows = (t->rows - row + tiles - 1) / tiles;
        switch (rows) {
            MULTIPLY_ROWS(1)
            MULTIPLY_ROWS(2)
            MULTIPLY_ROWS(3)
            MULTIPLY_ROWS(4)
#if defined(__AVX512F__)
            MULTIPLY_ROWS(5)
            MULTIPLY_ROWS(6)
#endif
        }
    }
}

#undef MULTIPLY_ROWS

/* Outputs [out, out + count) of all rows, whose inputs quantize_inputs has converted. */
INLINE void multiply_integer(int format, const struct matrix *m, const struct operands *t, int out,
                             int count) {
    int last = out + count;
    for (int first = out / SET * SET; first < last; first += SET) {
        const uint8_t *set = m->data + first * row_bytes(format, m->columns);
        int begin = MAX(out - first, 0), end = MIN(SET, last - first);
        for (int lane = 0; lane < SET; lane += INTEGER_WIDTH * PART_LANES)
            multiply_all_rows(format, set, lane, m, t, first, begin, end);
    }
}

#endif
