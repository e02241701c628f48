// What the emulator's files share. Kernels see emulator.h only. One launch runs at a time, on the calling
// thread.
#pragma once

#include "emulator.h"

#include <stdio.h>
#include <vector>

enum {
    EMU_MAX_WARPS = 32,
    EMU_BARRIERS = 16,
    EMU_SHARED_WINDOW = 0x400 // shared addresses start here, so that 0 is an error
};
enum emu_kind : uint8_t {
    EMU_RUNS,
    EMU_SHUFFLES,
    EMU_VOTES,
    EMU_REDUCES,
    EMU_SYNCS,
    EMU_LOADS,
    EMU_MOVES,
    EMU_MMAS,
    EMU_WAITS
};

// What a fiber waits for.
struct emu_op {
    emu_kind kind;
    uint32_t mask;
    void *arg;
    emu_site site;
};

// A cp.async in flight.
struct emu_copy {
    uint32_t offset;
    const void *src;
    int bytes, src_bytes, group;
    emu_site site;
};

struct emu_fiber : emu_coords {
    void *context, *context_memory; // where it was parked
    char *stack;
    int lane, warp;
    bool done;
    emu_op op;
    std::vector<emu_copy> copies; // oldest first
    int copy_group;               // committed groups
};

// Clocks: a warp's own clock names the interval between two of its releases. clock[w] is what it has seen of
// warp w.
struct emu_warp {
    uint32_t ready, posted, alive; // sets of lanes: runnable; parked in a collective; not exited
    uint32_t epoch;                // counts the points that order the lanes of this warp
    uint32_t clock[EMU_MAX_WARPS];
    bool fenced; // __threadfence in this block
    uint32_t fence_clock[EMU_MAX_WARPS];
};

struct emu_named_barrier {
    int expected, arrived;
    uint32_t waiting[EMU_MAX_WARPS];
    uint32_t clock[EMU_MAX_WARPS];
};

struct emu_block {
    int n_threads, n_warps, n_alive, current_warp;
    uint32_t serial; // counts blocks, over all launches
    uint64_t random;
    unsigned char *shared;
    uint32_t shared_bytes;
    void (*run)(const void *f);
    const void *f;
    emu_warp warp[EMU_MAX_WARPS];
    emu_named_barrier barrier[EMU_BARRIERS];
    std::vector<emu_fiber *> fiber;
    bool failed;
};
extern emu_block emu_b;
extern emu_stats emu_counts;
extern uint32_t emu_launch_serial; // of the first block of the running launch

static inline emu_fiber *emu_me() {
    return (emu_fiber *)emu_self;
}
static inline emu_fiber *emu_at(int warp, int lane) {
    return emu_b.fiber[(size_t)(warp * 32 + lane)];
}
static inline uint64_t emu_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}
static inline uint32_t emu_lanes_of(int warp) { // lanes that exist
    const int n = emu_b.n_threads - warp * 32;
    return n >= 32 ? 0xffffffffu : (1u << n) - 1;
}
#define EMU_EACH_LANE(lane, mask)                                                                            \
    for (uint32_t lane##_rest = (mask), lane = 0;                                                            \
         lane##_rest && (lane = (uint32_t)__builtin_ctz(lane##_rest), true); lane##_rest &= lane##_rest - 1)

// ---- fiber.cpp
#ifdef EMU_ASAN
enum : size_t { EMU_STACK = 512 << 10 };
#else
enum : size_t { EMU_STACK = 128 << 10 };
#endif
void emu_fiber_launch_begins();
void emu_fiber_prepare(emu_fiber *f, void (*entry)());
void emu_fiber_switch(emu_fiber *from, emu_fiber *to); // NULL is the launching context
bool emu_on_a_stack(const void *p);                    // of a fiber, or of the thread that launches

// ---- schedule.cpp
emu_fiber *emu_pick(); // the next to run; NULL when all have exited
void emu_park();       // the caller has cleared its ready bit; returns when it was set again
void emu_wake(int warp, uint32_t lanes);

// ---- collective.cpp: the last lane of mask to arrive calls run(warp, mask) for all
void emu_collective(emu_kind kind, uint32_t mask, void *arg, void (*run)(int warp, uint32_t mask),
                    emu_site site);

// ---- report.cpp
void emu_record(emu_site site, const char *format, ...)
    __attribute__((format(printf, 2, 3))); // outside of fibers
bool emu_has_failed();
void emu_clear_report();
const char *emu_site_text(emu_site site); // file:line, valid until three more calls
extern uint64_t emu_seed_value;

// ---- shared.cpp
void emu_shared_prepare(size_t bytes);
unsigned char *emu_shared_at(uint32_t addr, int bytes, int align, const char *what, emu_site site);

// ---- global.cpp
enum { EMU_CHUNK = 16, EMU_ATOMIC = 8 }; // EMU_ATOMIC beside EMU_READ and EMU_WRITE
struct emu_region;
void emu_global_access(const void *p, int bytes, int access, const char *what, emu_site site);
bool emu_global_find(const void *p);
bool emu_global_host_range(const void *p, size_t bytes, bool write); // cudaMemsetAsync and the like
void emu_global_launch(bool begins);

// ---- shadow.cpp: who touched what last, in cells of 16 bytes, or of 2 where a 16-byte chunk was accessed in
// pieces
struct emu_shadow;
emu_shadow *emu_shadow_new(bool global);
void emu_shadow_free(emu_shadow *s);
void emu_shadow_resize(emu_shadow *s, size_t bytes);
void emu_shadow_read(emu_shadow *s, size_t offset, int bytes, emu_site site);
void emu_shadow_write(emu_shadow *s, size_t offset, int bytes, emu_site site);
void emu_shadow_atomic(emu_shadow *s, size_t offset, int bytes, emu_site site);
void emu_shadow_flight(emu_shadow *s, size_t offset, int bytes, bool begins, emu_site site); // of a cp.async
void emu_shadow_forget_all();
extern emu_shadow *emu_shared_shadow;

// ---- clocks.cpp
void emu_clocks_begin_block();
void emu_clocks_end_block();
void emu_release(uint32_t *clock,
                 int warp); // clock = max(clock, the warp's); then the warp starts a new interval
void emu_acquire(int warp, const uint32_t *clock);
extern uint32_t emu_clock_base; // clocks below are of earlier blocks
void emu_sync_begin_launch();
void emu_sync_atomic(const void *p); // an atomic on global memory
bool emu_sync_ordered(uint32_t block, int warp,
                      uint32_t clock); // is that write of another block before this one?

// ---- warp.cpp
uint32_t emu_combine(uint32_t a, uint32_t b, enum emu_reduction op, bool is_signed);

// ---- conflict.cpp: bank conflicts
enum emu_traffic { EMU_TRAFFIC_READ, EMU_TRAFFIC_WRITE, EMU_TRAFFIC_COPY };
void emu_conflict_note(uint32_t offset, int bytes, enum emu_traffic traffic, emu_site site);
void emu_conflict_matrix(int wavefronts, emu_site site);
void emu_conflict_end_block();
void emu_conflict_clear();
int emu_site_id(emu_site site);
emu_site emu_site_of(int id);
