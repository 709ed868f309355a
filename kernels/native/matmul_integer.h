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
/* Rows of inputs multiplied with a set of weights at a time: their sums stay in registers. */
#if defined(__AVX512F__)
enum { INTEGER_ROWS = 8 };
#else
enum { INTEGER_ROWS = 4 };
#endif
/* Groups of weights between the one in use and the one that is prefetched. */
enum { PREFETCH_GROUPS = 4 };

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

INLINE struct fixed_point_row fixed_point_row(const struct worker *worker, int row, int columns) {
    float *at = (float *)worker->shared->split_inputs + row * fixed_point_floats(columns);
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
    ints sum = {0};
    for (int i = 0; i < VECTORS; i++) {
        ints fixed = (ints)(values[i] * inverse + magic) - (ints)broadcast(magic);
        sum += fixed;
        *(shorts *)(to->columns + g * GROUP + i * LANES) = __builtin_convertvector(fixed, shorts);
    }
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += sum[i];
    to->scales[g] = size < smallest ? 0 : size / LARGEST_INPUT;
    to->sums[g] = to->scales[g] * total;
}

/* All inputs of a product, one phase. */
static void quantize_inputs(const struct operands *t, int columns, struct worker *worker) {
    int groups = columns / GROUP;
    int size = chunk_size(t->rows, worker);
    FOR_EACH_CHUNK(worker, row, end, size, t->rows)
        for (; row < end; row++) {
            struct fixed_point_row to = fixed_point_row(worker, row, columns);
            for (int g = 0; g < groups; g++) quantize_group(t->x + row * t->x_stride, g, &to);
        }
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

/* A set of weights times ROWS rows of inputs: outputs [begin, end) of the set are stored, the first
 * of which is output ``out``. */
INLINE void multiply_set(int format, const uint8_t *set, int columns, const float *bias,
                         const struct operands *t, int row, int out, int begin, int end,
                         const struct worker *worker, const int ROWS) {
    int groups = columns / GROUP, words = GROUP / word_columns(format);
    const int PAIRS = word_columns(format) / 2;
    const uint8_t *levels = set + (size_t)SET * groups * SCALE_BYTES[format];
    struct fixed_point_row inputs[INTEGER_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) inputs[r] = fixed_point_row(worker, row + r, columns);
    for (int lane = 0; lane < SET; lane += LANES) {
        floats sums[INTEGER_ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sums[r] = (floats){0};
        for (int g = 0; g < groups; g++) {
            const uint8_t *at = levels + (size_t)SET * g * LEVEL_BYTES[format] + 4 * lane;
            ints dots[INTEGER_ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) dots[r] = (ints){0};
#pragma GCC unroll 1
            for (int w = 0; w < words; w++, at += 4 * SET) {
                ints pairs[4];
                __builtin_prefetch(at + PREFETCH_GROUPS * SET * LEVEL_BYTES[format]);
                unpack_pairs(format, at, pairs);
#pragma GCC unroll 4
                for (int p = 0; p < PAIRS; p++)
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; r++) {
                        int32_t pair;
                        memcpy(&pair, inputs[r].columns + g * GROUP + 2 * (PAIRS * w + p), 4);
                        dots[r] = add_pairs(dots[r], pairs[p], pair);
                    }
            }
            floats scale = load_fp16(set + 2 * (SET * g + lane));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                sums[r] += __builtin_convertvector(dots[r], floats) * inputs[r].scales[g] * scale;
            if (format == FORMAT_INT4) {
                floats minimum = load_fp16(set + 2 * (SET * (groups + g) + lane));
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) sums[r] += minimum * inputs[r].sums[g];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            float *to = t->out + (row + r) * t->out_stride + out - begin + lane;
            const float *added = bias ? bias + out - begin + lane : NULL;
            if (begin <= lane && lane + LANES <= end) {
                floats sum = sums[r];
                if (added) sum += *(const floats *)added;
                if (t->add) sum += *(const floats *)to;
                *(floats *)to = sum;
            } else {
                store_lanes(sums[r], added, to, MAX(begin - lane, 0), MIN(end - lane, LANES),
                            t->add);
            }
        }
    }
}

#define MULTIPLY_SET(ROWS)                                                                         \
    case ROWS:                                                                                     \
        multiply_set(format, at, columns, m->bias, t, row, out, begin, end, worker, ROWS);         \
        break;

/* Outputs [out, out + count) of all rows, whose inputs quantize_inputs has converted. */
INLINE void multiply_integer(int format, const struct matrix *m, const struct operands *t, int out,
                             int count, struct worker *worker) {
    int columns = m->columns, last = out + count;
    for (; out < last; out = out / SET * SET + SET) {
        const uint8_t *at = m->data + out / SET * SET * row_bytes(format, columns);
        int begin = out % SET, end = MIN(SET, last - out / SET * SET);
        for (int row = 0; row < t->rows; row += INTEGER_ROWS) {
            switch (MIN(INTEGER_ROWS, t->rows - row)) {
                MULTIPLY_SET(1)
                MULTIPLY_SET(2)
                MULTIPLY_SET(3)
                MULTIPLY_SET(4)
#if defined(__AVX512F__)
                MULTIPLY_SET(5)
                MULTIPLY_SET(6)
                MULTIPLY_SET(7)
                MULTIPLY_SET(8)
#endif
            }
        }
    }
}

#undef MULTIPLY_SET

#endif
