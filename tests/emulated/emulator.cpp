// The scheduler behind emulated_cuda.h: fibers, barriers, exchanges between lanes. Compiled without sanitizers: what it does to
// memory is not the kernel's doing. It tells ThreadSanitizer which fiber runs and what each barrier orders, nothing else.
#include "emulated_cuda.h"

#include <sys/mman.h>
#include <unistd.h>

#include <vector>

#ifdef EMU_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#ifdef EMU_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(void const volatile*, size_t);
}
#endif

Index3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the running stack and goes on with another. Callee-saved registers are all that a call may expect to keep.
#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.text
.globl emu_switch
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emu {

Config config;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

enum class Wait { none, block, grid, warp, exchange, done };

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  unsigned block = 0, thread = 0;
  Wait wait = Wait::none;
  uint32_t mask = 0;
  Site site{};
  bool arrived = false;  // at a grid barrier, and has not waited for the others yet
  unsigned ticket = 0;   // which one
  uint64_t words[4];
  Copies copies;
};
struct Warp {
  uint64_t snapshot[2][32][4];
  unsigned exchanges = 0;  // completed; its parity names the snapshot
  char order[2];           // addresses that stand for a barrier's ordering, two in turn
  unsigned syncs = 0;
};
struct Block {
  uint8_t* shared = nullptr;
  unsigned arrived = 0, alive = 0, syncs = 0;
  char order[2];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Block> blocks;
std::vector<uint64_t> ready;  // a bit per fiber
unsigned running = 0, alive = 0, grid_arrived = 0, grid_syncs = 0, warp_ahead = 0;
char grid_order[2], launch_order, end_order;
Fiber host;
const std::function<void()>* kernel = nullptr;
uint64_t random_state = 1;

uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1dull >> 16;
}

void order_release([[maybe_unused]] char* address) {
#ifdef EMU_TSAN
  __tsan_release(address);
#endif
}
void order_acquire([[maybe_unused]] char* address) {
#ifdef EMU_TSAN
  __tsan_acquire(address);
#endif
}

void set_ready(unsigned i) {
  fibers[i].wait = Wait::none;
  ready[i / 64] |= uint64_t(1) << i % 64;
}
void clear_ready(unsigned i) { ready[i / 64] &= ~(uint64_t(1) << i % 64); }

int first_ready_from(unsigned start) {  // cyclic
  const unsigned words = unsigned(ready.size());
  unsigned word = start / 64;
  uint64_t bits = ready[word] & ~uint64_t(0) << start % 64;
  for (unsigned i = 0; i <= words; ++i) {
    if (bits != 0) return int(word * 64 + unsigned(__builtin_ctzll(bits)));
    word = (word + 1) % words;
    bits = ready[word];
  }
  return -1;
}
int last_ready() {
  for (size_t word = ready.size(); word-- > 0;) {
    if (ready[word] != 0) return int(word * 64 + 63 - unsigned(__builtin_clzll(ready[word])));
  }
  return -1;
}
int choose() {
  switch (config.schedule) {
    case Schedule::ascending: return first_ready_from(0);
    case Schedule::descending: return last_ready();
    case Schedule::random: return first_ready_from(unsigned(random_bits() % fibers.size()));
    default: break;
  }
  if (random_bits() % 256 == 0) warp_ahead = unsigned(random_bits() % (fibers.size() / 32));
  const uint32_t bits = uint32_t(ready[warp_ahead / 2] >> warp_ahead % 2 * 32);
  if (bits != 0) return int(warp_ahead * 32 + unsigned(__builtin_ctz(bits)));
  return first_ready_from(unsigned(random_bits() % fibers.size()));
}

