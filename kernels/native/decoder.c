/* Decoder layers on a CPU: weights of any form, fp32 arithmetic, one call for a whole segment.
 *
 * Every sum runs in one order whatever else is in the batch, so a token's result does not depend on
 * the rows beside it, on the chunk of its prompt or on the number of threads. A dot product takes
 * columns a vector at a time into one vector of sums, which is then folded in halves. (Weights below
 * fp32 have a second way for many rows where there is a matrix unit, see MATRIX_UNIT.)
 *
 * Calls come through native.py, which has the same structures.
 */
#include <math.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define MATRIX_UNIT 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 6 };
#else
enum { LANES = 8, TILE_ROWS = 2 };
#endif
enum { GROUP = 32, VECTORS = GROUP / LANES };
/* The sums of a tile, TILE_OUTS x TILE_ROWS, stay in registers. */
enum { TILE_OUTS = 4 };
/* For more rows, weights are unpacked once and used often. */
enum { DIRECT_ROWS = TILE_ROWS };
/* Unpacked weights and inputs that stay in the cache; the same for the matrix unit. */
enum { PANEL_OUTS = 8, ROW_BLOCK = 96, UNIT_OUTS = 32, UNIT_ROWS = 16 };
/* Rows of weights, and keys, that memory is asked for in advance. */
enum { AHEAD = 8, KEYS_AHEAD = 16 };

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float floats8 __attribute__((vector_size(32)));
typedef float floats4 __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Forms of a weight matrix, whose columns come in groups of 32. A row is
 *   FP32, FP16   the values
 *   INT8         an fp16 scale for each group; 32 signed levels for each group (ggml's Q8_0)
 *   INT4         an fp16 scale for each group; an fp16 lowest value for each group; 16 bytes for
 *                each group with column j in the low and j + 16 in the high half (ggml's Q4_1)
 * Behind the last row lie SPARE bytes that may be read. */
enum form { FP32, FP16, INT8, INT4 };
enum { SPARE = 64 };

struct matrix {
    int32_t form, outs, columns;
    const uint8_t *data;
    const float *bias; /* [outs] or NULL */
};

struct layer {
    const float *attn_norm, *mlp_norm; /* [width] */
    const float *q_norm, *k_norm;      /* [head_dim] or NULL */
    struct matrix qkv, o, gate_up, down;
    int64_t index; /* among the layers of the pages */
};

struct shape {
    int32_t width, heads, kv_heads, head_dim, inner, window; /* window: 0 for none */
    float eps;
};

struct batch {
    int32_t rows, block_size, longest; /* longest context */
    float *pages;                      /* [layers, 2, places, kv_heads, head_dim] */
    int64_t page_size;                 /* floats of one layer's K */
    const int64_t *places;             /* [rows]: where each row's own K,V go */
    const int64_t *positions;          /* [rows] */
    const int64_t *first_blocks;       /* [rows]: start of the row's block table in blocks */
    const int64_t *blocks;
    const float *cos, *sin; /* [rows, head_dim], sine negative in the first half */
};

static const int32_t LEVEL_BYTES[] = {128, 64, 32, 16}, SCALE_BYTES[] = {0, 0, 2, 4};

#define FIFTEEN ((floats){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15})

INLINE floats splat(float x) {
    return x - (floats){0};
}

/* ``a`` where ``mask`` holds, ``b`` elsewhere. */
INLINE floats choose(ints mask, floats a, floats b) {
    return (floats)((mask & (ints)a) | (~mask & (ints)b));
}

INLINE floats load_halves(const uint8_t *at) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    _Float16 halves[LANES];
    memcpy(halves, at, sizeof halves);
    floats out;
    for (int i = 0; i < LANES; i++) out[i] = halves[i];
    return out;
#endif
}

/* GCC takes bytes apart one by one unless told. */
INLINE ints load_bytes(const uint8_t *at) {
#if defined(__AVX512F__)
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
#elif defined(__AVX2__)
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at));
#else
    ints out;
    for (int i = 0; i < LANES; i++) out[i] = at[i];
    return out;
#endif
}

INLINE ints load_signed_bytes(const uint8_t *at) {
#if defined(__AVX512F__)
    return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at));
#elif defined(__AVX2__)
    return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at));
#else
    ints out;
    for (int i = 0; i < LANES; i++) out[i] = (int8_t)at[i];
    return out;
#endif
}

INLINE size_t row_bytes(int form, int columns) {
    return (size_t)(columns / GROUP) * (SCALE_BYTES[form] + LEVEL_BYTES[form]);
}

/* Floats that ``open_row`` writes. */
INLINE size_t scale_room(int columns) {
    return 2 * (columns / GROUP + LANES);
}

