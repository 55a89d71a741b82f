// What compute-sanitizer's initcheck is on a GPU: kernels compiled with ThreadSanitizer's calls before every access, and these
// in the place of its runtime. They know what has been written of the memory that a call gets uninitialised (emu::fresh) and
// stop at a read of anything else there, used or not. Not instrumented itself; one thread.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace emu {
namespace {

struct Fresh {
  uintptr_t begin, end;
  std::vector<bool> written;
};
std::vector<Fresh> all;
uintptr_t lowest = UINTPTR_MAX, highest = 0;

Fresh* find(uintptr_t address) {
  if (address < lowest || address >= highest) return nullptr;
  for (Fresh& one : all) {
    if (address >= one.begin && address < one.end) return &one;
  }
  return nullptr;
}
void write(void* p, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  Fresh* const one = find(address);
  for (size_t i = 0; one != nullptr && i < bytes && address + i < one->end; ++i) one->written[address - one->begin + i] = true;
}
void read(void* p, size_t bytes, void* caller) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const Fresh* const one = find(address);
  for (size_t i = 0; one != nullptr && i < bytes && address + i < one->end; ++i) {
    if (one->written[address - one->begin + i]) continue;
    fprintf(stderr, "initcheck: %zu bytes are read, and byte %zu has never been written; code 0x%zx\n", bytes, i,
            reinterpret_cast<size_t>(caller) - 1);
    exit(67);
  }
}

}  // namespace

void fresh(void* memory, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  if (memory == nullptr || bytes <= 0) return;
  all.push_back({begin, begin + uintptr_t(bytes), std::vector<bool>(size_t(bytes))});
  lowest = begin < lowest ? begin : lowest;
  highest = all.back().end > highest ? all.back().end : highest;
}
void forget() {
  all.clear();
  lowest = UINTPTR_MAX;
  highest = 0;
}

}  // namespace emu

#define CALLER __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* p, size_t bytes) { emu::read(p, bytes, CALLER); }
void __tsan_write_range(void* p, size_t bytes) { emu::write(p, bytes); }
#define ACCESS(bytes)                                                             \
  void __tsan_read##bytes(void* p) { emu::read(p, bytes, CALLER); }               \
  void __tsan_write##bytes(void* p) { emu::write(p, bytes); }                     \
  void __tsan_unaligned_read##bytes(void* p) { emu::read(p, bytes, CALLER); }     \
  void __tsan_unaligned_write##bytes(void* p) { emu::write(p, bytes); }           \
  void __tsan_volatile_read##bytes(void* p) { emu::read(p, bytes, CALLER); }      \
  void __tsan_volatile_write##bytes(void* p) { emu::write(p, bytes); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#define ATOMIC(bits)                                                                                                \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {                                \
    emu::read(const_cast<uint##bits##_t*>(p), bits / 8, CALLER);                                                    \
    return *p;                                                                                                      \
  }                                                                                                                 \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t x, int) {                             \
    emu::write(const_cast<uint##bits##_t*>(p), bits / 8);                                                           \
    *p = x;                                                                                                         \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile uint##bits##_t* p, uint##bits##_t* expected,             \
                                                  uint##bits##_t x, int, int) {                                     \
    emu::read(const_cast<uint##bits##_t*>(p), bits / 8, CALLER);                                                    \
    const bool same = *p == *expected;                                                                              \
    if (same) *p = x;                                                                                               \
    else *expected = *p;                                                                                            \
    return same;                                                                                                    \
  }
ATOMIC(32)
ATOMIC(64)
}
