// CUDA on the CPU, for tests: csrc/cuda compiled by the host compiler with -DFACENET_EXT_EMULATED includes this instead of the
// CUDA headers. Every CUDA thread is a fiber; all blocks of the grid are resident, as in a cooperative launch. What runs here is
// compiled with the sanitizers; the scheduler and the exchange between lanes (emulator.cpp) are not, so that ThreadSanitizer
// sees exactly the kernel's own accesses and the orderings that CUDA promises (and initcheck.cpp what they read):
//
//   __syncthreads, __syncwarp, grid_sync   order memory between the threads that take part
//   shuffles, ballots, mma, atomics        order nothing
//   cp.async                               writes at once (early) or when waited for (late)
//
// Not emulated: clusters, TMA, wgmma, the memory model's reorderings, the rounding of tensor cores, time.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <type_traits>

#include "triplet.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Index3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// Set by the scheduler before it enters a fiber.
extern Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

enum class Schedule { ascending = 0, descending = 1, random = 2, one_warp_ahead = 3 };
struct Config {
  Schedule schedule = Schedule::ascending;
  uint64_t seed = 1;
  bool late_copies = true;        // cp.async lands when waited for; false: at once
  int64_t max_shared_bytes = 99 * 1024;
};
extern Config config;

struct Site {
  const char* file;
  int line;
  const char* what;
};

// Runs body() once per thread of the grid.
void run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body);
[[noreturn]] void fail(Site site, const char* message);
uint8_t* shared_memory();

// Memory that no kernel may read before it has written it, until it is forgotten. Nothing, but in the build with initcheck.cpp.
void fresh(void* memory, int64_t bytes);
void forget();

void sync_block(Site site);
void sync_grid(Site site);
void arrive_grid(Site site);
void wait_grid(Site site);
void sync_warp(uint32_t mask, Site site);
void maybe_switch();  // a place where another thread may get its turn

// Every lane of `mask` gives `words` 8-byte words; returns [32][4] words of all lanes, valid until the lane's next exchange.
const uint64_t (*exchange(uint32_t mask, const uint64_t* mine, int words, Site site))[4];
void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b, Site site);

// cp.async of the running thread
struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};
struct Copies {
  Copy pending[256];
  int count = 0, group = 0;
};
Copies& copies();

float float_from_half(uint16_t bits);
uint16_t half_from_float(float x);

inline void copy_now(const Copy& copy) {
  if (copy.bytes == 16) *static_cast<uint4*>(copy.to) = *static_cast<const uint4*>(copy.from);
  else *static_cast<uint32_t*>(copy.to) = *static_cast<const uint32_t*>(copy.from);
}

template <class T>
uint64_t to_word(T x) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  __builtin_memcpy(&word, &x, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T x;
  __builtin_memcpy(&x, &word, sizeof(T));
  return x;
}