/* A row of weights about to be unpacked. */
struct row {
    const uint8_t *levels;
    const float *scales, *lowest; /* [groups] */
};

/* ``room`` takes the row's scales as fp32. */
INLINE struct row open_row(int form, const uint8_t *at, int columns, float *room) {
    int groups = columns / GROUP;
    float *lowest = room + groups + LANES;
    if (form >= INT8)
        for (int g = 0; g < groups; g += LANES) *(floats *)(room + g) = load_halves(at + 2 * g);
    if (form == INT4)
        for (int g = 0; g < groups; g += LANES)
            *(floats *)(lowest + g) = load_halves(at + 2 * (groups + g));
    return (struct row){at + SCALE_BYTES[form] * groups, room, lowest};
}

/* Group ``g`` of a row as fp32. */
INLINE void unpack(int form, const struct row *row, int g, floats out[VECTORS]) {
    const uint8_t *at = row->levels + (size_t)g * LEVEL_BYTES[form];
    switch (form) {
    case FP32:
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) out[i] = *(const floats *)(at + 4 * LANES * i);
        break;
    case FP16:
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++) out[i] = load_halves(at + 2 * LANES * i);
        break;
    case INT8:
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; i++)
            out[i] = __builtin_convertvector(load_signed_bytes(at + LANES * i), floats) *
                     row->scales[g];
        break;
    default:
#pragma GCC unroll 2
        for (int i = 0; i < VECTORS / 2; i++) {
            ints both = load_bytes(at + LANES * i);
#if defined(__AVX512F__)
            /* The 16 values that occur are looked up; a lookup ignores all but the lowest 4 bits. */
            __m512 table = (__m512)(FIFTEEN * row->scales[g] + row->lowest[g]);
            out[i] = (floats)_mm512_permutexvar_ps((__m512i)both, table);
            out[i + 1] = (floats)_mm512_permutexvar_ps((__m512i)(both >> 4), table);
#else
            out[i] = __builtin_convertvector(both & 15, floats) * row->scales[g] + row->lowest[g];
            out[i + VECTORS / 2] =
                __builtin_convertvector(both >> 4, floats) * row->scales[g] + row->lowest[g];
#endif
        }
    }
}

INLINE void store_group(int form, const struct row *row, int g, float *to) {
    floats own[VECTORS];
    unpack(form, row, g, own);
    for (int i = 0; i < VECTORS; i++) *(floats *)(to + i * LANES) = own[i];
}

INLINE float fold(floats v) {
#if defined(__AVX512F__)
    floats8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    floats8 a = v;
#endif
    floats4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* exp for arguments of -87 and more; relative error 2e-7 (Cephes' polynomial). */
INLINE floats exponential(floats x) {
    x = choose(x < -87.0f, splat(-87.0f), x);
    x = choose(x > 88.0f, splat(88.0f), x);
    const float magic = 12582912.0f; /* adding it rounds to the nearest integer */
    floats n = x * 1.44269504088896341f + magic - magic;
    floats r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
}

/* Where a product goes: x [rows, columns] with x_stride to out [rows, outs] with out_stride. */
struct target {
    const float *x;
    size_t x_stride;
    float *out;
    size_t out_stride;
    int add; /* add to what is there */
};

/* OUTS x ROWS dot products; ``room`` is for the scales of OUTS rows of weights. */
INLINE void tile(int form, const uint8_t *w, size_t w_stride, int columns, const float *bias,
                 const struct target *t, int row, int out, int ahead, float *room, const int OUTS,
                 const int ROWS) {
    floats sums[TILE_OUTS][TILE_ROWS];
    struct row weights[TILE_OUTS];
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++) {
        weights[o] = open_row(form, w + o * w_stride, columns, room + o * scale_room(columns));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) sums[o][r] = (floats){0};
    }
    const float *x = t->x + row * t->x_stride;
    for (int g = 0; g < columns / GROUP; g++, x += GROUP) {
#pragma GCC unroll 8
        for (int o = 0; o < OUTS; o++) {
            floats own[VECTORS];
            unpack(form, &weights[o], g, own);
            if (ahead)
                __builtin_prefetch(weights[o].levels + g * LEVEL_BYTES[form] + AHEAD * w_stride);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const float *at = x + r * t->x_stride;
#pragma GCC unroll 4
                for (int i = 0; i < VECTORS; i++)
                    sums[o][r] += own[i] * *(const floats *)(at + i * LANES);
            }
        }
    }
#pragma GCC unroll 8
    for (int o = 0; o < OUTS; o++)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            float *to = t->out + (row + r) * t->out_stride + out + o;
            float sum = fold(sums[o][r]) + (bias ? bias[out + o] : 0);
            *to = t->add ? *to + sum : sum;
        }
}

#define TILE(OUTS, ROWS) tile(form, w, w_stride, columns, bias, t, row, out, ahead, room, OUTS, ROWS)

