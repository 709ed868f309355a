/* Results of the C kernels as bytes on standard output, to be compared between processors.
 *
 * Products of every weight format, some rows of the matrices as fp32, and a decoder layer's prompt
 * and next tokens. Weights and inputs are pseudo-random, and the same wherever this runs.
 */
#include <stdio.h>
#include <stdlib.h>

#include "decoder.c"

enum { THREADS = 2, ROWS = 40, WIDEST = 192, OUTS = 320, BLOCK = 4, LONGEST = 528 };
enum { WIDTH = 96, HEADS = 6, KV_HEADS = 2, DIM = 32, INNER = 160, PLACES = 64 };
enum { QUERIES = HEADS * DIM, KV = KV_HEADS * DIM, QKV = QUERIES + 2 * KV };

static uint32_t state = 1;

static uint32_t random_bits(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

/* Between -1 and 1. */
static float random_number(void) {
    return ((int)(random_bits() & 0xffff) - 0x8000) / 32768.0f;
}

static void *memory(size_t bytes) {
    void *made = calloc(1, bytes);
    if (!made) exit(2);
    return made;
}

static float *random_numbers(size_t count) {
    float *made = memory(sizeof *made * count);
    for (size_t i = 0; i < count; i++) made[i] = random_number();
    return made;
}

static void put_half(uint8_t *to, float number) {
    _Float16 half = number;
    memcpy(to, &half, sizeof half);
}

/* Levels are any, scales and minima of either sign. */
static struct matrix random_matrix(int format, int outs, int columns, int biased) {
    int sets = (outs + SET - 1) / SET, groups = columns / GROUP;
    uint8_t *data = memory((size_t)sets * SET * row_bytes(format, columns));
    struct matrix made = {format, outs, columns, data, biased ? random_numbers(outs) : NULL};
    if (format < FORMAT_INT8) {
        for (size_t i = 0; i < (size_t)outs * columns; i++) {
            float number = random_number() / 8;
            if (format == FORMAT_FP32)
                memcpy(data + 4 * i, &number, sizeof number);
            else
                put_half(data + 2 * i, number);
        }
        return made;
    }
    for (int g = 0; g < sets * groups; g++, data += set_group_bytes(format)) {
        for (size_t i = 0; i < set_group_bytes(format); i++) data[i] = random_bits();
        for (int i = 0; i < SET * SCALE_BYTES[format] / 2; i++)
            put_half(data + 2 * i, random_number() / (format == FORMAT_INT8 ? 512 : 64));
    }
    return made;
}

static void put(const void *results, size_t bytes) {
    if (fwrite(results, 1, bytes, stdout) != bytes) exit(3);
}

/* Zeros and what is no number would be the same everywhere. */
static void put_numbers(const float *results, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!isnormal(results[i])) exit(4);
    put(results, sizeof *results * count);
}

/* For products, or for layers of a shape and a batch too. */
static struct workspace make_workspace(const struct shape *s, const struct batch *b) {
    int64_t per_thread = offramp_matmul_floats(WIDEST) + (s ? offramp_attention_floats(s) : 0);
    return (struct workspace){
        .normed = memory(4 * ROWS * QUERIES),
        .wide = memory(4 * ROWS * 2 * INNER),
        .prepared = memory(8 * offramp_prepared_floats(ROWS, WIDEST)),
        .phases = memory(sizeof(struct phase) * (EMBED_PHASES + LAYER_PHASES + MATMUL_PHASES)),
        .per_thread = memory(4 * THREADS * per_thread),
        .per_thread_floats = per_thread,
        .partials = s ? memory(4 * offramp_partial_floats(s, b)) : NULL,
        .run_starts = memory(4 * (ROWS + 1)),
        .threads = THREADS,
        .columns = WIDEST,
    };
}

