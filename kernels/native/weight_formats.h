/* Weight formats, and how weights become fp32.
 *
 *   FP32, FP16   rows of values
 *   INT8         an fp16 scale and 32 signed levels for each group of 32 columns (ggml's Q8_0)
 *   INT4         an fp16 scale, an fp16 minimum and 32 levels of 4 bits for each group (ggml's
 * Q4_1)
 *
 * INT8 and INT4 are stored in sets of 32 rows, the last one filled up with zeros, so that a vector
 * holds the same columns of 16 rows. A set is, group after group: scales [32]; for INT4 minima
 * [32]; levels [words][32] in words of 32 bits. A word's halves of 16 bits hold the even and the
 * odd columns, the first column lowest:
 *
 *   INT8   columns 0, 2 | 1, 3                 8 bits each
 *   INT4   columns 0, 2, 4, 6 | 1, 3, 5, 7     4 bits each
 */
#ifndef OFFRAMP_WEIGHT_FORMATS_H
#define OFFRAMP_WEIGHT_FORMATS_H

#include <stddef.h>

#include "structures.h"
#include "vector.h"

enum weight_format { FORMAT_FP32, FORMAT_FP16, FORMAT_INT8, FORMAT_INT4 };
enum { GROUP = 32, VECTORS = GROUP / LANES, GROUP_PARTS = GROUP / PART_LANES, SET = 32 };

/* Bytes of one group of one row. */
static const int32_t LEVEL_BYTES[] = {128, 64, 32, 16}, SCALE_BYTES[] = {0, 0, 2, 4};

INLINE size_t row_bytes(int format, int columns) {
    return (size_t)(columns / GROUP) * (SCALE_BYTES[format] + LEVEL_BYTES[format]);
}

/* Rows from ``row`` on, the first of a set. */
INLINE const uint8_t *weight_rows(const struct matrix *m, int row) {
    return m->data + row * row_bytes(m->format, m->columns);
}

/* Bytes of one group of a set of INT8 or INT4. */
INLINE size_t set_group_bytes(int format) {
    return SET * (SCALE_BYTES[format] + LEVEL_BYTES[format]);
}

/* Columns of a row in one word of INT8 or INT4. */
INLINE int word_columns(int format) {
    return format == FORMAT_INT4 ? 8 : 4;
}

/* Group ``g`` of a row of FP32 or FP16 as fp32. */
INLINE void dequantize(int format, const uint8_t *row, int g, part_floats out[GROUP_PARTS]) {
    const uint8_t *at = row + (size_t)g * LEVEL_BYTES[format];
#pragma GCC unroll 8
    for (int i = 0; i < GROUP_PARTS; i++)
        out[i] = format == FORMAT_FP32 ? *(const part_floats *)(at + 4 * PART_LANES * i)
                                       : load_fp16_part(at + 2 * PART_LANES * i);
}

INLINE void dequantize_to(int format, const uint8_t *row, int g, float *to) {
    part_floats values[GROUP_PARTS];
    dequantize(format, row, g, values);
    for (int i = 0; i < GROUP_PARTS; i++) *(part_floats *)(to + i * PART_LANES) = values[i];
}

/* One row of a set of INT8 or INT4 as fp32, to [columns]. */
static void dequantize_from_set(int format, const uint8_t *set, int columns, int row, float *to) {
    int columns_of_word = word_columns(format);
    for (int g = 0; g < columns / GROUP; g++, set += set_group_bytes(format)) {
        _Float16 scale, minimum = 0;
        memcpy(&scale, set + 2 * row, sizeof scale);
        if (format == FORMAT_INT4) memcpy(&minimum, set + 2 * (SET + row), sizeof minimum);
        const uint8_t *levels = set + SET * SCALE_BYTES[format];
        for (int column = 0; column < GROUP; column++, to++) {
            int c = column % columns_of_word;
            uint32_t word;
            memcpy(&word, levels + 4 * (SET * (column / columns_of_word) + row), sizeof word);
            uint32_t half = word >> (c % 2 * 16);
            int level = format == FORMAT_INT4 ? (int)(half >> (c / 2 * 4) & 15)
                                              : (int8_t)(half >> (c / 2 * 8));
            *to = level * (float)scale + (float)minimum;
        }
    }
}

/* Row ``id`` of a matrix as fp32, to [columns]. */
static void read_row(const struct matrix *m, int64_t id, float *to) {
    size_t stride = row_bytes(m->format, m->columns);
    int row = id % SET;
    if (m->format >= FORMAT_INT8)
        dequantize_from_set(m->format, m->data + (id - row) * stride, m->columns, row, to);
    else
        for (int g = 0; g < m->columns / GROUP; g++)
            dequantize_to(m->format, m->data + id * stride, g, to + g * GROUP);
}

#endif
