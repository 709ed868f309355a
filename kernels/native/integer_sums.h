/* Sums of the products of levels and fixed point inputs, exact in 32 bits, by what there is.
 *
 * In pairs: an instruction, or what compilers make of it, multiplies two columns of 16 bits.
 * In quads: the dot products of NEON and VNNI multiply four columns of 8 bits. An input is
 * 256 * high + low, two signed bytes, whose products are added up apart. Words of INT4 then only
 * have to be masked and shifted.
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

/* Inputs in fixed point. Of each group the columns of all rows lie together, as tiles take them; an
 * odd ``stride`` keeps the groups of a row apart in the cache. The other numbers of a row lie
 * together, so that threads that convert different rows do not write into the same cache line. */
struct fixed_point {
    int stride;       /* rows, or one more */
    int numbers;      /* from a row's scales to those of the next */
    int16_t *columns; /* [groups, stride, GROUP] 16 bits each, as store_inputs puts them */
    float *scales;    /* [rows, numbers]: of each group; likewise: */
    float *sums;      /* the scale times the sum of the columns */
    int32_t *totals;  /* the sum of the columns */
    int32_t *wide;    /* whether a column has more than its high byte */
};

/* Rows from ``row`` on, in group ``g``. */
INLINE struct fixed_point at_group(struct fixed_point all, int g, int row) {
    size_t i = (size_t)row * all.numbers + g;
    all.columns += ((size_t)g * all.stride + row) * GROUP;
    all.scales += i;
    all.sums += i;
    all.totals += i;
    all.wide += i;
    return all;
}

/* Whether a column of ROWS rows of a group has more than its high byte. */
INLINE int any_wide(struct fixed_point inputs, const int ROWS) {
    int32_t any = 0;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) any |= inputs.wide[r * inputs.numbers];
    return any != 0;
}

/* The order in which a word of INT8, and two words of INT4, have eight columns. */
#define ORDER_INT8 0, 2, 1, 3, 4, 6, 5, 7
#define ORDER_INT4 0, 4, 1, 5, 2, 6, 3, 7

/* Whether products add up low bytes apart, which inputs that have none then spare. */
#if defined(__ARM_FEATURE_DOTPROD) || defined(__AVX512VNNI__) || defined(__AVXVNNI__)
enum { ADDS_BYTES = 1 };
#else
enum { ADDS_BYTES = 0 };
#endif

#if defined(__ARM_FEATURE_DOTPROD)

/* Put inputs from ``column`` on into their group: its high bytes, then its low ones, each in the
 * order that words of ``format`` have them. */
INLINE void store_inputs(int format, shorts inputs, int column, int16_t *group) {
    static const uint8_t orders[2][8] = {{ORDER_INT8}, {ORDER_INT4}};
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

/* A group of ROWS inputs times the levels of INTEGER_WIDTH vectors of outputs; without WIDE all
 * low bytes are zero. */
INLINE void add_up_group(int format, const uint8_t *levels, struct fixed_point inputs,
                         part_ints dots[INTEGER_ROWS][INTEGER_WIDTH], const int ROWS,
                         const int WIDE) {
    int8x16_t quads[INTEGER_WIDTH][8];
#pragma GCC unroll 2
    for (int v = 0; v < INTEGER_WIDTH; v++)
        unpack_quads(format, levels + 4 * PART_LANES * v, quads[v]);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) {
        const int8_t *at = (const int8_t *)(inputs.columns + r * GROUP);
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
    if (WIDE) low[v] = vdotq_laneq_s32(low[v], quads[v][4 * i + LANE], l, LANE);
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

#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)

/* Put inputs from ``column`` on into their group: its high bytes, then its low ones, each in the
 * order that words of ``format`` have them. */
INLINE void store_inputs(int format, shorts inputs, int column, int16_t *group) {
    uint8_t *to = (uint8_t *)group + column;
#pragma GCC unroll 2
    for (int i = 0; i < LANES / 8; i++) {
        __m128i columns = _mm_loadu_si128((const __m128i *)&inputs + i);
        __m128i high = _mm_srai_epi16(_mm_add_epi16(columns, _mm_set1_epi16(128)), 8);
        /* The high bytes of eight columns, then the low ones. */
        __m128i bytes = _mm_packs_epi16(high, _mm_srai_epi16(_mm_slli_epi16(columns, 8), 8));
        const __m128i order = format == FORMAT_INT4
                                  ? _mm_setr_epi8(ORDER_INT4, 8, 12, 9, 13, 10, 14, 11, 15)
                                  : _mm_setr_epi8(ORDER_INT8, 8, 10, 9, 11, 12, 14, 13, 15);
        bytes = _mm_shuffle_epi8(bytes, order);
        _mm_storel_epi64((__m128i *)(to + 8 * i), bytes);
        _mm_storeh_pd((double *)(to + GROUP + 8 * i), (__m128d)bytes);
    }
}

/* ``sums`` plus, in each lane, the products of four unsigned bytes of ``a`` and the signed ones of
 * ``b``. */
INLINE part_ints add_quads(part_ints sums, part_ints a, int32_t b) {
#if defined(__AVX512VNNI__)
    return (part_ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, _mm512_set1_epi32(b));
#else
    return (part_ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, _mm256_set1_epi32(b));
#endif
}

/* Word ``i`` of PART_LANES rows, or half of it, as four columns a lane. Levels are unsigned, those
 * of INT8 with 128 added to each. */
INLINE part_ints unpack_quad(int format, const uint8_t *levels, int i) {
    if (format == FORMAT_INT8)
        return *(const part_ints *)(levels + 4 * SET * i) ^ (int32_t)0x80808080;
    part_ints two = *(const part_ints *)(levels + 4 * SET * (i / 2));
    return (i % 2 ? two >> 4 : two) & 0x0f0f0f0f;
}

/* With many rows a group's levels stay in registers while BLOCK_STEP rows after the other use them;
 * the sums of BLOCK_ROWS rows stay in the first cache. */
#define HAS_BLOCKS
enum { BLOCK_ROWS = 48, BLOCK_STEP = 6 / INTEGER_WIDTH, FEWEST_BLOCKED = 5 };

/* Add the high, or the low, ``bytes`` of ROWS inputs times the levels to ``dots``. */
INLINE void add_up_bytes(const int8_t *bytes, part_ints quads[INTEGER_WIDTH][8],
                         part_ints (*dots)[INTEGER_WIDTH], const int ROWS) {
#pragma GCC unroll 8
    for (int q = 0; q < 8; q++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t quad;
            memcpy(&quad, bytes + 2 * GROUP * r + 4 * q, 4);
#pragma GCC unroll 2
            for (int v = 0; v < INTEGER_WIDTH; v++)
                dots[r][v] = add_quads(dots[r][v], quads[v][q], quad);
        }
}

/* A group of ROWS inputs, at most BLOCK_STEP, times its levels ``quads``: one sum takes high bytes,
 * then low ones, if there are any. Sums of coarse INPUTS are left in 256ths. */
INLINE void add_up_block(int format, part_ints quads[INTEGER_WIDTH][8], struct fixed_point inputs,
                         part_ints dots[BLOCK_STEP][INTEGER_WIDTH], const int ROWS,
                         const int INPUTS) {
    const int8_t *bytes = (const int8_t *)inputs.columns;
    if (INPUTS == INPUTS_COARSE) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t first = format == FORMAT_INT8 ? -(inputs.totals[r * inputs.numbers] / 2) : 0;
#pragma GCC unroll 2
            for (int v = 0; v < INTEGER_WIDTH; v++) dots[r][v] = (part_ints){0} + first;
        }
        add_up_bytes(bytes, quads, dots, ROWS);
        return;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) dots[r][v] = (part_ints){0};
    add_up_bytes(bytes, quads, dots, ROWS);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) dots[r][v] <<= 8;
    if (INPUTS == INPUTS_FINE)
        add_up_bytes(bytes + GROUP, quads, dots, ROWS);
    else
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
            if (inputs.wide[r * inputs.numbers])
                add_up_bytes(bytes + 2 * GROUP * r + GROUP, quads, dots + r, 1);
    if (format == FORMAT_INT8)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
            for (int v = 0; v < INTEGER_WIDTH; v++)
                dots[r][v] -= (int32_t)(128u * inputs.totals[r * inputs.numbers]);
}

