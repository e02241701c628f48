// Order: between warps by barriers, between the blocks of a launch by __threadfence and atomics.
//
// A warp's own clock names the interval between two of its releases (an arrival at a barrier). Clocks never
// go back, also across blocks, so that "before emu_clock_base" means "not in this block", and nothing needs
// to be cleared.
#include "engine.h"

#include <unordered_map>

uint32_t emu_clock_base = 1;

void emu_clocks_begin_block() {
    for (int w = 0; w < emu_b.n_warps; w++) {
        for (int v = 0; v < emu_b.n_warps; v++) {
            emu_b.warp[w].clock[v] = emu_clock_base - 1;
        }
        emu_b.warp[w].clock[w] = emu_clock_base;
    }
}

void emu_clocks_end_block() {
    uint32_t top = emu_clock_base;
    for (int w = 0; w < emu_b.n_warps; w++) {
        top = emu_b.warp[w].clock[w] > top ? emu_b.warp[w].clock[w] : top;
    }
    emu_clock_base = top + 1;
    if (emu_clock_base > 1u << 23) { // records have 24 bits for a clock
        emu_shadow_forget_all();
        emu_clock_base = 1;
    }
}

void emu_release(uint32_t *clock, int warp) {
    emu_warp *w = &emu_b.warp[warp];
    for (int v = 0; v < emu_b.n_warps; v++) {
        clock[v] = clock[v] > w->clock[v] ? clock[v] : w->clock[v];
    }
    w->clock[warp]++;
}

void emu_acquire(int warp, const uint32_t *clock) {
    emu_warp *w = &emu_b.warp[warp];
    for (int v = 0; v < emu_b.n_warps; v++) {
        w->clock[v] = w->clock[v] > clock[v] ? w->clock[v] : clock[v];
    }
}

// ---- between blocks. What a fence made visible travels with the atomics that follow it in the block: an
// atomic on the same address in another block takes it over. Spinning on another block is not emulated.
struct seen {
    uint32_t clock[EMU_MAX_WARPS];
};
typedef std::unordered_map<uint32_t, seen> knowledge; // of blocks, by serial
static std::unordered_map<const void *, knowledge> published;
static knowledge mine;
static uint32_t mine_of; // serial of the block that mine belongs to

void emu_sync_begin_launch() {
    published.clear();
    mine.clear();
}

void emu_threadfence(emu_site) {
    emu_warp *w = &emu_b.warp[emu_me()->warp];
    memset(w->fence_clock, 0, sizeof w->fence_clock);
    emu_release(w->fence_clock, emu_me()->warp);
    w->fenced = true;
}

static void learn(knowledge *to, uint32_t block, const seen &what) {
    seen *s = &(*to)[block];
    for (int w = 0; w < EMU_MAX_WARPS; w++) {
        s->clock[w] = s->clock[w] > what.clock[w] ? s->clock[w] : what.clock[w];
    }
}

void emu_sync_atomic(const void *p) {
    if (mine_of != emu_b.serial) {
        mine.clear();
        mine_of = emu_b.serial;
    }
    knowledge *there = &published[p];
    for (const auto &entry : *there) {
        learn(&mine, entry.first, entry.second);
    }
    // Its own warp's fence, and those of other warps that a barrier orders before it.
    const emu_warp *w = &emu_b.warp[emu_me()->warp];
    bool fenced = false;
    for (int v = 0; v < emu_b.n_warps; v++) {
        const emu_warp *other = &emu_b.warp[v];
        if (other->fenced && (other == w || w->clock[v] >= other->fence_clock[v])) {
            seen visible;
            memcpy(visible.clock, other->fence_clock, sizeof visible.clock);
            learn(there, emu_b.serial, visible);
            fenced = true;
        }
    }
    if (!fenced) {
        return;
    }
    for (const auto &entry : mine) {
        learn(there, entry.first, entry.second);
    }
}

bool emu_sync_ordered(uint32_t block, int warp, uint32_t clock) {
    const auto entry = mine_of == emu_b.serial ? mine.find(block) : mine.end();
    return entry != mine.end() && entry->second.clock[warp] >= clock;
}
