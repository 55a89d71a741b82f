// How one call's workspace is divided, and the plain data that the phases hand to each other. This header is compiled into
// every ISA file, so it defines no function that the linker could merge across them (one merged copy with AVX-512 in it would
// end the process on an older machine): what is not a constant is in an unnamed namespace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../triplet.h"

namespace facenet_ext::cpu {

// (distance, candidate index) packed so that an integer comparison orders by distance, then by index. Distances are >= +0,
// whose bit patterns order like the numbers.
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Key = uint64_t;
  using Bits = uint32_t;
};
__extension__ typedef unsigned __int128 uint128;
template <>
struct KeyOf<double> {
  using Key = uint128;
  using Bits = uint64_t;
};

namespace {

constexpr int kColumnPad = 48;  // candidates are padded to a multiple of every register block's width
constexpr int kSlotPad = 16;  // an anchor's thresholds are padded to a multiple of every vector width
constexpr int kMaxBins = 8;  // parts in which the reverse lists are built; more threads than that share them

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

constexpr int32_t kNoHole = INT32_MAX;

// Slots of an anchor with K positives: K + 1 buckets, in whole rows (buckets.h), of at most kSlotPad lanes or twice as many.
constexpr int kWideRows = 48;  // from so many positives on
constexpr int64_t slot_pitch(int64_t K) { return round_up(K + 1, K < kWideRows ? kSlotPad : 2 * kSlotPad); }

// Everything about an anchor that the sweep touches in one cache line.
template <class T>
struct Row {
  T farthest_positive;  // its largest threshold
  T ceiling;  // nothing beyond it is wanted any more
  uint32_t positives;  // K: how many thresholds the buckets have
  uint32_t radix;  // R: its buckets stand in R rows (buckets.h), 0: in order
  uint32_t top;  // place of the bucket beyond all positives
  int64_t slot;  // first of its slots in t, key, rank, weight
  typename KeyOf<T>::Key
      far;  // farthest negative so far: (bits << 32) | ~index, 0 = none; kept while no negative is beyond all positives
  bool fresh;  // nothing taken yet
  bool top_empty;  // no negative beyond the farthest positive seen yet
  bool track_far;  // top_empty and the fallback wants the farthest negative
  uint32_t runs;  // after selection: distinct (negative, weight) entries at its slots
  // Its positives: `pairs` sorted positions from `first` on, `hole` (the anchor itself) left out.
  uint32_t pairs;
  int32_t first, hole;

