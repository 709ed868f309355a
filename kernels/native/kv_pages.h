/* Pages of keys and values: where a token's are, and in which numbers.
 *
 * A block has the keys (values) of block_size positions, [block_size, kv_heads, head_dim] numbers.
 * Integers are followed by their scales, floats [kv_heads, block_size]. How layers and blocks
 * follow one another is the batch's to say.
 */
#ifndef OFFRAMP_KV_PAGES_H
#define OFFRAMP_KV_PAGES_H

#include <stddef.h>

#include "structures.h"
#include "vector.h"

/* The largest integer of keys and values. */
enum { LARGEST_KV = 32767 };

/* Bytes of a number. */
INLINE size_t number_bytes(int format) {
    return format == KV_FP32 ? 4 : 2;
}

/* The layer's keys; its values are ``kind_step`` bytes further on. */
INLINE uint8_t *layer_keys(const struct layer *l, const struct batch *b) {
    return b->pages + l->index * b->layer_step;
}

/* Write the key (value) x [kv_heads, head_dim] of ``place`` among the layer's keys (values). */
static void store_kv(const struct shape *s, const struct batch *b, const float *x, uint8_t *keys,
                     int64_t place) {
    int dim = s->head_dim, count = s->kv_heads * dim, offset = place % b->block_size;
    uint8_t *block = keys + place / b->block_size * b->block_step;
    uint8_t *at = block + (size_t)offset * count * number_bytes(b->kv_format);
    if (b->kv_format == KV_FP32) {
        memcpy(at, x, sizeof(float) * count);
    } else if (b->kv_format == KV_FP16) {
        for (int i = 0; i < count; i++) {
            _Float16 number = x[i];
            memcpy(at + 2 * i, &number, sizeof number);
        }
    } else {
        float *scales = (float *)(block + (size_t)b->block_size * count * 2) + offset;
        for (int h = 0; h < s->kv_heads; h++, x += dim, at += 2 * dim, scales += b->block_size) {
            float inverse, scale = fixed_point_scale(x, dim, LARGEST_KV, &inverse);
            for (int i = 0; i < dim; i += LANES)
                *(shorts *)(at + 2 * i) =
                    to_shorts(to_fixed_point(*(const floats *)(x + i), inverse));
            *scales = scale;
        }
    }
}

/* LANES numbers, without their scale. */
INLINE floats load_kv(const uint8_t *at, const int FORMAT) {
    if (FORMAT == KV_FP32) return *(const floats *)at;
    if (FORMAT == KV_FP16) return load_fp16(at);
    return __builtin_convertvector(load_shorts(at), floats);
}

/* The next LANES scales of ``count``; ``beyond`` where there are no more. */
INLINE floats load_scales(const float *scales, int count, float beyond) {
    if (count >= LANES) return *(const floats *)scales;
    floats found = broadcast(beyond);
    for (int i = 0; i < count; i++) found[i] = scales[i];
    return found;
}

/* The first position that a row at ``position`` sees. */
INLINE int64_t context_start(const struct shape *s, int64_t position) {
    return s->window && position >= s->window ? position + 1 - s->window : 0;
}

/* What consecutive rows of a sequence read of the keys and values: a part for each block of their
 * context, first of the keys, then of the values. */
struct context {
    const uint8_t *keys, *values;
    const int64_t *blocks;
    int64_t first, end; /* positions */
    int64_t first_block;
    int parts; /* of the keys alone */
    int size, dim;
    int64_t block_step;
    size_t stride; /* bytes from one key to the next */
};

/* What is at positions [from, to) of the context of the rows ``row`` to ``row + count - 1``. */
INLINE struct context context_of(const struct shape *s, const struct layer *l,
                                 const struct batch *b, int row, int count, int64_t from,
                                 int64_t to, const int FORMAT) {
    int size = b->block_size;
    int64_t first = MAX(context_start(s, b->positions[row]), from);
    int64_t end = MIN(b->positions[row + count - 1] + 1, to);
    return (struct context){
        .keys = layer_keys(l, b),
        .values = layer_keys(l, b) + b->kind_step,
        .blocks = b->blocks + b->first_blocks[row],
        .first = first,
        .end = end,
        .first_block = first / size,
        .parts = (end - 1) / size - first / size + 1,
        .size = size,
        .dim = s->head_dim,
        .block_step = b->block_step,
        .stride = s->kv_heads * s->head_dim * number_bytes(FORMAT),
    };
}

/* A head's keys (values) at ``count`` positions from ``first`` on: their numbers, ``stride`` bytes
 * apart, and their scales. Those of a later part, which are fetched meanwhile, are ``ahead`` bytes
 * further on. */
struct part {
    const uint8_t *at;
    const float *scales;
    size_t stride;
    int64_t first;
    ptrdiff_t ahead;
    int count, dim;
};

/* Where the block of the part ``index`` begins. */
INLINE const uint8_t *part_block(const struct context *c, int index) {
    int values = index >= c->parts;
    return (values ? c->values : c->keys) +
           c->blocks[c->first_block + index - (values ? c->parts : 0)] * c->block_step;
}

/* The part ``index`` of head ``head``. */
INLINE struct part context_part(const struct context *c, int index, int head, const int FORMAT) {
    enum { AHEAD = 2 };
    int64_t number = c->first_block + index - (index >= c->parts ? c->parts : 0);
    int64_t first = MAX(c->first, number * c->size), end = MIN((number + 1) * c->size, c->end);
    int offset = first - number * c->size;
    const uint8_t *block = part_block(c, index);
    const uint8_t *next = part_block(c, MIN(index + AHEAD, 2 * c->parts - 1));
    const float *scales = (const float *)(block + c->size * c->stride);
    return (struct part){
        .at = block + offset * c->stride + head * c->dim * number_bytes(FORMAT),
        .scales = FORMAT == KV_INT16 ? scales + head * c->size + offset : NULL,
        .stride = c->stride,
        .first = first,
        .ahead = next - block,
        .count = end - first,
        .dim = c->dim,
    };
}

/* Fetch memory that will be read soon. */
INLINE void fetch(const void *memory, size_t bytes) {
    enum { CACHE_LINE = 64 };
    for (size_t line = 0; line < bytes; line += CACHE_LINE)
        __builtin_prefetch((const uint8_t *)memory + line, 0, 2);
}

#endif
