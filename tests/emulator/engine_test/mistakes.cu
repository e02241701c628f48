// One kernel with many mistakes, for the tests of the emulator itself. in: 256 words that may be read, then
// 16 bytes that may not, then 16 more. out: 4096 words. MISTAKE(name) numbers them; tests/test_emulator.py
// knows the names.
#include "../../../csrc/cuda/ptx/atomic.cuh"
#include "../../../csrc/cuda/ptx/barrier.cuh"
#include "../../../csrc/cuda/ptx/cp_async.cuh"
#include "../../../csrc/cuda/ptx/ldmatrix.cuh"
#include "../../../csrc/cuda/ptx/memory.cuh"

enum { // in the order of MISTAKES in tests/test_emulator.py
    NONE,
    NO_BARRIER,
    NO_SYNCWARP,
    OVERWRITTEN,
    UNWRITTEN_SHARED,
    OUTSIDE_SHARED,
    MISALIGNED,
    NOT_SHARED,
    DIVERGENT,
    DIVERGENT_BARRIER,
    DEADLOCK,
    EXITED_LANES,
    OTHER_LANES_SHUFFLE,
    BARRIER_COUNTS,
    LEFT_AT_BARRIER,
    SOME_REDUCE,
    COPY_TOO_EARLY,
    COPY_NOT_WAITED,
    COPY_TARGET_WRITTEN,
    READ_BEYOND,
    READ_GAP,
    WRITE_INPUT,
    GLOBAL_RACE,
    BLOCKS_WRITE,
    BLOCKS_READ,
    NO_FENCE,
    FENCED,
    ATOMIC_AND_READ,
    PLAIN_RACE,
    PLAIN_BEYOND,
    BLANK_READ,
    CONFLICTS,
    BROADCAST,
    MATRIX_CONFLICTS,
    ORDER,
};

struct mistake_params {
    const uint32_t *in;
    uint32_t *out;
    int mistake;
};

SL_DEV void shared_mistake(const mistake_params &p, uint32_t base) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const uint32_t own = base + thread * 4;
    uint32_t v = 0;
    switch (p.mistake) {
    case NO_BARRIER:
        sl_st_shared_b32(own, 1);
        v = sl_ld_shared_b32(base + (thread ^ 32) * 4);
        break;
    case NO_SYNCWARP:
        sl_st_shared_b32(own, 1);
        v = sl_ld_shared_b32(base + (thread ^ 1) * 4);
        break;
    case OVERWRITTEN:
        sl_st_shared_b32(own, 1);
        __syncthreads();
        v = sl_ld_shared_b32(base + (thread ^ 32) * 4);
        sl_st_shared_b32(own, 2);
        break;
    case UNWRITTEN_SHARED:
        v = sl_ld_shared_b32(own);
        break;
    case OUTSIDE_SHARED:
        sl_st_shared_b32(base + 4096 + lane * 4, 1);
        break;
    case MISALIGNED:
        sl_st_shared_v4(base + 8, make_uint4(0, 0, 0, 0));
        break;
    case NOT_SHARED:
        v = sl_shared_addr(p.in);
        break;
    case PLAIN_RACE:
        ((uint32_t *)SL_SHARED_BASE())[thread] = 1;
        v = ((uint32_t *)SL_SHARED_BASE())[thread ^ 32];
        break;
    case CONFLICTS:
        sl_st_shared_b32(base + lane * 128 + warp * 4, 1);
        break;
    case BROADCAST:
        if (thread == 0) {
            sl_st_shared_b32(base, 1);
        }
        __syncthreads();
        v = sl_ld_shared_b32(base);
        break;
    case MATRIX_CONFLICTS: {
        for (int i = lane; i < 1024 && warp == 0; i += 32) {
            sl_st_shared_b32(base + i * 4, 0);
        }
        __syncthreads();
        uint32_t r[4];
        sl_ldmatrix_x4(r, base + lane * 128);
        v = r[0];
        break;
    }
    default:
        break;
    }
    sl_st_global(p.out + blockIdx.x * 64 + thread, v);
}

SL_DEV void collective_mistake(const mistake_params &p, uint32_t base) {
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const uint32_t own = base + thread * 16;
    uint32_t v = 0;
    switch (p.mistake) {
    case DIVERGENT:
        if (lane < 7) {
            v = __shfl_xor_sync(0xffffffffu, v, 1);
        } else {
            v = __shfl_xor_sync(0xffffffffu, v, 1);
        }
        break;
    case DIVERGENT_BARRIER:
        if (lane < 7) {
            __syncthreads();
        } else {
            __syncthreads();
        }
        break;
    case DEADLOCK:
        if (warp) {
            __syncthreads();
        }
        break;
    case EXITED_LANES:
        if (lane < 7) {
            return;
        }
        sl_barrier_sync(1 + warp, 32);
        break;
    case OTHER_LANES_SHUFFLE:
        v = __shfl_sync(lane < 16 ? 0xffffu : 0xffff0000u, v, 3);
        break;
    case BARRIER_COUNTS:
        sl_barrier_sync(2, warp ? 64 : 32 * 3);
        break;
    case LEFT_AT_BARRIER:
        sl_barrier_arrive(2 + warp, 64);
        break;
    case SOME_REDUCE:
        if (warp) {
            v = (uint32_t)__syncthreads_count(1);
        } else {
            __syncthreads();
        }
        break;
    case COPY_TOO_EARLY:
        sl_cp_async_16(own, p.in + thread * 4, 16);
        sl_cp_async_commit();
        v = sl_ld_shared_b32(own);
        break;
    case COPY_NOT_WAITED:
        sl_cp_async_16(own, p.in + thread * 4, 16);
        sl_cp_async_commit();
        break;
    case COPY_TARGET_WRITTEN:
        sl_cp_async_16(own, p.in + thread * 4, 16);
        sl_st_shared_b32(own + 4, 1);
        break;
    default:
        break;
    }
    sl_st_global(p.out + blockIdx.x * 64 + thread, v);
}

