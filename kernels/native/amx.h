/* AMX, the matrix unit of x86 processors: whether it is there, and the sizes of its tiles. */
#ifndef OFFRAMP_AMX_H
#define OFFRAMP_AMX_H

#include "matmul_vector.h"

/* Outputs multiplied together, and most inputs. */
enum { AMX_OUTS = 32, AMX_ROWS = 16 };
/* Fewest rows of inputs that it multiplies, by weight format: vectors are faster with less. */
static const int AMX_LEAST_ROWS[] = {
    [FORMAT_FP16] = TILE_ROWS + 1, [FORMAT_INT8] = 2, [FORMAT_INT4] = 5};

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) &&                        \
    defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define HAS_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

static int amx_ready = 0;

/* Whether AMX may be used: Linux grants a process its registers only on request. */
static int amx_initialize(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    amx_ready = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return amx_ready;
}

static int uses_amx(const struct matrix *m, int rows) {
    return amx_ready && m->format != FORMAT_FP32 && rows >= AMX_LEAST_ROWS[m->format];
}

/* The sizes of a thread's eight tiles: 16 rows of 64 bytes at most. */
struct tile_sizes {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static void amx_release(void) {
    if (amx_ready) _tile_release();
}

#else

static int amx_initialize(void) {
    return 0;
}

static int uses_amx(const struct matrix *m, int rows) {
    (void)m, (void)rows;
    return 0;
}

static void amx_release(void) {}

#endif
#endif