  int64_t positive(uint32_t place) const {  // place: 0 .. pairs, in order of index
    const int64_t at = first + static_cast<int64_t>(place);
    return at + (at >= hole);
  }
  int64_t place(int64_t candidate) const {  // its inverse, or -1
    const int64_t at = candidate - first - (candidate > hole);
    return candidate != hole && at >= 0 && at < static_cast<int64_t>(pairs) ? at : -1;
  }
};

// Which distances an anchor's buckets may still want, by ranges of equal width (sieve.h).
struct alignas(64) Sieve {
  uint32_t cells;  // how many ranges: 256 (all in one cache line), 512 or 1024; 0: there is none, or it lets too much through
  float scale, bias;  // the range of distance d: the low bits of d scale + bias
  float bottom, top;  // ends of what is wanted, and a range more
  uint32_t taken, next;  // candidates taken in so far, and from how many on it is made anew
  uint32_t cell[32];  // a bit for each range
};

// One anchor's share of the result.
struct RowSum {
  double loss, d2_ap, d2_an, max_d2_ap;
  int64_t pairs, active, fallback, hard, semi_hard;
};

// Rows in whole numbers, Rp of them.
template <class T>
struct Coarse {
  int8_t* numbers;  // [Rp / NR, Dp / 4, NR, 4]
  T* step;  // [Rp] what a unit of a row's numbers is worth
  T* reach;  // [Rp] a pair's squared distance is at least reach_a + reach_b - 2 step_a step_b numbers_a.numbers_b
  int32_t* level;  // [Rp] -kUp times their sum: takes back that the other row of a product was moved up by kUp
};

// All arrays of one call. Sorted order: classes with two or more candidates first, in order of first appearance, inside a
// class by index. It depends on which labels are equal, never on their values: relabelling changes no bit of the result.
template <class T>
struct Workspace {
  // candidates, sorted
  T* x;  // [Cp, Dp] rows, zero padded
  T* panels;  // [Cp / NR, Dp, NR]
  T* norm;  // [Cp] squared, NaN in the padding: no padded candidate passes any comparison
  T* inverse_length;  // [C] sorted, only if normalize; negative: shorter than 1e-12, the divisor is a constant
  int32_t* order;  // [C] sorted position -> candidate index
  int32_t* position;  // [C] candidate index -> sorted position
  int32_t* class_of;  // [C] sorted position -> class
  int32_t* class_begin;  // [classes + 1] first sorted position
  Coarse<T> coarse;  // where tiles may be screened (screen.h)
  // the rows as whole numbers of 24 bits, where weights are summed in bytes (dense.h)
  int8_t* digits;  // [Cp / 4, Dp / 16, 3, 16, 4]
  // anchors, sorted; the same memory as above where anchors and candidates are the same rows
  T* ax;  // [Ap, Dp]
  T* anorm;  // [Ap]
  Coarse<T> acoarse;
  T* ainverse_length;  // [A]
  int32_t* arow;  // [A] sorted row -> anchor index
  int32_t* aclass;  // [A] sorted row -> class or -1
  int32_t* aself;  // [A] sorted row -> its own sorted candidate position or -1
  int32_t* row_of;  // [C] sorted candidate position -> its sorted row as an anchor or -1
  int32_t* class_row;  // [classes + 1] first sorted row of a class
  Row<T>* rows;  // [A]
  RowSum* sums;  // [A]
  Sieve* sieve;  // [A] where one negative is chosen by its distance, in float
  // slots of the pass in hand: an anchor's K thresholds and K + 1 buckets
  int64_t slots;  // capacity
  T* t;  // thresholds: sorted distances of the positives; afterwards, up to the end of `rank`, the reverse lists
  uint32_t* rank;  // sorted rank -> position inside the class
  typename KeyOf<T>::Key* key;  // least (distance, index) per bucket, see buckets.h; afterwards the anchor's runs
  T* weight;  // by place (Row): d loss / d d2_ap; before selection, negatives = hard: the positives' distances
  uint32_t* term;  // per bucket: a histogram of its own where a band limits the terms (dense.h)
  // reverse lists: candidate -> anchors that took it as negative
  int32_t* bins;  // [kMaxBins, C] where each list ends (gradient.h)
  // label hashing, then row locks
  int32_t* table;  // [hash_size]
  int64_t hash_size;
  int32_t* scratch_index;  // [max(A, C) + 1]
  int32_t* locks;  // [tiles]
  int64_t* next;  // [threads] a line each: how much of a thread's work has been begun (share.h)
  // rules that look at every distance
  int32_t* turns;  // [1 + 2 (tiles of anchors + tiles of candidates)]
  T* centre;  // [1 + 2 threads, Dp] what the rows are moved by; every term counts
  T* anchor_grad;  // [A, Dp] every term counts, and anchors are some of the candidates
  uint64_t* draws;  // [2 slots] random rules: the least (hash, candidate index) of each range (draw.h)
  char* thread_scratch;  // [threads] of scratch_bytes each
  int64_t scratch_bytes;
  int64_t total;  // bytes
};

// A run: one distinct negative of an anchor and the weight of all positives that took it. Lives where the buckets were. In a
// reverse list (gradient.h) the other way round: an anchor that took a candidate.
template <class T>
struct Run {
  T weight;
  uint32_t candidate;  // sorted position
};
static_assert(sizeof(Run<float>) <= sizeof(KeyOf<float>::Key) && sizeof(Run<double>) <= sizeof(KeyOf<double>::Key), "");

template <class T>
constexpr int kTile = sizeof(T) == 4 ? 192 : 96;  // anchors and candidates of a tile; its distances stay in L2

constexpr int kGroup = 16;  // anchors whose searches run ahead of what they find
constexpr int kQueue = 4096;  // entries of a work list: a group's share of a tile and a vector more
constexpr int kMaxStrided = 1024;  // buckets of an anchor that are searched by whole vectors (buckets.h)
constexpr int kFarBuckets = 128;  // from so many on, the state of a tile's anchors does not stay in L2
constexpr int kRows = 16;  // gradient rows that a thread works on together
constexpr int kList = 64;  // neighbours gathered at a time: bounds the error of a float32 sum of thousands
constexpr int kBlock = 16 * kList;  // neighbours of a longer list whose sum is made apart from the others'
constexpr int kCarried = 48;  // rows of a class beyond which totals in float carry what they round away (gather.h)
constexpr int kTogether = 4;  // neighbouring rows gathered together at most

// Every negative is a term of its own.
bool counts_all(const TripletArgs& args) {
  return args.negatives == Negatives::all || args.negatives == Negatives::all_semi_hard;
}
bool draws_one(const TripletArgs& args) {
  return args.negatives == Negatives::random_semi_hard || args.negatives == Negatives::random_active;
}

// splitmix64's finaliser.
uint64_t mix(uint64_t h) {
  h ^= h >> 30;
  h *= 0xbf58476d1ce4e5b9u;
  h ^= h >> 27;
  h *= 0x94d049bb133111ebu;
  return h ^ (h >> 31);
}

int64_t hash_capacity(int64_t n) {
  int64_t size = 16;
  while (size < 2 * n) size *= 2;
  return size;
}

// Divides `base` (null: only counts). What stands at slots is bounded by 3 KiB an anchor plus 16 MiB, whatever the labels are
// (twice that in double; draws and the terms of a band come on top): a batch whose classes need more is worked off in passes
// over its anchors.
template <class T>
Workspace<T> divide(const TripletArgs& args, void* base) {
  Workspace<T> w{};
  char* p = static_cast<char*>(base);
  int64_t used = 0;
  auto take = [&](auto*& pointer, int64_t count) {
    using E = typename std::remove_reference<decltype(*pointer)>::type;
    pointer = base ? reinterpret_cast<E*>(p + used) : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(E)), 64);
  };
  const int64_t A = args.num_anchors, C = args.num_candidates, D = args.dim;
  const int64_t Cp = round_up(C, kColumnPad), Ap = round_up(A, kColumnPad), Dp = round_up(D, kSlotPad);
  const bool symmetric = args.anchor_offset == 0 && A == C;

  take(w.x, Cp * Dp);
  take(w.panels, Cp * Dp);
  take(w.norm, Cp);
  take(w.inverse_length, C);
  const bool may_screen = std::is_same<T, float>::value && !draws_one(args);
  const auto take_coarse = [&](Coarse<T>& coarse, int64_t rows) {
    take(coarse.numbers, may_screen ? rows * Dp : 0);
    take(coarse.step, may_screen ? rows : 0);
    take(coarse.reach, may_screen ? rows : 0);
    take(coarse.level, may_screen ? rows : 0);
  };
  take_coarse(w.coarse, Cp);
  const bool may_weigh = std::is_same<T, float>::value && symmetric && counts_all(args);
  take(w.digits, may_weigh ? 3 * Cp * Dp : 0);
  take(w.order, C);
  take(w.position, C);
  take(w.class_of, C);
  take(w.class_begin, C + 1);
  if (symmetric) {
    w.ax = w.x;
    w.anorm = w.norm;
    w.acoarse = w.coarse;
    w.ainverse_length = w.inverse_length;
  } else {
    take(w.ax, Ap * Dp);
    take(w.anorm, Ap);
    take_coarse(w.acoarse, Ap);
    take(w.ainverse_length, A);
  }
  take(w.arow, A);
  take(w.aclass, A);
  take(w.aself, A);
  take(w.row_of, C);
  take(w.class_row, C + 1);
  take(w.rows, A);
  take(w.sums, A);
  take(w.sieve, std::is_same<T, float>::value && !counts_all(args) && !draws_one(args) ? A : 0);

  using Key = typename KeyOf<T>::Key;
  const int64_t rank_words = sizeof(T) / sizeof(uint32_t);  // a threshold and its rank make room for a Run<T>
  const int64_t slot_bytes = 2 * sizeof(T) + sizeof(Key) + rank_words * sizeof(uint32_t);
  const int64_t one = slot_pitch(C);  // an anchor's slots at most
  const int64_t bound = (3072 * A + (int64_t{16} << 20)) / slot_bytes * static_cast<int64_t>(sizeof(T) / 4);
  w.slots = A * one < bound ? A * one : (one > bound ? one : bound);
  if (w.slots > INT32_MAX) w.slots = INT32_MAX;  // reverse lists count in 32 bits; one anchor fits all the same
  take(w.t, w.slots + kSlotPad);  // the last anchor's thresholds are read in whole vectors from the second on
  take(w.rank, w.slots * rank_words);
  take(w.key, w.slots);
  take(w.weight, w.slots);
  take(w.term, counts_all(args) && args.band > 0 ? w.slots : 0);
  take(w.bins, kMaxBins * C);

  w.hash_size = hash_capacity(C);
  take(w.table, w.hash_size);
  take(w.scratch_index, (A > C ? A : C) + 1);
  take(w.locks, (A + kTile<T> - 1) / kTile<T> + 1);
  take(w.next, 8 * static_cast<int64_t>(args.num_threads));
  const bool every = counts_all(args) || draws_one(args);
  const auto tiles = [](int64_t n) { return (n + kTile<T> - 1) / kTile<T>; };
  if (every) take(w.turns, 1 + 2 * (tiles(A) + tiles(C)));
  if (counts_all(args)) take(w.centre, (1 + 2 * static_cast<int64_t>(args.num_threads)) * Dp);
  if (counts_all(args) && args.anchor_offset >= 0 && !symmetric) take(w.anchor_grad, A * Dp);
  if (draws_one(args)) take(w.draws, 2 * w.slots);
  // per thread: a tile of distances, a transposed strip, the queue, a gather list, gradient rows; a second tile
  w.scratch_bytes = round_up(static_cast<int64_t>(sizeof(T)) * (kTile<T> * kTile<T> + 16 * kTile<T>)+4 * (kQueue + kList) +
                                 static_cast<int64_t>(sizeof(T)) * (kList + (2 * kRows + kTogether) * Dp) + 1024 +
                                 (every ? static_cast<int64_t>(sizeof(T)) * kTile<T> * (kTile<T> + 8) : 0) +
                                 (may_screen ? kTile<T> * Dp + 64 : 0),
                             64);
  take(w.thread_scratch, w.scratch_bytes * args.num_threads);
  w.total = used;
  return w;
}

}  // namespace

// What does not depend on the instruction set: label classes, orders, sorting. In triplet.cpp.
struct Classes {
  int64_t count;  // classes among the candidates
  int64_t live;  // sorted rows 0 .. live have at least one positive and one negative
};
Classes sort_labels(const TripletArgs& args, int32_t* table, int64_t hash_size, int32_t* scratch_index, int32_t* order,
                    int32_t* position, int32_t* class_of, int32_t* class_begin, int32_t* arow, int32_t* aclass,
                    int32_t* aself, int32_t* row_of, int32_t* class_row);
void sort_thresholds(float* t, uint32_t* rank, int64_t n);  // ascending, rank = original place, stable
void sort_thresholds(double* t, uint32_t* rank, int64_t n);
// FACENET_EXT_SCREENING=off or always, for tests: no bit of any result depends on it (screen.h).
enum class Screening { when_worth, never, always, misspelt };
Screening screening_switch();

// One instruction set's entry points.
struct Kernels {
  const char* name;
  Status (*run_float)(const TripletArgs& args);
  Status (*run_double)(const TripletArgs& args);
};
extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace facenet_ext::cpu
