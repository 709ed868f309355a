/* Matrix products of fp32 with AMX, the matrix unit of x86 processors, which multiplies bf16.
 *
 * Each number is split into the sum of two of bf16, its high and its low half, and of the four
 * partial products the three largest are taken, which leaves errors of 2^-16 (known as bf16x3). A
 * row's result depends on no other row here either. It differs from the vectors' result, so weights
 * kept in FP32, which is for exactness, stay with those; INT8 and INT4 have integer products
 * (matmul_integer_amx.h).
 */
#ifndef OFFRAMP_MATMUL_AMX_H
#define OFFRAMP_MATMUL_AMX_H

#include "amx.h"

#ifdef HAS_AMX

/* 32-bit words of a tile, which is 16 rows of 64 bytes. */
enum { TILE_WORDS = 256 };

/* All tiles full. */
static void set_full_tiles(void) {
    /* Static, because GCC drops the stores into a local one as unused. */
    static const struct tile_sizes sizes = {
        1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&sizes);
}

/* 32 numbers as high and low halves. */
INLINE void split(floats a, floats b, __m512i *high, __m512i *low) {
    *high = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    __m512i ha = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(*high)), 16);
    __m512i hb = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(*high, 1)), 16);
    *low = (__m512i)_mm512_cvtne2ps_pbh((__m512)(b - (floats)hb), (__m512)(a - (floats)ha));
}

/* Group ``g`` of a row of weights as high and low halves. */
INLINE void dequantize_split(int format, const uint8_t *row, int g, uint16_t *high, uint16_t *low) {
    floats values[VECTORS];
    __m512i h, l;
    dequantize(format, row, g, values);
    split(values[0], values[1], &h, &l);
    _mm512_storeu_si512(high, h);
    _mm512_storeu_si512(low, l);
}

/* Split the inputs, one phase. For each set of 16 rows, and for each 32 columns of it: a tile of
 * the high halves and one of the low halves, with pairs of columns down and the rows across. */
static void amx_split_inputs(const struct operands *t, int columns, struct worker *worker) {
    int groups = columns / GROUP, sets = (t->rows + AMX_ROWS - 1) / AMX_ROWS;
    int size = chunk_size(sets * groups, worker);
    FOR_EACH_CHUNK(worker, i, end, size, sets * groups)
        for (; i < end; i++) {
            int first = i / groups * AMX_ROWS, c = i % groups * GROUP;
            __m512i high[AMX_ROWS], low[AMX_ROWS];
            for (int r = 0; r < AMX_ROWS; r++) {
                high[r] = low[r] = _mm512_setzero_si512();
                if (first + r >= t->rows) continue;
                const float *x = t->x + (first + r) * t->x_stride + c;
                split(*(const floats *)x, *(const floats *)(x + LANES), &high[r], &low[r]);
            }
            transpose((floats *)high);
            transpose((floats *)low);
            uint32_t *to = (uint32_t *)t->prepared + (size_t)i * 2 * TILE_WORDS;
            for (int r = 0; r < 16; r++) {
                _mm512_storeu_si512(to + r * 16, high[r]);
                _mm512_storeu_si512(to + TILE_WORDS + r * 16, low[r]);
            }
        }
}

/* Store the sums [16 outs, 16 rows] of a tile, of which ``outs`` and the rows there are count. */
INLINE void store_tile(float sums[16][16], const float *bias, const struct operands *t, int row,
                       int out, int outs) {
    __m512i v[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(sums[i]);
    transpose((floats *)v);
    __mmask16 mask = outs >= 16 ? 0xffff : (1u << outs) - 1;
    __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + out) : _mm512_setzero_ps();
    for (int r = 0; r < MIN(16, t->rows - row); r++) {
        float *to = t->out + (row + r) * t->out_stride + out;
        __m512 sum = _mm512_add_ps((__m512)v[r], added);
        if (t->add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum);
        _mm512_mask_storeu_ps(to, mask, sum);
    }
}

/* 32 outs, of which ``outs`` count, with one or two sets of 16 rows. ``high`` and ``low`` are
 * [32, columns]. Tiles 0 to 3 hold sums, 4 and 5 weights, 6 and 7 inputs. */
