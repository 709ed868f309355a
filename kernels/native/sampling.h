/* Random choice of tokens, by the definitions of kernels/sampling.py. Nothing is sorted: top_k and
 * top_p come down to one value that has to be reached, found by bisection of all fp32 numbers in
 * their order. */
#ifndef OFFRAMP_SAMPLING_H
#define OFFRAMP_SAMPLING_H

#include "noise.h"

/* Phases of a call. */
enum { SAMPLING_PHASES = 1 };
/* Numbers are added up in blocks of so many, each in fp32, the blocks in fp64. */
enum { MASS_BLOCK = 512 };

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
    float inverse = 1 / temperature;
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

/* ``count`` numbers, fewer than a vector has; -inf behind them. */
static floats load_some(const float *x, int count) {
    floats v = broadcast(-INFINITY);
    for (int i = 0; i < count; i++) v[i] = x[i];
    return v;
}

/* The token of the largest key, logit over temperature plus noise, of those logits x [vocab] that
 * reach ``least``; ``token`` has the largest logit. Few sets may hold it. */
static int noisiest(const float *x, int vocab, float least, int token, const struct noise *n) {
    float inverse = inverse_temperature(n), best = -INFINITY, known = best, lowest = least;
    int sets = (vocab + SET - 1) / SET, found = token;
    /* The set of the largest logit first: what it has is not reached by most. */
    for (int turn = -1; turn < sets; turn++) {
        int first = turn < 0 ? token / SET * SET : turn * SET, count = MIN(SET, vocab - first);
        floats logits[SET_VECTORS], noise[SET_VECTORS], high = broadcast(-INFINITY);
        for (int i = 0; i < SET; i += LANES)
            logits[i / LANES] = i + LANES <= count ? *(const floats *)(x + first + i)
                                                   : load_some(x + first + i, count - i);
        for (int i = 0; i < SET_VECTORS; i++) high = larger(logits[i], high);
        if (!any_lane(high >= lowest)) continue;
        uniform_set(n, first, noise);
        ints may = {0};
        for (int i = 0; i < SET_VECTORS; i++)
            may |= logits[i] * inverse + gumbel_at_most(noise[i]) >= known;
        if (!any_lane(may)) continue;
        for (int i = 0; i < SET_VECTORS; i++) {
            floats key = logits[i] * inverse + gumbel(noise[i]);
            logits[i] = select_lanes(logits[i] >= least, key, broadcast(-INFINITY));
        }
        int at = largest((const float *)logits, SET);
        float key = ((const float *)logits)[at];
        known = MAX(known, key);
        /* What needs more noise than there is. */
        lowest = MAX(least, (known - MOST_NOISE) / inverse);
        if (turn >= 0 && key > best) best = key, found = first + at;
    }
    return found;
}

/* The least of logits x [vocab] whose weights reach ``least``. */
static float least_logit(const float *x, const float *weights, int vocab, float least) {
    floats low = broadcast(INFINITY);
    int i = 0;
    for (; i + LANES <= vocab; i += LANES) {
        ints kept = *(const floats *)(weights + i) >= least;
        low = -larger(-select_lanes(kept, *(const floats *)(x + i), low), -low);
    }
    float lowest = -largest_number(-low);
    for (; i < vocab; i++)
        if (weights[i] >= least) lowest = MIN(lowest, x[i]);
    return lowest;
}

/* A token of logits x [vocab]; ``weights`` [vocab] is scratch memory. */
static int draw_token(const float *x, int vocab, const struct choice *c, float *weights) {
    int token = largest(x, vocab);
    float best = x[token], least = -INFINITY, temperature = MAX(c->noise.temperature, COLDEST);
    if (!isfinite(best)) return token;
    if (0 < c->top_k && c->top_k < vocab) least = find_least(x, vocab, least, best, c->top_k, 0);
    if (c->top_p < 1) {
        weigh(x, vocab, best, least, temperature, weights);
        double mass = reach_least(weights, vocab, 0).mass;
        /* Those below this one come to less than what top_p leaves out. */
        float low = mass * (1 - c->top_p) / vocab;
        low = find_least(weights, vocab, low, 1, 0, mass * c->top_p);
        least = MAX(least, least_logit(x, weights, vocab, low));
    }
    if (c->min_p > 0) least = MAX(least, best + temperature * logf(MIN(c->min_p, 1)));
    return noisiest(x, vocab, least, token, &c->noise);
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
