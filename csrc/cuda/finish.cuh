// Phase 4: from bucket minima to triplets, a warp per anchor, lane = pair.
//
//   best     an empty bucket takes over what the next one that is not holds, which is closer than all behind it; bucket u - 1
//            then holds the negative of a positive with u thresholds <= its own
//   d2_ap    becomes the coefficient of (a - p) in the gradient (1, or 1 / d for the euclidean distance, Roots; 0: no hinge)
//   entry    the negative and the coefficient of (a - n); of 32 neighbouring pairs, those with one negative count as one
//   list     per candidate, the entries that chose it
//
// A pair's distances are those of the tiles, unless it is near: one of the two is less than a quarter of the largest
// |a|^2 + |x|^2, so that the expansion's rounding would show. Such a pair is summed anew in direct form, sum (a - p)^2 and
// sum (a - n)^2: both, because they are subtracted; two pairs at a time, 16 lanes each, 16 bytes per lane and load. So are
// all pairs of rows longer than kExpandedDim, whose products tensor cores may round too coarsely, and pairs that are listed.
// Bytes: 40 per pair from L2; two rows more where it is near.
#pragma once

#include "winners.cuh"

namespace facenet_ext::cuda {

template <class In, class Acc>
struct InputRow {  // a row as the distances see it
  const In* x;
  Acc factor;
  bool is_bfloat;
  __device__ __forceinline__ Acc operator[](int32_t d) const { return rounded_product(widen(x[d], is_bfloat), factor); }
};
template <class In, class Acc>
__device__ __forceinline__ InputRow<In, Acc> input_row(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t index) {
  return {static_cast<const In*>(rows.x) + int64_t(index) * rows.stride, p.normalize ? rows.inverse_norm[index] : Acc(1),
          p.is_bfloat};
}

// A warp reads two rows at a time, a group of 16 lanes each, in chunks of 512 bytes: two vectors for every lane.
constexpr int kGroups = 2;
constexpr int kGroupLanes = 32 / kGroups;
constexpr int kLoads = 2;
template <class Acc>
constexpr int kVector = 16 / int(sizeof(Acc));  // elements of one load
template <class Acc>
constexpr int kPiece = kLoads * kVector<Acc>;  // elements of a lane
template <class Acc>
constexpr int kChunk = kGroupLanes * kPiece<Acc>;  // elements of a row: 128 floats, 64 doubles
static_assert(kGroups == 2 && kLoads == kGroups, "combine_groups() gives each group one of a lane's vectors");

template <class In, class Acc>
__device__ __forceinline__ void load_piece(const Problem<Acc>& p, const Rows<Acc>& rows, int32_t index, int32_t first,
                                           Acc (&piece)[kPiece<Acc>]) {
  constexpr int kEach = kVector<Acc>;
  const auto row = input_row<In>(p, rows, index);
  const int32_t from = first + thread_index() % kGroupLanes * kEach;
#pragma unroll
  for (int q = 0; q < kLoads; ++q) {
    const int32_t d = from + q * kGroupLanes * kEach;
    Vector<In, kEach> v{};
    if (rows.aligned) {
      if (d < p.dim) v = *reinterpret_cast<const Vector<In, kEach>*>(row.x + d);
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (d + i < p.dim) v.element[i] = row.x[d + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) piece[q * kEach + i] = rounded_product(widen(v.element[i], p.is_bfloat), row.factor);
  }
}

// The tiles' distances in the unit of the rows, and which of them are near.
struct Expanded {
  int32_t exponent;
  float unit;  // 2^exponent; 0: beyond the range of floats
  float near;  // below it, in the tiles' unit
  __device__ __forceinline__ Expanded(const Problem<float>& p, const Pass& pass, int32_t a)
      : exponent(2 * pass.max_exponent), unit(exponent >= -126 && exponent <= 127 ? two_to<float>(exponent) : 0.f) {
    const float scale = two_to<float>(p.anchors.exponent[a] - pass.max_exponent);
    const float quarter = 0.25f * (p.anchors.norm[a] * scale * scale + pass.max_norm);
    near = quarter > 1e-24f ? quarter : 1e-24f;  // far from where floats end: scaled norms of tiny rows may have vanished
  }
  __device__ __forceinline__ Expanded(const Problem<double>&, const Pass&, int32_t) : exponent(0), unit(1), near(0) {}
  __device__ __forceinline__ bool is_near(float d2) const { return !(d2 >= near); }
  __device__ __forceinline__ float value(float d2) const { return unit != 0 ? d2 * unit : ldexpf(d2, exponent); }
};

// Euclidean distances in terms and coefficients: in units of 2^exponent, about the largest element of all rows. There they are
// ordinary numbers where their squares, or what is divided by them, in the unit of the rows are none. A direct sum of squares
// that vanishes or overflows is formed once more of scaled differences. Doubles have the range.
constexpr int32_t kMaxRootExponent = 100;  // products of a coefficient and a difference are ordinary numbers too
template <class Acc>
__device__ __forceinline__ int32_t root_exponent(const Pass& pass) {
  if (sizeof(Acc) == 8) return 0;
  return min(max(pass.max_exponent + 13, -kMaxRootExponent), kMaxRootExponent);  // row_exponent()
}
template <class Acc>
struct Roots {
  int32_t exponent;
  Acc margin;
  __device__ __forceinline__ Roots(const Problem<Acc>& p, const Pass& pass) : exponent(0), margin(p.margin) {
    if (sizeof(Acc) == 8 || !p.euclidean) return;
    exponent = root_exponent<Acc>(pass);
    margin = static_cast<Acc>(p.exact_margin * static_cast<double>(two_to<Acc>(-exponent)));
  }
  __device__ __forceinline__ Acc of_rows(Acc d2) const { return sqrt(d2) * two_to<Acc>(-exponent); }
  __device__ __forceinline__ Acc of_tiles(const Pass& pass, Acc d2) const {
    return sqrt(d2) * two_to<Acc>(pass.max_exponent - exponent);
  }
  // What the differences of a direct sum are to be multiplied by for the next one; 1: it is good. Between rows that are not
  // tiny 0 is 0.
  __device__ __forceinline__ Acc rescaled(Acc d2) const {
    if (sizeof(Acc) == 8) return 1;
    if (d2 < two_to<Acc>(-100) && (d2 > 0 || exponent < -20)) return two_to<Acc>(100);
    return d2 - d2 == 0 ? Acc(1) : two_to<Acc>(-80);
  }
};

// A pair's place in the loss.
template <class Acc>
struct Term {
  Acc loss;  // 0: not active, NaN: active; a hinge of euclidean distances in their unit
  Acc c_ap, c_an;  // coefficients of (a - p) and of -(a - n) in the anchor's gradient, up to the common scale
  bool hard, semi_hard;
};
template <class Acc>  // d_ap, d_an: Roots, where asked for
__device__ __forceinline__ Term<Acc> term_of(const Problem<Acc>& p, const Roots<Acc>& roots, Acc d2_ap, Acc d2_an, Acc d_ap,
                                             Acc d_an) {
  if (!p.euclidean) {
    const Acc half = p.cosine ? Acc(0.5) : Acc(1);
    d_ap = half * d2_ap;
    d_an = half * d2_an;
  }
  Acc gap = d_ap - d_an;
  const Acc hinge = gap + roots.margin;
  const bool hard = d_an < d_ap || (d_an == d_ap && d2_an <= d2_ap);
  Term<Acc> term{hinge, 1, 1, hard, !hard && hinge > 0};
  if (p.soft_margin) {  // log(1 + exp(gap)) without overflow; its slope is the logistic function
    gap *= two_to<Acc>(roots.exponent);
    const Acc small = exp(-fabs(gap));
    term.loss = (gap > 0 ? gap : Acc(0)) + log1p(small);
    term.c_ap = term.c_an = (gap > 0 ? Acc(1) : small) / (1 + small);
  }
  if (term.loss <= 0) {
    term.loss = term.c_ap = term.c_an = 0;
  } else if (p.euclidean) {
    constexpr Acc kLeast = Acc(sizeof(Acc) == 8 ? DBL_MIN : double(FLT_MIN));  // so that no coefficient is infinite
    term.c_ap = d_ap >= kLeast ? term.c_ap / d_ap : Acc(0);
    term.c_an = d_an >= kLeast ? term.c_an / d_an : Acc(0);
  }
  return term;
}

struct FinishShared {  // of a block; its pairs are fewer than 2^32
  uint64_t max_d2_ap;
  uint32_t counts[5];
};
// What a lane has counted, and the sums of its warp's last anchor, which are not stored yet. No gradient depends on them, so
// they are added up behind the phase's barrier where there is another one before somebody reads them.
template <class Acc>
struct Counted {
  int32_t index;  // of the anchor; -1: none
  double loss, sum_ap, sum_an;
  uint32_t counts[5];  // as stat_counts
  Acc max_d2_ap;

  __device__ __forceinline__ Counted() : index(-1), loss(0), sum_ap(0), sum_an(0), counts{}, max_d2_ap(0) {}
  __device__ __forceinline__ void store_sums(const Problem<Acc>& p) {
    if (index < 0) return;
    const int lane = thread_index() % 32;
    loss = warp_sum(loss);
    if (lane == 0) p.loss_of_anchor[index] = loss;
    if (p.stat_counts == nullptr) return;
    sum_ap = warp_sum(sum_ap);
    sum_an = warp_sum(sum_an);
    if (lane != 0) return;
    p.sum_d2_ap[index] = sum_ap;
    p.sum_d2_an[index] = sum_an;
  }
  __device__ __forceinline__ void store(const Problem<Acc>& p, FinishShared& totals) {
    store_sums(p);
    __syncthreads();  // zero totals
    const bool has_stats = p.stat_counts != nullptr;  // else nobody asks for most of what is counted
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      if (i >= 2 && !has_stats) break;
      const uint32_t count = warp_sum(counts[i]);
      if (thread_index() % 32 == 0) atomicAdd(&totals.counts[i], count);
    }
    if (has_stats) {
      max_d2_ap = warp_max(max_d2_ap);
      if (thread_index() % 32 == 0) atomic_max(&totals.max_d2_ap, ordered_bits(double(max_d2_ap)));
    }
    __syncthreads();  // the totals
    if (thread_index() != 0) return;
    // Integers: their sum does not depend on the order.
    for (int i = 0; i < (has_stats ? 5 : 2); ++i) atomic_add(&p.counters->counts[i], uint64_t(totals.counts[i]));
    if (has_stats) atomic_max(&p.counters->max_d2_ap, totals.max_d2_ap);
  }
};

// What is known of a lane's pair before the sweep ends.
template <class Acc>
struct Pair {
  int32_t not_farther, positive;
  Acc d2_ap;
};
// What a warp knows of its anchor before the sweep ends.
template <class Acc>
struct Anchor {
  int32_t count, index, begin, own;
  int32_t place;  // of the lane's pair in `entry`
  Pair<Acc> pair;  // of the first 32

