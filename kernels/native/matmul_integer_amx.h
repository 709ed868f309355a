/* Matrix products of weights in 8 and 4 bits with AMX.
 *
 * The sums of a group are those of integer_sums.h, bit for bit, of up to eight rows of inputs and
 * a set of 32 outputs at once. Tiles multiply bytes, so a row of inputs is two rows of a tile, its
 * high and its low bytes. Their sums go through memory to vectors, which put the two together and
 * scale them. What one instruction leaves in memory the next ones read a group or two later, so
 * that none waits for another.
 */
#ifndef OFFRAMP_MATMUL_INTEGER_AMX_H
#define OFFRAMP_MATMUL_INTEGER_AMX_H

#include "amx.h"
#include "matmul_integer.h"

#ifdef HAS_AMX

enum { INTEGER_TILE_ROWS = 8 };
/* Bytes of a group of a set as tiles have it: two vectors of outputs, four columns of each in a
 * row. */
enum { TILE_GROUP_BYTES = SET * GROUP };
/* Groups whose sums are kept: of two they are being made, of one they are read. */
enum { SUMS_KEPT = 4 };

/* Tiles 0, 1, 5 and 6 hold sums, 2 inputs, 3 and 4 weights. */
static void set_integer_tiles(int rows) {
    static struct tile_sizes all[INTEGER_TILE_ROWS + 1];
    static atomic_int made;
    if (!atomic_load_explicit(&made, memory_order_acquire)) {
        for (int r = 1; r <= INTEGER_TILE_ROWS; r++)
            all[r] = (struct tile_sizes){1,
                                         0,
                                         {0},
                                         {64, 64, GROUP, 64, 64, 64, 64},
                                         {2 * r, 2 * r, 2 * r, GROUP / 4, GROUP / 4, 2 * r, 2 * r}};
        atomic_store_explicit(&made, 1, memory_order_release);
    }
    _tile_loadconfig(&all[rows]);
}

/* Where ``levels`` has group ``g``: of one tile only a few groups, which stay in the first cache.
 */
INLINE uint8_t *levels_at(uint8_t *levels, int g, int tiles) {
    return levels + (tiles > 1 ? g : g % 4) * TILE_GROUP_BYTES;
}

/* The levels of a group of a set of INT4, as bytes. */
INLINE void unpack_levels(const uint8_t *set, uint8_t *to) {
    const uint8_t *levels = set + SET * SCALE_BYTES[FORMAT_INT4];
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            part_ints word = *(const part_ints *)(levels + 4 * (SET * w + PART_LANES * v));
            uint8_t *at = to + TILE_GROUP_BYTES / 2 * v + 128 * w;
            *(part_ints *)at = word & 0x0f0f0f0f;
            *(part_ints *)(at + 64) = word >> 4 & 0x0f0f0f0f;
        }
}

/* ROWS rows of inputs times all outputs of a set, stored as ``store_sums`` does; they are the
 * ``tile``-th of all rows in ``tiles``. ``levels`` keeps those of INT4 as bytes from the first
 * tile on. */
