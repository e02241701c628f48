// A launch: blocks one after another in a drawn order, each thread a fiber.
#include "engine.h"

#include <mutex>
#include <unordered_map>
#include <utility>

emu_block emu_b;
emu_coords *emu_self;
emu_stats emu_counts;
uint32_t emu_launch_serial;

static const emu_site LAUNCH = {"launch", 0};

static void thread_main() {
    emu_b.run(emu_b.f);
    emu_fiber *f = emu_me();
    if (!f->copies.empty()) {
        emu_fail(f->copies.front().site, "cp.async still in flight when its thread exited");
    }
    emu_warp *w = &emu_b.warp[f->warp];
    f->done = true;
    w->alive &= ~(1u << f->lane);
    w->ready &= ~(1u << f->lane);
    emu_b.n_alive--;
    emu_fiber *next = emu_pick();
    emu_fiber_switch(f, next);
}

static void begin_block(dim3 grid, dim3 block, uint32_t linear) {
    emu_block *b = &emu_b;
    b->serial++;
    b->n_alive = b->n_threads;
    b->current_warp = 0;
    b->failed = false;
    b->random = (emu_seed_value * 0x9E3779B97F4A7C15ull + linear * 0xD1B54A32D192ED03ull) | 1;
    memset(b->shared, 0xFF, b->shared_bytes); // NaN in every format
    memset(b->barrier, 0, sizeof b->barrier);
    const dim3 at(linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y);
    for (int t = 0; t < b->n_threads; t++) {
        emu_fiber *f = b->fiber[(size_t)t];
        emu_fiber_prepare(f, thread_main);
        const unsigned u = (unsigned)t;
        f->thread_idx = dim3(u % block.x, u / block.x % block.y, u / block.x / block.y);
        f->block_idx = at;
        f->block_dim = block;
        f->grid_dim = grid;
        f->lane = t & 31;
        f->warp = t >> 5;
        f->done = false;
        f->op.kind = EMU_RUNS;
        f->copies.clear();
        f->copy_group = 0;
    }
    for (int w = 0; w < b->n_warps; w++) {
        b->warp[w].ready = b->warp[w].alive = emu_lanes_of(w);
        b->warp[w].posted = 0;
        b->warp[w].fenced = false;
    }
    emu_clocks_begin_block();
}

static void end_block() {
    emu_block *b = &emu_b;
    for (int i = 0; i < EMU_BARRIERS && !b->failed; i++) {
        if (b->barrier[i].arrived) {
            emu_record(LAUNCH, "the block ended with threads that arrived at barrier %d", i);
        }
    }
    for (int t = 0; t < b->n_threads && b->failed; t++) { // what a failed block left in flight
        for (const emu_copy &c : b->fiber[(size_t)t]->copies) {
            emu_shadow_flight(emu_shared_shadow, c.offset, c.bytes, false, c.site);
        }
    }
    emu_clocks_end_block();
    emu_conflict_end_block();
    emu_counts.blocks++;
}

// ---- limits of devices of compute capability 8.0 and later
static int n_processors = 4, max_shared = 99 << 10;
static std::unordered_map<const void *, int> opted_in;
static const void *expected_stream;
static bool expects_stream;
static cudaError_t last_error;

void emu_set_error(cudaError_t error) {
    if (error != cudaSuccess) {
        last_error = error;
    }
}

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() {
    return last_error;
}

void emu_device(int n_processor, int shared_bytes) {
    n_processors = n_processor;
    max_shared = shared_bytes;
}

int emu_device_processors() {
    return n_processors;
}

int emu_device_shared() {
    return max_shared;
}

cudaError_t emu_func_attribute(const void *kernel, enum cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || value > max_shared) {
            emu_set_error(cudaErrorInvalidValue);
            return cudaErrorInvalidValue;
        }
        opted_in[kernel] = value;
    }
    return cudaSuccess;
}

void emu_expect_stream(const void *stream, int expect) {
    expected_stream = stream;
    expects_stream = expect != 0;
}

bool emu_stream_expected(const void *stream, const char *what) {
    if (expects_stream && stream != expected_stream) {
        emu_record(emu_site{what, 0}, "on stream %p, expected %p", stream, expected_stream);
        emu_set_error(cudaErrorLaunchFailure);
        return false;
    }
    return true;
}

static cudaError_t check(const emu_kernel &kernel, dim3 grid, dim3 block, size_t shared) {
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
        !threads || threads > 1024 || block.z > 64) {
        return cudaErrorInvalidConfiguration;
    }
    const auto opted = opted_in.find(kernel.function);
    const size_t allowed = opted == opted_in.end() ? 48 << 10 : (size_t)opted->second;
    return shared > allowed && shared > 48 << 10 ? cudaErrorInvalidValue
           : kernel.parameter_bytes > 4096       ? cudaErrorInvalidValue
                                                 : cudaSuccess;
}

void emu_launch_blocks(emu_kernel kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                       void (*run)(const void *), const void *f) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const cudaError_t error = check(kernel, grid, block, shared);
    if (error != cudaSuccess) {
        emu_set_error(error);
        return;
    }
    emu_clear_report();
    if (!emu_stream_expected(stream, kernel.name)) {
        return;
    }
    emu_block *b = &emu_b;
    b->n_threads = (int)(block.x * block.y * block.z);
    b->n_warps = (b->n_threads + 31) / 32;
    b->run = run;
    b->f = f;
    while ((int)b->fiber.size() < b->n_threads) {
        b->fiber.push_back(new emu_fiber());
    }
    emu_fiber_launch_begins();
    emu_shared_prepare(shared);
    emu_global_launch(true);
    emu_sync_begin_launch();
    emu_launch_serial = b->serial + 1;
    emu_counts.launches++;
    const uint32_t n = grid.x * grid.y * grid.z;
    std::vector<uint32_t> order(n);
    for (uint32_t i = 0; i < n; i++) {
        order[i] = i;
    }
    uint64_t random = (emu_seed_value * 2654435761u + 88172645463325252ull) | 1;
    for (uint32_t i = n; i > 1; i--) {
        std::swap(order[i - 1], order[emu_random(&random) % i]);
    }
    for (uint32_t i = 0; i < n && !emu_has_failed(); i++) {
        begin_block(grid, block, order[i]);
        emu_fiber_switch(NULL, emu_pick());
        end_block();
    }
    emu_global_launch(false);
    if (emu_has_failed()) {
        emu_set_error(cudaErrorLaunchFailure);
    }
}