  __device__ __forceinline__ Anchor() : count(0), index(0), begin(0), own(-1), place(0), pair{0, 0, 0} {}
  __device__ __forceinline__ Anchor(const Problem<Acc>& p, const Pass& pass, int32_t a)
      : count(count_positives(p, p.anchors.mate_begin[a], p.anchors.mate_end[a])),
        index(sorted_index(p, p.anchors)[a]),
        begin(p.anchors.mate_begin[a]),
        own(own_position(p, a)),
        place(pass.entry(a, thread_index() % 32)),
        pair(load(p, pass.slot(a), thread_index() % 32, place)) {}
  __device__ __forceinline__ Pair<Acc> load(const Problem<Acc>& p, int32_t slot, int32_t at, int32_t its_place) const {
    if (at >= count) return {0, 0, 0};
    const int32_t c = begin + at + (own >= 0 && begin + at >= own ? 1 : 0);
    return {p.entry[its_place].row, sorted_index(p, p.candidates)[c], p.d2_ap[slot + at]};
  }
};

// An anchor of the loss that is asked for most (Problem::is_usual), whose pairs are two for each lane and whose lists are gathered
// from slices: what is known of them before the sweep ends.
struct FewPairs {
  static constexpr int32_t kMost = 32 * OwnKeys::kOwn;
  int32_t count, index;
  int32_t not_farther[OwnKeys::kOwn];  // of pairs lane and lane + 32; 0: no pair
  float d2_ap[OwnKeys::kOwn];
  float near, unit;  // Expanded