/* Of ``mixed`` inputs most rows are coarse. */
static void products(int format, int mixed) {
    static const int sizes[][2] = {{64, 32}, {77, 96}, {OUTS, WIDEST}};
    static const int rows[] = {1, 2, 3, 4, 5, 6, 7, 16, ROWS};
    struct workspace w = make_workspace(NULL, NULL);
    static float out[ROWS * OUTS];
    static uint8_t coarse[ROWS];
    for (int r = 0; r < ROWS; r++) coarse[r] = r % 4 != 1;
    for (int i = 0; i < 3; i++) {
        int outs = sizes[i][0], columns = sizes[i][1];
        struct matrix m = random_matrix(format, outs, columns, i == 1);
        for (int j = 0; j < (int)(sizeof rows / sizeof *rows); j++) {
            float *x = random_numbers((size_t)rows[j] * columns);
            if (i && j == 1) memset(x, 0, sizeof *x * GROUP); /* a scale of 0 */
            for (int r = 0; r < rows[j]; r += 3) x[r * columns + GROUP / 2] *= 30; /* a peak */
            offramp_matmul(&m, x, out, rows[j], mixed ? coarse : NULL, &w);
            put_numbers(out, (size_t)rows[j] * outs);
        }
        const int64_t ids[] = {0, outs - 1, 33};
        offramp_rows(&m, ids, 3, out);
        put(out, sizeof *out * 3 * columns);
    }
}

/* 23 tokens behind 500 whose keys and values are zeros, then five more one by one, beside another
 * sequence's first five. */
static void layer(int format, int kv_format) {
    enum { FIRST = 500, PROMPT = 23, MORE = 5 };
    const struct shape s = {WIDTH, HEADS, KV_HEADS, DIM, INNER, 0, 1e-5f};
    const struct layer l = {
        .attn_norm = random_numbers(WIDTH),
        .mlp_norm = random_numbers(WIDTH),
        .q_norm = kv_format ? random_numbers(DIM) : NULL,
        .k_norm = kv_format ? random_numbers(DIM) : NULL,
        .qkv = random_matrix(format, QKV, WIDTH, 1),
        .o = random_matrix(format, WIDTH, QUERIES, 0),
        .gate_up = random_matrix(format, 2 * INNER, WIDTH, 0),
        .down = random_matrix(format, WIDTH, INNER, 1),
    };
    int64_t block =
        BLOCK * s.kv_heads * (DIM * number_bytes(kv_format) + (kv_format == KV_INT16 ? 4 : 0));
    int64_t blocks[2 * LONGEST / BLOCK], places[ROWS], positions[ROWS], first_blocks[ROWS];
    for (int i = 0; i < LONGEST / BLOCK; i++) {
        blocks[i] = i < FIRST / BLOCK ? 0 : 15 + FIRST / BLOCK - i;
        blocks[LONGEST / BLOCK + i] = 1 + i;
    }
    struct batch b = {
        .rows = ROWS,
        .block_size = BLOCK,
        .longest = LONGEST,
        .kv_format = kv_format,
        .pages = memory(2 * 4 * PLACES * KV),
        .layer_step = PLACES / BLOCK * 2 * block,
        .kind_step = block,
        .block_step = 2 * block,
        .places = places,
        .positions = positions,
        .first_blocks = first_blocks,
        .blocks = blocks,
        .cos = random_numbers(ROWS * DIM),
        .sin = random_numbers(ROWS * DIM),
    };
    struct workspace w = make_workspace(&s, &b);
    for (int step = 0; step <= MORE; step++) {
        b.rows = step ? 2 : PROMPT;
        for (int r = 0; r < b.rows; r++) {
            int sequence = step && r == 1;
            int64_t position = sequence ? step - 1 : FIRST + (step ? PROMPT + step - 1 : r);
            positions[r] = position;
            first_blocks[r] = sequence * (LONGEST / BLOCK);
            places[r] = blocks[first_blocks[r] + position / BLOCK] * BLOCK + position % BLOCK;
        }
        float *hidden = random_numbers((size_t)b.rows * WIDTH);
        offramp_run_layers(&s, &l, 1, &b, hidden, NULL, NULL, &w);
        put_numbers(hidden, (size_t)b.rows * WIDTH);
    }
    put(b.pages, b.layer_step);
}

int main(void) {
    offramp_initialize();
    for (int format = FORMAT_FP32; format <= FORMAT_INT4; format++) {
        products(format, 0);
        if (format >= FORMAT_INT8) products(format, 1);
        layer(format, KV_FP32);
        layer(format, KV_FP16);
        layer(format, KV_INT16);
    }
    return 0;
}
