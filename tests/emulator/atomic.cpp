// Atomics on 32-bit integers. They race with no other atomic, but with plain accesses.
#include "engine.h"

static uint32_t apply(void *p, uint32_t value, uint32_t compare, enum emu_reduction op, bool is_signed) {
    uint32_t old;
    memcpy(&old, p, 4);
    const uint32_t now =
        op == EMU_CAS ? (old == compare ? value : old) : emu_combine(old, value, op, is_signed);
    memcpy(p, &now, 4);
    return old;
}

uint32_t emu_shared_atomic(uint32_t addr, uint32_t value, uint32_t compare, enum emu_reduction op,
                           bool is_signed, emu_site site) {
    unsigned char *p = emu_shared_at(addr, 4, 4, "atom.shared", site);
    emu_shadow_atomic(emu_shared_shadow, (size_t)(p - emu_b.shared), 4, site);
    return apply(p, value, compare, op, is_signed);
}

uint32_t emu_global_atomic(void *p, uint32_t value, uint32_t compare, enum emu_reduction op, bool is_signed,
                           emu_site site) {
    const size_t offset = (size_t)((unsigned char *)p - emu_b.shared);
    if (offset < emu_b.shared_bytes) { // CUDA's atomicAdd takes either
        return emu_shared_atomic(emu_shared_addr(p, site), value, compare, op, is_signed, site);
    }
    if ((uintptr_t)p % 4) {
        emu_fail(site, "atomic: global address %p is not a multiple of 4", p);
    }
    emu_global_access(p, 4, EMU_READ | EMU_WRITE | EMU_ATOMIC, "atomic", site);
    emu_sync_atomic(p);
    return apply(p, value, compare, op, is_signed);
}
