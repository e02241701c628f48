// Global memory: the tests say which bytes a launch may read and write; every other access is reported.
#include "engine.h"

#include <algorithm>
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

// Neighbouring or overlapping buffers share a region. Sixteen bytes make a chunk, with a bit for each byte.
struct chunk {
    uint16_t readable, writable, blank; // blank: nothing was written yet
};
struct emu_region {
    uintptr_t begin, end; // multiples of EMU_CHUNK
    std::vector<chunk> chunks;
    bool written_to; // some of it is writable
    emu_shadow *shadow;
};
static std::vector<emu_region *> regions; // by address
static emu_region *last;

static emu_region *find(uintptr_t at) {
    if (last && at >= last->begin && at < last->end) {
        return last;
    }
    const auto after = std::upper_bound(regions.begin(), regions.end(), at,
                                        [](uintptr_t a, const emu_region *r) { return a < r->begin; });
    if (after == regions.begin() || at >= (*(after - 1))->end) {
        return NULL;
    }
    return last = *(after - 1);
}

bool emu_global_find(const void *p) {
    return find((uintptr_t)p) != NULL;
}

static void drop(emu_region *r) {
    if (r->shadow) {
        emu_shadow_free(r->shadow);
    }
    delete r;
    last = NULL;
}

// The region that holds [begin, end): a new one, made of those that overlap it.
static emu_region *region_for(uintptr_t begin, uintptr_t end) {
    emu_region *r = new emu_region();
    r->begin = begin / EMU_CHUNK * EMU_CHUNK;
    r->end = (end + EMU_CHUNK - 1) / EMU_CHUNK * EMU_CHUNK;
    const auto first = std::partition_point(regions.begin(), regions.end(),
                                            [&](emu_region *o) { return o->end <= r->begin; });
    auto stop = first;
    for (; stop != regions.end() && (*stop)->begin < r->end; ++stop) {
        r->begin = std::min(r->begin, (*stop)->begin);
        r->end = std::max(r->end, (*stop)->end);
    }
    if (stop - first == 1 && (*first)->begin == r->begin && (*first)->end == r->end) {
        delete r;
        return *first;
    }
    r->chunks.resize((r->end - r->begin) / EMU_CHUNK);
    for (auto o = first; o != stop; ++o) {
        std::copy((*o)->chunks.begin(), (*o)->chunks.end(),
                  r->chunks.begin() + (std::ptrdiff_t)(((*o)->begin - r->begin) / EMU_CHUNK));
        r->written_to = r->written_to || (*o)->written_to;
        drop(*o);
    }
    regions.insert(regions.erase(first, stop), r);
    return r;
}

// Calls each(chunk, its bytes that are meant) until it says false.
template <class F> static bool each_chunk(emu_region *r, uintptr_t at, size_t bytes, F each) {
    for (const uintptr_t end = at + bytes; at < end;) {
        const uintptr_t next = std::min(end, (at / EMU_CHUNK + 1) * EMU_CHUNK);
        const unsigned mask = ((1u << (next - at)) - 1) << at % EMU_CHUNK;
        if (!each(&r->chunks[(at - r->begin) / EMU_CHUNK], (uint16_t)mask)) {
            return false;
        }
        at = next;
    }
    return true;
}

static void allow(emu_region *r, uintptr_t at, size_t bytes, int access) {
    r->written_to = r->written_to || (access & EMU_WRITE);
    each_chunk(r, at, bytes, [&](chunk *c, uint16_t mask) {
        c->readable |= (access & EMU_READ) ? mask : (uint16_t)0;
        c->writable |= (access & EMU_WRITE) ? mask : (uint16_t)0;
        c->blank = (uint16_t)((access & EMU_BLANK) ? c->blank | mask : c->blank & ~mask);
        return true;
    });
}

void emu_memory_allow(const void *p, size_t bytes, int access) {
    const uintptr_t at = (uintptr_t)p;
    if (bytes) {
        allow(region_for(at, at + bytes), at, bytes, access);
    }
}

void emu_memory_allow_strided(const void *p, int n_dim, const int64_t *shape, const int64_t *stride, int item,
                              int access) {
    int64_t low = 0, high = 0, index[8] = {0};
    for (int i = 0; i < n_dim; i++) {
        if (shape[i] <= 0) {
            return;
        }
        (stride[i] < 0 ? low : high) += (shape[i] - 1) * stride[i];
    }
    emu_region *r =
        region_for((uintptr_t)p + (uintptr_t)low, (uintptr_t)p + (uintptr_t)high + (uintptr_t)item);
    const bool rows = n_dim > 0 && stride[n_dim - 1] == item; // whole rows at a time
    const int outer = rows ? n_dim - 1 : n_dim;
    for (;;) {
        int64_t offset = 0;
        for (int i = 0; i < outer; i++) {
            offset += index[i] * stride[i];
        }
        allow(r, (uintptr_t)p + (uintptr_t)offset, (size_t)(rows ? shape[n_dim - 1] * item : item), access);
        int i = outer - 1;
        for (; i >= 0 && ++index[i] == shape[i]; i--) {
            index[i] = 0;
        }
        if (i < 0) {
            return;
        }
    }
}