/* Rows of weights [count, columns] in one form against rows [first, last) of x. */
INLINE void tiles(int form, const uint8_t *w, size_t w_stride, int columns, const float *bias,
                  const struct target *t, int first, int last, int out, int count, int ahead,
                  float *room) {
    for (; count >= TILE_OUTS; count -= TILE_OUTS, out += TILE_OUTS, w += TILE_OUTS * w_stride) {
        int row = first;
#if defined(__AVX512F__)
        for (; last - row >= 6; row += 6) TILE(4, 6);
        for (; last - row >= 4; row += 4) TILE(4, 4);
#endif
        for (; last - row >= 2; row += 2) TILE(4, 2);
        for (; last - row >= 1; row += 1) TILE(4, 1);
    }
    for (; count > 0; count--, out++, w += w_stride) {
        int row = first;
        for (; last - row >= 2; row += 2) TILE(1, 2);
        for (; last - row >= 1; row += 1) TILE(1, 1);
    }
}

/* A part of a pass that has to be whole before the next begins: pieces of work taken, and done. */
struct phase {
    atomic_int taken, done;
    char apart[64 - 2 * sizeof(atomic_int)]; /* each in a cache line of its own */
};

/* One thread, with what it shares with the others and what is its own. */
struct worker {
    float *normed;       /* [rows, max(width, heads * head_dim)] */
    float *wide;         /* [rows, max(qkv, 2 * inner)] */
    uint32_t *halves;    /* [rows up to a multiple of 16, widest columns] */
    struct phase *phase; /* the one it is in, of an array that began as zeros */
    float *panel;        /* own: UNIT_OUTS * widest columns, then scales of TILE_OUTS rows */
    float *scores;       /* own: [group, longest + LANES] */
    int finished;        /* own: pieces of this phase that it did */
    int threads;
    int64_t *clock; /* [PARTS] nanoseconds to add to, of one thread; NULL for the others */
    int64_t since;
};

/* What a layer's time is told apart by; the same order as PARTS in native.py. */
enum part { NORMS, QKV, PLACES, ATTENTION, OUTPUT, GATE_UP, DOWN, PARTS };

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* The time since the last call of this goes to ``part``. */
INLINE void charge(struct worker *w, enum part part) {
    if (!w->clock) return;
    int64_t time = now();
    w->clock[part] += time - w->since;
    w->since = time;
}

/* The next of ``count`` pieces of work; negative when all are done, by whomever.
 *
 * Pieces are waited for, not threads: one that the system has put to sleep between two pieces keeps
 * nobody waiting, where a barrier would wait for its next slice of time, 240 times a pass. */
static int next_piece(struct worker *w, int count) {
    enum { SPINS = 1024 };
    struct phase *phase = w->phase;
    int piece = atomic_fetch_add_explicit(&phase->taken, 1, memory_order_relaxed);
    if (piece < count) {
        w->finished++;
        return piece;
    }
    atomic_fetch_add_explicit(&phase->done, w->finished, memory_order_acq_rel);
    for (int i = 1; atomic_load_explicit(&phase->done, memory_order_acquire) < count; i++) {
        if (i % SPINS == 0) sched_yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    w->finished = 0;
    w->phase++;
    return -1;
}

/* How many of ``count`` things make a piece: few pieces, so that threads read on in memory and seldom
 * meet, but some for each to even out. */
static int piece_size(int count, const struct worker *w) {
    enum { PIECES_EACH = 4 };
    int most = PIECES_EACH * w->threads;
    return (count + most - 1) / most;
}

/* Every piece, of ``size`` of ``count`` things, that this thread gets: those from ``first`` on and
 * before ``last``. Done when all threads' are. */
#define PIECES(worker, first, last, size, count)                                              \
    for (int first, last; (first = next_piece(worker, (count + size - 1) / size) * (size)) >= 0 \
                          && (last = MIN(first + (size), count), 1);)

#ifdef MATRIX_UNIT
/* Products of fp32 on a unit that multiplies bf16: each number is the sum of two of bf16, and of the
 * four partial products the three largest are taken, which leaves errors of 2^-16 (known as bf16x3).
 * A row's result depends on no other row here either, but it is not the vectors' to the last bit, so
 * FP32, which is for exactness, stays with those. */

static int unit_ready = 0;

/* Whether the unit may be used; the system must be asked once. */
static int prepare_unit(void) {
    enum { ASK = 0x1023, TILE_DATA = 18 };
    unit_ready = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
    return unit_ready;
}

static int uses_unit(const struct matrix *m, int rows) {
    return unit_ready && m->form != FP32 && rows > DIRECT_ROWS;
}

/* Every thread sets its eight tiles to 16 rows of 64 bytes. */
static void open_unit(void) {
    /* Static, for GCC takes stores into a local one to be of no use. */
    static const struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (unit_ready) _tile_loadconfig(&config);
}

static void close_unit(void) {
    if (unit_ready) _tile_release();
}

/* 32 numbers as sums of two halves each. */
INLINE void halve(floats a, floats b, __m512i *high, __m512i *low) {
    *high = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    __m512i ha = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(*high)), 16);
    __m512i hb = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(*high, 1)), 16);
    *low = (__m512i)_mm512_cvtne2ps_pbh((__m512)(b - (floats)hb), (__m512)(a - (floats)ha));
}