  __device__ __forceinline__ FewPairs(const Problem<float>& p, const Pass& pass, int32_t a) {
    const int lane = thread_index() % 32;
    count = count_positives(p, p.anchors.mate_begin[a], p.anchors.mate_end[a]);
    index = sorted_index(p, p.anchors)[a];
    const float* d2 = p.d2_ap + (pass.slot(a) + lane);
    const Entry<float>* entry = p.entry + side_by_side<2>(a, pass.entry_places(), lane);
#pragma unroll
    for (int i = 0; i < OwnKeys::kOwn; ++i) {
      const bool has = lane + 32 * i < count;
      not_farther[i] = has ? entry[i * kSlicedEntryStep].row : 0;
      d2_ap[i] = has ? d2[32 * i] : 0.f;
    }
    const Expanded expanded(p, pass, a);
    near = expanded.near;
    unit = expanded.unit;
  }

  // Does what finish() does of an anchor, both pairs of a lane at once. Every coefficient is 0 or 1. False, and nothing is
  // changed, where a pair is near.
  __device__ __forceinline__ bool finish(const Problem<float>& p, const Pass& pass, int32_t a, Counted<float>& counted) const {
    constexpr int kOwn = OwnKeys::kOwn;
    const int lane = thread_index() % 32;
    OwnKeys keys;
    keys.load(p, a - pass.begin, pass.width, count);
    keys.fill();
    int32_t negative[kOwn];
    float d2_an[kOwn];
    bool is_pair[kOwn], is_near = unit == 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      uint64_t key = keys.of(not_farther[i]);
      const bool is_empty = key >> 32 == kEmpty >> 32;  // no distance has these bits
      is_pair[i] = not_farther[i] > 0 && !(is_empty && p.without_negative);
      if (is_pair[i] && is_empty) {  // falls back
        const Winner farthest = farthest_of(p, a);
        key = pack(static_cast<uint32_t>(farthest.bits), farthest.index);
      }
      negative[i] = static_cast<int32_t>(static_cast<uint32_t>(key));
      d2_an[i] = __uint_as_float(static_cast<uint32_t>(key >> 32));
      is_near |= is_pair[i] && !(d2_ap[i] >= near && d2_an[i] >= near);
    }
    if (__ballot_sync(kWholeWarp, is_near) != 0) return false;
    counted.store_sums(p);
    counted.index = index;
    counted.loss = 0;
    bool is_active[kOwn], speaks[kOwn];
    uint32_t same[kOwn];
    int32_t place[kOwn];  // in the list of the negative
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float hinge = d2_ap[i] * unit - d2_an[i] * unit + p.margin;
      is_active[i] = is_pair[i] && !(hinge <= 0);  // NaN, of distances that overflow, is active
      if (is_pair[i]) ++counted.counts[0];
      if (is_active[i]) {
        ++counted.counts[1];
        counted.loss += hinge;
      }
      // The first of 32 pairs with the same negative speaks for all of them.
      same[i] = __match_any_sync(kWholeWarp, is_active[i] ? negative[i] : -1 - lane);
      speaks[i] = is_active[i] && (same[i] & ((1u << lane) - 1)) == 0;
      if (speaks[i]) place[i] = atomicAdd(&p.times_chosen[negative[i]], 1);
    }
    float* c_ap = p.d2_ap + (pass.slot(a) + lane);
    Entry<float>* entry = p.entry + side_by_side<2>(a, pass.entry_places(), lane);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t mine = lane + 32 * i;
      if (mine < count) c_ap[32 * i] = is_active[i] ? 1.f : 0.f;
      if (mine < count + count % 2) {  // entries are read in pairs
        entry[i * kSlicedEntryStep] = {speaks[i] ? negative[i] : index,
                                       speaks[i] ? static_cast<float>(__popc(same[i])) : 0.f};
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (speaks[i]) p.enter_list(negative[i], place[i], Listed(index, lane + 32 * i, __popc(same[i])).entry());
    }
    return true;
  }
};

