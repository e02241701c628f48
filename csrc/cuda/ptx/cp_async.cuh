// cp.async: 4, 8 or 16 bytes global to shared, both addresses aligned to them; bytes past src_bytes are
// zeros, and with src_bytes 0 src is not read. 16 bytes pass by the L1 cache. Groups: wait<n> returns when at
// most n of this thread's newest committed groups are pending. The data is then visible to this thread only;
// others need a barrier after it. wait_all waits also for what was not committed. A thread waits for all its
// copies before it exits.
#pragma once
#include "platform.cuh"

SL_DEV void sl_cp_async_16(uint32_t dst, const void *src, int src_bytes SL_SITE) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(src_bytes)
                 : "memory");
#else
    emu_cp_async(dst, src, 16, src_bytes, SL_HERE);
#endif
}

// 16 bytes where `yes` is not 0, else 16 zeros.
SL_DEV void sl_cp_async_16_if(int yes, uint32_t dst, const void *src SL_SITE) {
#ifdef __CUDACC__
    asm volatile(
        "{ .reg .pred no; setp.eq.b32 no, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, no; }" ::"r"(dst),
        "l"(src), "r"(yes)
        : "memory");
#else
    emu_cp_async(dst, src, 16, yes ? 16 : 0, SL_HERE);
#endif
}

SL_DEV void sl_cp_async_8(uint32_t dst, const void *src, int src_bytes SL_SITE) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(src_bytes)
                 : "memory");
#else
    emu_cp_async(dst, src, 8, src_bytes, SL_HERE);
#endif
}

SL_DEV void sl_cp_async_4(uint32_t dst, const void *src, int src_bytes SL_SITE) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(src_bytes)
                 : "memory");
#else
    emu_cp_async(dst, src, 4, src_bytes, SL_HERE);
#endif
}

SL_DEV void sl_cp_async_commit(SL_SITE0) {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emu_cp_async_commit(SL_HERE);
#endif
}

template <int N> SL_DEV void sl_cp_async_wait(SL_SITE0) {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
    emu_cp_async_wait(N, SL_HERE);
#endif
}

SL_DEV void sl_cp_async_wait_all(SL_SITE0) {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    emu_cp_async_commit(SL_HERE);
    emu_cp_async_wait(0, SL_HERE);
#endif
}