/* Group ``g`` of a row of weights in halves. */
INLINE void unpack_halves(int form, const struct row *row, int g, uint16_t *high, uint16_t *low) {
    __m512i h, l;
    if (form == INT4) {
        /* Only 16 values occur: their high halves, and behind them their low ones, are looked up. */
        floats table = FIFTEEN * row->scales[g] + row->lowest[g];
        floats cut = (floats)((ints)table & (int)0xffff0000);
        __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)(table - cut), (__m512)cut);
        const uint8_t *at = row->levels + (size_t)g * LEVEL_BYTES[form];
        __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)at));
        __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(words),
                                           _mm256_srli_epi16(words, 4), 1);
        index = _mm512_and_si512(index, _mm512_set1_epi16(15));
        h = _mm512_permutexvar_epi16(index, halves);
        l = _mm512_permutexvar_epi16(_mm512_or_si512(index, _mm512_set1_epi16(16)), halves);
    } else {
        floats both[VECTORS];
        unpack(form, row, g, both);
        halve(both[0], both[1], &h, &l);
    }
    _mm512_storeu_si512(high, h);
    _mm512_storeu_si512(low, l);
}

/* Transpose 16 x 16 words of 32 bits. */
INLINE void transpose(__m512i v[16]) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Inputs as the unit wants them: for 16 rows and 32 columns a tile of high halves and one of low
 * halves, each with column pairs down and rows across. Tile pairs of one set of rows lie together. */
static void halve_inputs(const struct target *t, int rows, int columns, struct worker *own) {
    int groups = columns / GROUP, sets = (rows + UNIT_ROWS - 1) / UNIT_ROWS;
    int size = piece_size(sets * groups, own);
    PIECES(own, i, end, size, sets * groups) for (; i < end; i++) {
        int first = i / groups * UNIT_ROWS, c = i % groups * GROUP;
        __m512i high[UNIT_ROWS], low[UNIT_ROWS];
        for (int r = 0; r < UNIT_ROWS; r++) {
            high[r] = low[r] = _mm512_setzero_si512();
            if (first + r >= rows) continue;
            const float *x = t->x + (first + r) * t->x_stride + c;
            halve(*(const floats *)x, *(const floats *)(x + LANES), &high[r], &low[r]);
        }
        transpose(high);
        transpose(low);
        uint32_t *to = own->halves + (size_t)i * 512;
        for (int r = 0; r < 16; r++) {
            _mm512_storeu_si512(to + r * 16, high[r]);
            _mm512_storeu_si512(to + 256 + r * 16, low[r]);
        }
    }
}

