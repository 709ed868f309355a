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

#include "matmul_vector.h"

enum { LARGEST_INPUT = 32512 };
/* Rows of inputs, and vectors of outputs, whose sums stay in registers. With two vectors, each
 * input that is broadcast serves two products: processors broadcast fewer than they multiply. */
#if defined(__AVX512F__)
enum { INTEGER_ROWS = 6, INTEGER_WIDTH = 2 };
#else
enum { INTEGER_ROWS = 4, INTEGER_WIDTH = 1 };
#endif
/* Bytes between the weights in use and those prefetched: what memory delivers in the time it needs
 * to answer, and more. */
enum { PREFETCH_BYTES = 8192 };

/* A row of inputs: columns of 16 bits; then for each group its scale; then for each group the scale
 * times the sum of its columns. */
struct fixed_point_row {
    int16_t *columns;
    float *scales, *sums; /* [groups] */
};

/* Floats of such a row. */
INLINE size_t fixed_point_floats(int columns) {
    return columns / 2 + 2 * (columns / GROUP);
}

INLINE struct fixed_point_row fixed_point_row(const struct operands *t, int row, int columns) {
    float *at = t->prepared + row * fixed_point_floats(columns);
    float *scales = at + columns / 2;
    return (struct fixed_point_row){(int16_t *)at, scales, scales + columns / GROUP};
}

/* One group of a row of inputs. */
INLINE void quantize_group(const float *x, int g, const struct fixed_point_row *to) {
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
        *(shorts *)(to->columns + g * GROUP + i * LANES) =
            __builtin_convertvector((ints)fixed, shorts);
    }
    uint32_t total = 0; /* of inputs that are no numbers, any */
    for (int i = 0; i < LANES; i++) total += sum[i];
    to->scales[g] = size < smallest ? 0 : size / LARGEST_INPUT;
    to->sums[g] = to->scales[g] * (int32_t)total;
}

/* Columns [first, end) of one row of ``columns`` inputs. */
static void quantize_inputs(const struct operands *t, int columns, int row, int first, int end) {
    struct fixed_point_row to = fixed_point_row(t, row, columns);
    for (int g = first / GROUP; g < end / GROUP; g++)
        quantize_group(t->x + row * t->x_stride, g, &to);
}

/* Word ``at`` of LANES rows as pairs of levels, the columns 0 and 1, 2 and 3, and so on. */
INLINE void unpack_pairs(int format, const uint8_t *at, ints pairs[4]) {
    ints word = *(const ints *)at;
    if (format == FORMAT_INT4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) pairs[i] = word >> 4 * i & 0x000f000f;
    } else {
        pairs[0] = (ints)((pair_lanes)word << 8 >> 8);
        pairs[1] = (ints)((pair_lanes)word >> 8);
    }
}

/* Store lanes [begin, end) of a row's sums. */
static __attribute__((noinline)) void store_lanes(floats sums, const float *bias, float *to,
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
    int columns = m->columns, groups = columns / GROUP, words = GROUP / word_columns(format);
    const int PAIRS = word_columns(format) / 2;
    struct fixed_point_row inputs[INTEGER_ROWS];
    floats sums[INTEGER_ROWS][INTEGER_WIDTH];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        inputs[r] = fixed_point_row(t, row + r, columns);
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) sums[r][v] = (floats){0};
    }
    for (int g = 0; g < groups; g++, set += set_group_bytes(format)) {
        ints dots[INTEGER_ROWS][INTEGER_WIDTH];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < INTEGER_WIDTH; v++) dots[r][v] = (ints){0};
        for (size_t i = 0; i < set_group_bytes(format); i += 64)
            __builtin_prefetch(set + PREFETCH_BYTES + i);
        const uint8_t *levels = set + SET * SCALE_BYTES[format] + 4 * lane;
#pragma GCC unroll 1
        for (int w = 0; w < words; w++) {
            ints pairs[INTEGER_WIDTH][4];
#pragma GCC unroll 2
            for (int v = 0; v < INTEGER_WIDTH; v++)
                unpack_pairs(format, levels + 4 * (SET * w + LANES * v), pairs[v]);
#pragma GCC unroll 4
            for (int p = 0; p < PAIRS; p++)
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    int32_t pair;
                    memcpy(&pair, inputs[r].columns + g * GROUP + 2 * (PAIRS * w + p), 4);
#pragma GCC unroll 2
                    for (int v = 0; v < INTEGER_WIDTH; v++)
                        dots[r][v] = add_pairs(dots[r][v], pairs[v][p], pair);
                }
        }
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            floats scale = load_fp16(set + 2 * (lane + LANES * v));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                sums[r][v] +=
                    __builtin_convertvector(dots[r][v], floats) * (inputs[r].scales[g] * scale);
            if (format == FORMAT_INT4) {
                floats minimum = load_fp16(set + 2 * (SET + lane + LANES * v));
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) sums[r][v] += minimum * inputs[r].sums[g];
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            int first = lane + v * LANES;
            float *to = t->out + (row + r) * t->out_stride + out + first;
            const float *bias = m->bias ? m->bias + out + first : NULL;
            if (begin <= first && first + LANES <= end) {
                floats sum = sums[r][v];
                if (bias) sum += *(const floats *)bias;
                if (t->add) sum += *(const floats *)to;
                *(floats *)to = sum;
            } else {
                store_lanes(sums[r][v], bias, to, MAX(begin - first, 0), MIN(end - first, LANES),
                            t->add);
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
        for (int lane = 0; lane < SET; lane += INTEGER_WIDTH * LANES)
            multiply_all_rows(format, set, lane, m, t, first, begin, end);
    }
}

#endif
