/* What callers hand over. native.py declares the same structures and compares their sizes. */
#ifndef OFFRAMP_STRUCTURES_H
#define OFFRAMP_STRUCTURES_H

#include <stdint.h>

/* A weight [outs, columns]. */
struct matrix {
    int32_t format, outs, columns; /* format: see weight_formats.h */
    const uint8_t *data;
    const float *bias; /* [outs] or NULL */
};

/* Weights of one decoder layer. */
struct layer {
    const float *attn_norm, *mlp_norm; /* [width] */
    const float *q_norm, *k_norm;      /* [head_dim] or NULL */
    struct matrix qkv, o, gate_up, down;
    int64_t index; /* among the layers of the pages */
};

/* Sizes that all layers share. */
struct shape {
    int32_t width, heads, kv_heads, head_dim, inner;
    int32_t window; /* tokens that attention sees, the row's own included; 0 for all */
    float eps;
};

/* The rows of a forward pass and the pages of keys and values they read and write. */
struct batch {
    int32_t rows, block_size;
    int32_t longest;             /* longest context of a row, in tokens */
    int32_t half;                /* whether pages are fp16, else fp32 */
    uint8_t *pages;              /* [layers, 2, places, kv_heads, head_dim]: keys, then values */
    int64_t page_size;           /* numbers of one layer's keys */
    const int64_t *places;       /* [rows]: where each row's own key and value are stored */
    const int64_t *positions;    /* [rows] */
    const int64_t *first_blocks; /* [rows]: start of the row's block table in ``blocks`` */
    const int64_t *blocks;
    const float *cos, *sin; /* [rows, head_dim], the sine negative in the first half */
};

/* Scratch memory of a call, and the threads that share it. */
struct workspace {
    float *normed;   /* [rows, max(width, heads * head_dim)] */
    float *wide;     /* [rows, max(qkv, 2 * inner)] */
    float *prepared; /* [2, prepared_floats(rows, columns)]: inputs of a product, and of the next */
    struct phase *phases; /* LAYER_PHASES a layer, or MATMUL_PHASES */
    float *per_thread;    /* [threads, per_thread_floats]: weight panel, scores */
    int64_t per_thread_floats;
    int32_t *run_starts; /* [rows + 1], for attention */
    int64_t *timers;     /* [TIMERS] nanoseconds are added, or NULL */
    int32_t threads;
    int32_t columns; /* of the widest matrix */
};

#endif