INLINE void multiply_block(const uint16_t *high, const uint16_t *low, const uint32_t *inputs,
                           int columns, const float *bias, const struct operands *t, int row,
                           int out, int outs, const int SETS) {
    int groups = columns / GROUP, stride = columns * 2;
    const uint32_t *first = inputs + (size_t)(row / AMX_ROWS) * groups * 2 * TILE_WORDS;
    const uint32_t *second = first + (size_t)groups * 2 * TILE_WORDS;
    _tile_zero(0);
    _tile_zero(1);
    if (SETS == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
#define MULTIPLY_TILES()                                                                           \
    _tile_dpbf16ps(0, 4, 6);                                                                       \
    _tile_dpbf16ps(1, 5, 6);                                                                       \
    if (SETS == 2) {                                                                               \
        _tile_dpbf16ps(2, 4, 7);                                                                   \
        _tile_dpbf16ps(3, 5, 7);                                                                   \
    }
    for (int g = 0; g < groups; g++, first += 2 * TILE_WORDS, second += 2 * TILE_WORDS) {
        const uint16_t *h = high + g * GROUP, *l = low + g * GROUP;
        _tile_loadd(6, first, 64);
        if (SETS == 2) _tile_loadd(7, second, 64);
        _tile_loadd(4, l, stride);
        _tile_loadd(5, l + 16 * columns, stride);
        MULTIPLY_TILES()
        _tile_loadd(4, h, stride);
        _tile_loadd(5, h + 16 * columns, stride);
        MULTIPLY_TILES()
        _tile_loadd(6, first + TILE_WORDS, 64);
        if (SETS == 2) _tile_loadd(7, second + TILE_WORDS, 64);
        MULTIPLY_TILES()
    }
#undef MULTIPLY_TILES
    float sums[4][16][16];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    store_tile(sums[0], bias, t, row, out, outs);
    if (outs > 16) store_tile(sums[1], bias, t, row, out + 16, outs - 16);
    if (SETS == 2) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        store_tile(sums[2], bias, t, row + AMX_ROWS, out, outs);
        if (outs > 16) store_tile(sums[3], bias, t, row + AMX_ROWS, out + 16, outs - 16);
    }
}

/* Outputs [out, out + count) of all rows, whose inputs amx_split_inputs has split. */
INLINE void multiply_amx(int format, const struct matrix *m, const struct operands *t, int out,
                         int count, struct worker *worker) {
    int columns = m->columns;
    size_t stride = row_bytes(format, columns);
    uint16_t *high = (uint16_t *)worker->panel, *low = high + (size_t)AMX_OUTS * columns;
    const uint32_t *inputs = (const uint32_t *)t->prepared;
    set_full_tiles();
    for (; count > 0; count -= AMX_OUTS, out += AMX_OUTS) {
        int outs = MIN(AMX_OUTS, count), row = 0;
        for (int o = 0; o < outs; o++) {
            const uint8_t *weights = m->data + (out + o) * stride;
            for (int g = 0; g < columns / GROUP; g++) {
                __builtin_prefetch(weights + g * LEVEL_BYTES[format] + PREFETCH_ROWS * stride);
                dequantize_split(format, weights, g, high + o * columns + g * GROUP,
                                 low + o * columns + g * GROUP);
            }
        }
        /* Rows of weights beyond ``outs`` are left from before; their sums are not stored. */
        for (; t->rows - row > AMX_ROWS; row += 2 * AMX_ROWS)
            multiply_block(high, low, inputs, columns, m->bias, t, row, out, outs, 2);
        if (row < t->rows)
            multiply_block(high, low, inputs, columns, m->bias, t, row, out, outs, 1);
    }
}

#else

static void amx_split_inputs(const struct operands *t, int columns, struct worker *worker) {
    (void)t, (void)columns, (void)worker;
}

INLINE void multiply_amx(int format, const struct matrix *m, const struct operands *t, int out,
                         int count, struct worker *worker) {
    (void)format, (void)m, (void)t, (void)out, (void)count, (void)worker;
}

#endif
#endif