void switch_to(Fiber& from, Fiber& to) {
#ifdef EMU_TSAN
  __tsan_switch_to_fiber(to.tsan, 1);  // 1: the switch orders nothing
#endif
#ifdef EMU_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, kStackBytes);
#endif
  emu_switch(&from.stack_pointer, to.stack_pointer);
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

const char* name(Wait wait) {
  switch (wait) {
    case Wait::block: return "a block barrier";
    case Wait::grid: return "a grid barrier";
    case Wait::warp: return "a warp barrier";
    case Wait::exchange: return "an exchange between lanes";
    default: return "nothing";
  }
}

[[noreturn]] void fail_deadlock() {
  fprintf(stderr, "EMULATION: no thread can go on:\n");
  const char* file = "";
  int line = 0, shown = 0;
  for (const Fiber& f : fibers) {
    if (f.wait == Wait::none || f.wait == Wait::done || (f.site.file == file && f.site.line == line) || ++shown > 20) continue;
    fprintf(stderr, "  block %u thread %u waits for %s at %s:%d\n", f.block, f.thread, name(f.wait), f.site.file, f.site.line);
    file = f.site.file;
    line = f.site.line;
  }
  _exit(66);
}

void resume_another() {  // the running fiber has set what it waits for
  Fiber& from = fibers[running];
  const int next = choose();
  if (next < 0) {
    if (alive != 0) fail_deadlock();
    switch_to(from, host);
    return;
  }
  if (unsigned(next) == running) return;
  running = unsigned(next);
  Fiber& to = fibers[running];
  switch_to(from, to);
}

void enter(unsigned i) {  // after a switch: fiber i runs
  running = i;
  threadIdx = {fibers[i].thread, 0, 0};
  blockIdx = {fibers[i].block, 0, 0};
}

void release_block(Block& block, unsigned index) {
  block.arrived = 0;
  ++block.syncs;
  for (unsigned t = 0; t < blockDim.x; ++t) {
    if (fibers[index * blockDim.x + t].wait == Wait::block) set_ready(index * blockDim.x + t);
  }
}

void fiber_main() {
#ifdef EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  const unsigned me = running;
  enter(me);
  order_acquire(&launch_order);
  (*kernel)();
  order_release(&end_order);
  Fiber& f = fibers[me];
  if (f.arrived) fail({"", 0, "grid_arrive"}, "a thread ends without waiting for the others");
  if (f.copies.count != 0) fail({"", 0, "cp.async"}, "a thread ends with copies that nobody waited for");
  f.wait = Wait::done;
  clear_ready(me);
  --alive;
  Block& block = blocks[f.block];
  --block.alive;
  if (block.arrived != 0) {
    for (const Fiber& other : fibers) {
      if (other.block == f.block && other.wait == Wait::block) fail(other.site, "a thread of the block has ended, others wait");
    }
  }
  if (grid_arrived != 0) {
    for (const Fiber& other : fibers) {
      if (other.wait == Wait::grid) fail(other.site, "a thread of the grid has ended, others wait");
    }
  }
  resume_another();
  __builtin_trap();
}

void pause(Wait wait, uint32_t mask, Site site) {
  const unsigned me = running;
  fibers[me].wait = wait;
  fibers[me].mask = mask;
  fibers[me].site = site;
  if (wait != Wait::none) clear_ready(me);
  resume_another();
  enter(me);
}

// Arrives with the lanes of `mask`; true for the last one, which completes the exchange for all.
bool arrive_warp(Wait kind, uint32_t mask, Site site) {
  Fiber& f = fibers[running];
  const unsigned first = running / 32 * 32, lane = running % 32;
  if ((mask >> lane & 1) == 0) fail(site, "the calling lane is not in its own mask");
  bool complete = true;
  for (unsigned i = 0; i < 32; ++i) {
    const Fiber& other = fibers[first + i];
    if (i == lane) continue;
    const bool waits = other.wait == Wait::warp || other.wait == Wait::exchange;
    if (waits && (other.mask >> lane & 1 || mask >> i & 1)) {
      if (other.mask != mask || other.wait != kind || other.site.line != site.line) {
        fprintf(stderr, "EMULATION: lane %u waits at %s:%d with mask %08x\n", i, other.site.file, other.site.line, other.mask);
        fail(site, "lanes of one mask meet at different places or with different masks");
      }
    }
    if ((mask >> i & 1) == 0) continue;
    if (other.wait == Wait::done) fail(site, "the mask names a lane that has ended");
    complete &= waits;
  }
  f.mask = mask;
  return complete;
}
void release_warp(uint32_t mask) {
  const unsigned first = running / 32 * 32;
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1 && first + i != running) set_ready(first + i);
  }
}

}  // namespace

