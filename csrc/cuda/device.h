// Everything that a kernel uses of the hardware. Kernels include this and nothing of CUDA's, so that the same sources
// compile for a GPU and, with SIMSD_EMULATE, run on a CPU (emulation/device.h), where every thread of a block is a
// fiber and the primitives below do what the PTX manual says of them.
//
// Blocks are one-dimensional and whole warps. Collective primitives (marked "warp" or "block") are reached by all
// threads of the warp or block, at the same place; the emulation refuses anything else.
#pragma once

#include <cstdint>

#include "cuda/numbers.h"

namespace simsd {

constexpr int WARP = 32;

// 16 bytes, the most that a thread moves at once.
struct alignas(16) Bytes16 {
    uint32_t words[4];
};

}  // namespace simsd

#ifdef SIMSD_EMULATE
#include "cuda/emulation/device.h"
#else

#define SIMSD_DEVICE __device__ __forceinline__

namespace simsd {

// Where the thread is.
SIMSD_DEVICE int thread_index() { return threadIdx.x; }
SIMSD_DEVICE int thread_count() { return blockDim.x; }
SIMSD_DEVICE int lane_index() { return threadIdx.x % WARP; }
SIMSD_DEVICE int warp_index() { return threadIdx.x / WARP; }
SIMSD_DEVICE int block_x() { return blockIdx.x; }
SIMSD_DEVICE int block_y() { return blockIdx.y; }
SIMSD_DEVICE int block_z() { return blockIdx.z; }
SIMSD_DEVICE int blocks_x() { return gridDim.x; }
SIMSD_DEVICE int blocks_y() { return gridDim.y; }

// Hands out the block's shared memory, whose size the launch gave; every thread makes the same calls. There is no
// static shared memory, so that the emulation can watch the bounds of every array.
class Shared {
  public:
    template <typename T>
    SIMSD_DEVICE T* take(int count) {
        extern __shared__ unsigned char simsd_shared_memory[] alignas(128);
        T* array = reinterpret_cast<T*>(simsd_shared_memory + used_);
        used_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
        return array;
    }

  private:
    int used_ = 0;
};

// Barriers. Writes before one are seen by the block's (the warp's) other threads after it.
SIMSD_DEVICE void block_barrier() { __syncthreads(); }
SIMSD_DEVICE bool block_any(bool value) { return __syncthreads_or(value); }
SIMSD_DEVICE int block_count(bool value) { return __syncthreads_count(value); }
SIMSD_DEVICE void warp_barrier() { __syncwarp(); }

// Values of the warp's other lanes. `T` has 4 or 8 bytes.
template <typename T>
SIMSD_DEVICE T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <typename T>
SIMSD_DEVICE T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>  // from lane - delta; the first `delta` lanes keep their own
SIMSD_DEVICE T shuffle_up(T value, int delta) {
    return __shfl_up_sync(0xffffffffu, value, delta);
}
template <typename T>  // from lane + delta; the last `delta` lanes keep their own
SIMSD_DEVICE T shuffle_down(T value, int delta) {
    return __shfl_down_sync(0xffffffffu, value, delta);
}
SIMSD_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
SIMSD_DEVICE bool warp_any(bool value) { return __any_sync(0xffffffffu, value); }
SIMSD_DEVICE bool warp_all(bool value) { return __all_sync(0xffffffffu, value); }
// The largest and the smallest of the lanes' numbers, in one instruction.
SIMSD_DEVICE int32_t lanes_max(int32_t value) { return __reduce_max_sync(0xffffffffu, value); }
SIMSD_DEVICE int32_t lanes_min(int32_t value) { return __reduce_min_sync(0xffffffffu, value); }

// Global memory. Addresses are 16-byte aligned. `load_16` is for data that the kernel does not write, `load_16_written`
// for data that it does.
SIMSD_DEVICE Bytes16 load_16(const void* address) {
    Bytes16 out;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.words[0]), "=r"(out.words[1]), "=r"(out.words[2]), "=r"(out.words[3])
                 : "l"(address));
    return out;
}
SIMSD_DEVICE Bytes16 load_16_written(const void* address) {
    const uint4 value = *reinterpret_cast<const uint4*>(address);
    return {{value.x, value.y, value.z, value.w}};
}
SIMSD_DEVICE void store_16(void* address, const Bytes16& value) {
    *reinterpret_cast<uint4*>(address) = make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
}
// Reads past this multiprocessor's cache what other blocks wrote before a `device_fence` of theirs.
template <typename T>
SIMSD_DEVICE T load_fresh(const T* address) {
    return __ldcg(address);
}

