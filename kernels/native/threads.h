/* Work shared by the threads of a call.
 *
 * A call is a sequence of phases; each phase is cut into chunks. Each thread has a share of
 * consecutive chunks, so that it reads memory in order, and takes chunks of others' shares when its
 * own is taken. A phase is over when its chunks are done, not when all threads have arrived as at a
 * barrier: a thread that the system has suspended between two chunks delays no other.
 */
#ifndef OFFRAMP_THREADS_H
#define OFFRAMP_THREADS_H

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "structures.h"
#include "vector.h"

/* Of more threads some have a share together. */
enum { MOST_SHARES = 15 };
/* At most, of a phase: several a thread even out what one thread loses. */
enum { CHUNKS_PER_THREAD = 2 };

/* Chunks done, and chunks taken of each share; one phase a cache line. */
struct phase {
    atomic_int done, taken[MOST_SHARES];
};

/* One thread of a call. */
struct worker {
    const struct workspace *shared;
    struct phase *phase; /* the one it is in */
    float *panel;        /* weights unpacked, [panel_floats(widest columns)] */
    float *scores;       /* [attention_floats] */
    int number;          /* in its team */
    /* Weights of the next product, which the thread fetches while it waits for others. */
    const uint8_t *ahead, *ahead_end;
    int finished;    /* chunks of this phase that it did */
    int others;      /* shares of this phase that were taken before it asked */
    int64_t *timers; /* of the first thread if time is taken, else NULL */
    int64_t since;
};

/* Number of this thread in its team. */
static int thread_number(void) {
#ifdef _OPENMP
    extern int omp_get_thread_num(void);
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* What the time of a layer is broken down into. */
enum timer {
    TIME_NORMS,
    TIME_QKV,
    TIME_ROPE,
    TIME_ATTENTION,
    TIME_OUTPUT,
    TIME_GATE_UP,
    TIME_DOWN,
    TIMERS
};

static int64_t nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* Add the time since the last call of this to ``timer``. */
INLINE void add_time(struct worker *worker, enum timer timer) {
    if (!worker->timers) return;
    int64_t now = nanoseconds();
    worker->timers[timer] += now - worker->since;
    worker->since = now;
}

/* Chunks [begin, end) of ``count``. */
struct share {
    int begin, end;
};

INLINE int count_shares(const struct worker *worker) {
    return MIN(worker->shared->threads, MOST_SHARES);
}

/* The ``number``-th of ``shares`` of ``count`` chunks. */
INLINE struct share share_of(int number, int shares, int count) {
    return (struct share){count * number / shares, count * (number + 1) / shares};
}

/* The next of ``count`` chunks for this thread; negative when all are done, whoever did them. */
static int next_chunk(struct worker *worker, int count) {
    enum { SPINS = 1024 };
    struct phase *phase = worker->phase;
    int shares = count_shares(worker);
    for (; worker->others < shares; worker->others++) {
        int number = (worker->number + worker->others) % shares;
        struct share share = share_of(number, shares, count);
        if (share.begin == share.end) continue;
        int taken = atomic_fetch_add_explicit(&phase->taken[number], 1, memory_order_relaxed);
        if (share.begin + taken < share.end) {
            worker->finished++;
            return share.begin + taken;
        }
    }
    atomic_fetch_add_explicit(&phase->done, worker->finished, memory_order_acq_rel);
    for (int i = 1; atomic_load_explicit(&phase->done, memory_order_acquire) < count; i++) {
        if (worker->ahead < worker->ahead_end) {
            __builtin_prefetch(worker->ahead, 0, 2);
            worker->ahead += 64;
            continue;
        }
        if (i % SPINS == 0) sched_yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    worker->finished = worker->others = 0;
    worker->phase++;
    return -1;
}

/* How many of ``count`` items make a chunk: large chunks read memory in order and need few atomic
 * operations. */
static int chunk_size(int count, const struct worker *worker) {
    int chunks = CHUNKS_PER_THREAD * worker->shared->threads;
    return (count + chunks - 1) / chunks;
}

/* One phase: every chunk [begin, end), of ``size`` of ``count`` items, that this thread gets. */
#define FOR_EACH_CHUNK(worker, begin, end, size, count)                                            \
    for (int begin, end; (begin = next_chunk(worker, (count + size - 1) / size) * (size)) >= 0 &&  \
                         (end = MIN(begin + (size), count), 1);)

#endif