void fail(Site site, const char* message) {
  fprintf(stderr, "EMULATION: %s:%d: %s: %s (block %u, thread %u)\n", site.file, site.line, site.what, message, blockIdx.x,
          threadIdx.x);
  fflush(stderr);
  _exit(66);
}

uint8_t* shared_memory() { return blocks[blockIdx.x].shared; }
Copies& copies() { return fibers[running].copies; }

#ifndef EMU_INIT
void fresh(void*, int64_t) {}
void forget() {}
#endif

void maybe_switch() {
  if (config.schedule < Schedule::random || random_bits() % 16 != 0) return;
  pause(Wait::none, 0, {});
}

void sync_block(Site site) {
  const unsigned index = blockIdx.x;
  Block& block = blocks[index];
  if (block.alive != blockDim.x) fail(site, "a thread of the block has ended before this barrier");
  char* order = &block.order[block.syncs % 2];
  order_release(order);
  if (++block.arrived == blockDim.x) {
    release_block(block, index);
    if (config.schedule >= Schedule::random) pause(Wait::none, 0, site);
  } else {
    pause(Wait::block, 0, site);
  }
  order_acquire(order);
}

void arrive_grid(Site site) {
  if (alive != fibers.size()) fail(site, "a thread of the grid has ended before this barrier");
  if (fibers[running].arrived) fail(site, "a thread arrives twice at one barrier");
  fibers[running].arrived = true;
  fibers[running].ticket = grid_syncs;
  order_release(&grid_order[grid_syncs % 2]);
  if (++grid_arrived < fibers.size()) return;
  grid_arrived = 0;
  ++grid_syncs;
  for (unsigned i = 0; i < fibers.size(); ++i) {
    if (fibers[i].wait == Wait::grid) set_ready(i);
  }
}
void wait_grid(Site site) {
  Fiber& f = fibers[running];
  if (!f.arrived) fail(site, "a thread waits that has not arrived");
  f.arrived = false;
  char* order = &grid_order[f.ticket % 2];
  if (f.ticket == grid_syncs) {
    pause(Wait::grid, 0, site);
  } else if (config.schedule >= Schedule::random) {
    pause(Wait::none, 0, site);
  }
  order_acquire(order);
}
void sync_grid(Site site) {
  arrive_grid(site);
  wait_grid(site);
}

void sync_warp(uint32_t mask, Site site) {
  Warp& warp = warps[running / 32];
  char* order = &warp.order[warp.syncs % 2];
  order_release(order);
  if (arrive_warp(Wait::warp, mask, site)) {
    ++warp.syncs;
    release_warp(mask);
  } else {
    pause(Wait::warp, mask, site);
  }
  order_acquire(order);
}

const uint64_t (*exchange(uint32_t mask, const uint64_t* mine, int words, Site site))[4] {
  Warp& warp = warps[running / 32];
  Fiber& f = fibers[running];
  for (int i = 0; i < words; ++i) f.words[i] = mine[i];
  const unsigned parity = warp.exchanges % 2;
  if (arrive_warp(Wait::exchange, mask, site)) {
    const unsigned first = running / 32 * 32;
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) warp.snapshot[parity][lane][i] = fibers[first + lane].words[i];
    }
    ++warp.exchanges;
    release_warp(mask);
  } else {
    pause(Wait::exchange, mask, site);
  }
  return warp.snapshot[parity];
}

float float_from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                          : exponent == 0 ? ldexpf(float(fraction), -24)
                                          : ldexpf(float(1024 + fraction), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}
uint16_t half_from_float(float x) {  // to nearest, ties to even
  const uint16_t sign = __float_as_uint(x) >> 31 ? 0x8000 : 0;
  const float magnitude = fabsf(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.f) return sign | 0x7c00;
  const int exponent = magnitude < 0x1p-14f ? -14 : ilogbf(magnitude);
  const int fraction = int(nearbyintf(ldexpf(magnitude, 10 - exponent)));  // up to 2048: carries into the exponent
  return uint16_t(sign | ((exponent + 14) * 1024 + fraction));
}

