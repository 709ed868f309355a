/* What a layer does to each row beside products and attention. */
#ifndef OFFRAMP_ELEMENTWISE_H
#define OFFRAMP_ELEMENTWISE_H

#include <math.h>

#include "kv_pages.h"
#include "threads.h"

/* One over the root mean square of x [width]. */
INLINE float unit_scale(const float *x, int width, float eps) {
    floats squares = {0};
    for (int i = 0; i < width; i += LANES) {
        floats v = *(const floats *)(x + i);
        squares += v * v;
    }
    return 1 / sqrtf(sum_lanes(squares) / width + eps);
}

/* x [width] over its root mean square; ``out`` may be ``x``. */
INLINE void scale_to_unit(const float *x, float *out, int width, float eps) {
    float scale = unit_scale(x, width, eps);
    for (int i = 0; i < width; i += LANES) *(floats *)(out + i) = *(const floats *)(x + i) * scale;
}

/* The same, times ``weight``. */
INLINE void rms_norm(const float *x, const float *weight, float *out, int width, float eps) {
    float scale = unit_scale(x, width, eps);
    for (int i = 0; i < width; i += LANES)
        *(floats *)(out + i) = *(const floats *)(x + i) * scale * *(const floats *)(weight + i);
}

/* The place of the largest of x [count], the first of equal ones; 0 if none is a number. */
INLINE int largest(const float *x, int count) {
    floats most = broadcast(-INFINITY);
    int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) most = larger(*(const floats *)(x + i), most);
    float top = largest_number(most);
    for (int i = whole; i < count; i++) top = x[i] > top ? x[i] : top;
    /* Many at a time until one is among them: a look at a vector's lanes takes longer than it. */
    enum { AT_ONCE = 16 * LANES };
    int first = 0;
    for (; first + AT_ONCE <= count; first += AT_ONCE) {
        ints found = {0};
        for (int i = first; i < first + AT_ONCE; i += LANES)
            found |= *(const floats *)(x + i) == broadcast(top);
        if (largest_lane(found & 1)) break;
    }
    for (int i = first; i < count; i++)
        if (x[i] == top) return i;
    return 0;
}

/* Rotary embedding: the halves of x [dim], 16 columns a multiple of, are rotated against each
 * other;
 * ``out`` may be ``x``. */
INLINE void rope(const float *x, float *out, const float *cos, const float *sin, int dim) {
    int half = dim / 2;
    for (int i = 0; i < half; i += 8) {
        unaligned8 a = *(const unaligned8 *)(x + i), b = *(const unaligned8 *)(x + i + half);
        *(unaligned8 *)(out + i) =
            a * *(const unaligned8 *)(cos + i) + b * *(const unaligned8 *)(sin + i);
        *(unaligned8 *)(out + i + half) =
            b * *(const unaligned8 *)(cos + i + half) + a * *(const unaligned8 *)(sin + i + half);
    }
}

/* Per-head norm and rope of the row's queries and keys, in place; keys and values go into the
 * pages. ``qkv`` [(heads + 2 kv_heads) * head_dim] is the row's. */
static void rope_and_store(const struct shape *s, const struct layer *l, const struct batch *b,
                           float *qkv, int row) {
    int dim = s->head_dim, kv = s->kv_heads * dim;
    int64_t angle = (b->angles ? b->angles[row] : row) * dim;
    const float *cos = b->cos + angle, *sin = b->sin + angle;
    for (int h = 0; h < s->heads + s->kv_heads; h++) {
        float *x = qkv + h * dim;
        const float *norm = h < s->heads ? l->q_norm : l->k_norm;
        if (norm) rms_norm(x, norm, x, dim, s->eps);
        rope(x, x, cos, sin, dim);
    }
    uint8_t *keys = layer_keys(l, b);
    store_kv(s, b, qkv + s->heads * dim, keys, b->places[row]);
    store_kv(s, b, qkv + s->heads * dim + kv, keys + b->kind_step, b->places[row]);
}

/* silu(gate) * up for ``count`` columns from ``column`` on, in place of gate; gate_up is
 * [rows, 2 * inner]. */
static void swiglu(float *gate_up, int inner, int rows, int column, int count) {
    for (int r = 0; r < rows; r++) {
        float *gate = gate_up + (size_t)r * 2 * inner + column;
        for (int i = 0; i < count; i += LANES) {
            floats g = *(floats *)(gate + i), u = *(floats *)(gate + inner + i);
            *(floats *)(gate + i) = g / (1.0f + vector_exp(-g)) * u;
        }
    }
}

#endif
