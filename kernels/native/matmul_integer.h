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
 *
 * Coarse inputs have 8 bits, q being a multiple of 256: half of the products, and an error of 1e-2.
 * A group whose largest input is far above its others loses most. Mixed inputs keep 16 bits there,
 * and in all groups of rows that are not to be rounded.
 */
#ifndef OFFRAMP_MATMUL_INTEGER_H
#define OFFRAMP_MATMUL_INTEGER_H

#include "integer_sums.h"
#include "matmul_vector.h"

enum { LARGEST_INPUT = 32512 };
/* Of coarse inputs q is a multiple of this. */
enum { COARSE_STEP = 256, LARGEST_COARSE = LARGEST_INPUT / COARSE_STEP };
/* A group of a coarse row of mixed inputs keeps 16 bits if its largest is more than four times
 * their root mean square: its levels' squares then add up to less than this. */
static const float LEAST_SQUARES = LARGEST_COARSE * LARGEST_COARSE * GROUP / (4.0f * 4.0f);

/* Numbers of a row beside its columns, four a group: whole cache lines. */
INLINE int fixed_point_numbers(int columns) {
    enum { CACHE_LINE = 16 };
    return (4 * (columns / GROUP) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
}

/* Floats that inputs take in fixed point. */
INLINE size_t fixed_point_floats(int rows, int columns) {
    return (size_t)(rows | 1) * columns / 2 + (size_t)rows * fixed_point_numbers(columns);
}

/* The operands' inputs in fixed point. */
INLINE struct fixed_point fixed_point(const struct operands *t, int columns) {
    int groups = columns / GROUP, stride = t->rows | 1, numbers = fixed_point_numbers(columns);
    int16_t *all = (int16_t *)t->prepared;
    float *scales = (float *)(all + (size_t)stride * columns);
    return (struct fixed_point){stride,
                                numbers,
                                all,
                                scales,
                                scales + groups,
                                (int32_t *)scales + 2 * groups,
                                (int32_t *)scales + 3 * groups};
}

/* A group of inputs, x = scale * levels, with levels up to ``most``; the scale. */
INLINE float to_levels(const float *x, int most, ints levels[VECTORS]) {
    float inverse, scale = fixed_point_scale(x, GROUP, most, &inverse);
    for (int i = 0; i < VECTORS; i++)
        levels[i] = to_fixed_point(*(const floats *)(x + i * LANES), inverse);
    return scale;
}

/* Whether the largest of coarse levels is far above the others. */
INLINE int has_peak(const ints levels[VECTORS]) {
    floats squares = {0};
    for (int i = 0; i < VECTORS; i++) {
        floats level = __builtin_convertvector(levels[i], floats);
        squares += level * level;
    }
    /* Integers that floats hold exactly, so any machine finds the same. */
    return sum_lanes(squares) < LEAST_SQUARES;
}

/* One group of a row of inputs; of mixed ones, a coarse row's. */
INLINE void quantize_group(int format, const float *x, struct fixed_point to, int inputs) {
    ints fixed[VECTORS];
    int wide = inputs == INPUTS_FINE, step = COARSE_STEP;
    float scale = to_levels(x, wide ? LARGEST_INPUT : LARGEST_COARSE, fixed);
    if (inputs == INPUTS_MIXED && has_peak(fixed)) {
        wide = 1;
        scale = to_levels(x, LARGEST_INPUT, fixed);
    }
    if (wide) step = 1;
    uints sum = {0};
    for (int i = 0; i < VECTORS; i++) {
        fixed[i] = (ints)((uints)fixed[i] * (uint32_t)step);
        sum += (uints)fixed[i];
        store_inputs(format, to_shorts(fixed[i]), i * LANES, to.columns);
    }
    uint32_t total = add_lanes(sum); /* of inputs that are no numbers, any */
    scale /= step;
    *to.scales = scale;
    *to.sums = scale * (int32_t)total;
    *to.totals = total;
    *to.wide = wide;
}

/* Columns [first, end) of one row of inputs, x [columns]. */
static void quantize_inputs(const struct matrix *m, const struct operands *t, int row,
                            const float *x, int first, int end) {
    struct fixed_point to = fixed_point(t, m->columns);
    int fine = t->inputs == INPUTS_FINE || (t->inputs == INPUTS_MIXED && !t->coarse[row]);
    for (int g = first / GROUP; g < end / GROUP; g++)
        if (fine)
            quantize_group(m->format, x + g * GROUP, at_group(to, g, row), INPUTS_FINE);
        else
            quantize_group(m->format, x + g * GROUP, at_group(to, g, row), t->inputs);
}

/* What coarse inputs leave out of one group of a row, x [GROUP], squared and added up. */
INLINE float coarse_loss(const float *x) {
    ints levels[VECTORS];
    float scale = to_levels(x, LARGEST_COARSE, levels);
    floats squares = {0};
    for (int i = 0; i < VECTORS; i++) {
        floats kept = __builtin_convertvector(levels[i], floats) * scale;
        floats lost = *(const floats *)(x + i * LANES) - kept;
        squares += lost * lost;
    }
    return sum_lanes(squares);
}

/* The set that is used after the one of outputs from ``first`` on, of those before ``last``. */
INLINE const uint8_t *next_set(const struct matrix *m, const struct operands *t, int first,
                               int last) {
    int behind = first + SET;
    return t->next && behind >= last ? t->next : weight_rows(m, behind);
}

/* Fetch group ``g`` of the set that is used next, if it is the turn of ``tile``: all rows' tiles
 * share the work, so that memory is read all the time. Into the second cache, because misses of the
 * first are few at a time. */
INLINE void fetch_next_set(int format, const uint8_t *next, int g, int tile, int tiles) {
    if (g % tiles != tile) return;
    size_t bytes = set_group_bytes(format);
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + g * bytes + i, 0, 2);
}

