// The CPU backend for one instruction set.
//
//   labels -> classes; rows -> scaled or normalised, sorted, packed; norms     prepare.h
//
//   for each pass over anchors whose slots fit (nearly always one pass):
//     thresholds   block-diagonal distances, sorted                            mine.h      2 N K D FLOP
//     sweep        tiles of distances -> sieve -> search -> buckets            sweep.h     N^2 D FLOP
//                  late in training in whole numbers first                     screen.h    a quarter of that, or half
//     select       suffix minimum, near pairs anew, terms, weights             finish.h    up to 6 N K D FLOP
//     takers       candidate -> the anchors that took it                       gradient.h
//     gradient     one gather a row                                            gradient.h  up to 9 N K D FLOP
//
//   loss, statistics: sums of per-anchor float64 values in anchor order        finish.h
//   which thread does what                                                     share.h
//
// Rules that draw a negative sweep and choose in a way of their own (draw.h); rules that make every negative a term go
// another way from the thresholds on (dense.h).
//
// Memory: two copies of the rows, a third in 8 bits, and per anchor its K thresholds and buckets and a sieve of 192
// bytes: O(N D), never N x N. A class so large that its anchors' slots exceed their bound (layout.h) is worked off in several
// passes.
// Reproducible: buckets take minima of (distance, index), and minima do not depend on order; every floating-point sum is made
// by one thread in an order that depends on the data alone. So any number of threads gives the same bits. Interruptible: the
// calling thread polls between tiles.
#pragma once

#include "dense.h"
#include "draw.h"
#include "sweep.h"

namespace facenet_ext::cpu {
namespace {

// The rules that take one negative a pair: by its place in the order of distances, or drawn.
template <class S>
Status run_buckets(const TripletArgs& args) {
  Call<S> c(args);
  inspect(c);
  if (!c.finite && !c.mining) {
    fill_nan(c);
    return {};
  }
  const auto& w = c.w;
  c.classes = sort_labels(args, w.table, w.hash_size, w.scratch_index, w.order, w.position, w.class_of, w.class_begin, w.arow,
                          w.aclass, w.aself, w.row_of, w.class_row);
  if (c.classes.live > 0) pack(c);
  int64_t begin = 0;
  do {
    const int64_t end = plan_pass(c, begin);
    thresholds(c, begin, end);
    const Draw<S> draw{c, begin, end};
    if (draws_one(args)) {
      draw.start();
      visit_tiles(c, begin, end, [&](const Tile& tile, const typename S::T* d) { draw.visit(tile, d); });
    } else {
      c.screening = worth_screening(c, begin, end);
      if (c.screening) {
        quantise(c);
        find_far(c, begin, end);
      }
      sweep(c, begin, end);
    }
    if (c.stopped) return {Code::interrupted, "triplet", "interrupted"};
    if (draws_one(args)) draw.finish();
    select(c, begin, end);
    if (!c.mining && end == c.classes.live) total(c);
    if (c.wants_gradient()) {
      const Takers<S> takers(c, begin, end);
      takers.list();
      gradient(c, takers);
    }
    begin = end;
  } while (begin < c.classes.live);
  return {};
}

template <class S>
Status run(const TripletArgs& args) {
  return counts_all(args) ? run_dense<S>(args) : run_buckets<S>(args);
}

}  // namespace
}  // namespace facenet_ext::cpu
