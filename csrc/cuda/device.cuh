// Device primitives: everything that is not plain C++ and that a CPU cannot run by itself stands here, in functions small
// enough to have a twin in tests/emulated/emulated_cuda.h, which defines the same names (and CUDA's own: __syncthreads,
// __shfl_sync, atomicMin, …) for the host compiler.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "triplet.h"

#ifdef FACENET_EXT_EMULATED
#include "emulated_cuda.h"
#else

#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The block's dynamic shared memory. Phases share it one after the other; each lays it out with a Carver.
#define FACENET_EXT_SHARED_MEMORY(name) extern __shared__ __align__(16) uint8_t name[]

namespace facenet_ext::cuda {

constexpr int kSharedRedzone = 0;  // emulation: bytes between two shared arrays, poisoned
__host__ __device__ inline void poison_shared(void*, int64_t, void*) {}

// All threads of the grid; needs a cooperative launch. Orders every access to global memory before it against those after it.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// The same barrier in two halves: what is before grid_arrive() is ordered before what is behind grid_wait(); between them a
// thread touches nothing that others write before theirs or read behind it. `ticket` is the block's, in shared memory.
__device__ __forceinline__ void grid_arrive(uint32_t* ticket) {
  const uint32_t mine = cooperative_groups::this_grid().barrier_arrive();
  if (threadIdx.x == 0) *ticket = mine;  // that of the thread which waits for all
}
__device__ __forceinline__ void grid_wait(const uint32_t* ticket) {
  cooperative_groups::this_grid().barrier_wait(threadIdx.x == 0 ? *ticket : 0u);
}

// threadIdx.x, blockIdx.x and gridDim.x, read anew: what is derived from them need not wait in registers while a tile's
// products fill them. (The compiler would hoist every phase's addresses out of the loop over passes, and spill them.)
// None is negative: divisions by powers of two are shifts.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  __builtin_assume(index >= 0);
  return index;
}
__device__ __forceinline__ int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  __builtin_assume(index >= 0);
  return index;
}
__device__ __forceinline__ int grid_size() {
  int size;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(size));
  __builtin_assume(size > 0);
  return size;
}

// A value that other threads change with atomics meanwhile: some value it had, never torn, never from a stale L1 line.
template <class T>
__device__ __forceinline__ T load_relaxed(const T* p) {
  return *const_cast<const volatile T*>(p);
}

// Written by several threads at a time, all of them the same value.
template <class T>
__device__ __forceinline__ void store_relaxed(T* p, T x) {
  *const_cast<volatile T*>(p) = x;
}

