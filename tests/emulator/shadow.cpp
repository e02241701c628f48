// Races: for every cell of memory, the last write and the reads since, and whether the next access is ordered
// after them (as FastTrack does it, with one clock a warp and a count of syncs for its lanes).
//
// Two accesses, at least one of them a write, must be ordered: by a barrier when the warps differ, by
// __syncwarp or a barrier when the lanes differ, by the end of the launch (or fences and atomics) when the
// blocks differ. mma, ldmatrix and shuffles order nothing. A cell is a chunk of 16 bytes; once it is accessed
// in pieces, 2 bytes. Single bytes are not recorded.
#include "engine.h"

#include <sys/mman.h>

enum { MANY = 32, PARTS = EMU_CHUNK / 2 };
struct access {
    uint64_t clock : 24, epoch : 20, lane : 6, site : 14; // lane MANY: several of the warp
};
struct cell {
    access write;
    uint32_t block, readers, reads_block,
        other_reads;                        // serials of blocks; set of warps with an entry in reads
    uint8_t warp, in_flight, split, atomic; // atomic: the write was; then reads hold the block's atomics
};
template <class T> struct table { // zeroed pages that take memory when touched
    T *at;
    size_t bytes;
    void free() {
        if (at) {
            munmap(at, bytes);
        }
        at = NULL;
    }
    void resize(size_t n) {
        free();
        bytes = n * sizeof(T);
        at = (T *)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                       0);
    }
};
struct emu_shadow {
    bool global;
    size_t chunks;
    table<cell> whole, part;
    table<access> whole_reads, part_reads; // EMU_MAX_WARPS a cell
};
static std::vector<emu_shadow *> shadows;

emu_shadow *emu_shadow_new(bool global) {
    emu_shadow *s = new emu_shadow();
    s->global = global;
    shadows.push_back(s);
    return s;
}

static void forget(emu_shadow *s) {
    s->whole.free();
    s->part.free();
    s->whole_reads.free();
    s->part_reads.free();
    s->chunks = 0;
}

void emu_shadow_free(emu_shadow *s) {
    forget(s);
    for (size_t i = 0; i < shadows.size(); i++) {
        if (shadows[i] == s) {
            shadows.erase(shadows.begin() + (std::ptrdiff_t)i);
            break;
        }
    }
    delete s;
}

void emu_shadow_resize(emu_shadow *s, size_t bytes) {
    const size_t n = (bytes + EMU_CHUNK - 1) / EMU_CHUNK;
    if (n <= s->chunks) {
        return;
    }
    s->chunks = n;
    s->whole.resize(n);
    s->part.resize(n * PARTS);
    s->whole_reads.resize(n * EMU_MAX_WARPS);
    s->part_reads.resize(n * PARTS * EMU_MAX_WARPS);
}

void emu_shadow_forget_all() {
    for (emu_shadow *s : shadows) {
        const size_t n = s->chunks;
        forget(s);
        emu_shadow_resize(s, n * EMU_CHUNK);
    }
}

// ---- the rules
static bool ordered(access a, int warp, const emu_fiber *f) {
    const emu_warp *w = &emu_b.warp[f->warp];
    if (warp != f->warp) {
        return w->clock[warp] >= a.clock;
    }
    return a.lane == (uint64_t)f->lane || (w->epoch & 0xfffff) != a.epoch;
}

static access now(const emu_fiber *f, int site) {
    const emu_warp *w = &emu_b.warp[f->warp];
    return access{w->clock[f->warp], w->epoch & 0xfffff, (uint64_t)f->lane, (uint64_t)site};
}

[[noreturn]] static void report(const emu_shadow *s, const char *what, size_t at, access a, int warp,
                                emu_site site) {
    char lane[24] = "several lanes";
    if (a.lane < MANY) {
        snprintf(lane, sizeof lane, "lane %d", (int)a.lane);
    }
    emu_fail(site, "%s: %s offset %zu, other access by warp %d %s at %s", what,
             s->global ? "global" : "shared", at, warp, lane, emu_site_text(emu_site_of((int)a.site)));
}