/* Store lanes [begin, end) of a row's sums. */
static __attribute__((noinline)) void store_lanes(part_floats sums, const float *bias, float *to,
                                                  int begin, int end, int add) {
    for (int i = begin; i < end; i++) {
        float sum = sums[i] + (bias ? bias[i] : 0);
        to[i] = add ? to[i] + sum : sum;
    }
}

/* What a group adds to the sum of a row and a vector of outputs: ``dots`` are its sums of levels
 * times columns. */
INLINE part_floats add_scaled(part_floats sum, part_ints dots, part_floats scale, float input) {
    return sum + __builtin_convertvector(dots, part_floats) * (input * scale);
}

/* Store the sums of ROWS rows and INTEGER_WIDTH vectors of outputs, the first of which starts at
 * ``lane`` of a set. Of these outputs, ``begin`` to ``end`` are stored; ``out`` is the number of
 * the set's first output. */
INLINE void store_sums(part_floats (*sums)[INTEGER_WIDTH], int lane, const struct matrix *m,
                       const struct operands *t, int row, int out, int begin, int end,
                       const int ROWS) {
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

/* Weights of INTEGER_WIDTH vectors of outputs, the first of which starts at ``lane`` of ``set``,
 * times ROWS rows of inputs, the ``tile``-th of all in ``tiles``; stored as ``store_sums`` does. */
INLINE void multiply_lanes(int format, const uint8_t *set, const uint8_t *next, int lane, int tile,
                           int tiles, const struct matrix *m, const struct operands *t, int row,
                           int out, int begin, int end, const int ROWS) {
    int groups = m->columns / GROUP;
    struct fixed_point all = fixed_point(t, m->columns);
    part_floats sums[INTEGER_ROWS][INTEGER_WIDTH];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) sums[r][v] = (part_floats){0};
    size_t bytes = set_group_bytes(format);
    for (int g = 0; g < groups; g++, set += bytes) {
        struct fixed_point inputs = at_group(all, g, row);
        part_ints dots[INTEGER_ROWS][INTEGER_WIDTH];
        if (lane == 0) fetch_next_set(format, next, g, tile, tiles);
        const uint8_t *levels = set + SET * SCALE_BYTES[format] + 4 * lane;
        if (!ADDS_BYTES || t->inputs == INPUTS_FINE || any_wide(inputs, ROWS))
            add_up_group(format, levels, inputs, dots, ROWS, 1);
        else
            add_up_group(format, levels, inputs, dots, ROWS, 0);
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            part_floats scale = load_fp16_part(set + 2 * (lane + PART_LANES * v));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
                sums[r][v] =
                    add_scaled(sums[r][v], dots[r][v], scale, inputs.scales[r * inputs.numbers]);
            if (format == FORMAT_INT4) {
                part_floats minimum = load_fp16_part(set + 2 * (SET + lane + PART_LANES * v));
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++)
                    sums[r][v] += minimum * inputs.sums[r * inputs.numbers];
            }
        }
    }
    store_sums(sums, lane, m, t, row, out, begin, end, ROWS);
}

#ifdef HAS_BLOCKS

/* ROWS rows of a block, at most BLOCK_STEP, times one group: what it adds to their ``sums``. */
INLINE void add_block_rows(int format, part_ints quads[INTEGER_WIDTH][8], const part_floats *scales,
                           const part_floats *minima, struct fixed_point inputs,
                           part_floats (*sums)[INTEGER_WIDTH], const int ROWS, const int INPUTS) {
    part_ints dots[BLOCK_STEP][INTEGER_WIDTH];
    add_up_block(format, quads, inputs, dots, ROWS, INPUTS);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            int i = r * inputs.numbers;
            part_floats sum = add_scaled(sums[r][v], dots[r][v], scales[v], inputs.scales[i]);
            if (format == FORMAT_INT4) sum += minima[v] * inputs.sums[i];
            sums[r][v] = sum;
        }
}