// The last block to finish sums what all have written.
SL_DEV void last_block_sums(const mistake_params &p, bool fence) {
    const int thread = threadIdx.x;
    sl_st_global(p.out + 64 + blockIdx.x * 64 + thread, (uint32_t)thread);
    if (fence) {
        __threadfence();
    }
    __syncthreads();
    int last = 0;
    if (thread == 0) {
        last = atomicAdd(p.out, 1u) == gridDim.x - 1;
    }
    if (__syncthreads_or(last)) {
        uint32_t sum = 0;
        for (unsigned b = 0; b < gridDim.x; b++) {
            sum += sl_ld_global(p.out + 64 + b * 64 + thread);
        }
        sl_st_global(p.out + 2048 + thread, sum);
    }
}

SL_DEV void global_mistake(const mistake_params &p) {
    const int thread = threadIdx.x;
    uint32_t *own = p.out + blockIdx.x * 64 + thread;
    uint32_t v = 0;
    switch (p.mistake) {
    case READ_BEYOND:
        v = sl_ld_global(p.in + 264 + thread);
        break;
    case READ_GAP:
        v = sl_ld_global(p.in + 256);
        break;
    case WRITE_INPUT:
        sl_st_global((uint32_t *)p.in + thread, 1u);
        break;
    case GLOBAL_RACE:
        sl_st_global(own, 1u);
        v = sl_ld_global(p.out + blockIdx.x * 64 + (thread ^ 32));
        break;
    case BLOCKS_WRITE:
        sl_st_global(p.out + thread, 1u);
        break;
    case BLOCKS_READ:
        sl_st_global(own, 1u);
        v = sl_ld_global(p.out + (blockIdx.x ^ 1) * 64 + thread);
        break;
    case NO_FENCE:
    case FENCED:
        last_block_sums(p, p.mistake == FENCED);
        break;
    case ATOMIC_AND_READ:
        atomicAdd(p.out + blockIdx.x, 1u);
        v = sl_ld_global(p.out + blockIdx.x);
        break;
    case PLAIN_BEYOND:
        v = p.in[264 + thread];
        break;
    case BLANK_READ:
        v = sl_ld_global(own);
        break;
    case ORDER:
        if (thread == 0) {
            sl_st_global(p.out + 1 + atomicAdd(p.out, 1u), blockIdx.x);
        }
        break;
    default:
        sl_st_global(own, (uint32_t)thread);
    }
    if (v) {
        sl_st_global(p.out + 3000 + blockIdx.x * 64 + thread, v);
    }
}

static __global__ void __launch_bounds__(64) mistakes(const __grid_constant__ mistake_params p) {
    const uint32_t base = sl_shared_addr(SL_SHARED_BASE());
    const bool shared = (p.mistake >= NO_BARRIER && p.mistake <= NOT_SHARED) || p.mistake == PLAIN_RACE ||
                        (p.mistake >= CONFLICTS && p.mistake <= MATRIX_CONFLICTS);
    if (shared) {
        shared_mistake(p, base);
    } else if (p.mistake >= DIVERGENT && p.mistake <= COPY_TARGET_WRITTEN) {
        collective_mistake(p, base);
    } else {
        global_mistake(p);
    }
}

extern "C" int make_mistake(const void *in, void *out, int mistake, int n_block, int shared, void *stream) {
    const mistake_params p = {(const uint32_t *)in, (uint32_t *)out, mistake};
    SL_LAUNCH(mistakes, dim3((unsigned)n_block), dim3(64), (size_t)shared, (cudaStream_t)stream, p);
    return (int)cudaGetLastError();
}

extern "C" int allow_shared(int bytes) {
    return (int)cudaFuncSetAttribute(mistakes, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

extern "C" int set_memory(void *p, int value, int64_t bytes, void *stream) {
    return (int)cudaMemsetAsync(p, value, (size_t)bytes, (cudaStream_t)stream);
}

// What the headers call 16-bit floats, for every number: to[i] of from[i], back[i] of i.
extern "C" void convert_all(const float *from, uint32_t *to, float *back, int64_t n, int bf16) {
    for (int64_t i = 0; i < n; i++) {
        to[i] = emu_f32_to_16(from[i], bf16 != 0);
    }
    for (uint32_t i = 0; i < 65536; i++) {
        back[i] = emu_16_to_f32(i, bf16 != 0);
    }
}