// The grid arrives before it: facts of the first anchor are on their way while it waits for best and farthest. Calls meanwhile()
// once, behind the loads of these.
template <class In, class Acc, class Meanwhile>
__device__ __forceinline__ Counted<Acc> finish(const Problem<Acc>& p, const Pass& pass, const uint32_t* ticket,
                                               FinishShared& totals, Meanwhile meanwhile) {
  const int warp = thread_index() / 32, lane = thread_index() % 32, group = lane / kGroupLanes;
  if (thread_index() == 0) totals = FinishShared{};
  const int32_t first = pass.begin + block_index() * kWarps + warp;
  Counted<Acc> counted;
  int32_t a = first;
  bool is_loaded = false;  // the anchor
  Anchor<Acc> anchor;
  // Kernels on other rows than floats have no slices.
  if (std::is_same<In, float>::value && p.is_usual && pass.sliced && pass.in_shared && pass.stride <= FewPairs::kMost) {
    if constexpr (std::is_same<In, float>::value) {
      bool is_waiting = true;
#pragma unroll 1
      for (;; a += grid_size() * kWarps) {
        const FewPairs few(p, pass, min(a, pass.end - 1));
        if (is_waiting) {
          meanwhile();
          grid_wait(ticket);  // best and farthest
        }
        is_waiting = false;
        if (a >= pass.end || !few.finish(p, pass, a, counted)) break;  // from here on the warp's anchors are any anchors
        if (a + grid_size() * kWarps >= pass.end) return counted;
      }
    }
  } else {
    is_loaded = a < pass.end;
    if (is_loaded) anchor = Anchor<Acc>(p, pass, a);
    meanwhile();
    grid_wait(ticket);  // best and farthest
  }
  const bool has_stats = p.stat_counts != nullptr;
  const Roots<Acc> roots(p, pass);

#pragma unroll 1
  for (; a < pass.end; a += grid_size() * kWarps) {
    if (!is_loaded) anchor = Anchor<Acc>(p, pass, a);
    is_loaded = false;
    const int32_t count = anchor.count, anchor_index = anchor.index;
    const int32_t slot = pass.slot(a);
    counted.store_sums(p);
    counted.index = anchor_index;
    counted.loss = counted.sum_ap = counted.sum_an = 0;
    const Expanded expanded(p, pass, a);
    // An atomic's answer takes long: the entry goes to its place in the list a turn later.
    int32_t waiting_place = 0, waiting_list = -1, waiting_entry = 0;
    const auto enter_list = [&] {
      if (waiting_list >= 0) p.enter_list(waiting_list, waiting_place, waiting_entry);
    };
    Pair<Acc> next = anchor.pair;
    const Filled<Acc> filled(p, pass, a, count);
    __syncwarp();  // minima, which all lanes read
    Winner next_winner = filled(p, next.not_farther);
    int64_t pair = p.mining ? p.pair_begin[anchor_index] : 0;  // place of the next one in the list
    const int32_t entry_step = pass.entry_step();
    int32_t place = anchor.place;
#pragma unroll 1
    for (int32_t base = 0; base < count; base += 32, place += entry_step) {
      // lane = pair: its negative
      const int32_t mine = base + lane, positive = next.positive;
      int32_t negative = positive;  // any row, where there is no pair
      const bool is_pair = next.not_farther > 0;
      bool is_fallback = false;
      Acc d2_ap = 0, d2_an = 0;
      const Pair<Acc> pair_here = next;
      const Winner winner_here = next_winner;
      next = anchor.load(p, slot, mine + 32, place + entry_step);  // on its way meanwhile
      if (is_pair) {
        Winner winner = winner_here;
        is_fallback = winner.none() && p.negatives != Negatives::hard;
        if (!winner.none() || !p.without_negative) {
          if (winner.none()) winner = farthest_of(p, a);
          negative = static_cast<int32_t>(winner.index);
        }
        d2_ap = pair_here.d2_ap;
        d2_an = static_cast<Acc>(__uint_as_float(static_cast<uint32_t>(winner.bits)));
      }
      const bool counts_here = is_pair && !(is_fallback && p.without_negative);
      const bool is_direct = counts_here && (p.direct || expanded.is_near(d2_ap) || expanded.is_near(d2_an));
      Acc d_ap = 0, d_an = 0;
      if (!p.direct) {
        if (p.euclidean) {
          d_ap = roots.of_tiles(pass, d2_ap);
          d_an = roots.of_tiles(pass, d2_an);
        }
        d2_ap = expanded.value(d2_ap);
        d2_an = expanded.value(d2_an);
      }
      // group = pair: the distances of near pairs
#pragma unroll 1
      for (uint32_t direct = __ballot_sync(kWholeWarp, is_direct); direct != 0;) {
        const int turn = (__ffs(static_cast<int>(direct)) - 1) / kGroups, i = kGroups * turn + group;
        direct &= ~(((1u << kGroups) - 1) << kGroups * turn);
        const int32_t its_positive = __shfl_sync(kWholeWarp, positive, i),
                      its_negative = __shfl_sync(kWholeWarp, negative, i);
        Acc sum_ap2 = 0, sum_an2 = 0;
#pragma unroll 1
        for (int32_t first = 0; first < p.dim; first += kChunk<Acc>) {
          Acc x[kPiece<Acc>], to_ap[kPiece<Acc>], to_an[kPiece<Acc>];
          load_piece<In>(p, p.anchors, anchor_index, first, x);
          load_piece<In>(p, p.candidates, its_positive, first, to_ap);
          load_piece<In>(p, p.candidates, its_negative, first, to_an);
#pragma unroll
          for (int e = 0; e < kPiece<Acc>; ++e) {
            to_ap[e] = x[e] - to_ap[e];
            to_an[e] = x[e] - to_an[e];
            sum_ap2 = fma(to_ap[e], to_ap[e], sum_ap2);
            sum_an2 = fma(to_an[e], to_an[e], sum_an2);
          }
        }
        for (int by = kGroupLanes / 2; by > 0; by /= 2) {  // the same bits in every lane of the group
          sum_ap2 += __shfl_xor_sync(kWholeWarp, sum_ap2, by);
          sum_an2 += __shfl_xor_sync(kWholeWarp, sum_an2, by);
        }
        const Acc its_d2_ap = __shfl_sync(kWholeWarp, sum_ap2, lane % kGroups * kGroupLanes);
        const Acc its_d2_an = __shfl_sync(kWholeWarp, sum_an2, lane % kGroups * kGroupLanes);
        if (is_direct && lane / kGroups == turn) {
          d2_ap = its_d2_ap;
          d2_an = its_d2_an;
        }
      }
      if (p.euclidean) {
        if (is_direct) {
          d_ap = roots.of_rows(d2_ap);
          d_an = roots.of_rows(d2_an);
        }
        const Acc scale_ap = roots.rescaled(d2_ap), scale_an = roots.rescaled(d2_an);
        const bool again = is_direct && !p.mining && (scale_ap != 1 || scale_an != 1);
#pragma unroll 1
        for (uint32_t left = __ballot_sync(kWholeWarp, again); left != 0; left &= left - 1) {  // warp = pair
          const int i = __ffs(static_cast<int>(left)) - 1;
          const auto x = input_row<In>(p, p.anchors, anchor_index);
          const auto to_ap = input_row<In>(p, p.candidates, __shfl_sync(kWholeWarp, positive, i));
          const auto to_an = input_row<In>(p, p.candidates, __shfl_sync(kWholeWarp, negative, i));
          const Acc its_scale_ap = __shfl_sync(kWholeWarp, scale_ap, i), its_scale_an = __shfl_sync(kWholeWarp, scale_an, i);
          Acc sum_ap2 = 0, sum_an2 = 0;
#pragma unroll 1
          for (int32_t d = lane; d < p.dim; d += 32) {
            const Acc ap = (x[d] - to_ap[d]) * its_scale_ap, an = (x[d] - to_an[d]) * its_scale_an;
            sum_ap2 = fma(ap, ap, sum_ap2);
            sum_an2 = fma(an, an, sum_an2);
          }
          sum_ap2 = warp_sum(sum_ap2);
          sum_an2 = warp_sum(sum_an2);
          if (lane == i) {
            d_ap = roots.of_rows(sum_ap2) / scale_ap;
            d_an = roots.of_rows(sum_an2) / scale_an;
          }
        }
      }
      // lane = pair again: the rest
      Acc c_ap = 0, c_an = 0;
      if (counts_here) {
        const Term<Acc> term = term_of(p, roots, d2_ap, d2_an, d_ap, d_an);
        c_ap = term.c_ap;
        c_an = term.c_an;
        ++counted.counts[0];
        // NaN is active; a soft term is above 0, if only in exact arithmetic.
        counted.counts[1] += p.soft_margin || term.loss != 0 ? 1 : 0;
        counted.loss += term.loss;
        if (has_stats) {
          counted.counts[3] += term.hard ? 1 : 0;
          counted.counts[4] += term.semi_hard ? 1 : 0;
          counted.sum_ap += d2_ap;
          counted.sum_an += d2_an;
          counted.max_d2_ap = d2_ap > counted.max_d2_ap ? d2_ap : counted.max_d2_ap;
        }
      }
      counted.counts[2] += is_fallback ? 1 : 0;
      next_winner = filled(p, next.not_farther);
      if (p.mining) {
        const uint32_t pairs = __ballot_sync(kWholeWarp, is_pair);
        const int64_t place = pair + __popc(pairs & ((1u << lane) - 1));
        pair += __popc(pairs);
        if (is_pair) {
          p.out_positive[place] = positive;
          p.out_negative[place] = counts_here ? negative : -1;
          static_cast<Acc*>(p.out_d2_ap)[place] = counts_here ? d2_ap : Acc(NAN);
          static_cast<Acc*>(p.out_d2_an)[place] = counts_here ? d2_an : Acc(NAN);
          p.out_is_fallback[place] = is_fallback ? 1 : 0;
        }
      }
      if (!p.wants_gradient) continue;
      // Pairs with the same negative: their coefficients, added in order of the pairs, at the first of them. It registers the
      // anchor with the row that must hear of it.
      const uint32_t same = __match_any_sync(kWholeWarp, c_an != 0 ? negative : -1 - lane);
      const bool speaks = c_an != 0 && __ffs(static_cast<int>(same)) - 1 == lane;
      uint32_t left = c_an != 0 ? same : 0;
      Acc sum = 0;
      while (__ballot_sync(kWholeWarp, left != 0) != 0) {
        const Acc other = __shfl_sync(kWholeWarp, c_an, left != 0 ? __ffs(static_cast<int>(left)) - 1 : lane);
        if (left != 0) sum += other;
        left &= left - 1;
      }
      if (mine < count) {
        p.d2_ap[slot + mine] = c_ap;
        p.entry[place] = {speaks || !p.plain ? negative : anchor_index, speaks ? sum : Acc(0)};
      } else if (mine == count && count % 2 == 1 && pass.sliced) {
        p.entry[place] = {anchor_index, Acc(0)};  // entries are read in pairs
      }
      enter_list();
      waiting_list = -1;
      if (speaks) {
        waiting_list = negative;
        waiting_entry = pass.listed(anchor_index, mine, place);
        waiting_place = atomicAdd(&p.times_chosen[negative], 1);
      }
    }
    enter_list();
    if (p.euclidean && !p.soft_margin) counted.loss *= static_cast<double>(two_to<Acc>(roots.exponent));
  }
  return counted;
}

}  // namespace facenet_ext::cuda