template <class T, class Op>
T atomic_update(T* p, Op op) {
  maybe_switch();
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, op(old), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace emu

#define EMU_SITE(what) \
  emu::Site { file, line, what }
#define EMU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMU_WHERE) { emu::sync_block(EMU_SITE("__syncthreads")); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, EMU_WHERE) { emu::sync_warp(mask, EMU_SITE("__syncwarp")); }

template <class T>
T emu_shuffle(uint32_t mask, T x, int from, emu::Site site) {
  const uint64_t word = emu::to_word(x);
  const auto all = emu::exchange(mask, &word, 1, site);
  if (from >= 0 && from < 32 && (mask >> from & 1) == 0) emu::fail(site, "reads a lane that is not in the mask");
  return from >= 0 && from < 32 ? emu::from_word<T>(all[from][0]) : x;
}
template <class T>
T __shfl_sync(uint32_t mask, T x, int lane, EMU_WHERE) {
  return emu_shuffle(mask, x, lane & 31, EMU_SITE("__shfl_sync"));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T x, int bits, EMU_WHERE) {
  return emu_shuffle(mask, x, int(threadIdx.x % 32) ^ bits, EMU_SITE("__shfl_xor_sync"));
}
template <class T>
T __shfl_down_sync(uint32_t mask, T x, int by, EMU_WHERE) {
  return emu_shuffle(mask, x, int(threadIdx.x % 32) + by, EMU_SITE("__shfl_down_sync"));
}
template <class T>
T __shfl_up_sync(uint32_t mask, T x, int by, EMU_WHERE) {
  return emu_shuffle(mask, x, int(threadIdx.x % 32) - by, EMU_SITE("__shfl_up_sync"));
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, EMU_WHERE) {
  const uint64_t word = predicate;
  const auto all = emu::exchange(mask, &word, 1, EMU_SITE("__ballot_sync"));
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (mask >> lane & 1 & uint32_t(all[lane][0])) << lane;
  return votes;
}

template <class T>
T __reduce_add_sync(uint32_t mask, T x, EMU_WHERE) {
  const uint64_t word = emu::to_word(x);
  const auto all = emu::exchange(mask, &word, 1, EMU_SITE("__reduce_add_sync"));
  uint32_t sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += mask >> lane & 1 ? uint32_t(all[lane][0]) : 0;
  return T(sum);
}
template <class T>
T __reduce_max_sync(uint32_t mask, T x, EMU_WHERE) {
  const uint64_t word = emu::to_word(x);
  const auto all = emu::exchange(mask, &word, 1, EMU_SITE("__reduce_max_sync"));
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) x = std::max(x, emu::from_word<T>(all[lane][0]));
  }
  return x;
}

inline uint32_t __match_any_sync(uint32_t mask, int value, EMU_WHERE) {
  const uint64_t word = uint32_t(value);
  const auto all = emu::exchange(mask, &word, 1, EMU_SITE("__match_any_sync"));
  uint32_t equal = 0;
  for (int lane = 0; lane < 32; ++lane) equal |= (mask >> lane & 1 & uint32_t(all[lane][0] == word)) << lane;
  return equal;
}

template <class T>
T atomicAdd(T* p, T x) {
  return emu::atomic_update(p, [&](T old) { return old + x; });
}
template <class T>
T atomicMin(T* p, T x) {
  return emu::atomic_update(p, [&](T old) { return x < old ? x : old; });
}
template <class T>
T atomicMax(T* p, T x) {
  return emu::atomic_update(p, [&](T old) { return old < x ? x : old; });
}

inline int atomicCAS(int* p, int expected, int x) {
  return emu::atomic_update(p, [&](int old) { return old == expected ? x : old; });
}

inline uint32_t __float_as_uint(float x) { return emu::from_word<uint32_t>(emu::to_word(x)); }
inline float __uint_as_float(uint32_t x) { return emu::from_word<float>(emu::to_word(x)); }
inline long long __double_as_longlong(double x) { return emu::from_word<long long>(emu::to_word(x)); }
inline double __longlong_as_double(long long x) { return emu::from_word<double>(emu::to_word(x)); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

#define FACENET_EXT_SHARED_MEMORY(name) uint8_t* name = emu::shared_memory()

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(void const volatile*, size_t);
extern "C" void __asan_unpoison_memory_region(void const volatile*, size_t);
#endif

namespace facenet_ext::cuda {

constexpr int kSharedRedzone = 16;  // between two shared arrays; AddressSanitizer reports who reads or writes it

// Called for each array and its redzone; the array is made readable again because the phase before laid memory out differently.
inline void poison_shared([[maybe_unused]] void* array, [[maybe_unused]] int64_t bytes, [[maybe_unused]] void* redzone) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(array, size_t(bytes));
  __asan_poison_memory_region(redzone, kSharedRedzone);
#endif
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a) * b >> 32); }

inline int thread_index() { return int(threadIdx.x); }
inline int block_index() { return int(blockIdx.x); }
inline int grid_size() { return int(gridDim.x); }

inline void grid_sync(EMU_WHERE) { emu::sync_grid(EMU_SITE("grid_sync")); }
inline void grid_arrive(uint32_t*, EMU_WHERE) { emu::arrive_grid(EMU_SITE("grid_arrive")); }
inline void grid_wait(const uint32_t*, EMU_WHERE) { emu::wait_grid(EMU_SITE("grid_wait")); }

template <class T>
T load_relaxed(const T* p) {
  emu::maybe_switch();
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}

