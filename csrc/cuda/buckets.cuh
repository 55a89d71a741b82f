// Phase 3: buckets in shared memory, float. A distance d goes to bucket r, the number of the anchor's thresholds below it,
// and the least (d, index) of a bucket is kept.
//
// A tag is both in 32 bits, whose minima shared memory has in hardware, where 64-bit ones are a loop:
//
//     | d in steps of the last bit from `base` on, 25 bits | rank of the candidate's index among the tile's kSide, 7 bits |
//
// 25 bits reach from base to 16 base. With base an eighth of the last threshold that is nearly all that there is; what lies
// below, and what is more than twice as far as the farthest positive and still wanted, goes to `best` at once. Its tag is one
// of the largest, kNoTags and up, which say nothing.
//
// Steps of a search: four thresholds that stay in registers tell five ranges apart, then up to four steps read one each.
// Missing thresholds are infinite, so all lanes take the same steps. A tile's distances take one access to shared memory for
// d, one per step and one or two for the tag.
#pragma once

#include "tile.cuh"

namespace facenet_ext::cuda {

constexpr uint64_t kEmpty = ~uint64_t(0);  // a bucket without negative: above every distance, NaN included
constexpr uint32_t kNoTag = ~0u;
constexpr uint32_t kInfinity = 0x7f800000;  // bits: above every distance but NaN and kNotOffered
constexpr uint32_t kTagSteps = (1u << 25) - 1;  // those that a tag has room for: it is never kNoTag
constexpr uint32_t kRanks = 1u << 7;
constexpr uint32_t kNoTags = kTagSteps * kRanks;  // from here on
static_assert(kSide <= int(kRanks), "a rank has 7 bits");

__device__ __forceinline__ uint64_t pack(uint32_t high, uint32_t low) { return uint64_t(high) << 32 | low; }

// ---- what the tiles need to know, found in phase 2 ------------------------------------------------------------------

// Of the farthest positive. NaN (mining): every negative goes to `best` at once.
__device__ __forceinline__ float base_of(const Problem<float>& p, float last) {
  return p.negatives == Negatives::hard || ordered_bits(last) >= kInfinity ? 0.f : last / 8;
}
// By one warp.
__device__ __forceinline__ void store_base(const Problem<float>& p, int32_t a, const float* d2_ap, int32_t positives) {
  uint32_t last = 0;
#pragma unroll 1
  for (int32_t r = thread_index() % 32; r < positives; r += 32) last = max(last, ordered_bits(d2_ap[r]));
  last = warp_max(last);
  if (thread_index() % 32 != 0) return;
  p.base[a] = base_of(p, __uint_as_float(last));
}

// By the whole grid, kSide candidates a block; the last blocks have the least to do otherwise. So many threads share a
// candidate:
__device__ __forceinline__ void order_tiles(const Problem<float>& p) {
  constexpr int kShares = kThreads / kSide;
  const int32_t* indices = sorted_index(p, p.candidates);
  const int32_t last = p.candidates.count - 1;
  for (int64_t at = int64_t(grid_size() - 1 - block_index()) * kSide; at <= last; at += int64_t(grid_size()) * kSide) {
    const int32_t first = static_cast<int32_t>(at), c = first + thread_index() / kShares, share = thread_index() % kShares;
    const int32_t mine = indices[min(c, last)];
    int32_t rank = 0;
#pragma unroll 16  // loads in flight: this is the way of the last blocks to the barrier
    for (int32_t i = share; i < kSide; i += kShares) {
      const int32_t other = indices[min(first + i, last)];
      count_if_less(rank, first + i <= last ? other : INT32_MAX, mine);
    }
    for (int step = 1; step < kShares; step *= 2) rank += __shfl_xor_sync(kWholeWarp, rank, step);
    if (share != 0 || c > last) continue;
    p.tile_rank[c] = rank;
    p.tile_index[first + rank] = mine;
  }
}

// ---- from and to global memory --------------------------------------------------------------------------------------

// A row or a column of the order, on its way from construction to store().
struct OrderOfTile {
  int32_t rank, index;
  __device__ __forceinline__ OrderOfTile(const Problem<float>& p, const TileShared<float>& s) {
    const int side = thread_index() / kSide, i = thread_index() % kSide;
    const int32_t c = (side == 0 ? s.cursor->row : s.cursor->column) + i;
    // Else a rank is still read, with a distance that is not offered. Rows that are no candidates: nobody asks.
    const bool has = side <= 1 && (side == 1 || p.plain) && c < p.candidates.count;
    rank = has ? p.tile_rank[c] : 0;
    index = has ? p.tile_index[c] : 0;
  }
  __device__ __forceinline__ void store(const TileShared<float>& s) const {
    const int side = thread_index() / kSide, i = thread_index() % kSide;
    if (side > 1) return;
    s.order[side].rank[i] = static_cast<uint32_t>(rank);
    s.order[side].index[i] = index;
  }
};

__device__ __forceinline__ void clear_beyond(const Pass& pass, Buckets* buckets) {
  for (int i = thread_index(); i < kBeyond * kBucketPitch; i += kThreads) {
    buckets[pass.buckets + 1 + i / kBucketPitch].threshold[i % kBucketPitch] = INFINITY;
  }
}

// What a thread has of the buckets of kWidth anchors from position `first` on: those of one anchor, kStep apart.
template <int kWidth>
struct BucketsOf {
  static_assert(kThreads % kWidth == 0, "a thread stays with its anchor");
  static constexpr int32_t kStep = kThreads / kWidth;
  int32_t left, bucket, step;  // how many from the first one on, the first in global memory, from one to its next there
  bool has;  // the anchor is in the pass
  Buckets* row;
  int at;
  __device__ __forceinline__ BucketsOf(const Pass& pass, const TileShared<float>& s, int32_t first, int place) {
    const int32_t a = first + thread_index() % kWidth, r = thread_index() / kWidth, width = pass.width;
    left = pass.buckets - r;
    bucket = a - pass.begin + r * width;
    step = kStep * width;
    has = pass.has(a);
    row = s.buckets() + 1 + r;
    at = place + thread_index() % kWidth;
  }
};

// A block's first tile finds next to nothing in `best` and begins with empty buckets, whose thresholds are on their way behind
// it.
template <int kWidth>
__device__ __forceinline__ void send_for_thresholds(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                                    int32_t first, int place) {
  constexpr int kFours = kWidth / 4, kStep = kThreads / kFours;
  const int four = thread_index() % kFours * 4, r = thread_index() / kFours;
  const bool has = first + four < pass.end;
  const int32_t step = kStep * pass.width;
  const float* from = p.threshold + first + four + r * pass.width;
  Buckets* row = s.buckets() + 1 + r;
#pragma unroll 1
  for (int32_t left = pass.buckets - r; left > 0; left -= kStep, from += step, row += kStep) {
    if (has) cp_async_16(row->threshold + place + four, from);
    else *reinterpret_cast<Vector<float, 4>*>(row->threshold + place + four) = {INFINITY, INFINITY, INFINITY, INFINITY};
    *reinterpret_cast<Vector<uint32_t, 4>*>(row->least + place + four) = {kNoTag, kNoTag, kNoTag, kNoTag};
  }
  cp_async_commit();
}
// Of several passes, and of the tiles behind the first one. What is in a bucket already is loaded as the tag above it: an
// equally close negative may still have a lower index.
template <int kWidth>
__device__ __forceinline__ void load_thresholds(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                                int32_t first, int place) {
  BucketsOf<kWidth> b(pass, s, first, place);
  const uint32_t base = b.has ? ordered_bits(p.base[first + thread_index() % kWidth]) : 0;
  constexpr int kLoads = 5;  // in flight
#pragma unroll 1
  for (; b.left > 0; b.left -= kLoads * b.kStep, b.bucket += kLoads * b.step, b.row += kLoads * b.kStep) {
    float threshold[kLoads];
    uint32_t tag[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const bool has = b.has && i * b.kStep < b.left;
      threshold[i] = has ? p.threshold[b.bucket + i * b.step] : INFINITY;
      const uint64_t key = has ? load_relaxed(p.best + b.bucket + i * b.step) : kEmpty;
      const uint32_t steps = static_cast<uint32_t>(key >> 32) - base + 1;
      tag[i] = key != kEmpty && steps < kTagSteps ? steps * kRanks : kNoTag;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i * b.kStep >= b.left) continue;
      b.row[i * b.kStep].threshold[b.at] = threshold[i];
      b.row[i * b.kStep].least[b.at] = tag[i];
    }
  }
}
// Anchors are those of `edge` from entry `from` on. Threads from `thread` on, which stored these entries, do their ranges.
template <int kWidth>
__device__ __forceinline__ void load_buckets(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                             const Edge<float>& edge, int from, int32_t first, int place, int thread) {
  const bool is_first = s.cursor->is_first;
  if (is_first && pass.by_fours) send_for_thresholds<kWidth>(p, pass, s, first, place);
  else load_thresholds<kWidth>(p, pass, s, first, place);
  const int i = thread_index() - thread;
  if (static_cast<uint32_t>(i) >= static_cast<uint32_t>(kWidth)) return;
  const int32_t a = first + i, at = place + i;
  const bool has = pass.has(a);
  const float base = has ? p.base[a] : 0.f;
  int32_t count = 0;
  if (has) count = count_buckets(p, count_positives(p, edge.mate_begin[from + i], edge.mate_end[from + i]));
  uint32_t far = count > 0 ? kInfinity : 0;
  if (count > 0 && !is_first) {
    const uint64_t last = load_relaxed(p.best + pass.bucket(a) + (count - 1) * pass.bucket_step());
    far = min(far, static_cast<uint32_t>(last >> 32));
  }
  s.ranges->far[at] = far;
  s.ranges->last[at] = count;
  s.ranges->base[at] = count > 0 ? base : 0.f;
}
// What has become better. index: of the candidates, by rank. A warp has a bucket of all anchors at a time; those that are not in
// the pass have no tag.
template <int kWidth>
__device__ __forceinline__ void store_buckets(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                              const int32_t* index, int32_t first, int place) {
  constexpr int kEach = kWidth / 32;
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  uint32_t base[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) base[i] = ordered_bits(s.ranges->base[place + 32 * i + lane]);
  const uint32_t indices = shared_address(index);
  const bool is_first = s.cursor->is_first;  // then there is hardly anything to compare with
  const Buckets* row = s.buckets() + 1 + warp;
  uint64_t* best = p.best + (first + lane - pass.begin) + int64_t(warp) * pass.width;
  const int64_t step = int64_t(kWarps) * pass.width;
#pragma unroll 1
  for (int32_t r = warp; r < pass.buckets; r += kWarps, row += kWarps, best += step) {
    uint32_t tag[kEach];
    uint64_t there[kEach];  // on their way together
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      tag[i] = row->least[place + 32 * i + lane];
      there[i] = !is_first && tag[i] < kNoTags ? load_relaxed(best + 32 * i) : kEmpty;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const uint64_t key = pack(base[i] + tag[i] / kRanks, *shared_words(indices + tag[i] % kRanks * 4));
      atomic_min_if_less(best + 32 * i, key, key < there[i] ? tag[i] : kNoTags, kNoTags);
    }
  }
}

