// Rendezvous of lanes, and barriers of warps.
#include "engine.h"

void emu_collective(emu_kind kind, uint32_t mask, void *arg, void (*run)(int, uint32_t), emu_site site) {
    emu_fiber *f = emu_me();
    emu_warp *w = &emu_b.warp[f->warp];
    mask &= emu_lanes_of(f->warp);
    if (!(mask >> f->lane & 1)) {
        emu_fail(site, "calling lane %d is not in the mask 0x%08x", f->lane, mask);
    }
    if (mask & ~w->alive) {
        emu_fail(site, "warp collective with lanes that have exited: 0x%08x", mask & ~w->alive);
    }
    f->op = emu_op{kind, mask, arg, site};
    w->posted |= 1u << f->lane;
    const uint32_t others = w->posted & mask & ~(1u << f->lane);
    if (others) {
        const emu_op *o = &emu_at(f->warp, __builtin_ctz(others))->op;
        if (o->kind != kind || o->mask != mask || o->site.line != site.line ||
            strcmp(o->site.file, site.file) != 0) {
            emu_fail(site, "divergent warp collective: another lane is at %s", emu_site_text(o->site));
        }
    }
    if ((w->posted & mask) != mask) {
        w->ready &= ~(1u << f->lane);
        emu_park();
        return;
    }
    emu_counts.collectives++;
    run(f->warp, mask);
    w->posted &= ~mask;
    emu_wake(f->warp, mask);
}

void emu_syncwarp(uint32_t mask, emu_site site) {
    emu_collective(EMU_SYNCS, mask, NULL, [](int warp, uint32_t) { emu_b.warp[warp].epoch++; }, site);
}

// ---- barriers. op.arg of a waiting fiber: what it brings to a reduction, and where the result goes.
struct reduction {
    enum emu_reduction op;
    int value;
};

static void reduce(const emu_named_barrier *bar, const reduction *mine) {
    int count = 0, n = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int w = 0; w < emu_b.n_warps; w++) {
            EMU_EACH_LANE(lane, bar->waiting[w]) {
                const emu_fiber *f = emu_at(w, (int)lane);
                reduction *r = (reduction *)f->op.arg;
                if (!r != !mine || (r && r->op != mine->op)) {
                    emu_fail(f->op.site, "barrier: some threads reduce, others do not");
                }
                if (!r) {
                    continue;
                }
                if (pass == 0) {
                    count += r->value != 0;
                    n++;
                } else {
                    r->value = r->op == EMU_ADD ? count : r->op == EMU_OR ? count > 0 : count == n;
                }
            }
        }
    }
}

static void complete(emu_named_barrier *bar) {
    const emu_named_barrier done = *bar;
    memset(bar, 0, sizeof *bar);
    for (int w = 0; w < emu_b.n_warps; w++) {
        const uint32_t lanes = done.waiting[w];
        if (!lanes) {
            continue;
        }
        const emu_site site = emu_at(w, __builtin_ctz(lanes))->op.site;
        EMU_EACH_LANE(lane, lanes) {
            const emu_op *o = &emu_at(w, (int)lane)->op;
            if (o->site.line != site.line) {
                emu_fail(o->site, "divergent barrier: a lane of the same warp is at %s", emu_site_text(site));
            }
        }
        emu_acquire(w, done.clock);
        emu_b.warp[w].epoch++;
        emu_wake(w, lanes);
    }
}

static void arrive(int id, int n_threads, bool wait, reduction *r, emu_site site) {
    emu_fiber *f = emu_me();
    if (id < 0 || id >= EMU_BARRIERS || n_threads % 32) {
        emu_fail(site, "barrier %d of %d threads", id, n_threads);
    }
    emu_named_barrier *bar = &emu_b.barrier[id];
    const int expected = n_threads ? n_threads : emu_b.n_threads;
    if (expected > emu_b.n_threads || (bar->arrived && bar->expected != expected)) {
        emu_fail(site, "barrier %d: %d threads, expected %d", id, expected,
                 bar->arrived ? bar->expected : emu_b.n_threads);
    }
    bar->expected = expected;
    f->op = emu_op{EMU_WAITS, 0, r, site};
    if (wait) {
        bar->waiting[f->warp] |= 1u << f->lane;
    }
    emu_release(bar->clock, f->warp);
    if (++bar->arrived == expected) {
        emu_counts.collectives++;
        reduce(bar, r);
        complete(bar);
    } else if (wait) {
        emu_b.warp[f->warp].ready &= ~(1u << f->lane);
        emu_park();
    }
}

void emu_barrier(int id, int n_threads, bool wait, emu_site site) {
    arrive(id, n_threads, wait, NULL, site);
}

int emu_barrier_reduce(int predicate, enum emu_reduction op, emu_site site) {
    reduction r = {op, predicate};
    arrive(0, 0, true, &r, site);
    return r.value;
}