INLINE void multiply_set(int format, const uint8_t *set, const uint8_t *next, uint8_t *levels,
                         int tile, int tiles, const struct matrix *m, const struct operands *t,
                         int row, int out, int begin, int end, const int ROWS) {
    int unpack = format == FORMAT_INT4 && tile == 0;
    int groups = m->columns / GROUP;
    size_t bytes = set_group_bytes(format);
    struct fixed_point all = fixed_point(t, m->columns);
    int32_t kept[SUMS_KEPT][2][2 * INTEGER_TILE_ROWS][PART_LANES] __attribute__((aligned(64)));
    part_floats sums[INTEGER_TILE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) sums[r][0] = sums[r][1] = (part_floats){0};
    if (unpack) unpack_levels(set, levels);
    for (int g = 0; g < groups + 2; g++) {
        fetch_next_set(format, next, g, tile, tiles);
        if (unpack && g + 1 < groups)
            unpack_levels(set + (g + 1) * bytes, levels_at(levels, g + 1, tiles));
        if (g < groups) {
            _tile_loadd(2, at_group(all, g, row).columns, GROUP);
            if (format == FORMAT_INT4) {
                const uint8_t *at = levels_at(levels, g, tiles);
                _tile_loadd(3, at, 64);
                _tile_loadd(4, at + TILE_GROUP_BYTES / 2, 64);
            } else {
                const uint8_t *at = set + g * bytes + SET * SCALE_BYTES[FORMAT_INT8];
                _tile_loadd(3, at, 4 * SET);
                _tile_loadd(4, at + 4 * PART_LANES, 4 * SET);
            }
        }
#define MULTIPLY(FIRST, SECOND, LAST_FIRST, LAST_SECOND)                                           \
    if (g < groups) {                                                                              \
        _tile_zero(FIRST);                                                                         \
        _tile_zero(SECOND);                                                                        \
        _tile_dpbssd(FIRST, 2, 3);                                                                 \
        _tile_dpbssd(SECOND, 2, 4);                                                                \
    }                                                                                              \
    if (g > 0) {                                                                                   \
        _tile_stored(LAST_FIRST, kept[(g - 1) % SUMS_KEPT][0], 64);                                \
        _tile_stored(LAST_SECOND, kept[(g - 1) % SUMS_KEPT][1], 64);                               \
    }
        if (g % 2) {
            MULTIPLY(5, 6, 0, 1)
        } else {
            MULTIPLY(0, 1, 5, 6)
        }
#undef MULTIPLY
        if (g < 2) continue;
        struct fixed_point inputs = at_group(all, g - 2, row);
        const uint8_t *scales = set + (g - 2) * bytes;
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            part_ints *bytes_sums = (part_ints *)kept[(g - 2) % SUMS_KEPT][v];
            part_floats scale = load_fp16_part(scales + 2 * PART_LANES * v), minimum = {0};
            if (format == FORMAT_INT4)
                minimum = load_fp16_part(scales + 2 * (SET + PART_LANES * v));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                part_ints dots = (bytes_sums[2 * r] << 8) + bytes_sums[2 * r + 1];
                sums[r][v] = add_scaled(sums[r][v], dots, scale, inputs.scales[r * inputs.numbers]);
                if (format == FORMAT_INT4) sums[r][v] += minimum * inputs.sums[r * inputs.numbers];
            }
        }
    }
    store_sums(sums, 0, m, t, row, out, begin, end, ROWS);
}

#define MULTIPLY_ROWS(ROWS)                                                                        \
    case ROWS:                                                                                     \
        multiply_set(format, set, next, levels, tile, tiles, m, t, row, out, begin, end, ROWS);    \
        break;

/* Outputs [first, last) of the rows [from, to). */
INLINE void multiply_rows(int format, const struct matrix *m, const struct operands *t, int from,
                          int to, int first, int last, uint8_t *levels) {
    int tiles = (to - from + INTEGER_TILE_ROWS - 1) / INTEGER_TILE_ROWS;
    int most = (to - from + tiles - 1) / tiles;
    set_integer_tiles(most);
    for (int out = first / SET * SET; out < last; out += SET) {
        const uint8_t *set = weight_rows(m, out);
        const uint8_t *next = next_set(m, t, out, last);
        int begin = MAX(first - out, 0), end = MIN(SET, last - out);
        for (int row = from, tile = 0, rows; row < to; row += rows, tile++) {
            rows = MIN(most, to - row);
            switch (rows) {
                MULTIPLY_ROWS(1)
                MULTIPLY_ROWS(2)
                MULTIPLY_ROWS(3)
                MULTIPLY_ROWS(4)
                MULTIPLY_ROWS(5)
                MULTIPLY_ROWS(6)
                MULTIPLY_ROWS(7)
                MULTIPLY_ROWS(8)
            }
        }
    }
}

#undef MULTIPLY_ROWS

/* Outputs [first, first + count) of all rows, whose inputs quantize_inputs has converted. */
INLINE void multiply_integer_amx(int format, const struct matrix *m, const struct operands *t,
                                 int first, int count, struct worker *worker) {
    /* Their inputs stay in the second cache while all outputs are made. */
    enum { ROWS_AT_ONCE = 128 };
    for (int row = 0; row < t->rows; row += ROWS_AT_ONCE)
        multiply_rows(format, m, t, row, MIN(row + ROWS_AT_ONCE, t->rows), first, first + count,
                      (uint8_t *)worker->panel);
}

#else

INLINE void multiply_integer_amx(int format, const struct matrix *m, const struct operands *t,
                                 int first, int count, struct worker *worker) {
    (void)format, (void)m, (void)t, (void)first, (void)count, (void)worker;
}

#endif
#endif