// What will be read soon.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Addresses of shared memory in one register, for loops that compilers address less well.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t* shared_words(uint32_t address) {
  return static_cast<uint32_t*>(__cvta_shared_to_generic(address));
}
// count += a < b, count += a == b: a comparison and an addition, where compilers add, then choose.
__device__ __forceinline__ void count_if_less(int32_t& count, int32_t a, int32_t b) {
  asm("{ .reg .pred q; setp.lt.s32 q, %1, %2; @q add.s32 %0, %0, 1; }" : "+r"(count) : "r"(a), "r"(b));
}
__device__ __forceinline__ void count_if_less(int32_t& count, uint32_t a, uint32_t b) {
  asm("{ .reg .pred q; setp.lt.u32 q, %1, %2; @q add.s32 %0, %0, 1; }" : "+r"(count) : "r"(a), "r"(b));
}
__device__ __forceinline__ void count_if_less(int32_t& count, int64_t a, int64_t b) {
  asm("{ .reg .pred q; setp.lt.s64 q, %1, %2; @q add.s32 %0, %0, 1; }" : "+r"(count) : "l"(a), "l"(b));
}
__device__ __forceinline__ void count_if_less(int32_t& count, uint64_t a, uint64_t b) {
  asm("{ .reg .pred q; setp.lt.u64 q, %1, %2; @q add.s32 %0, %0, 1; }" : "+r"(count) : "l"(a), "l"(b));
}
__device__ __forceinline__ void count_if_equal(int32_t& count, int64_t a, int64_t b) {
  asm("{ .reg .pred q; setp.eq.s64 q, %1, %2; @q add.s32 %0, %0, 1; }" : "+r"(count) : "l"(a), "l"(b));
}
__device__ __forceinline__ void count_if_equal(int32_t& count, int32_t a, int32_t b) {
  asm("{ .reg .pred q; setp.eq.s32 q, %1, %2; @q add.s32 %0, %0, 1; }" : "+r"(count) : "r"(a), "r"(b));
}
// Two counts in one word: each += a < b of its half, for numbers of 15 bits below 0x7c00, which order as the half floats that
// have their bits. Two instructions for two comparisons.
__device__ __forceinline__ void count_halves_if_less(uint32_t& counts, uint32_t a, uint32_t b) {
  asm("{ .reg .b32 t; set.lt.f16x2.f16x2 t, %1, %2; add.rn.f16x2 %0, %0, t; }" : "+r"(counts) : "r"(a), "r"(b));
}
__device__ __forceinline__ int32_t count_of_half(uint32_t counts, int half) {
  return __half2int_rz(__ushort_as_half(static_cast<uint16_t>(counts >> 16 * half)));
}
// at += bytes if t < d. Two instructions, where compilers would rather select and add.
__device__ __forceinline__ void add_if_less(uint32_t& at, float t, float d, uint32_t bytes) {
  asm volatile("{ .reg .pred q; setp.lt.f32 q, %1, %2; @q add.u32 %0, %0, %3; }" : "+r"(at) : "f"(t), "f"(d), "r"(bytes));
}
// The minimum with x, where a < b: no branch, no answer.
__device__ __forceinline__ void atomic_min_if_less(uint64_t* p, uint64_t x, uint32_t a, uint32_t b) {
  asm volatile("{ .reg .pred q; setp.lt.u32 q, %2, %3; @q red.global.min.u64 [%0], %1; }"
               :
               : "l"(p), "l"(x), "r"(a), "r"(b)
               : "memory");
}
// One step of a search: at += kBytes if the float kBytes behind `at` is less than d. Three instructions.
template <int kBytes>
__device__ __forceinline__ void search_step(uint32_t& at, float d) {
  asm volatile("{ .reg .pred q; .reg .f32 t; ld.shared.f32 t, [%0+%2]; setp.lt.f32 q, t, %1; @q add.u32 %0, %0, %2; }"
               : "+r"(at)
               : "f"(d), "n"(kBytes)
               : "memory");
}

// The larger one of x and 0; NaN stays.
__device__ __forceinline__ float at_least_zero(float x) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
  return x;
#else
  return x < 0 ? 0 : x;
#endif
}

// 16 bytes from global to shared memory; done after a cp_async_wait of the same thread, seen by others after a barrier.
__device__ __forceinline__ void cp_async_16(void* to_shared, const void* from_global) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from_global) : "memory");
#else
  *static_cast<uint4*>(to_shared) = *static_cast<const uint4*>(from_global);
#endif
}
// The same of 4 bytes, for rows that do not lie on 16.
__device__ __forceinline__ void cp_async_4(void* to_shared, const void* from_global) {
#if __CUDA_ARCH__ >= 800
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from_global) : "memory");
#else
  *static_cast<uint32_t*>(to_shared) = *static_cast<const uint32_t*>(from_global);
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kStillInFlight>  // of the groups that this thread committed, all but the youngest kStillInFlight have landed
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kStillInFlight) : "memory");
#endif
}

// c[16 x 8] += a[16 x 16] * b[16 x 8], products exact, sums in float32. With g = lane / 4 and t = lane % 4 (PTX ISA):
//   a: {(g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}   b: {(2t.., g), (2t + 8.., g)}   two elements in each
//   c: {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}
__device__ __forceinline__ void mma_16x8x16_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // the launcher sends such a device to Math::simt32
#endif
}

// Asks nothing of the device that could wait for it; 48 KB if it cannot be asked.
inline int64_t max_shared_bytes() {
  int device = 0, bytes = 48 * 1024;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Enqueues kernel(problem) on `stream`, all blocks resident at a time so that grid_sync() works.
template <class Problem>
Status launch_cooperative(void (*kernel)(Problem), const char* name, unsigned blocks, unsigned threads, size_t shared,
                          void* stream, Problem problem) {
  void* parameters[] = {&problem};
  // The limit belongs to the function, not to the launch: another thread must not lower it in between.
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(max_shared_bytes()));
  if (error == cudaSuccess) {
    error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), parameters,
                                        shared, static_cast<cudaStream_t>(stream));
  }
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // the error is reported here, not by the next call of whoever shares the device
  return {Code::cuda, name, cudaGetErrorString(error)};
}
inline Status fill_zero(void* memory, int64_t bytes, void* stream) {
  if (memory == nullptr || bytes == 0) return {};
  const cudaError_t error = cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return {};
  cudaGetLastError();
  return {Code::cuda, "fill_zero", cudaGetErrorString(error)};
}

