/* The draft head: entries of its layer for any number of rows, then guesses of the next tokens of
 * several sequences, each made of the one before, in one call.
 *
 * Threads take chunks of phases as in a layer. A thread may lag behind by a whole guess, so what
 * decides the chunks of a phase, the rows of each guess, is written once and kept.
 */
#ifndef OFFRAMP_DRAFT_H
#define OFFRAMP_DRAFT_H

#include "layer.h"
#include "noise.h"

/* Phases of ``draft_step``. */
enum { DRAFT_PHASES = 6 + 2 * MATMUL_PHASES + LAYER_PHASES };

/* Phase of one chunk: what one thread does while the others wait. */
#define ONE_THREAD(worker) while (next_chunk(worker, 1) == 0)

/* Inputs of a row: its token's embedding, and the states before it, each over its root mean square;
 * zeros where there are none. */
static void draft_inputs(const struct shape *s, const struct draft_head *h, int64_t id,
                         const float *states, int count, float *to) {
    read_row(&h->embeddings, id, to);
    scale_to_unit(to, to, s->width, s->eps);
    for (int i = 0; i < count; i++) {
        to += s->width;
        if (states)
            scale_to_unit(states + (size_t)i * s->width, to, s->width, s->eps);
        else
            memset(to, 0, sizeof(float) * s->width);
    }
}

/* Keys that are so far below the largest have no part in its chance. */
static const float FARTHEST = 8;

/* Logits [count] of tokens ``vocab`` become keys, or -inf where these are far below the largest.
 * There is room for whole vectors. */
static void make_keys(const struct noise *n, const int32_t *vocab, float *logits, int count) {
    float inverse = inverse_temperature(n), lowest = -INFINITY;
    int likely = largest(logits, count) / LANES * LANES;
    for (int i = count; i % LANES; i++) logits[i] = -INFINITY;
    /* The vector of the largest logit first: what it has is not reached by most. */
    for (int turn = -LANES; turn < count; turn += LANES) {
        int i = turn < 0 ? likely : turn;
        if (turn == likely) continue;
        floats *at = (floats *)(logits + i), scaled = *at * inverse;
        *at = broadcast(-INFINITY);
        if (!any_lane(scaled + MOST_NOISE >= lowest)) continue;
        ints tokens = {0};
        memcpy(&tokens, vocab + i, sizeof *vocab * MIN(LANES, count - i));
        floats x = uniform_of(n, tokens);
        if (!any_lane(scaled + gumbel_at_most(x) >= lowest)) continue;
        *at = scaled + gumbel(x);
        lowest = MAX(lowest, largest_number(*at) - FARTHEST);
    }
}

/* The largest of ``count`` logits and its share of the softmax of those at most ``farthest`` below.
 */
static int likeliest(const float *logits, int count, float farthest, float *chance) {
    int best = largest(logits, count);
    float top = logits[best], lowest = top - farthest;
    floats sums = {0};
    int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) {
        floats x = *(const floats *)(logits + i);
        sums += (floats)(~(x < lowest) & (ints)vector_exp(x - top));
    }
    float sum = sum_lanes(sums);
    for (int i = whole; i < count; i++) sum += logits[i] < lowest ? 0 : expf(logits[i] - top);
    *chance = sum >= 1 ? 1 / sum : 0; /* 0 also for what is no number */
    return best;
}

/* Make ``to`` a batch of ``count`` rows that stand at ``numbers`` [4, count]. */
static void begin_rows(const struct draft *d, struct batch *to, int count, int64_t *numbers) {
    *to = *d->batch;
    to->rows = count;
    to->places = numbers;
    to->positions = numbers + count;
    to->first_blocks = numbers + 2 * count;
    to->angles = numbers + 3 * count;
}

/* Row ``row`` of ``to`` is the one at ``position`` of a sequence. Attention begins at its first
 * block with entries, as if its text did. */
static void put_row(const struct batch *to, int row, const struct draft_span *span,
                    int64_t position) {
    int64_t *numbers = (int64_t *)to->places + row;
    int64_t own = position - span->before, size = to->block_size;
    numbers[0] = to->blocks[span->start + own / size] * size + own % size;
    numbers[to->rows] = own;
    numbers[2 * to->rows] = span->start;
    numbers[3 * to->rows] = position;
}

/* The rows of guess ``step``: those of the first ``count`` sequences of ``alive``. */
static void take_rows(const struct draft *d, int step, int count, const struct workspace *w) {
    struct batch *to = d->steps + 1 + step;
    begin_rows(d, to, count, d->numbers + 4 * (d->entries + step * d->sequences));
    for (int i = 0; i < count; i++) {
        const struct draft_span *span = d->spans + d->alive[i];
        put_row(to, i, span, span->first + span->entries - 1 + step);
    }
    /* Rows are of different sequences, each a run of its own. */
    for (int i = 0; i <= count; i++) w->run_starts[i] = i;
}