// ---- offers ---------------------------------------------------------------------------------------------------------

constexpr int kSearches = 8;  // distances whose searches go hand in hand, so that their loads overlap

template <int kRows>
__device__ __forceinline__ void search_rows(const float (&d)[kSearches], uint32_t (&at)[kSearches]) {
#pragma unroll
  for (int j = 0; j < kSearches; ++j) search_step<kRows* int(sizeof(Buckets))>(at[j], d[j]);
}

// A distance that no tag holds: to `best` at once, unless a closer one is known. An anchor's last bucket is the one where
// that happens often; `far` is its filter.
__device__ __forceinline__ void offer_beyond_tags(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                                  int32_t count, int32_t a, int place, float d, uint32_t index) {
  int32_t low = 0, high = count;  // thresholds below d
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    const bool below = s.buckets()[middle + 1].threshold[place] < d;
    low = below ? middle + 1 : low;
    high = below ? high : middle;
  }
  if (low == 0) return;
  const uint32_t bits = ordered_bits(d);
  if (low == count) atomicMin(&s.ranges->far[place], bits);
  const uint64_t key = pack(bits, index);
  uint64_t* best = p.best + pass.bucket(a) + (low - 1) * pass.bucket_step();
  if (key < load_relaxed(best)) atomic_min(best, key);
}