// Another block of this launch, and nothing that orders it before.
static bool unordered_block(uint32_t block, int warp, uint32_t clock) {
    return block >= emu_launch_serial && block != emu_b.serial && !emu_sync_ordered(block, warp, clock);
}

static void check_against_write(const emu_shadow *s, const cell *c, size_t at, const emu_fiber *f, bool reads,
                                emu_site site) {
    if (c->in_flight) {
        report(s,
               reads ? "read of data that a cp.async has not delivered"
                     : "write into the target of a cp.async in flight",
               at, c->write, c->warp, site);
    }
    if (c->write.clock >= emu_clock_base) {
        if (!ordered(c->write, c->warp, f)) {
            report(s, reads ? "race: read, unordered with a write" : "race: two writes", at, c->write,
                   c->warp, site);
        }
    } else if (!s->global) {
        if (reads) {
            emu_fail(site, "read of shared offset %zu, which nothing was written to", at);
        }
    } else if (c->block && unordered_block(c->block, c->warp, c->write.clock)) {
        report(s, reads ? "race: read of what another block writes" : "race: two blocks write", at, c->write,
               c->warp, site);
    }
}

static void check_against_reads(const emu_shadow *s, const cell *c, const access *reads, size_t at,
                                const emu_fiber *f, const char *what, emu_site site) {
    if (c->reads_block == emu_b.serial) {
        EMU_EACH_LANE(w, c->readers) {
            if (!ordered(reads[w], (int)w, f)) {
                report(s, what, at, reads[w], (int)w, site);
            }
        }
    }
}

static void keep_access(cell *c, access *reads, const emu_fiber *f, int id) {
    if (c->reads_block != emu_b.serial) {
        c->other_reads = c->readers && !c->atomic ? c->reads_block : c->other_reads;
        c->readers = 0;
        c->reads_block = emu_b.serial;
    }
    const access mine = now(f, id);
    access *r = &reads[f->warp];
    const bool same = (c->readers >> f->warp & 1) && r->epoch == mine.epoch && r->lane != mine.lane;
    *r = mine;
    if (same) {
        r->lane = MANY;
    }
    c->readers |= 1u << f->warp;
}

static void note_read(emu_shadow *s, cell *c, access *reads, size_t at, emu_fiber *f, int id, emu_site site) {
    check_against_write(s, c, at, f, true, site);
    if (c->atomic) { // every one of them, not only the last; from here on it is as if one had been written
        check_against_reads(s, c, reads, at, f, "race: read, unordered with an atomic", site);
        c->atomic = 0;
        c->readers = 0;
    }
    keep_access(c, reads, f, id);
}

static void check_write(const emu_shadow *s, const cell *c, const access *reads, size_t at,
                        const emu_fiber *f, emu_site site) {
    check_against_write(s, c, at, f, false, site);
    check_against_reads(s, c, reads, at, f, "race: write, unordered with a read", site);
    const uint32_t other = c->reads_block != emu_b.serial && c->readers ? c->reads_block : c->other_reads;
    if (s->global && other && unordered_block(other, 0, 0)) {
        emu_fail(site, "race: write of global offset %zu, which another block reads", at);
    }
}

static void note_write(cell *c, const emu_fiber *f, int id) {
    c->write = now(f, id);
    c->warp = (uint8_t)f->warp;
    c->block = emu_b.serial;
    c->readers = 0;
    c->other_reads = 0;
    c->atomic = 0;
}

static void note_atomic(emu_shadow *s, cell *c, access *reads, size_t at, const emu_fiber *f, int id,
                        emu_site site) {
    if (!c->atomic || (!s->global && c->write.clock < emu_clock_base)) {
        check_against_write(s, c, at, f, true, site);
        check_write(s, c, reads, at, f, site);
        c->readers = 0;
    }
    c->atomic = 1;
    keep_access(c, reads, f, id);
    c->write = now(f, id);
    c->warp = (uint8_t)f->warp;
    c->block = emu_b.serial;
}

