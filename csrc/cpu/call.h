// What the phases of one call share: the arguments, the divided workspace, and facts found on the way.
#pragma once

#include <omp.h>
#include <sched.h>

#include "buckets.h"

namespace facenet_ext::cpu {
namespace {

struct Lock {
  int32_t* word;
  explicit Lock(int32_t* w) : word(w) {
    while (__atomic_exchange_n(word, 1, __ATOMIC_ACQUIRE)) sched_yield();
  }
  ~Lock() { __atomic_store_n(word, 0, __ATOMIC_RELEASE); }
  Lock(const Lock&) = delete;
};

template <class S>
struct Call {
  using T = typename S::T;
  using Key = typename KeyOf<T>::Key;
  static constexpr int kT = kTile<T>;
  static_assert(kT % S::MR == 0 && kT % S::NR == 0 && kColumnPad % S::NR == 0 && kColumnPad % S::MR == 0 &&
                    kColumnPad % S::W == 0 && kSlotPad % S::W == 0 && kT % kColumnPad == 0 && kT <= kQueue,
                "tile arithmetic");

  const TripletArgs& args;
  const Workspace<T> w;
  const int64_t A, C, D, Dp, panel_size;
  const bool symmetric;  // anchors and candidates are the same rows in the same order: every product serves both ways
  const bool mining;
  const bool hard;  // the closest negative, whatever the positives' distances are
  const bool one_positive;  // the farthest or closest
  const bool every_pair;  // both (i, j) and (j, i) of all candidates of one label
  const int64_t gradient_rows;  // candidates of an index below it have a gradient
  const int threads;     // below about a million products a second thread costs more than it brings

  Classes classes{};
  bool finite = true;
  double scale = 1, unscale = 1;  // rows are multiplied by `scale` on the way in, distances by `unscale` on the way out
  Limit<T> limit{};
  T longest = 0;  // the largest squared length of a row
  bool direct = false;  // every distance that enters the loss is summed directly (finish.h)
  bool screening = false;  // tiles are looked at in whole numbers first (screen.h)
  bool far_is_zero = false;  // a negative beyond the limit makes a term of 0, and nobody asks for its distance
  T digit_unit = 0;  // what a unit of the last digit is worth where weights are summed in bytes (dense.h), else 0
  const T* centre = nullptr;  // [Dp] has been subtracted from every row
  bool stopped = false;
  // totals, known after the last pass's selection
  RowSum sum{};
  double factor = 0;  // 1 / count

  explicit Call(const TripletArgs& a)
      : args(a),
        w(divide<T>(a, a.workspace)),
        A(a.num_anchors),
        C(a.num_candidates),
        D(a.dim),
        Dp(round_up(a.dim, kSlotPad)),
        panel_size(Dp * S::NR),
        symmetric(a.anchor_offset == 0 && A == C),
        mining(a.positive != nullptr),
        hard(a.negatives == Negatives::hard),
        one_positive(a.positives != Positives::all),
        every_pair(!one_positive && a.pairs == PairOrder::ordered && a.negatives_only == 0),
        gradient_rows(C - a.constants),
        threads(static_cast<double>(A) * static_cast<double>(C) * static_cast<double>(D) < 1e6 ? 1 : a.num_threads) {}

  // scale^-2 itself may be beyond the range, and 0 times infinity is no tie.
  double unscaled(double d2) const { return d2 * unscale * unscale; }
  // A margin or band in the unit of scaled rows' distances. Beyond all of them it is as good as infinite, but stays below
  // what stands for "no negative" (kNoNegative).
  T scaled(double width) const {
    constexpr double kMost = static_cast<double>(std::numeric_limits<T>::max()) / 16;
    const double x = args.distance == Distance::euclidean ? width * scale : width * scale * scale;
    return width > 0 ? static_cast<T>(x < kMost ? x : kMost) : T(0);
  }

  bool wants_gradient() const { return args.grad_candidates || args.grad_anchors; }

  Buckets<S> buckets(int64_t row) const {
    Row<T>& r = w.rows[row];
    return {r, w.t + r.slot, w.key + r.slot, w.sieve + row};
  }

  struct Scratch {
    T* tile;  // [kT, kT]
    T* strip;  // [W, kT]
    T* list_weight;  // [kList]
    T* rows;  // [kRows, Dp]
    T* carry;  // [kRows, Dp] what their last bits have rounded away
    T* block;  // [kTogether, Dp] sums of a long list's part
    uint32_t* queue;  // [kQueue]
    int32_t* list;  // [kList]
    T* weights;  // [kT, kT] where every distance is looked at
    T* aside;  // [8, kT] likewise
    int8_t* coarse;  // [kT, Dp] where tiles are screened, the last of all
    int64_t* coarse_rows;  // [1] whose rows they are
  };
  Scratch scratch(int thread) const {
    Scratch s;
    s.tile = reinterpret_cast<T*>(w.thread_scratch + thread * w.scratch_bytes);
    s.strip = s.tile + kT * kT;
    s.list_weight = s.strip + 16 * kT;
    s.rows = s.list_weight + kList;
    s.carry = s.rows + kRows * Dp;
    s.block = s.carry + kRows * Dp;
    s.queue = reinterpret_cast<uint32_t*>(s.block + kTogether * Dp);
    s.list = reinterpret_cast<int32_t*>(s.queue + kQueue);
    s.weights = reinterpret_cast<T*>(s.list + kList);
    s.aside = s.weights + kT * kT;
    s.coarse = reinterpret_cast<int8_t*>(w.thread_scratch + (thread + 1) * w.scratch_bytes - kT * Dp - 64);
    s.coarse_rows = reinterpret_cast<int64_t*>(s.coarse + kT * Dp);
    return s;
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
