// The closest negatives of an anchor's buckets, once the sweep has ended, and how an empty bucket takes over what the next one that
// is not holds.
#pragma once

#include "select.cuh"

namespace facenet_ext::cuda {

struct Winner {  // of a bucket: ordered bits of the distance (all ones: none) and the index
  uint64_t bits;
  uint32_t index;
  __device__ __forceinline__ bool none() const { return bits == kEmpty; }
  __device__ __forceinline__ bool operator<(const Winner& other) const {
    return bits < other.bits || (bits == other.bits && index < other.index);
  }
};
__device__ __forceinline__ Winner winner_of(uint64_t key) {
  return {key == kEmpty ? kEmpty : key >> 32, static_cast<uint32_t>(key)};
}
__device__ __forceinline__ Winner load_winner(const Problem<float>& p, int32_t slot) { return winner_of(p.best[slot]); }
__device__ __forceinline__ Winner load_winner(const Problem<double>& p, int32_t slot) {
  if (draws(p)) return {p.best[slot], static_cast<uint32_t>(p.best[slot])};
  return {p.best[slot], p.best_index[slot]};
}
__device__ __forceinline__ void store_winner(const Problem<float>& p, int32_t slot, Winner w) {
  p.best[slot] = w.none() ? kEmpty : pack(static_cast<uint32_t>(w.bits), w.index);
}
__device__ __forceinline__ void store_winner(const Problem<double>& p, int32_t slot, Winner w) {
  p.best[slot] = w.bits;
  p.best_index[slot] = w.index;
}
__device__ __forceinline__ Winner farthest_of(const Problem<float>& p, int32_t a) {
  const uint64_t key = p.farthest[a];
  return {(key >> 32) - 1, ~static_cast<uint32_t>(key)};
}
__device__ __forceinline__ Winner farthest_of(const Problem<double>& p, int32_t a) {
  return {p.farthest[a] - 1, p.farthest_index[a]};
}

// An anchor's buckets once empty ones have taken over what the next one that is not holds. What a bucket holds is closer than
// what any behind it holds, so these are suffix minima.
template <class Acc>
struct Filled {  // by a warp, in memory; a barrier must follow before other lanes read it
  int32_t bucket, step;
  __device__ __forceinline__ Filled(const Problem<Acc>& p, const Pass& pass, int32_t a, int32_t count)
      : bucket(pass.bucket(a)), step(pass.bucket_step()) {
    if (p.negatives != Negatives::semi_hard) return;
    const int lane = thread_index() % 32;
    Winner later{kEmpty, ~0u};
    int32_t base = (count - 1) / 32 * 32;
    Winner next{kEmpty, ~0u};  // on its way while the buckets behind it are looked at
    if (base >= 0 && base + lane < count) next = load_winner(p, bucket + (base + lane) * step);
#pragma unroll 1
    for (; base >= 0; base -= 32) {
      const Winner mine = next;
      if (base > 0) next = load_winner(p, bucket + (base - 32 + lane) * step);
      const uint32_t full = __ballot_sync(kWholeWarp, !mine.none()) >> lane;  // from this lane on
      const int from = lane + __ffs(static_cast<int>(full)) - 1;
      Winner found{__shfl_sync(kWholeWarp, mine.bits, from), __shfl_sync(kWholeWarp, mine.index, from)};
      if (full == 0) found = later;
      if (mine.none() && base + lane < count) store_winner(p, bucket + (base + lane) * step, found);
      later = Winner{__shfl_sync(kWholeWarp, found.bits, 0), __shfl_sync(kWholeWarp, found.index, 0)};
    }
  }
  // The winner of bucket r - 1; none of r = 0.
  __device__ __forceinline__ Winner operator()(const Problem<Acc>& p, int32_t r) const {
    return r > 0 ? load_winner(p, bucket + (r - 1) * step) : Winner{kEmpty, ~0u};
  }
};

// Buckets of a warp's lanes, as above. later: what the buckets behind them hold first; it becomes what these do.
__device__ __forceinline__ uint64_t fill_keys(uint64_t mine, uint64_t& later) {
  const int lane = thread_index() % 32;
  const uint32_t full = __ballot_sync(kWholeWarp, mine != kEmpty) >> lane;  // from this lane on
  uint64_t found = __shfl_sync(kWholeWarp, mine, lane + __ffs(static_cast<int>(full)) - 1);
  if (full == 0) found = later;
  later = __shfl_sync(kWholeWarp, found, 0);
  return found;
}
// Keys of buckets lane and lane + 32.
struct OwnKeys {
  static constexpr int kOwn = 2;
  uint64_t own[kOwn];
  __device__ __forceinline__ void load(const Problem<float>& p, int32_t bucket, int32_t step, int32_t count) {
    const int lane = thread_index() % 32;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[i] = lane + 32 * i < count ? p.best[bucket + (lane + 32 * i) * step] : kEmpty;
  }
  __device__ __forceinline__ void fill() {
    uint64_t later = kEmpty;
#pragma unroll
    for (int i = kOwn - 1; i >= 0; --i) own[i] = fill_keys(own[i], later);
  }
  // By all lanes: the key of bucket r - 1, empty of r = 0.
  __device__ __forceinline__ uint64_t of(int32_t r) const {
    const uint64_t low = __shfl_sync(kWholeWarp, own[0], r - 1), high = __shfl_sync(kWholeWarp, own[1], r - 1);
    return r > 32 ? high : r > 0 ? low : kEmpty;
  }
};

// Of floats: keys, which stay with the lanes where they are no more than two for each.
template <>
struct Filled<float> {
  int32_t bucket, step;
  bool in_lanes;
  OwnKeys keys;
  __device__ __forceinline__ Filled(const Problem<float>& p, const Pass& pass, int32_t a, int32_t count)
      : bucket(pass.bucket(a)), step(pass.bucket_step()), in_lanes(false), keys{{kEmpty, kEmpty}} {
    if (p.negatives != Negatives::semi_hard) return;
    in_lanes = count <= 32 * OwnKeys::kOwn;
    if (in_lanes) {
      keys.load(p, bucket, step, count);
      keys.fill();
      return;
    }
    const int lane = thread_index() % 32;
    uint64_t later = kEmpty;
#pragma unroll 1
    for (int32_t base = (count - 1) / 32 * 32; base >= 0; base -= 32) {
      uint64_t* best = p.best + bucket + (base + lane) * step;
      const uint64_t mine = base + lane < count ? *best : kEmpty, found = fill_keys(mine, later);
      if (mine == kEmpty && base + lane < count) *best = found;
    }
  }
  __device__ __forceinline__ Winner operator()(const Problem<float>& p, int32_t r) const {
    if (in_lanes) return winner_of(keys.of(r));
    return r > 0 ? load_winner(p, bucket + (r - 1) * step) : Winner{kEmpty, ~0u};
  }
};

}  // namespace facenet_ext::cuda