void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b, Site site) {
  const uint64_t mine[3] = {uint64_t(a[1]) << 32 | a[0], uint64_t(a[3]) << 32 | a[2], uint64_t(b[1]) << 32 | b[0]};
  const auto all = exchange(0xffffffffu, mine, 3, site);
  const auto value = [](uint64_t word, unsigned reg, unsigned k) {
    return float_from_half(uint16_t(word >> (32 * reg + 16 * (k % 2))));
  };
  const unsigned lane = running % 32, g = lane / 4, t = lane % 4;
  float row[2][16], column[2][16];
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned i = 0; i < 2; ++i) {
      row[i][k] = value(all[g * 4 + k % 8 / 2][k / 8], i, k);              // row g + 8 i
      column[i][k] = value(all[(2 * t + i) * 4 + k % 8 / 2][2], k / 8, k);  // column 2 t + i
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    double sum = 0;
    for (unsigned k = 0; k < 16; k += 2) {
      sum += double(row[i / 2][k]) * column[i % 2][k] + double(row[i / 2][k + 1]) * column[i % 2][k + 1];
    }
    c[i] = float(double(c[i]) + sum);
  }
}

void run(unsigned block_count, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  const size_t total = size_t(block_count) * threads;
  if (threads % 32 != 0) fail({"", 0, "launch"}, "threads is no multiple of 32");
  if (fibers.size() < total) {  // stacks and TSan's fibers are kept from launch to launch
    const size_t old = fibers.size();
    fibers.resize(total);
    for (size_t i = old; i < total; ++i) {
      void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) fail({"", 0, "launch"}, "no memory for stacks");
      fibers[i].stack = static_cast<char*>(stack);
#ifdef EMU_TSAN
      fibers[i].tsan = __tsan_create_fiber(0);
#endif
    }
  }
  std::vector<Fiber> spare;  // those that this launch does not need
  spare.assign(fibers.begin() + long(total), fibers.end());
  fibers.resize(total);

  random_state = config.seed * 0x9e3779b97f4a7c15ull | 1;
  for (int i = 0; i < 8; ++i) random_bits();
  warps.assign(total / 32, Warp{});
  blocks.assign(block_count, Block{});
  ready.assign((total + 63) / 64, 0);
  for (Block& block : blocks) {
    block.alive = threads;
    // Exactly as large as asked for, so that AddressSanitizer sees its end; filled with what no kernel may rely on.
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, shared_bytes) != 0) fail({"", 0, "launch"}, "no memory");
    block.shared = static_cast<uint8_t*>(memory);
    for (size_t i = 0; i < shared_bytes; ++i) block.shared[i] = uint8_t(random_bits());
  }
  threadIdx = blockIdx = {0, 0, 0};
  blockDim = {threads, 1, 1};
  gridDim = {block_count, 1, 1};
  kernel = &body;
  alive = unsigned(total);
  grid_arrived = 0;
  warp_ahead = unsigned(random_bits() % (total / 32));
#ifdef EMU_TSAN
  host.tsan = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < total; ++i) {
    Fiber& f = fibers[i];
    f.block = i / threads;
    f.thread = i % threads;
    f.copies.count = f.copies.group = 0;
    set_ready(i);
    uint64_t* top = reinterpret_cast<uint64_t*>(f.stack + kStackBytes);
    *--top = 0;  // the frame of nobody: keeps the stack aligned as after a call
    *--top = reinterpret_cast<uint64_t>(&fiber_main);
    for (int r = 0; r < 6; ++r) *--top = 0;
    f.stack_pointer = top;
  }
  order_release(&launch_order);
  running = unsigned(choose());
#ifdef EMU_ASAN
  // The host stack's bounds are what the first fiber would be told; the host is only ever returned to.
  for (unsigned i = 0; i < total; ++i) __asan_unpoison_memory_region(fibers[i].stack, kStackBytes);
#endif
  switch_to(host, fibers[running]);
  order_acquire(&end_order);
  for (Block& block : blocks) {
#ifdef EMU_ASAN
    __asan_unpoison_memory_region(block.shared, shared_bytes);
#endif
    free(block.shared);
  }
  for (Fiber& f : spare) fibers.push_back(f);
}

}  // namespace emu