// A product that is rounded before anything is added to it. Of x f - y f the compiler would round one product only, and equal
// rows were no longer at distance 0.
__device__ __forceinline__ float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double rounded_product(double x, double y) { return __dmul_rn(x, y); }

__device__ __forceinline__ uint16_t half_from_float(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ float float_from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

}  // namespace facenet_ext::cuda
#endif  // FACENET_EXT_EMULATED

namespace facenet_ext::cuda {

constexpr uint32_t kWholeWarp = 0xffffffffu;

__device__ __forceinline__ double at_least_zero(double x) { return x < 0 ? 0 : x; }

// An element of half precision, as bits: no vendor type leaves this header. One kernel serves float16 and bfloat16, and asks
// which it is where it reads the input.
struct Half {
  uint16_t bits;
};
__device__ __forceinline__ float widen(float x, bool) { return x; }
__device__ __forceinline__ double widen(double x, bool) { return x; }
__device__ __forceinline__ float widen(Half x, bool is_bfloat) {
  return is_bfloat ? __uint_as_float(uint32_t(x.bits) << 16) : float_from_half(x.bits);
}

// Bits whose unsigned order is the order of values that are >= +0; NaN comes last.
__device__ __forceinline__ uint32_t ordered_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint64_t ordered_bits(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
__device__ __forceinline__ float from_ordered_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ double from_ordered_bits(uint64_t bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

template <class T>
__device__ __forceinline__ T
warp_sum(T x) {  // the same bits in every lane: both sides of an exchange add the same two numbers
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
  for (int step = 16; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, x, step);
    x = other > x ? other : x;
  }
  return x;
}
#if __CUDA_ARCH__ >= 800 || defined(FACENET_EXT_EMULATED)
// One instruction for integers.
__device__ __forceinline__ int32_t warp_sum(int32_t x) { return __reduce_add_sync(kWholeWarp, x); }
__device__ __forceinline__ uint32_t warp_sum(uint32_t x) { return __reduce_add_sync(kWholeWarp, x); }
__device__ __forceinline__ int32_t warp_max(int32_t x) { return __reduce_max_sync(kWholeWarp, x); }
__device__ __forceinline__ uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kWholeWarp, x); }
__device__ __forceinline__ uint64_t warp_max(uint64_t x) {
  const uint32_t high = warp_max(static_cast<uint32_t>(x >> 32));
  const uint32_t low = warp_max(x >> 32 == high ? static_cast<uint32_t>(x) : 0u);
  return uint64_t(high) << 32 | low;
}
#endif

__device__ __forceinline__ uint64_t atomic_min(uint64_t* p, uint64_t x) {
  return atomicMin(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}
__device__ __forceinline__ uint32_t atomic_max(uint32_t* p, uint32_t x) { return atomicMax(p, x); }
__device__ __forceinline__ uint64_t atomic_max(uint64_t* p, uint64_t x) {
  return atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}
__device__ __forceinline__ uint64_t atomic_add(uint64_t* p, uint64_t x) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}

// N neighbouring elements that one load brings. Their address is a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
};

// Hands out pieces of one buffer. Host (null base: sizes) and device run the same sequence of take()s.
struct Carver {
  uint8_t* base;
  int64_t used = 0;
  bool shared = false;

  template <class T>
  __host__ __device__ T* take(int64_t count) {
    used = (used + 15) / 16 * 16;
    T* piece = reinterpret_cast<T*>(base + used);
    used += count * static_cast<int64_t>(sizeof(T));
    if (shared) {
      used = (used + 15) / 16 * 16;
      if (base != nullptr) poison_shared(piece, count * static_cast<int64_t>(sizeof(T)), base + used);
      used += kSharedRedzone;
    }
    return piece;
  }
};

}  // namespace facenet_ext::cuda
