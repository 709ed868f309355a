/* Random choice of tokens, by the definitions of kernels/sampling.py. Nothing is sorted: top_k and
 * top_p come down to one value that has to be reached, found by bisection of all fp32 numbers in
 * their order. */
#ifndef OFFRAMP_SAMPLING_H
#define OFFRAMP_SAMPLING_H

#include "elementwise.h"

/* Phases of a call. */
enum { SAMPLING_PHASES = 1 };
/* Numbers are added up in blocks of so many, each in fp32, the blocks in fp64. */
enum { MASS_BLOCK = 512 };
/* Far below it fp32 has no number for a temperature, and all below it are greedy anyway. */
static const float COLDEST = 1e-30f;

/* What numbers reach a value: how many they are, and what they add up to. */
struct reached {
    int count;
    double mass;
};

/* What numbers x [size] reach ``least``. */
static struct reached reach_least(const float *x, int size, float least) {
    struct reached all = {0, 0};
    for (int begin = 0; begin < size; begin += MASS_BLOCK) {
        int i = begin, end = MIN(begin + MASS_BLOCK, size);
        floats mass = {0};
        ints count = {0};
        for (; i + LANES <= end; i += LANES) {
            floats v = *(const floats *)(x + i);
            ints reaches = v >= least; /* -1 where it does */
            count -= reaches;
            mass += (floats)(reaches & (ints)v);
        }
        float rest = 0;
        for (; i < end; i++)
            if (x[i] >= least) rest += x[i], all.count++;
        all.count += add_lanes((uints)count);
        all.mass += sum_lanes(mass) + rest;
    }
    return all;
}

/* Where a number stands in the order of all fp32 numbers: negative ones are stored reversed. */
INLINE int64_t place_of(float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits ^ (bits >> 31 & 0x7fffffff);
}

/* The number at a place. */
INLINE float number_at(int64_t place) {
    int32_t bits = (int32_t)place;
    bits ^= bits >> 31 & 0x7fffffff;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The highest value, at least ``low``, that so many of x [size] reach, or, with a count of 0, that
 * numbers reach which come to ``mass``. The largest number is ``best``. It ends early, with a value
 * that splits the numbers alike, when only one is between a set that is enough and one that is not.
 */
static float find_least(const float *x, int size, float low, float best, int count, double mass) {
    int64_t enough = place_of(low), missed = place_of(best) + 1;
    int most = size, fewest = MAX(count - 1, 0);
    while (missed - enough > 1 && most - fewest > 1) {
        int64_t middle = (enough + missed) >> 1;
        struct reached found = reach_least(x, size, number_at(middle));
        if (count ? found.count >= count : found.mass >= mass)
            enough = middle, most = found.count;
        else
            missed = middle, fewest = MAX(fewest, found.count);
    }
    return number_at(enough);
}

/* Weights of logits x [vocab]: 1 for ``best``, 0 for those below ``least`` and what is no number.
 */
static void weigh(const float *x, int vocab, float best, float least, float temperature,
                  float *weights) {
    const float farthest = -87; /* of which exp is next to nothing */
    float inverse = 1 / MAX(temperature, COLDEST);
    int i = 0;
    for (; i + LANES <= vocab; i += LANES) {
        floats v = *(const floats *)(x + i), far = (v - best) * inverse;
        ints kept = (v >= least) & (far > farthest);
        *(floats *)(weights + i) = (floats)(kept & (ints)exp_below_88(far));
    }
    for (; i < vocab; i++) {
        float far = (x[i] - best) * inverse;
        weights[i] = x[i] >= least && far > farthest ? exp_below_88(broadcast(far))[0] : 0;
    }
}

/* The first place with which weights of ``least`` and more, added up in order, exceed ``goal``.
 * Sums that are rounded differently may end just short of it: then the last with any weight. */
static int walk_weights(const float *weights, int size, float least, double goal) {
    double before = 0, mass = 0;
    int begin = 0, end = 0, last = 0;
    for (; begin < size; begin = end) {
        end = MIN(begin + MASS_BLOCK, size);
        mass = reach_least(weights + begin, end - begin, least).mass;
        if (before + mass > goal) break;
        before += mass;
    }
    for (int i = begin < size ? begin : 0; i < end; i++) {
        if (weights[i] < least || weights[i] == 0) continue;
        before += weights[last = i];
        if (begin < size && before > goal) break;
    }
    return last;
}

/* A token of logits x [vocab]; ``weights`` [vocab] is scratch memory. */
static int draw_token(const float *x, int vocab, const struct choice *c, float *weights) {
    int token = largest(x, vocab);
    float best = x[token], least = -INFINITY;
    if (!isfinite(best)) return token;
    if (0 < c->top_k && c->top_k < vocab) least = find_least(x, vocab, least, best, c->top_k, 0);
    weigh(x, vocab, best, least, c->temperature, weights);
    least = 0;
    if (c->top_p < 1) {
        double mass = reach_least(weights, vocab, 0).mass;
        /* Those below this one come to less than what top_p leaves out. */
        least = mass * (1 - c->top_p) / vocab;
        least = find_least(weights, vocab, least, 1, 0, mass * c->top_p);
    }
    least = MAX(least, MIN(c->min_p, 1));
    return walk_weights(weights, vocab, least, reach_least(weights, vocab, least).mass * c->draw);
}

/* A token for each choice. */
static void draw_tokens(const struct sampling *s, struct worker *worker) {
    FOR_EACH_CHUNK(worker, i, end, 1, s->count)
        for (; i < end; i++) {
            struct choice *c = s->choices + i;
            c->token =
                draw_token(s->logits + (size_t)c->row * s->vocab, s->vocab, c, worker->scores);
        }
}

#endif