#define ADD_BLOCK_ROWS(ROWS)                                                                       \
    case ROWS:                                                                                     \
        add_block_rows(format, quads, scales, minima, at_group(all, g, row + r), sums + r, ROWS,   \
                       INPUTS);                                                                    \
        break;

/* The same as multiply_lanes for a block of ``rows``, up to BLOCK_ROWS, group by group. */
INLINE void multiply_row_block(int format, const uint8_t *set, const uint8_t *next, int lane,
                               int block, int blocks, const struct matrix *m,
                               const struct operands *t, int row, int rows, int out, int begin,
                               int end, const int INPUTS) {
    int groups = m->columns / GROUP;
    struct fixed_point all = fixed_point(t, m->columns);
    part_floats sums[BLOCK_ROWS][INTEGER_WIDTH];
    memset(sums, 0, rows * sizeof *sums);
    size_t bytes = set_group_bytes(format);
    for (int g = 0; g < groups; g++, set += bytes) {
        part_ints quads[INTEGER_WIDTH][8];
        part_floats scales[INTEGER_WIDTH], minima[INTEGER_WIDTH];
        if (lane == 0) fetch_next_set(format, next, g, block, blocks);
#pragma GCC unroll 2
        for (int v = 0; v < INTEGER_WIDTH; v++) {
            int first = lane + PART_LANES * v;
            const uint8_t *levels = set + SET * SCALE_BYTES[format] + 4 * first;
#pragma GCC unroll 8
            for (int q = 0; q < 8; q++) quads[v][q] = unpack_quad(format, levels, q);
            scales[v] =
                load_fp16_part(set + 2 * first) * (INPUTS == INPUTS_COARSE ? COARSE_STEP : 1.0f);
            minima[v] = (part_floats){0};
            if (format == FORMAT_INT4) minima[v] = load_fp16_part(set + 2 * (SET + first));
        }
        int r = 0;
        for (; r + BLOCK_STEP <= rows; r += BLOCK_STEP)
            add_block_rows(format, quads, scales, minima, at_group(all, g, row + r), sums + r,
                           BLOCK_STEP, INPUTS);
        switch (rows - r) {
            ADD_BLOCK_ROWS(1)
            ADD_BLOCK_ROWS(2)
#if !defined(__AVX512F__)
            ADD_BLOCK_ROWS(3)
            ADD_BLOCK_ROWS(4)
            ADD_BLOCK_ROWS(5)
#endif
        }
    }
    for (int r = 0; r < rows; r++) store_sums(sums + r, lane, m, t, row + r, out, begin, end, 1);
}

#undef ADD_BLOCK_ROWS

/* All rows in blocks, about as many in each. */
INLINE void multiply_row_blocks(int format, const uint8_t *set, const uint8_t *next, int lane,
                                const struct matrix *m, const struct operands *t, int out,
                                int begin, int end, const int INPUTS) {
    int blocks = (t->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int row = 0, block = 0, rows; row < t->rows; row += rows, block++) {
        rows = (t->rows - row + blocks - block - 1) / (blocks - block);
        multiply_row_block(format, set, next, lane, block, blocks, m, t, row, rows, out, begin, end,
                           INPUTS);
    }
}

#endif

#define MULTIPLY_ROWS(ROWS)                                                                        \
    case ROWS:                                                                                     \
        multiply_lanes(format, set, next, lane, tile, tiles, m, t, row, out, begin, end, ROWS);    \
        break;

/* The same for all rows: as many at a time as keep their sums in registers, about as many each
 * time. */
INLINE void multiply_all_rows(int format, const uint8_t *set, const uint8_t *next, int lane,
                              const struct matrix *m, const struct operands *t, int out, int begin,
                              int end) {
#ifdef HAS_BLOCKS
    if (t->rows >= FEWEST_BLOCKED || t->inputs == INPUTS_COARSE) {
        if (t->inputs == INPUTS_FINE)
            multiply_row_blocks(format, set, next, lane, m, t, out, begin, end, INPUTS_FINE);
        else if (t->inputs == INPUTS_MIXED)
            multiply_row_blocks(format, set, next, lane, m, t, out, begin, end, INPUTS_MIXED);
        else
            multiply_row_blocks(format, set, next, lane, m, t, out, begin, end, INPUTS_COARSE);
        return;
    }
#endif
    int tiles = (t->rows + INTEGER_ROWS - 1) / INTEGER_ROWS;
    for (int row = 0, tile = 0, rows; row < t->rows; row += rows, tile++) {
        rows = (t->rows - row + tiles - tile - 1) / (tiles - tile);
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
        const uint8_t *set = weight_rows(m, first);
        const uint8_t *next = next_set(m, t, first, last);
        int begin = MAX(out - first, 0), end = MIN(SET, last - first);
        for (int lane = 0; lane < SET; lane += INTEGER_WIDTH * PART_LANES)
            multiply_all_rows(format, set, next, lane, m, t, first, begin, end);
    }
}

#endif