template <class T>
void store_relaxed(T* p, T x) {
  emu::maybe_switch();
  __atomic_store_n(p, x, __ATOMIC_RELAXED);
}

inline void prefetch(const void*) {}

inline uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const uint8_t*>(p) - emu::shared_memory());
}
inline uint32_t* shared_words(uint32_t address) { return reinterpret_cast<uint32_t*>(emu::shared_memory() + address); }
template <class T>
void count_if_less(int32_t& count, T a, T b) {
  count += a < b ? 1 : 0;
}
template <class T>
void count_if_equal(int32_t& count, T a, T b) {
  count += a == b ? 1 : 0;
}
inline void count_halves_if_less(uint32_t& counts, uint32_t a, uint32_t b) {
  counts += ((a & 0xffff) < (b & 0xffff) ? 1 : 0) + (a >> 16 < b >> 16 ? 0x10000 : 0);
}
inline int32_t count_of_half(uint32_t counts, int half) { return counts >> 16 * half & 0xffff; }
inline void atomic_min_if_less(uint64_t* p, uint64_t x, uint32_t a, uint32_t b) {
  if (a < b) atomicMin(p, x);
}
inline void add_if_less(uint32_t& at, float t, float d, uint32_t bytes) { at += t < d ? bytes : 0; }
inline float at_least_zero(float x) { return x < 0 ? 0 : x; }
template <int kBytes>
void search_step(uint32_t& at, float d) {
  if (*reinterpret_cast<const float*>(emu::shared_memory() + at + kBytes) < d) at += kBytes;
}

inline void emu_cp_async(void* to, const void* from, int bytes, emu::Site site) {
  emu::Copies& copies = emu::copies();
  const emu::Copy copy{to, from, bytes, copies.group};
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    emu::fail(site, "address is not a multiple of the size");
  }
  if (!emu::config.late_copies) return emu::copy_now(copy);
  if (copies.count == int(std::size(copies.pending))) emu::fail(site, "more copies in flight than the emulation holds");
  copies.pending[copies.count++] = copy;
}
inline void cp_async_16(void* to, const void* from, EMU_WHERE) { emu_cp_async(to, from, 16, EMU_SITE("cp.async of 16")); }
inline void cp_async_4(void* to, const void* from, EMU_WHERE) { emu_cp_async(to, from, 4, EMU_SITE("cp.async of 4")); }
inline void cp_async_commit() { ++emu::copies().group; }
template <int kStillInFlight>
void cp_async_wait() {
  emu::Copies& copies = emu::copies();
  int kept = 0;
  for (int i = 0; i < copies.count; ++i) {
    if (copies.pending[i].group < copies.group - kStillInFlight) {
      emu::copy_now(copies.pending[i]);
    } else {
      copies.pending[kept++] = copies.pending[i];
    }
  }
  copies.count = kept;
}

inline void mma_16x8x16_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_WHERE) {
  emu::mma_16x8x16(c, a, b, EMU_SITE("mma"));
}

inline uint16_t half_from_float(float x) { return emu::half_from_float(x); }
// Also where the compiler contracts what is added to it.
template <class T>
T rounded_product(T x, T y) {
  T product = x * y;
  asm volatile("" : "+x"(product));
  return product;
}
inline float float_from_half(uint16_t bits) { return emu::float_from_half(bits); }

inline int64_t max_shared_bytes() { return emu::config.max_shared_bytes; }

// The launch is over when this returns: a stream of its own is not emulated.
template <class Problem>
Status launch_cooperative(void (*kernel)(Problem), const char* name, unsigned blocks, unsigned threads, size_t shared, void*,
                          Problem problem) {
  if (blocks == 0 || threads == 0 || threads > 1024) return {Code::cuda, name, "invalid configuration argument"};
  if (int64_t(shared) > emu::config.max_shared_bytes) return {Code::cuda, name, "too much shared memory"};
  emu::run(blocks, threads, shared, [&] { kernel(problem); });
  return {};
}
inline Status fill_zero(void* memory, int64_t bytes, void*) {
  if (memory != nullptr) memset(memory, 0, size_t(bytes));
  return {};
}

}  // namespace facenet_ext::cuda
