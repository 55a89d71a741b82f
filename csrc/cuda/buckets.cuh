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

// By one warp. NaN among the distances (mining): every negative goes to `best` at once.
__device__ __forceinline__ void store_base(const Problem<float>& p, int32_t a, const float* d2_ap, int32_t positives) {
  uint32_t last = 0;
  for (int32_t r = thread_index() % 32; r < positives; r += 32) last = max(last, ordered_bits(d2_ap[r]));
  last = warp_max(last);
  if (thread_index() % 32 != 0) return;
  p.base[a] = p.negatives == Negatives::hard || last >= kInfinity ? 0.f : __uint_as_float(last) / 8;
}

// By the whole grid; the last blocks have the least to do otherwise.
__device__ __forceinline__ void order_tiles(const Problem<float>& p) {
  const int32_t* indices = sorted_index(p, p.candidates);
  for (int64_t i = int64_t(grid_size() - 1 - block_index()) * kThreads + thread_index(); i < p.candidates.count;
       i += int64_t(grid_size()) * kThreads) {
    const int32_t c = static_cast<int32_t>(i), first = c / kSide * kSide, end = min(first + kSide, p.candidates.count);
    const int32_t mine = indices[c];
    int32_t rank = 0;
#pragma unroll 8
    for (int32_t other = first; other < end; ++other) count_if_less(rank, indices[other], mine);
    p.tile_rank[c] = rank;
    p.tile_index[first + rank] = mine;
  }
}

// ---- from and to global memory --------------------------------------------------------------------------------------

__device__ __forceinline__ void load_order(const Problem<float>& p, const TileShared<float>& s) {
  const int side = thread_index() / kSide, i = thread_index() % kSide;
  if (side > 1) return;
  const int32_t c = (side == 0 ? s.cursor->row : s.cursor->column) + i;
  if ((side == 0 && !p.plain) || c >= p.candidates.count) return;  // rows that are no candidates
  s.order[side].rank[i] = static_cast<uint32_t>(p.tile_rank[c]);
  s.order[side].index[i] = p.tile_index[c];
}

__device__ __forceinline__ void clear_beyond(const Pass& pass, Buckets* buckets) {
  for (int i = thread_index(); i < kBeyond * kBucketPitch; i += kThreads) {
    buckets[pass.buckets + 1 + i / kBucketPitch].threshold[i % kBucketPitch] = INFINITY;
  }
}

// Calls body(bucket, row, base) for every bucket of an anchor; bucket < 0: it is not in the pass. Lanes are the kWidth
// anchors from position `first` on; a thread is called with the same buckets each time.
template <int kWidth, class Body>
__device__ __forceinline__ void for_each_bucket(const Problem<float>& p, const Pass& pass, int32_t first, Body body) {
  static_assert(kThreads % kWidth == 0, "a thread stays with its anchor");
  const int32_t a = first + thread_index() % kWidth;
  const bool has = pass.has(a);
  const uint32_t base = has ? ordered_bits(p.base[a]) : 0;
#pragma unroll 10  // loads in flight
  for (int32_t r = thread_index() / kWidth; r < pass.buckets; r += kThreads / kWidth) {
    body(has ? a - pass.begin + r * pass.width : -1, r + 1, base);
  }
}

