/* What callers hand over. native_structures.py declares the same, and a test compares sizes. */
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

/* Numbers of keys and values: floats of 32 and 16 bits, and integers of 16 bits that a scale, a
 * float behind each head's numbers, is multiplied with. */
enum kv_format { KV_FP32, KV_FP16, KV_INT16 };

/* The rows of a forward pass and the pages of keys and values they read and write. */
struct batch {
    int32_t rows, block_size;
    int32_t longest;   /* longest context of a row, in tokens */
    int32_t kv_format; /* of the numbers in ``pages`` */
    uint8_t *pages;    /* keys and values of all layers and blocks, see kv_pages.h */
    /* Bytes from one layer to the next, from keys to values, and from one block to the next. */
    int64_t layer_step, kind_step, block_step;
    const int64_t *places;       /* [rows]: where each row's own key and value are stored */
    const int64_t *positions;    /* [rows] */
    const int64_t *first_blocks; /* [rows]: start of the row's block table in ``blocks`` */
    const int64_t *blocks;
    const float *cos, *sin; /* [.., head_dim], the sine negative in the first half */
    const int64_t *angles;  /* [rows]: which of these are the row's; NULL for one after another */
    const uint8_t *coarse;  /* [rows]: which ones' inputs are rounded to 8 bits; NULL: none's */
    /* Where states are kept on the way, or NULL: row r after layer i in slot ``state_slots[i]``, if
     * that is not negative, of the states of row ``state_rows[r]``. */
    float *states;              /* [.., slots, width] */
    int64_t state_stride;       /* floats of a row's states */
    const int64_t *state_rows;  /* [rows] */
    const int32_t *state_slots; /* [all layers] */
};

/* Weights of the draft head (see models/exits/draft_head.py). */
struct draft_head {
    struct layer layer;
    struct matrix fuse, feedback, embeddings, lm_head;
    const float *norm;    /* [width] */
    const int32_t *vocab; /* [lm_head.outs] token ids */
};

/* Of a row's tokens (noise.h); of temperature 0 there is none. */
struct noise {
    float temperature;
    uint32_t seed[2], index;
};

/* Entries of one sequence, at consecutive positions. */
struct draft_span {
    int64_t first, entries; /* position of the first one, and how many there are */
    int64_t guesses;        /* wanted behind the last one; 0: none */
    int64_t start;          /* of its blocks in ``blocks``, those with entries alone */
    int64_t before;         /* positions before these blocks */
};

/* Entries to make, and sequences whose next tokens are to be guessed. */
struct draft {
    int32_t sequences, entries, guesses; /* spans, their entries, and most guesses of one */
    float bound; /* of a sequence's chances, times its luck each, below which it asks for no more */
    const struct batch *batch; /* pages, blocks and the states of all entries, but no rows yet */
    const struct draft_span *spans; /* [sequences] */
    const struct noise *noise;      /* [sequences] of the first guess, or NULL */
    const float *luck;              /* [sequences] */
    int64_t *tokens;                /* [sequences, guesses] results */
    float *chances;                 /* likewise */
    int32_t *made;                  /* [sequences] how many of them there are */
    int64_t first; /* result: nanoseconds from ``begun`` to the end of the first guesses */
    int64_t begun;
    int64_t *ids;            /* [entries] tokens, then scratch like all that follows */
    float *hidden;           /* [entries, width] */
    float *inputs;           /* [entries, fuse.columns] */
    float *logits;           /* [sequences, lm_head.outs up to a multiple of LANES] */
    struct batch *steps;     /* [1 + guesses]: all entries, then the rows of each guess */
    int64_t *numbers;        /* [4, entries], then [guesses, 4, sequences] */
    int32_t *alive, *ends;   /* [sequences] that go on, and their last rows of the entries */
    int32_t *best;           /* [sequences] */
    float *product, *chance; /* [sequences] */
};

/* What makes coarse logits of an LM head, and how far off they may be (lm_head.h). */
struct screen {
    struct matrix weight; /* the LM head's, or INT4 [outs, width + GROUP], a copy with directions */
    const float *norms;   /* [outs] of the LM head's rows */
    /* Of a copy, else NULL: orthonormal directions [GROUP, width], and norms [outs] of what is left
     * out along them and across them. */
    const float *basis, *along, *across;
};

/* What makes tokens of the states behind the last layer. */
struct lm_head {
    struct matrix weight;
    const float *norm; /* [width] */
    float eps;
};

/* Rows whose logits are wanted. */
struct head_rows {
    int32_t rows;
    const float *hidden;         /* [.., width] */
    const int64_t *places;       /* [rows]: where each row's state is in ``hidden`` */
    const struct screen *screen; /* if any, the places of the largest alone are wanted: */
    const struct noise *noise;   /* [rows] of the logits with noise, where there is any, or NULL */
    float *logits;               /* [rows, outs] results, or NULL */
    int32_t *best;               /* [rows] the place of the largest */
    int32_t *multiplied;         /* [rows] by a screen: sets that were made exactly */
};

/* How a row's token is drawn (see kernels/sampling.py), and the token. */
struct choice {
    struct noise noise;
    float top_p, min_p;
    int32_t top_k, row, token;
};

/* Tokens to draw. */
struct sampling {
    int32_t count, vocab;
    const float *logits;    /* [.., vocab] */
    struct choice *choices; /* [count] */
};

/* Weights of an exit (see models/exits/head.py); ``layer`` has the adapter's alone. */
struct exit_head {
    struct layer layer;
    struct matrix router_up, lm_head;
    const float *router_up_bias, *router_down; /* [router_up.outs] */
    const float *scale, *norm;                 /* [width] */
    float router_down_bias, floor, eps;
};

/* States to check at an exit. */
struct exit_check {
    int32_t rows;
    const float *hidden;    /* [.., width] */
    const int64_t *places;  /* [rows]: where each row's state is in ``hidden`` */
    float *gates;           /* [rows] results */
    int32_t *best;          /* [rows] places in the exit's vocabulary; -1: the gate did not fire */
    float *tops, *seconds;  /* [rows] the two largest probabilities, where it did */
    float *logits;          /* [rows that fired, lm_head.outs up to a multiple of LANES] */
    int32_t *fired, *count; /* [rows] numbers of the rows that fired, and how many these are */
    float *states;          /* [rows, width] scratch */
};

/* Scratch memory of a call, and the threads that share it. */
struct workspace {
    float *normed;   /* [rows, max(width, heads * head_dim)] */
    float *wide;     /* [rows, max(qkv, 2 * inner)] */
    float *prepared; /* [2, prepared_floats(rows, columns)]: inputs of a product, and of the next */
    struct phase *phases; /* LAYER_PHASES a layer, or MATMUL_PHASES */
    float *per_thread;    /* [threads, per_thread_floats]: weight panel, scratch of attention */
    int64_t per_thread_floats;
    float *partials;     /* [shared_partial_floats], for attention */
    int32_t *run_starts; /* [rows + 1], for attention */
    int64_t *timers;     /* [TIMERS] nanoseconds are added, or NULL */
    int32_t threads;
    int32_t columns; /* of the widest matrix */
};

#endif