/* The rows of all entries, and those of the first guesses. */
static void take_entries(const struct draft *d, const struct workspace *w) {
    int row = 0, asking = 0;
    begin_rows(d, d->steps, d->entries, d->numbers);
    for (int i = 0; i < d->sequences; i++) {
        const struct draft_span *span = d->spans + i;
        for (int j = 0; j < span->entries; j++) put_row(d->steps, row++, span, span->first + j);
        d->made[i] = 0;
        d->product[i] = 1;
        if (!span->guesses) continue;
        d->ends[asking] = row - 1;
        d->alive[asking++] = i;
    }
    if (d->guesses) take_rows(d, 0, asking, w);
}

/* Note the guesses of ``step``; the sequences that go on get a row each in the next one. */
static void end_step(const struct shape *s, const struct draft_head *h, struct draft *d, int step,
                     const struct workspace *w) {
    int rows = d->steps[1 + step].rows, going = 0;
    if (step == 0) d->first = nanoseconds() - d->begun;
    for (int i = 0; i < rows; i++) {
        int sequence = d->alive[i], at = sequence * d->guesses + step;
        d->tokens[at] = h->vocab[d->best[i]];
        d->chances[at] = d->chance[i];
        d->made[sequence] = step + 1;
        d->product[sequence] *= d->chance[i] * d->luck[sequence];
        int wanted = step + 1 < d->spans[sequence].guesses;
        if (!wanted || !(d->product[sequence] >= d->bound)) continue;
        d->alive[going] = sequence;
        d->ids[going] = d->tokens[at];
        memmove(d->hidden + (size_t)going * s->width, d->hidden + (size_t)i * s->width,
                sizeof(float) * s->width);
        going++;
    }
    if (step + 1 < d->guesses) take_rows(d, step + 1, going, w);
}

/* Entries, all of them (step 0) or those behind the guess before, and guess ``step`` of the
 * sequences that still ask. */
static void draft_step(const struct shape *s, const struct draft_head *h, struct draft *d, int step,
                       struct worker *worker) {
    const struct workspace *w = worker->shared;
    const struct batch *asked = d->steps + 1 + step, *b = step ? asked : d->steps;
    const struct matrix *m = step ? &h->feedback : &h->fuse;
    int rows = b->rows, width = s->width, parts = m->columns / width - 1;
    const struct operands to_hidden = {d->inputs, m->columns, d->hidden,   width,
                                       rows,      0,          w->prepared, .next = NULL};
    int size = chunk_size(rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, rows)
        for (; r < end; r++) {
            const float *states = d->hidden + (size_t)r * width;
            if (step == 0)
                states =
                    b->state_rows[r] < 0 ? NULL : b->states + b->state_rows[r] * b->state_stride;
            float *inputs = d->inputs + (size_t)r * m->columns;
            draft_inputs(s, h, d->ids[r], states, parts, inputs);
            prepare_columns(m, &to_hidden, r, inputs, 0, m->columns);
        }
    matmul(m, &to_hidden, worker);
    make_keys_values(s, &h->layer, b, d->hidden, worker);
    if (!d->guesses) return;
    if (step == 0) ONE_THREAD(worker) {
            int qkv = h->layer.qkv.outs;
            for (int i = 0; i < asked->rows; i++) {
                int from = d->ends[i];
                memmove(d->hidden + (size_t)i * width, d->hidden + (size_t)from * width,
                        sizeof(float) * width);
                memmove(w->wide + (size_t)i * qkv, w->wide + (size_t)from * qkv,
                        sizeof(float) * qkv);
            }
        }
    attend_and_transform(s, &h->layer, &h->lm_head, asked, asked->rows, d->hidden, worker);
    int outs = h->lm_head.outs, stride = (outs + LANES - 1) / LANES * LANES;
    const struct operands to_logits = {w->normed,   width, d->logits,   stride,
                                       asked->rows, 0,     w->prepared, .next = NULL};
    norm_inputs(d->hidden, h->norm, s->eps, &h->lm_head, &to_logits, worker);
    matmul(&h->lm_head, &to_logits, worker);
    size = chunk_size(asked->rows, worker);
    FOR_EACH_CHUNK(worker, r, end, size, asked->rows)
        for (; r < end; r++) {
            float *logits = d->logits + (size_t)r * stride;
            struct noise noise = d->noise ? d->noise[d->alive[r]] : (struct noise){0};
            noise.index += step;
            int random = noise.temperature > 0;
            if (random) make_keys(&noise, h->vocab, logits, outs);
            d->best[r] = likeliest(logits, outs, random ? FARTHEST : INFINITY, d->chance + r);
        }
    ONE_THREAD(worker) end_step(s, h, d, step, w);
}

#endif
