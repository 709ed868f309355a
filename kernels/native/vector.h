/* Vectors of fp32 and int32, as wide as the processor computes at once. */
#ifndef OFFRAMP_VECTOR_H
#define OFFRAMP_VECTOR_H

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

/* Numbers of a vector, and of a part of it that one register holds. The order of sums depends on
 * LANES alone. */
#if defined(__AVX512F__)
enum { LANES = 16, PART_LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8, PART_LANES = 8 };
#else
enum { LANES = 8, PART_LANES = 4 };
#endif
enum { PARTS = LANES / PART_LANES };

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float floats8 __attribute__((vector_size(32)));
typedef float unaligned8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float floats4 __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
/* Whose sums and differences may wrap around. */
typedef uint32_t uints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uints8 __attribute__((vector_size(32)));
typedef uint32_t uints4 __attribute__((vector_size(16)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef float part_floats __attribute__((vector_size(4 * PART_LANES), aligned(4), may_alias));
typedef int32_t part_ints __attribute__((vector_size(4 * PART_LANES), aligned(4), may_alias));
typedef int16_t part_pairs __attribute__((vector_size(4 * PART_LANES), aligned(4), may_alias));

INLINE floats broadcast(float x) {
    return x - (floats){0};
}

/* ``a`` where ``mask`` is all ones, ``b`` where it is zero. */
INLINE floats select_lanes(ints mask, floats a, floats b) {
    return (floats)((mask & (ints)a) | (~mask & (ints)b));
}

/* The larger of each two lanes; that of ``b`` where one is no number. */
INLINE floats larger(floats a, floats b) {
#if defined(__AVX512F__)
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select_lanes(a > b, a, b);
#endif
}

/* The same of integers. */
INLINE ints larger_ints(ints a, ints b) {
#if defined(__AVX512F__)
    return (ints)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (ints)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
    return (ints)select_lanes(a > b, (floats)a, (floats)b);
#endif
}

/* The largest lane of numbers. */
INLINE float largest_number(floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

/* Whether a lane of a comparison holds. */
INLINE int any_lane(ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int32_t all = 0;
    for (int i = 0; i < LANES; i++) all |= mask[i];
    return all != 0;
#endif
}

/* ``v``, which several instructions use: keeps the compiler from loading it for each of them. */
INLINE floats in_register(floats v) {
#if defined(__AVX__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

INLINE floats load_fp16(const uint8_t *at) {
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#elif defined(__aarch64__)
    floats4 a = (floats4)vcvt_f32_f16(vld1_f16((const float16_t *)at));
    floats4 b = (floats4)vcvt_f32_f16(vld1_f16((const float16_t *)at + 4));
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#else
    _Float16 values[LANES];
    memcpy(values, at, sizeof values);
    floats out;
    for (int i = 0; i < LANES; i++) out[i] = values[i];
    return out;
#endif
}

/* LANES integers of 16 bits. */
INLINE ints load_shorts(const uint8_t *at) {
#if defined(__AVX512F__)
    return (ints)_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__AVX2__)
    return (ints)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)at));
#else
    return __builtin_convertvector(*(const shorts *)at, ints);
#endif
}

/* The lower halves of ``v``. */
INLINE shorts to_shorts(ints v) {
#if defined(__AVX512F__)
    return (shorts)_mm512_cvtepi32_epi16((__m512i)v);
#else
    return __builtin_convertvector(v, shorts);
#endif
}

INLINE part_floats load_fp16_part(const uint8_t *at) {
#if defined(__AVX__)
    return load_fp16(at);
#elif defined(__aarch64__)
    return (part_floats)vcvt_f32_f16(vld1_f16((const float16_t *)at));
#else
    _Float16 values[PART_LANES];
    memcpy(values, at, sizeof values);
    part_floats out = {0};
    for (int i = 0; i < PART_LANES; i++) out[i] = values[i];
    return out;
#endif
}

/* ``sums`` plus, in each lane, the products of the two 16-bit halves of ``a`` and of ``b``. */
INLINE part_ints add_pairs(part_ints sums, part_ints a, int32_t b) {
#if defined(__AVX512VNNI__)
    return (part_ints)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVX512BW__)
    return sums + (part_ints)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi32(b));
#elif defined(__AVXVNNI__)
    return (part_ints)_mm256_dpwssd_avx_epi32((__m256i)sums, (__m256i)a, _mm256_set1_epi32(b));
#elif defined(__AVX2__)
    return sums + (part_ints)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(b));
#elif defined(__SSE2__) && !defined(__AVX__)
    return sums + (part_ints)_mm_madd_epi16((__m128i)a, _mm_set1_epi32(b));
#else
    return sums + (a << 16 >> 16) * (int32_t)(int16_t)b + (a >> 16) * (b >> 16);
#endif
}