// A block's first tile finds next to nothing in `best` and begins with empty buckets. What is in a bucket already is loaded
// as the tag above it: an equally close negative may still have a lower index.
template <int kWidth>
__device__ __forceinline__ void load_buckets(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                             int32_t first, int place) {
  const bool is_first = s.cursor->is_first;
  const int at = place + thread_index() % kWidth;
  for_each_bucket<kWidth>(p, pass, first, [&](int32_t bucket, int32_t row, uint32_t base) {
    const uint64_t key = bucket < 0 || is_first ? kEmpty : load_relaxed(p.best + bucket);
    const uint32_t steps = static_cast<uint32_t>(key >> 32) - base + 1;
    s.buckets[row].threshold[at] = bucket < 0 ? INFINITY : p.threshold[bucket];
    s.buckets[row].least[at] = key != kEmpty && steps < kTagSteps ? steps * kRanks : kNoTag;
  });
  if (thread_index() >= kWidth) return;
  const int32_t a = first + thread_index();
  int32_t count = 0;
  if (pass.has(a)) count = count_buckets(p, count_positives(p, p.anchors.mate_begin[a], p.anchors.mate_end[a]));
  uint32_t far = count > 0 ? kInfinity : 0;
  if (count > 0 && !is_first) {
    const uint64_t last = load_relaxed(p.best + pass.bucket(a) + (count - 1) * pass.bucket_step());
    far = min(far, static_cast<uint32_t>(last >> 32));
  }
  s.ranges->far[at] = far;
  s.ranges->base[at] = count > 0 ? p.base[a] : 0.f;
}
// What has become better. index: of the candidates, by rank.
template <int kWidth>
__device__ __forceinline__ void store_buckets(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                              const int32_t* index, int32_t first, int place) {
  const bool is_first = s.cursor->is_first;  // then there is hardly anything to compare with
  const int at = place + thread_index() % kWidth;
  for_each_bucket<kWidth>(p, pass, first, [&](int32_t bucket, int32_t row, uint32_t base) {
    const uint32_t tag = s.buckets[row].least[at];
    if (bucket < 0 || tag >= kNoTags) return;
    const uint64_t key = pack(base + tag / kRanks, static_cast<uint32_t>(index[tag % kRanks]));
    if (is_first || key < load_relaxed(p.best + bucket)) atomic_min(p.best + bucket, key);
  });
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
    const bool below = s.buckets[middle + 1].threshold[place] < d;
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

// Offers count distances, kStep floats apart, to the anchor at position a, entry i of `edge`, whose buckets stand at `place`;
// index and rank are of the candidates. Several threads may do so for the same anchor.
template <int kStep>
__device__ __forceinline__ void offer_in_shared(const Problem<float>& p, const Pass& pass, const TileShared<float>& s,
                                                const Edge<float>& edge, int i, int32_t a, int place, int count,
                                                const float* distance, const int32_t* index, const uint32_t* rank) {
  const int32_t range = pass.range, behind = pass.buckets + 1;  // row `behind` is infinite
  const auto threshold = [&](int32_t row) { return s.buckets[min(row, behind)].threshold[place]; };
  const float first = threshold(range), second = threshold(2 * range), third = threshold(3 * range),
              fourth = threshold(4 * range);
  const uint32_t bytes = range * uint32_t(sizeof(Buckets));
  const uint32_t base = ordered_bits(s.ranges->base[place]), row0 = shared_address(&s.buckets[0].threshold[place]);
  const uint32_t row2 = row0 + 2 * bytes, least_behind = shared_address(&s.buckets[0].least[place]) - row0;
  const bool is_first = s.cursor->is_first;
#pragma unroll 1
  for (; count > 0; count -= kSearches, distance += kSearches * kStep, index += kSearches, rank += kSearches) {
    float d[kSearches];
    uint32_t at[kSearches];  // the row of as many thresholds as are < d; row 0 for kNotOffered and NaN
#pragma unroll
    for (int j = 0; j < kSearches; ++j) {
      d[j] = distance[j * kStep];
      const bool above = second < d[j];
      at[j] = above ? row2 : row0;
      add_if_less(at[j], above ? third : first, d[j], bytes);
      add_if_less(at[j], fourth, d[j], bytes);
    }
    if (range > 8) search_rows<8>(d, at);
    if (range > 4) search_rows<4>(d, at);
    if (range > 2) search_rows<2>(d, at);
    if (range > 1) search_rows<1>(d, at);
    Vector<uint32_t, 4> ranks[kSearches / 4];
#pragma unroll
    for (int i = 0; i < kSearches / 4; ++i) {
      ranks[i] = *reinterpret_cast<const Vector<uint32_t, 4>*>(rank + 4 * i);
    }
    uint32_t tag[kSearches], most = 0;
#pragma unroll
    for (int j = 0; j < kSearches; ++j) {
      tag[j] = min(ordered_bits(d[j]) - base, kTagSteps) * kRanks + ranks[j / 4].element[j % 4];
      most = max(most, tag[j]);
    }
#pragma unroll
    for (int j = 0; j < kSearches; ++j) {
      uint32_t* least = shared_words(at[j] + least_behind);
      // In a first tile nearly everything is better than nothing: no look, no branch.
      if (is_first || tag[j] < load_relaxed(least)) atomicMin(least, tag[j]);
    }
    if (most < kNoTags) continue;
    const uint32_t far = load_relaxed(&s.ranges->far[place]);  // 0: no anchor of this pass
    uint32_t beyond = 0;  // those that no tag holds
#pragma unroll
    for (int j = 0; j < kSearches; ++j) {
      beyond |= tag[j] >= kNoTags && ordered_bits(d[j]) <= far ? 1u << j : 0u;
    }
    const int32_t buckets = count_buckets(p, count_positives(p, edge.mate_begin[i], edge.mate_end[i]));
#pragma unroll 1
    while (beyond != 0) {
      const int j = __ffs(static_cast<int>(beyond)) - 1;
      beyond &= beyond - 1;
      offer_beyond_tags(p, pass, s, buckets, a, place, distance[j * kStep], static_cast<uint32_t>(index[j]));
    }
  }
}

// "Farthest" keys are shifted by one so that NaN is the nearest.
template <class Acc>
__device__ __forceinline__ auto farthest_bits(Acc d) {
  return d == d ? ordered_bits(d) + 1 : 0;
}

// Behind all offers of a part: a positive may fall back to the farthest negative while none is known beyond the last
// threshold. Most anchors know one by then, so a warp looks for those that do not, and goes along the part for each.
__device__ __forceinline__ void offer_farthest_of_part(const Problem<float>& p, const TileShared<float>& s, int part) {
  constexpr int kEach = kBucketPitch / kWarps, kColumns = kPart<float>;
  static_assert(kBucketPitch % kWarps == 0 && kEach <= 32);
  const int lane = thread_index() % 32, first = thread_index() / 32 * kEach;
  const int32_t column = s.cursor->column + part * kColumns;
  const auto position = [&](int place) { return place < kSide ? s.cursor->row + place : column + place - kSide; };
  bool wants = false;
  if (lane < kEach && load_relaxed(&s.ranges->far[first + lane]) >= kInfinity) {  // an anchor of this pass, if it is loaded
    const int place = first + lane, i = place < kSide ? place : part * kColumns + place - kSide;
    if (place < kSide || serves_columns(p, *s.cursor)) {
      const Edge<float>& edge = place < kSide ? *s.row : *s.column;
      const int32_t count = count_buckets(p, count_positives(p, edge.mate_begin[i], edge.mate_end[i]));
      wants = load_relaxed(&s.buckets[count].least[place]) >= kNoTags;
    }
  }
#pragma unroll 1
  for (uint32_t left = __ballot_sync(kWholeWarp, wants); left != 0; left &= left - 1) {
    const int place = first + __ffs(static_cast<int>(left)) - 1;
    const bool is_row = place < kSide;
    const float* d = s.part + (is_row ? place * kPartPitch<float> : place - kSide);
    const int32_t* index = is_row ? s.column->index + part * kColumns : s.row->index;
    uint64_t farthest = 0;
#pragma unroll 1
    for (int j = lane; j < (is_row ? kColumns : kSide); j += 32) {
      const float value = d[is_row ? j : j * kPartPitch<float>];
      const uint64_t key = pack(farthest_bits(value), ~static_cast<uint32_t>(index[j]));
      farthest = value != kNotOffered && key > farthest ? key : farthest;
    }
    farthest = warp_max(farthest);
    uint64_t* known = p.farthest + position(place);
    if (lane == 0 && farthest > load_relaxed(known)) atomic_max(known, farthest);
  }
}

}  // namespace facenet_ext::cuda
