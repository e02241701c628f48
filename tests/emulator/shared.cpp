// A block's shared memory: bounds, alignment, plain accesses by wrappers.
#include "engine.h"

#include <stdlib.h>
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

emu_shadow *emu_shared_shadow;
static size_t capacity;
enum : size_t { GUARD = 1024 };

void emu_shared_prepare(size_t bytes) {
    if (!emu_shared_shadow) {
        emu_shared_shadow = emu_shadow_new(false);
    }
#ifdef EMU_ASAN
    if (emu_b.shared) {
        __asan_unpoison_memory_region(emu_b.shared, capacity);
    }
#endif
    if (!emu_b.shared || bytes + GUARD > capacity) {
        free(emu_b.shared);
        capacity = (bytes + GUARD + 1023) / 1024 * 1024;
        emu_b.shared = (unsigned char *)aligned_alloc(1024, capacity);
    }
    emu_b.shared_bytes = (uint32_t)bytes;
#ifdef EMU_ASAN
    __asan_poison_memory_region(emu_b.shared + bytes, capacity - bytes);
#endif
    emu_shadow_resize(emu_shared_shadow, bytes);
}

void *emu_shared_base() {
    return emu_b.shared;
}

uint32_t emu_shared_addr(const void *p, emu_site site) {
    const size_t offset = (size_t)((const unsigned char *)p - emu_b.shared);
    if (offset > emu_b.shared_bytes) {
        emu_fail(site, "pointer %p is not into shared memory", p);
    }
    return (uint32_t)offset + EMU_SHARED_WINDOW;
}

unsigned char *emu_shared_at(uint32_t addr, int bytes, int align, const char *what, emu_site site) {
    const int64_t offset = (int64_t)addr - EMU_SHARED_WINDOW;
    if (offset < 0 || offset + bytes > emu_b.shared_bytes) {
        emu_fail(site, "%s: shared offset %lld + %d out of %u bytes", what, (long long)offset, bytes,
                 emu_b.shared_bytes);
    }
    if (offset % align) {
        emu_fail(site, "%s: shared offset %lld is not a multiple of %d", what, (long long)offset, align);
    }
    return emu_b.shared + offset;
}

void emu_shared_read(void *dst, uint32_t addr, int bytes, emu_site site) {
    const unsigned char *p = emu_shared_at(addr, bytes, bytes, "ld.shared", site);
    const uint32_t offset = (uint32_t)(p - emu_b.shared);
    emu_shadow_read(emu_shared_shadow, offset, bytes, site);
    emu_conflict_note(offset, bytes, EMU_TRAFFIC_READ, site);
    memcpy(dst, p, (size_t)bytes);
}

void emu_shared_write(uint32_t addr, const void *src, int bytes, emu_site site) {
    unsigned char *p = emu_shared_at(addr, bytes, bytes, "st.shared", site);
    const uint32_t offset = (uint32_t)(p - emu_b.shared);
    emu_shadow_write(emu_shared_shadow, offset, bytes, site);
    emu_conflict_note(offset, bytes, EMU_TRAFFIC_WRITE, site);
    memcpy(p, src, (size_t)bytes);
}

// ---- cp.async: the target is poisoned when the copy is issued and filled when it is waited for, so that
// neither the old nor the new content can be used in between.
void emu_cp_async(uint32_t dst, const void *src, int bytes, int src_bytes, emu_site site) {
    unsigned char *p = emu_shared_at(dst, bytes, bytes, "cp.async", site);
    const uint32_t offset = (uint32_t)(p - emu_b.shared);
    if ((bytes != 4 && bytes != 8 && bytes != 16) || src_bytes < 0 || src_bytes > bytes) {
        emu_fail(site, "cp.async of %d bytes, %d from the source", bytes, src_bytes);
    }
    if ((uintptr_t)src % (size_t)bytes) {
        emu_fail(site, "cp.async: source %p is not a multiple of %d", src, bytes);
    }
    if (src_bytes) {
        emu_global_access(src, src_bytes, EMU_READ, "cp.async", site);
    }
    emu_shadow_flight(emu_shared_shadow, offset, bytes, true, site);
    emu_conflict_note(offset, bytes, EMU_TRAFFIC_COPY, site);
    memset(p, 0xFF, (size_t)bytes);
    emu_me()->copies.push_back(emu_copy{offset, src, bytes, src_bytes, emu_me()->copy_group, site});
}

void emu_cp_async_commit(emu_site) {
    emu_me()->copy_group++;
}

void emu_cp_async_wait(int n_pending, emu_site) {
    emu_fiber *f = emu_me();
    size_t n = 0;
    for (; n < f->copies.size() && f->copies[n].group < f->copy_group - n_pending; n++) {
        const emu_copy *c = &f->copies[n];
        emu_shadow_flight(emu_shared_shadow, c->offset, c->bytes, false, c->site);
        emu_shadow_write(emu_shared_shadow, c->offset, c->bytes, c->site);
        if (c->src_bytes) {
            memcpy(emu_b.shared + c->offset, c->src, (size_t)c->src_bytes);
        }
        memset(emu_b.shared + c->offset + c->src_bytes, 0, (size_t)(c->bytes - c->src_bytes));
    }
    f->copies.erase(f->copies.begin(), f->copies.begin() + (std::ptrdiff_t)n);
}
