/* Sums of the products of levels and fixed point inputs, exact in 32 bits, by what there is.
 *
 * In pairs: an instruction, or what compilers make of it, multiplies two columns of 16 bits.
 * In quads: NEON's dot product multiplies four columns of 8 bits. An input is 256 * high + low,
 * two signed bytes, whose products are added up apart.
 */
#ifndef OFFRAMP_INTEGER_SUMS_H
#define OFFRAMP_INTEGER_SUMS_H

#include "weight_formats.h"

/* Rows of inputs, and vectors of outputs, whose sums stay in registers. With two vectors, each
 * input that is broadcast serves two products: processors broadcast fewer than they multiply. */
#if defined(__AVX512F__)
enum { INTEGER_ROWS = 6, INTEGER_WIDTH = 2 };
#elif defined(__AVX__)
enum { INTEGER_ROWS = 4, INTEGER_WIDTH = 1 };
#else
enum { INTEGER_ROWS = 4, INTEGER_WIDTH = 2 };
#endif

/* A row of inputs: 16 bits a column, as store_inputs puts them; then for each group its scale; then
 * for each group the scale times the sum of its columns. */
struct fixed_point_row {
    int16_t *columns;
    float *scales, *sums; /* [groups] */
};

#if defined(__ARM_FEATURE_DOTPROD)

/* Put inputs from ``column`` on into their group: its high bytes, then its low ones, each four
 * in the order that a word of ``format`` has them. */
INLINE void store_inputs(int format, shorts inputs, int column, int16_t *group) {
    static const uint8_t orders[2][8] = {{0, 2, 1, 3, 4, 6, 5, 7}, {0, 4, 1, 5, 2, 6, 3, 7}};
    uint8x8_t order = vld1_u8(orders[format == FORMAT_INT4]);
    int8_t *to = (int8_t *)group + column;
    vst1_s8(to, vtbl1_s8(vrshrn_n_s16((int16x8_t)inputs, 8), (int8x8_t)order));
    vst1_s8(to + GROUP, vtbl1_s8(vmovn_s16((int16x8_t)inputs), (int8x8_t)order));
}

/* A group's levels of PART_LANES rows, four columns of each in a vector. */
INLINE void unpack_quads(int format, const uint8_t *levels, int8x16_t quads[8]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        if (format == FORMAT_INT8) {
            quads[i] = vld1q_s8((const int8_t *)levels + 4 * SET * i);
        } else {
            uint8x16_t two = vld1q_u8(levels + 4 * SET * (i / 2));
            quads[i] = (int8x16_t)(i % 2 ? two >> 4 : two & 15);
        }
}

/* Group ``g`` of ROWS inputs times the levels of INTEGER_WIDTH vectors of outputs. */
INLINE void add_up_group(int format, const uint8_t *levels, const struct fixed_point_row *inputs,
                         int g, part_ints dots[INTEGER_ROWS][INTEGER_WIDTH], const int ROWS) {
    int8x16_t quads[INTEGER_WIDTH][8];
#pragma GCC unroll 2
    for (int v = 0; v < INTEGER_WIDTH; v++)
        unpack_quads(format, levels + 4 * PART_LANES * v, quads[v]);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        const int8_t *at = (const int8_t *)(inputs[r].columns + g * GROUP);
        int32x4_t high[INTEGER_WIDTH], low[INTEGER_WIDTH];
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) high[v] = low[v] = vdupq_n_s32(0);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            int8x16_t h = vld1q_s8(at + 16 * i), l = vld1q_s8(at + GROUP + 16 * i);
#pragma GCC unroll 2
            for (int v = 0; v < INTEGER_WIDTH; v++) {
#define ADD_QUADS(LANE)                                                                            \
    high[v] = vdotq_laneq_s32(high[v], quads[v][4 * i + LANE], h, LANE);                           \
    low[v] = vdotq_laneq_s32(low[v], quads[v][4 * i + LANE], l, LANE);
                ADD_QUADS(0)
                ADD_QUADS(1)
                ADD_QUADS(2)
                ADD_QUADS(3)
#undef ADD_QUADS
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) dots[r][v] = (part_ints)((high[v] << 8) + low[v]);
    }
}

#else

/* Put inputs from ``column`` on into their group, in order. */
INLINE void store_inputs(int format, shorts inputs, int column, int16_t *group) {
    (void)format;
    *(shorts *)(group + column) = inputs;
}

/* Word ``at`` of PART_LANES rows as pairs of levels, the columns 0 and 1, 2 and 3, and so on. */
INLINE void unpack_pairs(int format, const uint8_t *at, part_ints pairs[4]) {
    part_ints word = *(const part_ints *)at;
    if (format == FORMAT_INT4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) pairs[i] = word >> 4 * i & 0x000f000f;
    } else {
        pairs[0] = (part_ints)((part_pairs)word << 8 >> 8);
        pairs[1] = (part_ints)((part_pairs)word >> 8);
    }
}

/* Group ``g`` of ROWS inputs times the levels of INTEGER_WIDTH vectors of outputs. */
INLINE void add_up_group(int format, const uint8_t *levels, const struct fixed_point_row *inputs,
                         int g, part_ints dots[INTEGER_ROWS][INTEGER_WIDTH], const int ROWS) {
    const int PAIRS = word_columns(format) / 2, WORDS = GROUP / word_columns(format);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) dots[r][v] = (part_ints){0};
#pragma GCC unroll 1
    for (int w = 0; w < WORDS; w++) {
        part_ints pairs[INTEGER_WIDTH][4];
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++)
            unpack_pairs(format, levels + 4 * (SET * w + PART_LANES * v), pairs[v]);
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
}

#endif
#endif