// Atomics on global or shared memory; they return what was there.
template <typename T>  // int32_t, uint32_t, unsigned long long, float
SIMSD_DEVICE T atomic_add(T* address, T value) {
    return atomicAdd(address, value);
}
template <typename T>  // int32_t, uint32_t, unsigned long long, long long
SIMSD_DEVICE T atomic_max(T* address, T value) {
    return atomicMax(address, value);
}
template <typename T>
SIMSD_DEVICE T atomic_min(T* address, T value) {
    return atomicMin(address, value);
}
template <typename T>  // int32_t, uint32_t, unsigned long long
SIMSD_DEVICE T atomic_or(T* address, T value) {
    return atomicOr(address, value);
}
template <typename T>  // int32_t, uint32_t, unsigned long long: writes `desired` where `expected` stands
SIMSD_DEVICE T atomic_compare_exchange(T* address, T expected, T desired) {
    return atomicCAS(address, expected, desired);
}
// This thread's writes before it are seen by other blocks that see a later write or atomic of its.
SIMSD_DEVICE void device_fence() { __threadfence(); }
// Waits until another block has raised *address to `least` or more, and returns it: what that block wrote before its
// `device_fence` is seen then, by the block's other threads after a barrier. The other block must be one that runs
// already and waits for nothing that this one has yet to do.
SIMSD_DEVICE int32_t wait_for(const int32_t* address, int32_t least) {
    for (;;) {
        int32_t value;
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
        if (value >= least) return value;
        __nanosleep(50);
    }
}

// Of global memory, as an assignment does it; the emulation counts the bytes.
template <typename T>
SIMSD_DEVICE T load_global(const T* address) {
    return *address;
}
template <typename T>
SIMSD_DEVICE void store_global(T* address, const T& value) {
    *address = value;
}

SIMSD_DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, without waiting; zeros where not `valid` (then `from` is not read). Copies are
// grouped by `copy_commit`; `copy_wait<N>` waits for all groups of this thread but the last N. Other threads see them
// after a barrier behind that.
SIMSD_DEVICE void copy_async_16(void* to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
// 4 bytes.
SIMSD_DEVICE void copy_async_4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
SIMSD_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
SIMSD_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory, one to a register of every lane (warp). Lane l points at
// row l % 8 (16 bytes, aligned) of matrix l / 8. Register i of lane t receives elements 2 (t % 4) and 2 (t % 4) + 1 of
// row t / 4 of matrix i; transposed: of column t / 4. BYTES past `row`: an address with a constant costs no operation.
template <int BYTES = 0>
SIMSD_DEVICE void load_matrices(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)), "n"(BYTES)
                 : "memory");
}
template <int BYTES = 0>
SIMSD_DEVICE void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row)), "n"(BYTES)
                 : "memory");
}

// c += a b for a of 16 x 16, b of 16 x 8 elements of type T, c of 16 x 8 floats (warp). With g = lane / 4, t = lane %
// 4:
//   a[0]: row g,     columns 2t, 2t + 1        b[0]: rows 2t, 2t + 1,         column g
//   a[1]: row g + 8, columns 2t, 2t + 1        b[1]: rows 2t + 8, 2t + 9,     column g
//   a[2]: row g,     columns 2t + 8, 2t + 9    c[0], c[1]: row g,     columns 2t, 2t + 1
//   a[3]: row g + 8, columns 2t + 8, 2t + 9    c[2], c[3]: row g + 8, columns 2t, 2t + 1
template <typename T>
SIMSD_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
SIMSD_DEVICE void multiply_add<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
SIMSD_DEVICE void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The four int8 of a word, from its lowest byte on, as elements of type T: two in `low`, two in `high`.
template <typename T>
SIMSD_DEVICE void widen(uint32_t& low, uint32_t& high, uint32_t bytes);
// 128 + b % 128 less 128, or 256 of a negative b: all of these are exact. Each `lop3` is (spread & mask) | base, of
// which the compiler would make two.
template <>
SIMSD_DEVICE void widen<Bfloat16>(uint32_t& low, uint32_t& high, uint32_t bytes) {
    const auto two = [](uint32_t spread) {
        uint32_t plus, minus, out;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(plus) : "r"(spread), "r"(0x007f007fu), "r"(0x43004300u));
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(minus) : "r"(spread), "r"(0x00800080u), "r"(0xc300c300u));
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(plus), "r"(0x3f803f80u), "r"(minus));
        return out;
    };
    low = two(__byte_perm(bytes, 0, 0x4140));
    high = two(__byte_perm(bytes, 0, 0x4342));
}
// 1024 + (b + 128) less 1152, exact too.
template <>
SIMSD_DEVICE void widen<Float16>(uint32_t& low, uint32_t& high, uint32_t bytes) {
    const uint32_t unsigned_bytes = bytes ^ 0x80808080u;
    const auto two = [](uint32_t shifted) {
        uint32_t out;
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(shifted), "r"(0x64806480u));
        return out;
    };
    low = two(__byte_perm(unsigned_bytes, 0x64646464u, 0x4140));
    high = two(__byte_perm(unsigned_bytes, 0x64646464u, 0x4342));
}