// ---- chunks and their parts
static void split(emu_shadow *s, size_t chunk) {
    cell *c = &s->whole.at[chunk];
    c->split = 1;
    for (size_t i = 0; i < PARTS; i++) {
        s->part.at[chunk * PARTS + i] = *c;
        if (c->reads_block == emu_b.serial) {
            EMU_EACH_LANE(w, c->readers) {
                s->part_reads.at[(chunk * PARTS + i) * EMU_MAX_WARPS + w] =
                    s->whole_reads.at[chunk * EMU_MAX_WARPS + w];
            }
        }
    }
}

// Calls each(cell, its reads, offset) for the cells of a range.
template <class F> static void each_cell(emu_shadow *s, size_t offset, int bytes, F each) {
    const size_t end = offset + (size_t)bytes;
    for (size_t at = offset; at < end;) {
        const size_t chunk = at / EMU_CHUNK, chunk_end = (chunk + 1) * EMU_CHUNK;
        cell *c = &s->whole.at[chunk];
        if (at % EMU_CHUNK == 0 && end >= chunk_end && !c->split) {
            each(c, &s->whole_reads.at[chunk * EMU_MAX_WARPS], at);
            at = chunk_end;
            continue;
        }
        if (!c->split) {
            split(s, chunk);
        }
        for (const size_t stop = end < chunk_end ? end : chunk_end; at < stop; at = (at / 2 + 1) * 2) {
            each(&s->part.at[at / 2], &s->part_reads.at[at / 2 * EMU_MAX_WARPS], at);
        }
    }
}

// After a write of whole chunks their parts are equal again.
static void join(emu_shadow *s, size_t offset, int bytes) {
    for (size_t chunk = (offset + EMU_CHUNK - 1) / EMU_CHUNK;
         (chunk + 1) * EMU_CHUNK <= offset + (size_t)bytes; chunk++) {
        if (s->whole.at[chunk].split) {
            s->whole.at[chunk] = s->part.at[chunk * PARTS];
            s->whole.at[chunk].split = 0;
        }
    }
}

void emu_shadow_read(emu_shadow *s, size_t offset, int bytes, emu_site site) {
    if (bytes < 2) {
        return;
    }
    emu_fiber *f = emu_me();
    const int id = emu_site_id(site);
    each_cell(s, offset, bytes,
              [&](cell *c, access *reads, size_t at) { note_read(s, c, reads, at, f, id, site); });
}

void emu_shadow_write(emu_shadow *s, size_t offset, int bytes, emu_site site) {
    if (bytes < 2) {
        return;
    }
    emu_fiber *f = emu_me();
    const int id = emu_site_id(site);
    each_cell(s, offset, bytes, [&](cell *c, access *reads, size_t at) {
        check_write(s, c, reads, at, f, site);
        note_write(c, f, id);
    });
    join(s, offset, bytes);
}

void emu_shadow_atomic(emu_shadow *s, size_t offset, int bytes, emu_site site) {
    emu_fiber *f = emu_me();
    const int id = emu_site_id(site);
    each_cell(s, offset, bytes,
              [&](cell *c, access *reads, size_t at) { note_atomic(s, c, reads, at, f, id, site); });
}

void emu_shadow_flight(emu_shadow *s, size_t offset, int bytes, bool begins, emu_site site) {
    emu_fiber *f = emu_me();
    const int id = emu_site_id(site);
    each_cell(s, offset, bytes, [&](cell *c, access *reads, size_t at) {
        if (begins) {
            check_write(s, c, reads, at, f, site);
            note_write(c, f, id);
        }
        c->in_flight = begins;
    });
    join(s, offset, bytes);
}
