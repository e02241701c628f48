// Which fiber runs next: drawn at every switch, mostly from the same warp.
#include "engine.h"

#include <stdio.h>

static int first_of(uint32_t set, uint32_t turn) { // the first member at or after turn, cyclically
    turn &= 31;
    const uint32_t turned = turn ? set >> turn | set << (32 - turn) : set;
    return (int)((uint32_t)__builtin_ctz(turned) + turn) & 31;
}

static const char *doing(const emu_fiber *f) {
    static const char *const names[] = {"running",  "shuffle",   "vote", "reduction", "__syncwarp",
                                        "ldmatrix", "movmatrix", "mma",  "barrier"};
    return f->done ? "exited" : names[f->op.kind];
}

// Names every group of neighbouring lanes that wait at one place.
static void deadlock() {
    char text[2400];
    size_t n = 0;
    emu_site at = {"launch", 0};
    for (int t = 0, lanes; t < emu_b.n_threads && n < sizeof text - 200; t += lanes) {
        const emu_fiber *f = emu_b.fiber[(size_t)t];
        for (lanes = 1; (t + lanes) % 32 && t + lanes < emu_b.n_threads; lanes++) {
            const emu_fiber *o = emu_b.fiber[(size_t)(t + lanes)];
            const bool same = o->op.kind == f->op.kind && o->op.site.line == f->op.site.line;
            if (o->done != f->done || (!same && !f->done)) {
                break;
            }
        }
        if (!f->done) {
            at = f->op.site;
        }
        n += (size_t)snprintf(text + n, sizeof text - n, "; warp %d lanes %d-%d: %s%s%s", t / 32, t % 32,
                              t % 32 + lanes - 1, doing(f), f->done ? "" : " at ",
                              f->done ? "" : emu_site_text(f->op.site));
    }
    emu_fail(at, "deadlock: no thread can run%s", text);
}

emu_fiber *emu_pick() {
    const uint64_t r = emu_random(&emu_b.random);
    int warp = emu_b.current_warp;
    if (!emu_b.warp[warp].ready || (r & 31) == 0) {
        uint32_t ready = 0;
        for (int w = 0; w < emu_b.n_warps; w++) {
            ready |= (uint32_t)(emu_b.warp[w].ready != 0) << w;
        }
        if (!ready) {
            if (emu_b.n_alive) {
                deadlock();
            }
            return NULL;
        }
        emu_b.current_warp = warp = first_of(ready, (uint32_t)(r >> 8));
    }
    return emu_at(warp, first_of(emu_b.warp[warp].ready, (uint32_t)(r >> 16)));
}

void emu_park() {
    emu_fiber *f = emu_me(), *next = emu_pick();
    if (next != f) {
        emu_fiber_switch(f, next);
    }
}

void emu_wake(int warp, uint32_t lanes) {
    emu_b.warp[warp].ready |= lanes;
}
