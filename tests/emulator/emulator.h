// What a kernel sees of CUDA when g++ compiles it for the host. README.md says how it works.
//
// Every thread of a block is a fiber. A collective is a rendezvous: each fiber posts its operands and parks,
// the last to arrive executes it for all. Every operation carries its call site, so that reports name source
// lines.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "cuda_types.h"

#include "cuda_host.h"

#include "float16.h"

// ---- the running thread; changes at every collective
struct emu_coords {
    dim3 thread_idx, block_idx, block_dim, grid_dim;
};
extern emu_coords *emu_self;
#define threadIdx (emu_self->thread_idx)
#define blockIdx (emu_self->block_idx)
#define blockDim (emu_self->block_dim)
#define gridDim (emu_self->grid_dim)
enum { warpSize = 32 };

// ---- warp collectives: all lanes of mask, at one call site
enum emu_shuffle_mode { EMU_SHUFFLE_IDX, EMU_SHUFFLE_XOR, EMU_SHUFFLE_UP, EMU_SHUFFLE_DOWN };
enum emu_vote { EMU_BALLOT, EMU_ANY, EMU_ALL, EMU_MATCH_ANY };
enum emu_reduction { EMU_ADD, EMU_MIN, EMU_MAX, EMU_AND, EMU_OR, EMU_XOR, EMU_EXCHANGE, EMU_CAS };
int emu_lane();
uint32_t emu_shuffle(uint32_t mask, uint32_t value, enum emu_shuffle_mode mode, int by, int width,
                     emu_site site);
uint32_t emu_vote(uint32_t mask, uint32_t value, enum emu_vote vote, emu_site site);
uint32_t emu_warp_reduce(uint32_t mask, uint32_t value, enum emu_reduction op, bool is_signed, emu_site site);
void emu_syncwarp(uint32_t mask, emu_site site);
void emu_ldmatrix(uint32_t *r, uint32_t addr, int count, bool trans, emu_site site);
uint32_t emu_movmatrix(uint32_t a, emu_site site);
void emu_mma_16816(float *d, const uint32_t *a, const uint32_t *b, bool bf16, emu_site site);

// ---- block collectives. n_threads 0 is the whole block.
void emu_barrier(int id, int n_threads, bool wait, emu_site site);
int emu_barrier_reduce(int predicate, enum emu_reduction op,
                       emu_site site); // EMU_ADD counts, EMU_AND, EMU_OR

// ---- memory. Shared addresses are 32-bit; global ones are pointers into what the test allowed.
void *emu_shared_base();
uint32_t emu_shared_addr(const void *p, emu_site site);
void emu_shared_read(void *dst, uint32_t addr, int bytes, emu_site site);
void emu_shared_write(uint32_t addr, const void *src, int bytes, emu_site site);
uint32_t emu_shared_atomic(uint32_t addr, uint32_t value, uint32_t compare, enum emu_reduction op,
                           bool is_signed, emu_site site);
void emu_global_read(void *dst, const void *p, int bytes, emu_site site);
void emu_global_write(void *p, const void *src, int bytes, emu_site site);
uint32_t emu_global_atomic(void *p, uint32_t value, uint32_t compare, enum emu_reduction op, bool is_signed,
                           emu_site site);
void emu_threadfence(emu_site site);
void emu_cp_async(uint32_t dst, const void *src, int bytes, int src_bytes, emu_site site);
void emu_cp_async_commit(emu_site site);
void emu_cp_async_wait(int n_pending, emu_site site);

// Records the report (the first of a launch wins), abandons the block and ends the launch with an error.
[[noreturn]] void emu_fail(emu_site site, const char *format, ...) __attribute__((format(printf, 2, 3)));

#include "cuda_device.h"
