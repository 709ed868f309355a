/* Weight formats, and how a row of weights becomes fp32.
 *
 * Columns come in groups of 32. A row is
 *   FP32, FP16   the values
 *   INT8         an fp16 scale for each group; 32 signed levels for each group (ggml's Q8_0)
 *   INT4         an fp16 scale for each group; an fp16 minimum for each group; 16 bytes for each
 *                group with column j in the low and j + 16 in the high half (ggml's Q4_1)
 * ggml interleaves scales and levels; here the scales of a row come first, for vector loads.
 */
#ifndef OFFRAMP_WEIGHT_FORMATS_H
#define OFFRAMP_WEIGHT_FORMATS_H

#include <stddef.h>

#include "structures.h"
#include "vector.h"

enum weight_format { FORMAT_FP32, FORMAT_FP16, FORMAT_INT8, FORMAT_INT4 };
enum { GROUP = 32, VECTORS = GROUP / LANES };
/* Bytes behind the last row of INT8 and INT4 that are read with the last scales and ignored. */
enum { SPARE_BYTES = 64 };

/* Bytes of one group. */
static const int32_t LEVEL_BYTES[] = {128, 64, 32, 16}, SCALE_BYTES[] = {0, 0, 2, 4};

#define ZERO_TO_FIFTEEN ((floats){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})

INLINE size_t row_bytes(int format, int columns) {
    return (size_t)(columns / GROUP) * (SCALE_BYTES[format] + LEVEL_BYTES[format]);
}

/* Floats that ``load_scales`` writes: scales and minima, each rounded up to whole vectors. */
INLINE size_t scale_floats(int columns) {
    return 2 * (columns / GROUP + LANES);
}

/* A row of weights with its scales in fp32. */
struct weight_row {
    const uint8_t *levels;
    const float *scales, *minima; /* [groups] */
};

/* The row at ``at``; its scales are converted into ``room`` [scale_floats]. */
INLINE struct weight_row load_scales(int format, const uint8_t *at, int columns, float *room) {
    int groups = columns / GROUP;
    float *minima = room + groups + LANES;
    if (format >= FORMAT_INT8)
        for (int g = 0; g < groups; g += LANES) *(floats *)(room + g) = load_fp16(at + 2 * g);
    if (format == FORMAT_INT4)
        for (int g = 0; g < groups; g += LANES)
            *(floats *)(minima + g) = load_fp16(at + 2 * (groups + g));
    return (struct weight_row){at + SCALE_BYTES[format] * groups, room, minima};
}

/* Group ``g`` of a row as fp32. */
INLINE void dequantize(int format, const struct weight_row *row, int g, floats out[VECTORS]) {
    const uint8_t *at = row->levels + (size_t)g * LEVEL_BYTES[format];
    switch (format) {
    case FORMAT_FP32:
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) out[i] = *(const floats *)(at + 4 * LANES * i);
        break;
    case FORMAT_FP16:
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) out[i] = load_fp16(at + 2 * LANES * i);
        break;
    case FORMAT_INT8:
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++)
            out[i] = __builtin_convertvector(load_int8(at + LANES * i), floats) * row->scales[g];
        break;
    default:
#pragma GCC unroll 2
        for (int i = 0; i < VECTORS / 2; i++) {
            ints both = load_uint8(at + LANES * i);
#if defined(__AVX512F__)
            /* The 16 values of the group are looked up; the index is the lowest 4 bits alone. */
            __m512 table = (__m512)(ZERO_TO_FIFTEEN * row->scales[g] + row->minima[g]);
            out[i] = (floats)_mm512_permutexvar_ps((__m512i)both, table);
            out[i + 1] = (floats)_mm512_permutexvar_ps((__m512i)(both >> 4), table);
#else
            out[i] = __builtin_convertvector(both & 15, floats) * row->scales[g] + row->minima[g];
            out[i + VECTORS / 2] =
                __builtin_convertvector(both >> 4, floats) * row->scales[g] + row->minima[g];
#endif
        }
    }
}

INLINE void dequantize_to(int format, const struct weight_row *row, int g, float *to) {
    floats values[VECTORS];
    dequantize(format, row, g, values);
    for (int i = 0; i < VECTORS; i++) *(floats *)(to + i * LANES) = values[i];
}

#endif
