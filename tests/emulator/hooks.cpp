// Plain loads and stores of kernels, in the build "hook": compiled with -fsanitize=thread, but linked with
// these functions in place of its library, they come to the checks that the wrappers make.
#include "engine.h"

#ifdef EMU_HOOKS
#include <dlfcn.h>

static emu_site site_of(void *pc) {
    static uintptr_t base;
    if (!base) {
        Dl_info info;
        base = dladdr((void *)&emu_self, &info) ? (uintptr_t)info.dli_fbase : 0;
    }
    return emu_site{NULL, (int)((uintptr_t)pc - base)};
}

// Constants and tables lie in the libraries' images.
static bool in_an_image(const void *p) {
    Dl_info info;
    return dladdr(p, &info) != 0;
}

static inline void access(void *p, int bytes, bool write, void *pc) {
    if (!emu_self || (size_t)((char *)p - (char *)emu_self) < sizeof(emu_fiber) ||
        (size_t)((char *)p - emu_me()->stack) < EMU_STACK) {
        return; // host code; threadIdx and the like; the thread's own variables
    }
    const size_t offset = (size_t)((unsigned char *)p - emu_b.shared);
    if (offset < emu_b.shared_bytes + 1024u) {
        if (offset + (size_t)bytes > emu_b.shared_bytes) {
            emu_fail(site_of(pc), "shared offset %zu + %d out of %u bytes", offset, bytes,
                     emu_b.shared_bytes);
        }
        if (write) {
            emu_shadow_write(emu_shared_shadow, offset, bytes, site_of(pc));
        } else {
            emu_shadow_read(emu_shared_shadow, offset, bytes, site_of(pc));
        }
        return;
    }
    if (emu_on_a_stack(p)) {
        return;
    }
    if (emu_global_find(p) || !in_an_image(p)) {
        emu_global_access(p, bytes, write ? EMU_WRITE : EMU_READ, "plain access", site_of(pc));
    }
}

#define PC __builtin_return_address(0)
#define HOOK(size)                                                                                           \
    void __tsan_read##size(void *p) {                                                                        \
        access(p, size, false, PC);                                                                          \
    }                                                                                                        \
    void __tsan_write##size(void *p) {                                                                       \
        access(p, size, true, PC);                                                                           \
    }                                                                                                        \
    void __tsan_unaligned_read##size(void *p) {                                                              \
        access(p, size, false, PC);                                                                          \
    }                                                                                                        \
    void __tsan_unaligned_write##size(void *p) {                                                             \
        access(p, size, true, PC);                                                                           \
    }
extern "C" {
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
void __tsan_read_range(void *p, long bytes) {
    access(p, (int)bytes, false, PC);
}
void __tsan_write_range(void *p, long bytes) {
    access(p, (int)bytes, true, PC);
}
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
}
#endif