// Offers a thread's distances (select.cuh) to their anchor. Several threads may do so for the same anchor. Returns the largest
// tag, of equally far candidates that of the lowest index, with the bits of its rank turned round; 0: no tag holds a distance,
// or none but the least.
template <int kRange, class Side>
__device__ __forceinline__ uint32_t offer_in_range(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                                   const Side& side) {
  constexpr int kStep = Side::kStep;
  const int place = side.place;
  const float* distance = side.distance;
  const int32_t* index = side.index;
  const uint32_t* rank = side.order.rank + side.from;
  const auto stop = *reinterpret_cast<const Vector<int32_t, 4>*>(pass.stop);
  const auto threshold = [&](int k) { return s.buckets()[stop.element[k]].threshold[place]; };
  const float first = threshold(0), second = threshold(1), third = threshold(2), fourth = threshold(3);
  constexpr uint32_t kBytes = kRange * uint32_t(sizeof(Buckets));
  const uint32_t base = ordered_bits(s.ranges->base[place]), row0 = shared_address(&s.buckets()[0].threshold[place]);
  const uint32_t row2 = row0 + 2 * kBytes, least_behind = shared_address(&s.buckets()[0].least[place]) - row0;
  const bool is_first = s.cursor->is_first;
  uint32_t farthest = 0;
#pragma unroll 1
  for (int count = side.count; count > 0;
       count -= kSearches, distance += kSearches * kStep, index += kSearches, rank += kSearches) {
    float d[kSearches];
    uint32_t at[kSearches];  // the row of as many thresholds as are < d; row 0 for kNotOffered and NaN
    if constexpr (kStep == 1) {
#pragma unroll
      for (int j = 0; j < kSearches; j += 4) {
        const auto four = *reinterpret_cast<const Vector<float, 4>*>(distance + j);
#pragma unroll
        for (int i = 0; i < 4; ++i) d[j + i] = four.element[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSearches; ++j) d[j] = distance[j * kStep];
    }
#pragma unroll
    for (int j = 0; j < kSearches; ++j) {
      const bool above = second < d[j];
      at[j] = above ? row2 : row0;
      add_if_less(at[j], above ? third : first, d[j], kBytes);
      add_if_less(at[j], fourth, d[j], kBytes);
    }
    if constexpr (kRange > 8) search_rows<8>(d, at);
    if constexpr (kRange > 4) search_rows<4>(d, at);
    if constexpr (kRange > 2) search_rows<2>(d, at);
    if constexpr (kRange > 1) search_rows<1>(d, at);
    using Four = Vector<uint32_t, 4>;
    Four ranks[kSearches / 4];
#pragma unroll
    for (int i = 0; i < kSearches / 4; ++i) {
      ranks[i] = *reinterpret_cast<const Four*>(rank + 4 * i);
    }
    uint32_t tag[kSearches], most = 0;
#pragma unroll
    for (int j = 0; j < kSearches; ++j) {
      tag[j] = min(ordered_bits(d[j]) - base, kTagSteps) * kRanks + ranks[j / 4].element[j % 4];
      most = max(most, tag[j] ^ (kRanks - 1));
    }
    if (is_first) {  // nearly everything is better than nothing: no look
#pragma unroll
      for (int j = 0; j < kSearches; ++j) atomicMin(shared_words(at[j] + least_behind), tag[j]);
    } else {
      uint32_t least[kSearches];
#pragma unroll
      for (int j = 0; j < kSearches; ++j) least[j] = load_relaxed(shared_words(at[j] + least_behind));
#pragma unroll
      for (int j = 0; j < kSearches; ++j) {
        if (tag[j] < least[j]) atomicMin(shared_words(at[j] + least_behind), tag[j]);
      }
    }
    if (most < kNoTags) {
      farthest = max(farthest, most);
      continue;
    }
    const int32_t buckets = s.ranges->last[place];
    // 0: no anchor of this pass. Where a tag is in the last bucket, nothing beyond tags is wanted.
    uint32_t far = load_relaxed(&s.ranges->far[place]);
    if (far != 0 && load_relaxed(&s.buckets()[buckets].least[place]) < kNoTags) far = ordered_bits(s.ranges->base[place]);
    uint32_t beyond = 0;  // those that no tag holds
#pragma unroll
    for (int j = 0; j < kSearches; ++j) {
      if (tag[j] < kNoTags) farthest = max(farthest, tag[j] ^ (kRanks - 1));
      else if (ordered_bits(d[j]) <= far) beyond |= 1u << j;
    }
    if (beyond == 0) continue;
#pragma unroll 1
    while (beyond != 0) {
      const int j = __ffs(static_cast<int>(beyond)) - 1;
      beyond &= beyond - 1;
      offer_beyond_tags(p, pass, s, buckets, side.a, place, distance[j * kStep], static_cast<uint32_t>(index[j]));
    }
  }
  return farthest;
}

// "Farthest" keys are shifted by one so that NaN is the nearest.
template <class Acc>
__device__ __forceinline__ auto farthest_bits(Acc d) {
  return d == d ? ordered_bits(d) + 1 : 0;
}

template <class Side>
__device__ __forceinline__ uint32_t offer_in_shared(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                                    const Side& side) {
  switch (pass.range) {
    case 1: return offer_in_range<1>(p, pass, s, side);
    case 2: return offer_in_range<2>(p, pass, s, side);
    case 4: return offer_in_range<4>(p, pass, s, side);
    case 8: return offer_in_range<8>(p, pass, s, side);
    default: return offer_in_range<16>(p, pass, s, side);
  }
}

// Behind all offers of a part, with what offer_in_shared() returned: a positive may fall back to the farthest negative while
// none is known beyond the last threshold.
template <class Side>
__device__ __forceinline__ void offer_farthest_in_shared(const Problem<float>& p, const TileShared<float>& s, const Side& side,
                                                         uint32_t farthest) {
  const int32_t last = s.ranges->last[side.place];
  if (last == 0 || load_relaxed(&s.ranges->far[side.place]) < kInfinity) return;
  if (load_relaxed(&s.buckets()[last].least[side.place]) < kNoTags) return;
  uint64_t key = 0;
  if (farthest != 0) {
    const uint32_t rank = (farthest ^ (kRanks - 1)) % kRanks;
    key = pack(ordered_bits(s.ranges->base[side.place]) + farthest / kRanks + 1,
               ~static_cast<uint32_t>(side.order.index[rank]));
  } else {
#pragma unroll 1
    for (int j = 0; j < side.count; ++j) {
      const float d = side.distance[j * Side::kStep];
      const uint64_t other = pack(farthest_bits(d), ~static_cast<uint32_t>(side.index[j]));
      key = d != kNotOffered && other > key ? other : key;
    }
  }
  uint64_t* known = p.farthest + side.a;
  if (key > load_relaxed(known)) atomic_max(known, key);
}

}  // namespace facenet_ext::cuda
