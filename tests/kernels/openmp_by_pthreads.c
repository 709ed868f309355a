/* OpenMP's parallel region on plain threads, for ThreadSanitizer.
 *
 * GCC's libgomp is not built for it: threads of its pool synchronise in ways that the sanitizer
 * does not see, so that everything before and after a region seems to race. These threads begin
 * and end with the region.
 */
#include <pthread.h>
#include <stdlib.h>

struct member {
    void (*run)(void *);
    void *data;
    int number;
};

static __thread int own_number;

int omp_get_thread_num(void) {
    return own_number;
}

static void *start(void *argument) {
    const struct member *member = argument;
    own_number = member->number;
    member->run(member->data);
    return NULL;
}

void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    pthread_t *others = malloc(threads * sizeof *others);
    struct member *members = malloc(threads * sizeof *members);
    for (unsigned i = 1; i < threads; i++) {
        members[i] = (struct member){run, data, (int)i};
        if (pthread_create(others + i, NULL, start, members + i)) abort();
    }
    own_number = 0;
    run(data);
    for (unsigned i = 1; i < threads; i++) pthread_join(others[i], NULL);
    free(others);
    free(members);
}