/* Sums [16 outs, 16 rows] of a tile to their place. */
INLINE void put_tile(float sums[16][16], const float *bias, const struct target *t, int rows,
                     int row, int out, int outs) {
    __m512i v[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(sums[i]);
    transpose(v);
    __mmask16 mask = outs >= 16 ? 0xffff : (1u << outs) - 1;
    __m512 added = bias ? _mm512_maskz_loadu_ps(mask, bias + out) : _mm512_setzero_ps();
    for (int r = 0; r < MIN(16, rows - row); r++) {
        float *to = t->out + (row + r) * t->out_stride + out;
        __m512 sum = _mm512_add_ps((__m512)v[r], added);
        if (t->add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum);
        _mm512_mask_storeu_ps(to, mask, sum);
    }
}

/* 32 outs, of which ``outs`` count, against one or two sets of 16 rows. ``high`` and ``low`` are
 * [32, columns]. Tiles 0 to 3 sum up; 4 and 5 hold weights, 6 and 7 inputs. */
INLINE void unit_block(const uint16_t *high, const uint16_t *low, const uint32_t *halves,
                       int columns, const float *bias, const struct target *t, int rows, int row,
                       int out, int outs, const int SETS) {
    int groups = columns / GROUP, stride = columns * 2;
    const uint32_t *first = halves + (size_t)(row / UNIT_ROWS) * groups * 512;
    const uint32_t *second = first + (size_t)groups * 512;
    _tile_zero(0);
    _tile_zero(1);
    if (SETS == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
#define MULTIPLY()                  \
    _tile_dpbf16ps(0, 4, 6);        \
    _tile_dpbf16ps(1, 5, 6);        \
    if (SETS == 2) {                \
        _tile_dpbf16ps(2, 4, 7);    \
        _tile_dpbf16ps(3, 5, 7);    \
    }
    for (int g = 0; g < groups; g++, first += 512, second += 512) {
        const uint16_t *h = high + g * GROUP, *l = low + g * GROUP;
        _tile_loadd(6, first, 64);
        if (SETS == 2) _tile_loadd(7, second, 64);
        _tile_loadd(4, l, stride);
        _tile_loadd(5, l + 16 * columns, stride);
        MULTIPLY()
        _tile_loadd(4, h, stride);
        _tile_loadd(5, h + 16 * columns, stride);
        MULTIPLY()
        _tile_loadd(6, first + 256, 64);
        if (SETS == 2) _tile_loadd(7, second + 256, 64);
        MULTIPLY()
    }
#undef MULTIPLY
    float sums[4][16][16];
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    put_tile(sums[0], bias, t, rows, row, out, outs);
    if (outs > 16) put_tile(sums[1], bias, t, rows, row, out + 16, outs - 16);
    if (SETS == 2) {
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        put_tile(sums[2], bias, t, rows, row + UNIT_ROWS, out, outs);
        if (outs > 16) put_tile(sums[3], bias, t, rows, row + UNIT_ROWS, out + 16, outs - 16);
    }
}

INLINE void unit_product(int form, const struct matrix *m, const struct target *t, int rows,
                         int out, int count, struct worker *own) {
    int columns = m->columns;
    size_t stride = row_bytes(form, columns);
    uint16_t *high = (uint16_t *)own->panel, *low = high + (size_t)UNIT_OUTS * columns;
    float *room = own->panel + (size_t)UNIT_OUTS * columns;
    const uint32_t *halves = own->halves;
    for (; count > 0; count -= UNIT_OUTS, out += UNIT_OUTS) {
        int outs = MIN(UNIT_OUTS, count), row = 0;
        for (int o = 0; o < outs; o++) {
            struct row weights = open_row(form, m->data + (out + o) * stride, columns, room);
            for (int g = 0; g < columns / GROUP; g++) {
                __builtin_prefetch(weights.levels + g * LEVEL_BYTES[form] + AHEAD * stride);
                unpack_halves(form, &weights, g, high + o * columns + g * GROUP,
                              low + o * columns + g * GROUP);
            }
        }
        /* Rows of weights beyond ``outs`` are left from before; their sums are not stored. */
        for (; rows - row > UNIT_ROWS; row += 2 * UNIT_ROWS)
            unit_block(high, low, halves, columns, m->bias, t, rows, row, out, outs, 2);
        if (row < rows)
            unit_block(high, low, halves, columns, m->bias, t, rows, row, out, outs, 1);
    }
}
#else
static int prepare_unit(void) {
    return 0;
}

static int uses_unit(const struct matrix *m, int rows) {
    (void)m, (void)rows;
    return 0;
}

static void open_unit(void) {}

static void close_unit(void) {}

static void halve_inputs(const struct target *t, int rows, int columns, struct worker *own) {
    (void)t, (void)rows, (void)columns, (void)own;
}

INLINE void unit_product(int form, const struct matrix *m, const struct target *t, int rows,
                         int out, int count, struct worker *own) {
    (void)form, (void)m, (void)t, (void)rows, (void)out, (void)count, (void)own;
}
#endif

/* Outputs [out, out + count) for all rows. */
INLINE void product_in(int form, const struct matrix *m, const struct target *t, int rows, int out,
                       int count, struct worker *own) {
    int columns = m->columns;
    size_t stride = row_bytes(form, columns);
    const uint8_t *w = m->data + out * stride;
    float *panel = own->panel, *room = panel + (size_t)UNIT_OUTS * columns;
    if (uses_unit(m, rows)) {
        unit_product(form, m, t, rows, out, count, own);
        return;
    }
    if (form == FP32 || rows <= DIRECT_ROWS) {
        tiles(form, w, stride, columns, m->bias, t, 0, rows, out, count, 1, room);
        return;
    }
    for (int done = 0; done < count; done += PANEL_OUTS) {
        int outs = MIN(PANEL_OUTS, count - done);
        for (int o = 0; o < outs; o++) {
            struct row weights = open_row(form, w + (done + o) * stride, columns, room);
            float *to = panel + (size_t)o * columns;
            for (int g = 0; g < columns / GROUP; g++, to += GROUP) {
                __builtin_prefetch(weights.levels + g * LEVEL_BYTES[form] + AHEAD * stride);
                store_group(form, &weights, g, to);
            }
        }
        for (int row = 0; row < rows; row += ROW_BLOCK)
            tiles(FP32, (const uint8_t *)panel, 4 * (size_t)columns, columns, m->bias, t, row,
                  MIN(row + ROW_BLOCK, rows), out + done, outs, 0, room);
    }
}

static void product(const struct matrix *m, const struct target *t, int rows, int out, int count,
                    struct worker *own) {
    switch (m->form) {
    case FP32: product_in(FP32, m, t, rows, out, count, own); break;
    case FP16: product_in(FP16, m, t, rows, out, count, own); break;
    case INT8: product_in(INT8, m, t, rows, out, count, own); break;
    default: product_in(INT4, m, t, rows, out, count, own);
    }
}

/* Outputs a piece of a product has. */
static int output_size(int outs, const struct worker *own) {
    return piece_size((outs + UNIT_OUTS - 1) / UNIT_OUTS, own) * UNIT_OUTS;
}

/* Make the inputs of products with ``m`` ready. */
static void prepare(const struct matrix *m, const struct target *t, int rows,
                    struct worker *own) {
    if (uses_unit(m, rows)) halve_inputs(t, rows, m->columns, own);
}

/* All outputs. */
static void spread(const struct matrix *m, const struct target *t, int rows,
                   struct worker *own) {
    prepare(m, t, rows, own);
    int size = output_size(m->outs, own);
    PIECES(own, out, end, size, m->outs) product(m, t, rows, out, end - out, own);
}

INLINE void normalise(const float *x, const float *weight, float *out, int width, float eps) {
    floats squares = {0};
    for (int i = 0; i < width; i += LANES) {
        floats v = *(const floats *)(x + i);
        squares += v * v;
    }
    float scale = 1 / sqrtf(fold(squares) / width + eps);
    for (int i = 0; i < width; i += LANES)
        *(floats *)(out + i) = *(const floats *)(x + i) * scale * *(const floats *)(weight + i);
}

/* Rotate the halves of x [head_dim] against each other. */
INLINE void rotate(const float *x, float *out, const float *cos, const float *sin, int dim) {
    int half = dim / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        out[i] = a * cos[i] + b * sin[i];
        out[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

INLINE float *keys(const struct layer *l, const struct batch *b) {
    return b->pages + 2 * l->index * b->page_size;
}

/* Position the row's queries and keys, and store its K and V. */
static void place(const struct shape *s, const struct layer *l, const struct batch *b, float *qkv,
                  int row) {
    int dim = s->head_dim, kv = s->kv_heads * dim;
    const float *cos = b->cos + (size_t)row * dim, *sin = b->sin + (size_t)row * dim;
    float *k = keys(l, b) + b->places[row] * kv, *v = k + b->page_size;
    for (int h = 0; h < s->heads + s->kv_heads; h++) {
        float *x = qkv + h * dim;
        const float *norm = h < s->heads ? l->q_norm : l->k_norm;
        if (norm) normalise(x, norm, x, dim, s->eps);
        rotate(x, h < s->heads ? x : k + (h - s->heads) * dim, cos, sin, dim);
    }
    memcpy(v, qkv + (s->heads + s->kv_heads) * dim, sizeof(float) * kv);
}

/* Scores of ``group`` queries [group, dim] for ``count`` consecutive keys. */
INLINE void score(const float *q, const float *k, size_t stride, int dim, int group, int count,
                  float scale, float *scores, size_t span) {
    for (int p = 0; p < count; p++, k += stride) {
        for (int i = 0; i < dim; i += LANES) __builtin_prefetch(k + KEYS_AHEAD * stride + i);
        for (int g = 0; g < group; g++) {
            floats sums = {0};
            for (int i = 0; i < dim; i += LANES)
                sums += *(const floats *)(q + g * dim + i) * *(const floats *)(k + i);
            scores[g * span + p] = fold(sums) * scale;
        }
    }
}

/* Scores [count] to shares of one, in place; memory up to a multiple of LANES is written. */
static void soften(float *scores, int64_t count) {
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    floats most = splat(-INFINITY), sums = {0};
    for (int64_t i = count; i < padded; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) {
        floats v = *(floats *)(scores + i);
        most = choose(v > most, v, most);
    }
    float top = most[0];
    for (int i = 1; i < LANES; i++) top = most[i] > top ? most[i] : top;
    for (int64_t i = 0; i < padded; i += LANES) {
        floats v = *(floats *)(scores + i);
        floats e = choose(v == -INFINITY, (floats){0}, exponential(v - top));
        *(floats *)(scores + i) = e;
        sums += e;
    }
    float share = 1 / fold(sums);
    for (int64_t i = 0; i < padded; i += LANES) *(floats *)(scores + i) *= share;
}

/* Add ``count`` consecutive values [stride] weighted by GROUP_ sets of shares, 2 * LANES columns. */
INLINE void mix(const float *v, size_t stride, int count, const float *shares, size_t span,
                float *out, int dim, const int QUERIES, const int WIDE) {
    floats sums[4][2];
#pragma GCC unroll 4
    for (int g = 0; g < QUERIES; g++)
#pragma GCC unroll 2
        for (int i = 0; i < WIDE; i++) sums[g][i] = *(floats *)(out + g * dim + i * LANES);
    for (int p = 0; p < count; p++, v += stride)
#pragma GCC unroll 2
        for (int i = 0; i < WIDE; i++) {
            __builtin_prefetch(v + KEYS_AHEAD * stride + i * LANES);
            floats value = *(const floats *)(v + i * LANES);
#pragma GCC unroll 4
            for (int g = 0; g < QUERIES; g++) sums[g][i] += shares[g * span + p] * value;
        }
#pragma GCC unroll 4
    for (int g = 0; g < QUERIES; g++)
#pragma GCC unroll 2
        for (int i = 0; i < WIDE; i++) *(floats *)(out + g * dim + i * LANES) = sums[g][i];
}

/* All columns for up to four queries. */
INLINE void mix_columns(const float *v, size_t stride, int count, const float *shares, size_t span,
                        float *out, int dim, const int QUERIES) {
    int i = 0;
    for (; dim - i >= 2 * LANES; i += 2 * LANES)
        mix(v + i, stride, count, shares, span, out + i, dim, QUERIES, 2);
    if (i < dim) mix(v + i, stride, count, shares, span, out + i, dim, QUERIES, 1);
}

static void mix_group(const float *v, size_t stride, int count, const float *shares, size_t span,
                      float *out, int dim, int group) {
    for (; group >= 4; group -= 4, shares += 4 * span, out += 4 * dim)
        mix_columns(v, stride, count, shares, span, out, dim, 4);
    switch (group) {
    case 3: mix_columns(v, stride, count, shares, span, out, dim, 3); break;
    case 2: mix_columns(v, stride, count, shares, span, out, dim, 2); break;
    case 1: mix_columns(v, stride, count, shares, span, out, dim, 1); break;
    default: break;
    }
}

/* Queries [group, head_dim] of one row that share K,V head ``head``; ``scores`` [group, longest +
 * LANES] is scratch. Keys and values are walked block by block of the row's table. */
static void attend(const struct shape *s, const struct layer *l, const struct batch *b,
                   const float *q, float *out, int row, int head, float *scores) {
    int dim = s->head_dim, group = s->heads / s->kv_heads, size = b->block_size;
    size_t stride = (size_t)s->kv_heads * dim, span = b->longest + LANES;
    const int64_t *blocks = b->blocks + b->first_blocks[row];
    int64_t last = b->positions[row], end = last + 1;
    int64_t first = s->window && end > s->window ? end - s->window : 0;
    const float *k = keys(l, b) + head * dim, *v = k + b->page_size;
    float scale = 1 / sqrtf(dim);
    for (int64_t p = first, to; p < end; p = to) {
        to = MIN((p / size + 1) * size, end);
        score(q, k + (blocks[p / size] * size + p % size) * stride, stride, dim, group, to - p,
              scale, scores + p - first, span);
    }
    for (int g = 0; g < group; g++) soften(scores + g * span, end - first);
    memset(out, 0, sizeof(float) * group * dim);
    for (int64_t p = first, to; p < end; p = to) {
        to = MIN((p / size + 1) * size, end);
        mix_group(v + (blocks[p / size] * size + p % size) * stride, stride, to - p,
                  scores + p - first, span, out, dim, group);
    }
}

/* silu(gate) * up for ``count`` columns from ``column`` on, into gate's place. */
static void activate(float *gate_up, int inner, int rows, int column, int count) {
    for (int r = 0; r < rows; r++) {
        float *gate = gate_up + (size_t)r * 2 * inner + column;
        for (int i = 0; i < count; i += LANES) {
            floats g = *(floats *)(gate + i), u = *(floats *)(gate + inner + i);
            *(floats *)(gate + i) = g / (1.0f + exponential(-g)) * u;
        }
    }
}

static void normalise_rows(const float *x, const float *weight, int rows, int width, float eps,
                           struct worker *own) {
    int size = piece_size(rows, own);
    PIECES(own, r, end, size, rows) for (; r < end; r++)
        normalise(x + (size_t)r * width, weight, own->normed + (size_t)r * width, width, eps);
}

static void run_layer(const struct shape *s, const struct layer *l, const struct batch *b,
                      float *hidden, struct worker *own) {
    int rows = b->rows, width = s->width, dim = s->head_dim, group = s->heads / s->kv_heads;
    size_t queries = s->heads * dim, qkv = queries + 2 * s->kv_heads * dim, wide = 2 * s->inner;
    float *normed = own->normed, *out = own->wide;
    normalise_rows(hidden, l->attn_norm, rows, width, s->eps, own);
    charge(own, NORMS);
    spread(&l->qkv, &(struct target){normed, width, out, qkv, 0}, rows, own);
    charge(own, QKV);
    int some = piece_size(rows, own);
    PIECES(own, r, end, some, rows) for (; r < end; r++) place(s, l, b, out + r * qkv, r);
    charge(own, PLACES);
    PIECES(own, i, end, 1, rows * s->kv_heads) for (; i < end; i++) {
        int r = i / s->kv_heads, head = i % s->kv_heads;
        size_t at = (size_t)head * group * dim;
        attend(s, l, b, out + r * qkv + at, normed + r * queries + at, r, head, own->scores);
    }
    charge(own, ATTENTION);
    spread(&l->o, &(struct target){normed, queries, hidden, width, 1}, rows, own);
    charge(own, OUTPUT);
    normalise_rows(hidden, l->mlp_norm, rows, width, s->eps, own);
    charge(own, NORMS);
    const struct target up = {normed, width, out, wide, 0};
    prepare(&l->gate_up, &up, rows, own);
    int size = output_size(s->inner, own);
    PIECES(own, c, end, size, s->inner) {
        int count = end - c;
        product(&l->gate_up, &up, rows, c, count, own);
        product(&l->gate_up, &up, rows, s->inner + c, count, own);
        activate(out, s->inner, rows, c, count);
    }
    charge(own, GATE_UP);
    spread(&l->down, &(struct target){out, wide, hidden, width, 1}, rows, own);
    charge(own, DOWN);
}

/* Number of this thread in its team. */
static int thread_number(void) {
#ifdef _OPENMP
    extern int omp_get_thread_num(void);
    return omp_get_thread_num();
#else
    return 0;
#endif
}

enum { LAYER_PHASES = 12, PRODUCT_PHASES = 2 };

/* Advance hidden [rows, width] by ``count`` layers, in place. ``phases`` are LAYER_PHASES zeros a
 * layer; ``clock`` [PARTS] takes nanoseconds, or is NULL. Of ``own`` each thread takes ``own_size`` floats: its panel of ``panel_size``, then its
 * scores. */
void offramp_run_layers(const struct shape *s, const struct layer *layers, int32_t count,
                        const struct batch *b, float *hidden, float *normed, float *wide,
                        uint32_t *halves, struct phase *phases, float *own, int64_t panel_size,
                        int64_t own_size, int32_t threads, int64_t *clock) {
#pragma omp parallel num_threads(threads)
    {
        float *panel = own + own_size * thread_number();
        struct worker mine = {normed, wide, halves, phases, panel, panel + panel_size, 0, threads,
                              thread_number() ? NULL : clock, clock ? now() : 0};
        open_unit();
        for (int i = 0; i < count; i++) run_layer(s, layers + i, b, hidden, &mine);
        close_unit();
    }
}

/* x [rows, columns] to out [rows, outs]. ``phases`` are PRODUCT_PHASES zeros; of ``own`` each thread
 * takes ``own_size`` floats. */
void offramp_product(const struct matrix *m, const float *x, float *out, int32_t rows,
                     uint32_t *halves, struct phase *phases, float *own, int64_t own_size,
                     int32_t threads) {
    const struct target t = {x, m->columns, out, m->outs, 0};
#pragma omp parallel num_threads(threads)
    {
        float *panel = own + own_size * thread_number();
        open_unit();
        spread(m, &t, rows, &(struct worker){NULL, NULL, halves, phases, panel, NULL, 0, threads, NULL, 0});
        close_unit();
    }
}

/* Rows ``ids`` [count] of a matrix as fp32, out [count, columns]; ``room`` for one row's scales. */
void offramp_rows(const struct matrix *m, const int64_t *ids, int32_t count, float *out,
                  float *room) {
    size_t stride = row_bytes(m->form, m->columns);
    for (int i = 0; i < count; i++) {
        struct row weights = open_row(m->form, m->data + ids[i] * stride, m->columns, room);
        for (int g = 0; g < m->columns / GROUP; g++, out += GROUP)
            store_group(m->form, &weights, g, out);
    }
}

/* Before anything else: whether this processor's matrix unit is at hand. */
int32_t offramp_start(void) {
    return prepare_unit();
}

/* Sizes of the structures, for the caller to compare with its own. */
int32_t offramp_size_of(int32_t kind) {
    const size_t sizes[] = {sizeof(struct matrix), sizeof(struct layer), sizeof(struct shape),
                            sizeof(struct batch), sizeof(struct phase)};
    return sizes[kind];
}