// Arithmetic. The first two are the special function unit's, good to about 2 units in the last place; the others are
// libdevice's.
SIMSD_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
SIMSD_DEVICE float reciprocal_fast(float x) { return __frcp_rn(x); }
SIMSD_DEVICE float exponential(float x) { return expf(x); }
SIMSD_DEVICE float logarithm(float x) { return logf(x); }
SIMSD_DEVICE float log_one_plus(float x) { return log1pf(x); }
SIMSD_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }
SIMSD_DEVICE float round_up(float x) { return ceilf(x); }
SIMSD_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }  // of a NaN and a number the number
SIMSD_DEVICE double exponential(double x) { return exp(x); }
SIMSD_DEVICE double logarithm(double x) { return log(x); }
SIMSD_DEVICE double log_one_plus(double x) { return log1p(x); }
// Products and sums that are rounded one by one, where fusing them would change a documented result.
SIMSD_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
SIMSD_DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }
SIMSD_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SIMSD_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
SIMSD_DEVICE double sum(double a, double b) { return __dadd_rn(a, b); }

// Words as memory has them, of one float or two 16-bit numbers of type T. The larger numbers, of a NaN and a number the
// number; and all ones where numbers are equal.
template <typename T>
SIMSD_DEVICE uint32_t word_max(uint32_t a, uint32_t b);
template <>
SIMSD_DEVICE uint32_t word_max<float>(uint32_t a, uint32_t b) {
    return float_as_bits(fmaxf(bits_as_float(a), bits_as_float(b)));
}
template <>
SIMSD_DEVICE uint32_t word_max<Bfloat16>(uint32_t a, uint32_t b) {
    uint32_t out;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}
template <>
SIMSD_DEVICE uint32_t word_max<Float16>(uint32_t a, uint32_t b) {
    uint32_t out;
    asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}
template <typename T>
SIMSD_DEVICE uint32_t word_equal(uint32_t a, uint32_t b);
template <>
SIMSD_DEVICE uint32_t word_equal<float>(uint32_t a, uint32_t b) {
    return bits_as_float(a) == bits_as_float(b) ? 0xffffffffu : 0u;
}
template <>
SIMSD_DEVICE uint32_t word_equal<Float16>(uint32_t a, uint32_t b) {
    uint32_t out;
    asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}
template <>
SIMSD_DEVICE uint32_t word_equal<Bfloat16>(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
    uint32_t out;
    asm("set.eq.u32.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
#else
    const uint32_t low = word_equal<float>(a << 16, b << 16);
    const uint32_t high = word_equal<float>(a & 0xffff0000u, b & 0xffff0000u);
    return (low & 0xffffu) | (high & 0xffff0000u);
#endif
}
SIMSD_DEVICE int count_bits(uint32_t x) { return __popc(x); }
SIMSD_DEVICE int count_bits(uint64_t x) { return __popcll(x); }
// Index of the lowest set bit, -1 for none.
SIMSD_DEVICE int lowest_bit(uint32_t x) { return __ffs(x) - 1; }
SIMSD_DEVICE int lowest_bit(uint64_t x) { return __ffsll(x) - 1; }

// For values that a GPU trusts: the emulation ends the launch with `message` where they do not hold.
SIMSD_DEVICE void expect(bool, const char*) {}

}  // namespace simsd

#endif