void emu_memory_forbid(const void *p, size_t bytes) {
    for (uintptr_t at = (uintptr_t)p; bytes; at++, bytes--) {
        if (emu_region *r = find(at)) {
            each_chunk(r, at, 1, [](chunk *c, uint16_t mask) {
                c->readable &= (uint16_t)~mask;
                c->writable &= (uint16_t)~mask;
                return true;
            });
        }
    }
}

void emu_memory_reset(void) {
    for (emu_region *r : regions) {
        drop(r);
    }
    regions.clear();
}

// ---- a launch begins or ends
void emu_global_launch(bool begins) {
    for (emu_region *r : regions) {
        if (begins && r->written_to && !r->shadow) {
            r->shadow = emu_shadow_new(true);
            emu_shadow_resize(r->shadow, r->end - r->begin);
        }
#ifdef EMU_ASAN
        // Poisoned only while kernels run: the test's own code may look at gaps.
        for (size_t i = 0; i < r->chunks.size(); i++) {
            const uint16_t usable = r->chunks[i].readable | r->chunks[i].writable;
            char *at = (char *)r->begin + i * EMU_CHUNK;
            for (int half = 0; half < 2; half++) { // ASan's shadow has 8 bytes a granule
                if (!(usable >> half * 8 & 0xff)) {
                    begins ? __asan_poison_memory_region(at + half * 8, 8)
                           : __asan_unpoison_memory_region(at + half * 8, 8);
                }
            }
        }
#endif
    }
}

// ---- accesses
static const char *verb(int access) {
    return access & EMU_WRITE ? "write" : "read";
}

void emu_global_access(const void *p, int bytes, int access, const char *what, emu_site site) {
    const uintptr_t at = (uintptr_t)p;
    emu_region *r = find(at);
    if (!r || at + (uintptr_t)bytes > r->end) {
        emu_fail(site, "%s: %s of %d bytes at %p, outside of every buffer", what, verb(access), bytes, p);
    }
    emu_counts.global_bytes += (uint64_t)bytes;
    const bool ok = each_chunk(r, at, (size_t)bytes, [&](const chunk *c, uint16_t mask) {
        return (!(access & EMU_READ) || (c->readable & mask) == mask) &&
               (!(access & EMU_WRITE) || (c->writable & mask) == mask);
    });
    if (!ok) {
        const chunk *c = &r->chunks[(at - r->begin) / EMU_CHUNK];
        emu_fail(site, "%s: %s of %d bytes at %p, %s", what, verb(access), bytes, p,
                 (access & EMU_WRITE) && (c->readable >> at % EMU_CHUNK & 1)
                     ? "which is read-only"
                     : "out of bounds: a gap, or beyond the end of a buffer");
    }
#ifdef EMU_HOOKS // elsewhere plain accesses are not seen, and with them who wrote
    if (access & EMU_READ) {
        const bool written = each_chunk(r, at, (size_t)bytes,
                                        [](const chunk *c, uint16_t mask) { return !(c->blank & mask); });
        if (!written) {
            emu_fail(site, "%s: read of %d bytes at %p, which nothing was written to", what, bytes, p);
        }
    }
#endif
    if (access & EMU_WRITE) {
        each_chunk(r, at, (size_t)bytes, [](chunk *c, uint16_t mask) {
            c->blank &= (uint16_t)~mask;
            return true;
        });
    }
    if (r->shadow) {
        (access & EMU_ATOMIC  ? emu_shadow_atomic
         : access & EMU_WRITE ? emu_shadow_write
                              : emu_shadow_read)(r->shadow, at - r->begin, bytes, site);
    }
}

bool emu_global_host_range(const void *p, size_t bytes, bool write) {
    const uintptr_t at = (uintptr_t)p;
    emu_region *r = find(at);
    if (!r || at + bytes > r->end) {
        return false;
    }
    return each_chunk(r, at, bytes, [&](chunk *c, uint16_t mask) {
        if (((write ? c->writable : c->readable) & mask) != mask) {
            return false;
        }
        c->blank &= write ? (uint16_t)~mask : (uint16_t)0xffff;
        return true;
    });
}

static void check_alignment(const void *p, int bytes, const char *what, emu_site site) {
    if ((uintptr_t)p % (size_t)bytes) {
        emu_fail(site, "%s: global address %p is not a multiple of %d", what, p, bytes);
    }
}

void emu_global_read(void *dst, const void *p, int bytes, emu_site site) {
    check_alignment(p, bytes, "ld.global", site);
    emu_global_access(p, bytes, EMU_READ, "ld.global", site);
    memcpy(dst, p, (size_t)bytes);
}

void emu_global_write(void *p, const void *src, int bytes, emu_site site) {
    check_alignment(p, bytes, "st.global", site);
    emu_global_access(p, bytes, EMU_WRITE, "st.global", site);
    memcpy(p, src, (size_t)bytes);
}