/* The largest lane of numbers that are not negative. */
INLINE int32_t largest_lane(ints v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = 0;
    for (int i = 0; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}

/* The sum of all lanes, which may wrap around. */
INLINE uint32_t add_lanes(uints v) {
#if defined(__AVX512F__)
    uints8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    uints8 a = v;
#endif
    uints4 b =
        __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return b[0] + b[1] + (b[2] + b[3]);
}

/* Sum of all lanes: the upper half is added to the lower until one is left. */
INLINE float sum_lanes(floats v) {
#if defined(__AVX512F__)
    floats8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    floats8 a = v;
#endif
    floats4 b =
        __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* The same of a vector in parts. */
INLINE float sum_parts(const part_floats parts[PARTS]) {
#if defined(__AVX__)
    return sum_lanes(parts[0]);
#else
    part_floats b = parts[0] + parts[1];
    return (b[0] + b[2]) + (b[1] + b[3]);
#endif
}

/* Sums of the lanes of LANES vectors, each added up in the order of sum_lanes. Vectors go in four
 * at a time (two if LANES is 8): call ``i`` takes vector i and every fourth after it; a last call
 * gives the sums in order. */
INLINE floats sum_lanes_begin(const floats v[LANES / 4]) {
#if defined(__AVX512F__)
    __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    a = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xEE);
    c = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xEE);
    return (floats)(_mm512_shuffle_f32x4(a, c, 0x88) + _mm512_shuffle_f32x4(a, c, 0xDD));
#else
    return __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
#endif
}

INLINE floats sum_lanes_end(const floats v[4]) {
#if defined(__AVX512F__)
    __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    a = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xEE);
    c = _mm512_shuffle_ps(c, d, 0x44) + _mm512_shuffle_ps(c, d, 0xEE);
    return (floats)(_mm512_shuffle_ps(a, c, 0x88) + _mm512_shuffle_ps(a, c, 0xDD));
#else
    floats a = __builtin_shufflevector(v[0], v[1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(v[0], v[1], 2, 3, 10, 11, 6, 7, 14, 15);
    floats b = __builtin_shufflevector(v[2], v[3], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(v[2], v[3], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#endif
}

/* Rows of a square of 32-bit words become its columns. */
INLINE void transpose(floats rows[LANES]) {
#if defined(__AVX512F__)
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i c = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88);
        __m512i d = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd);
        __m512i e = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88);
        __m512i f = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
        rows[j] = (floats)_mm512_shuffle_i32x4(c, e, 0x88);
        rows[j + 4] = (floats)_mm512_shuffle_i32x4(d, f, 0x88);
        rows[j + 8] = (floats)_mm512_shuffle_i32x4(c, e, 0xdd);
        rows[j + 12] = (floats)_mm512_shuffle_i32x4(d, f, 0xdd);
    }
#else
    floats a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        a[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            floats low = a[i + j], high = a[i + j + 2];
            b[i + 2 * j] = __builtin_shufflevector(low, high, 0, 1, 8, 9, 4, 5, 12, 13);
            b[i + 2 * j + 1] = __builtin_shufflevector(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        rows[j] = __builtin_shufflevector(b[j], b[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        rows[j + 4] = __builtin_shufflevector(b[j], b[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#endif
}

/* The scale at which x [count], whole vectors, is fixed point from -``most`` to ``most``, and what
 * numbers are multiplied with to become so: 0 and 0 where all are next to nothing. */
INLINE float fixed_point_scale(const float *x, int count, int most, float *inverse) {
    const float smallest = 1e-30f; /* of a smaller one the reciprocal overflows */
    ints largest = {0};
    for (int i = 0; i < count; i += LANES) {
        /* Floats without their sign are ordered like integers; NaN is the largest. */
        largest = larger_ints(*(const ints *)(x + i) & 0x7fffffff, largest);
    }
    int32_t bits = largest_lane(largest);
    float size;
    memcpy(&size, &bits, sizeof size);
    *inverse = size < smallest ? 0 : most / size;
    return size < smallest ? 0 : size / most;
}

/* x * inverse, rounded to the nearest integers; of what is no number, any. */
INLINE ints to_fixed_point(floats x, float inverse) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    return (ints)((uints)(x * inverse + magic) - (uints)broadcast(magic));
}

/* exp of numbers up to 88; below -87 it is that of -87. Relative error 2e-7 (the polynomial of
 * Cephes' expf). */
INLINE floats exp_below_88(floats x) {
    x = larger(broadcast(-87.0f), x);
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to the nearest integer */
    floats n = x * 1.44269504088896341f + magic - magic;
    floats r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
    return (floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
#endif
}

/* exp with arguments clamped to [-87, 88]. */
INLINE floats vector_exp(floats x) {
    return exp_below_88(-larger(broadcast(-88.0f), -x));
}

#endif
