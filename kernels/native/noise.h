/* Noise that makes the token of the largest logit a random one: see kernels/noise.py, which
 * defines it. Tokens come in sets of 32, [16] with the first random word of a counter and [16] with
 * its second. */
#ifndef OFFRAMP_NOISE_H
#define OFFRAMP_NOISE_H

#include "elementwise.h"

enum { COUNTERS = SET / 2, SET_VECTORS = SET / LANES };
/* Noise is less than this: the least random number is 2^-32. */
static const float MOST_NOISE = 22.5f;
/* Far below it fp32 has no number for a temperature, and all below it are greedy anyway. */
static const float COLDEST = 1e-30f;

/* One over the temperature. */
INLINE float inverse_temperature(const struct noise *n) {
    return 1 / MAX(n->temperature, COLDEST);
}

/* A set's counters, the first that a vector holds. */
INLINE ints count_up(void) {
#if defined(__AVX512F__)
    return (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
    return (ints){0, 1, 2, 3, 4, 5, 6, 7};
#endif
}

/* Two random words for each of ``counters``: Threefry-2x32 with 20 rounds (Salmon et al., "Parallel
 * random numbers: as easy as 1, 2, 3", SC 2011). */
INLINE void random_words(const struct noise *n, uints counters, uints *first, uints *second) {
    static const int ROTATIONS[8] = {13, 15, 26, 6, 17, 29, 16, 24};
    uint32_t keys[3] = {n->seed[0], n->seed[1], 0x1bd11bda ^ n->seed[0] ^ n->seed[1]};
    uints x = counters + keys[0], y = (uints){0} + (n->index + keys[1]);
#pragma GCC unroll 20
    for (int i = 0; i < 20; i++) {
        int turn = ROTATIONS[i % 8], key = i / 4 + 1;
        x += y;
        y = (y << turn | y >> (32 - turn)) ^ x;
        if (i % 4 != 3) continue;
        x += keys[key % 3];
        y += keys[(key + 1) % 3] + (uint32_t)key;
    }
    *first = x;
    *second = y;
}

/* Numbers between 0 and 1. */
INLINE floats uniform(uints words) {
    floats x = (__builtin_convertvector((ints)(words >> 1), floats) + 0.5f) * 0x1p-31f;
    return -larger(-x, broadcast(0x1p-24f - 1));
}

/* Of the set of tokens that begins with ``first``. */
INLINE void uniform_set(const struct noise *n, int first, floats out[SET_VECTORS]) {
    for (int i = 0; i < SET_VECTORS / 2; i++) {
        uints words[2];
        random_words(n, (uints)(count_up() + (first / 2 + i * LANES)), words, words + 1);
        out[i] = uniform(words[0]);
        out[i + SET_VECTORS / 2] = uniform(words[1]);
    }
}

/* Of any tokens. */
INLINE floats uniform_of(const struct noise *n, ints tokens) {
    uints words[2];
    random_words(n, (uints)((tokens >> 5) * COUNTERS + (tokens & (COUNTERS - 1))), words,
                 words + 1);
    ints second = (tokens & COUNTERS) != 0;
    return uniform((uints)((second & (ints)words[1]) | (~second & (ints)words[0])));
}

/* log(1 + x) for x from -0.3 to 0.42, by a polynomial of the Cephes library. */
INLINE floats log_near_one(floats x) {
    static const float FACTORS[9] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,
                                     -1.2420140846e-1f, 1.4249322787e-1f,  -1.6668057665e-1f,
                                     2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
    floats sum = broadcast(FACTORS[0]), square = x * x;
    for (int i = 1; i < 9; i++) sum = sum * x + FACTORS[i];
    return x + (sum * x * square - 0.5f * square);
}

/* x, a normal positive number, as m 2^k with m from sqrt(1/2) to sqrt(2); returns m - 1. */
INLINE floats split_power(floats x, floats *k) {
    const int32_t half_root = 0x3f3504f3;
    ints power = ((ints)x - half_root) >> 23;
    *k = __builtin_convertvector(power, floats);
    return (floats)((ints)x - (power << 23)) - 1;
}

/* Gumbel noise -log(-log(1 - x)) of uniform numbers. */
INLINE floats gumbel(floats x) {
    const float log_of_two = 0.69314718f;
    floats k, near = split_power(1 - x, &k);
    /* 1 - x has lost small numbers' last bits. */
    near = select_lanes(x < 0.25f, -x, near);
    floats wait = -(log_near_one(near) + k * log_of_two);
    near = split_power(wait, &k);
    return -(log_near_one(near) + k * log_of_two);
}

/* The keys of a set of logits, that from ``first`` on: over the temperature, plus noise. */
INLINE void add_noise(const struct noise *n, int first, float logits[SET]) {
    float inverse = inverse_temperature(n);
    floats noise[SET_VECTORS];
    uniform_set(n, first, noise);
    for (int i = 0; i < SET_VECTORS; i++) {
        floats *keys = (floats *)(logits + i * LANES);
        *keys = *keys * inverse + gumbel(noise[i]);
    }
}

/* What it is at most: -log(-log(1 - x)) <= -log(x), of which the power of two is enough. */
INLINE floats gumbel_at_most(floats x) {
    ints power = 127 - ((ints)x >> 23);
    return __builtin_convertvector(power, floats) * 0.6931472f + 1e-5f;
}

#endif