/* A group of ROWS inputs times the levels of INTEGER_WIDTH vectors of outputs; without WIDE all
 * low bytes are zero. */
INLINE void add_up_group(int format, const uint8_t *levels, struct fixed_point inputs,
                         part_ints dots[INTEGER_ROWS][INTEGER_WIDTH], const int ROWS,
                         const int WIDE) {
    const int QUADS = word_columns(format) / 4, WORDS = GROUP / word_columns(format);
    part_ints low[INTEGER_ROWS][INTEGER_WIDTH];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) dots[r][v] = low[r][v] = (part_ints){0};
#pragma GCC unroll 1
    for (int w = 0; w < WORDS; w++) {
        part_ints quads[INTEGER_WIDTH][2];
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            part_ints word = *(const part_ints *)(levels + 4 * (SET * w + PART_LANES * v));
            if (format == FORMAT_INT4) {
                quads[v][0] = word & 0x0f0f0f0f;
                quads[v][1] = word >> 4 & 0x0f0f0f0f;
            } else {
                quads[v][0] = word ^ (int32_t)0x80808080;
            }
        }
#pragma GCC unroll 2
        for (int q = 0; q < QUADS; q++)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const int8_t *at = (const int8_t *)(inputs.columns + r * GROUP);
                int32_t high_quad, low_quad;
                memcpy(&high_quad, at + 4 * (QUADS * w + q), 4);
                memcpy(&low_quad, at + GROUP + 4 * (QUADS * w + q), 4);
#pragma GCC unroll 2
                for (int v = 0; v < INTEGER_WIDTH; v++) {
                    dots[r][v] = add_quads(dots[r][v], quads[v][q], high_quad);
                    if (WIDE) low[r][v] = add_quads(low[r][v], quads[v][q], low_quad);
                }
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            dots[r][v] = (dots[r][v] << 8) + low[r][v];
            if (format == FORMAT_INT8)
                dots[r][v] -= (int32_t)(128u * inputs.totals[r * inputs.numbers]);
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

/* A group of ROWS inputs times the levels of INTEGER_WIDTH vectors of outputs. */
INLINE void add_up_group(int format, const uint8_t *levels, struct fixed_point inputs,
                         part_ints dots[INTEGER_ROWS][INTEGER_WIDTH], const int ROWS,
                         const int WIDE) {
    (void)WIDE;
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
                memcpy(&pair, inputs.columns + r * GROUP + 2 * (PAIRS * w + p), 4);
#pragma GCC unroll 2
                for (int v = 0; v < INTEGER_WIDTH; v++)
                    dots[r][v] = add_pairs(dots[r][v], pairs[v][p], pair);
            }
    }
}

#endif

/* From this number of rows on, products of coarse inputs are worth making in place of others: where
 * low bytes are left out; 0: never. */
#ifdef HAS_BLOCKS
enum { FEWEST_COARSE = 4 };
#else
enum { FEWEST_COARSE = 0 };
#endif
#endif
