// What a kernel gets: the caller's pointers, the options, and the workspace, carved by one function that also sizes it.
#pragma once

#include "device.cuh"
#include "triplet.h"

namespace facenet_ext::cuda {

#ifndef FACENET_EXT_WARPS_PER_SIDE
#define FACENET_EXT_WARPS_PER_SIDE 4  // the emulated tests also build with 2: smaller tiles, more ragged edges
#endif

// Every tuning constant. A block computes one kSide x kSide tile of distances at a time, a warp 32 x 32 of it.
constexpr int kWarpsPerSide = FACENET_EXT_WARPS_PER_SIDE;
constexpr int kWarps = kWarpsPerSide * kWarpsPerSide;
constexpr int kThreads = 32 * kWarps;
constexpr int kSide = 32 * kWarpsPerSide;
constexpr int kStageBytes = 64;   // of every row, per stage of the copy ring: 16 split floats, 32 halves or 8 doubles
constexpr int kStages = 3;        // of the ring, at least (RingLayout)
constexpr int kMostStages = 8;    // of rows that stand in the ring whole
constexpr int kStrip = 16;        // anchors whose positives a block finds together: the height of an mma
constexpr int kRowsPerBlock = 8;  // a grid has at most a block per so many rows
#ifndef FACENET_EXT_SORT_CHUNK
#define FACENET_EXT_SORT_CHUNK 8192  // up to here labels are sorted by counting alone; the tests build with 64
#endif
constexpr int kSortChunk = FACENET_EXT_SORT_CHUNK;
constexpr int kWarpSort = FACENET_EXT_SORT_CHUNK < 128 ? 16 : 128;  // longer lists are sorted by a block
constexpr int kExpandedDim = 128;  // up to here a tile's distance of a pair that is not near serves the loss (finish.cuh)
constexpr int kTileGroup = 8;     // rows of tiles that walk down the columns together, so that L2 serves them
static_assert(2 * kSide * (kStageBytes / 16) % kThreads == 0, "every thread copies as many 16-byte pieces");

// How products of rows are computed; what a row looks like in `operand`.
enum class Math {
  split,   // float: each element as the pair of halves (hi, lo * 2^11); three products on tensor cores
  half,    // float16 and bfloat16: one product of halves, which hold the 8 bits of a bfloat16 too, once they are scaled
  simt32,  // floats on CUDA cores: for devices whose tensor cores lack this mma
  simt64,  // doubles on CUDA cores
};
template <Math M>
struct MathTraits {
  using Acc = float;
  static constexpr int kElementBytes = 4;
  static constexpr int kRounds = 1;  // sweeps over the distances: a float and an index are compared as one 64-bit word
};
template <>
struct MathTraits<Math::half> : MathTraits<Math::split> {
  static constexpr int kElementBytes = 2;
};
template <>
struct MathTraits<Math::simt64> {
  using Acc = double;
  static constexpr int kElementBytes = 8;
  static constexpr int kRounds = 2;  // first the smallest value, then the smallest index that has it
};

// Anchors or candidates. "Position" is a row's place after sorting by (label, index), "index" its place in the input.
template <class Acc>
struct Rows {
  const void* x;          // [count, D] input type, rows `stride` elements apart
  const int64_t* labels;  // [count]
  int64_t stride;
  int32_t count;
  int64_t* sorted_label[2];   // [count] by position; two buffers for the merges, the sorted one is the last written
  int32_t* sorted_index[2];   // [count] by position: the index
  int32_t* position;          // [count] by index: the position
  int32_t* mate_begin;  // [count] by position: rows of the other set (the same one if plain) with this label stand at
  int32_t* mate_end;  //         positions mate_begin .. mate_end there
  uint8_t* operand;  // [count, pitch] bytes by position, zero behind element D
  Acc* norm;  // [count] by position: the row's product with itself, by the arithmetic of the tiles, scaled
  int32_t* exponent;  // [count] by position: operand = row * 2^-exponent
  Acc* inverse_norm;  // [count] by index: what the row is multiplied by if it is to be normalised
  Acc* gradient;  // [count, D] by index: running sum over passes
  void* gradient_out;  // [count, D] Acc, or null
  bool aligned;  // vectors of 16 bytes of Acc lie on multiples of their size in every row, and fill it
};

// A negative of an anchor, or an anchor that chose a row.
template <class Acc>
struct alignas(2 * sizeof(Acc)) Entry {
  int32_t row;  // before finish(): how many thresholds are not farther than the positive, 0: no pair; after it the index
                // of the negative (plain, coefficient 0: of the anchor)
  Acc coefficient;  // in the gradient; 0: no term, or an earlier pair of the anchor has the same negative and speaks for both
};

struct alignas(16) Facts {  // of a block's rows, of all rows in the end
  int32_t max_positives;
  int32_t max_exponent;
  int32_t max_norm;  // norm_order()
  int32_t has_nonfinite;
};
constexpr int32_t kNoExponent = -(1 << 20);  // a row of zeros

// norm * 4^exponent as an integer that orders as it does: exponents are added, so no range of rows is out of reach.
__device__ __forceinline__ int32_t norm_order(float norm, int32_t exponent) {
  return norm > 0 && norm - norm == 0 ? static_cast<int32_t>(ordered_bits(norm) >> 4) + exponent * (1 << 20) : INT32_MIN;
}
__device__ __forceinline__ int32_t norm_order(double, int32_t) { return INT32_MIN; }  // nobody asks
// Rounded down, in units of 4^max_exponent.
__device__ __forceinline__ float norm_of_order(int32_t order, int32_t max_exponent) {
  return order == INT32_MIN ? 0.f : __uint_as_float(static_cast<uint32_t>(order - max_exponent * (1 << 20)) << 4);
}

struct Counters {
  uint64_t counts[5];  // as stat_counts
  uint64_t max_d2_ap;  // ordered bits of a double
  uint64_t list_end;  // of this pass: entries of `list` given away, if some list does not fit in its place
  int32_t list_overflows;  // of this pass: there is such a list
};

// How a tile's memory is shared out. Stages come in groups with a barrier each, so that warps drift apart within one and the
// products of one warp hide the loads of another; two groups are on their way while one is multiplied.
struct RingLayout {
  int32_t group, stages;  // stages of a group; of the ring, three groups or whole rows
  bool apart;  // distances stand beside the ring: the next tile is on its way while they are searched
  int32_t slots;  // an anchor's buckets that fit in beside it
};
constexpr int kLayouts = 5;
constexpr __host__ __device__ RingLayout narrow_ring() { return {1, kStages, false, 0}; }

template <class Acc>
struct Problem {
  Rows<Acc> anchors, candidates;  // the same if plain
  bool plain;  // anchors are the candidates: distances are symmetric and half of the tiles do
  bool anchors_are_candidates;  // at index anchor_offset + a
  bool is_bfloat;  // half precision: which of the two the input is
  bool mining, normalize, euclidean, cosine, soft_margin, wants_gradient;
  Negatives negatives;
  Positives positives;
  bool unordered;
  bool drops_pairs;  // not every candidate of the anchor's class makes a pair: one of the three options above, or those below
  int32_t positives_end;  // candidates from this index on are nobody's positives
  int32_t gradient_rows;  // candidates from this index on are constants
  bool direct;  // the loss takes every distance in direct form, not those of near pairs alone (finish.cuh)
  bool is_usual;  // the plain loss with a hinge over squared distances, semi-hard negatives and a gradient, without statistics
  bool without_negative;  // a pair whose bucket is empty does not count, or (mining, random rules) has negative -1
  Reduction reduction;
  int32_t anchor_offset;
  int32_t dim;
  int32_t pitch;  // bytes of a row in `operand`, a multiple of kStageBytes
  int32_t rows_per_block;  // that a block prepares, of both sets
  bool has_table;  // of labels, in shared memory: labels.cuh
  int32_t slot_bits;  // 2^slot_bits slots in it
  int32_t merges;  // merge passes after the chunks are sorted: ceil(log2(rows / kSortChunk))
  RingLayout layouts[kLayouts];  // of a tile's memory, the best one first
  int32_t slice_helpers;  // warps of a block for which a group has no rows, and which have memory to help others
  int32_t slice_lanes;  // of 16 bytes, that a slice of a row takes; 0: the gradient is not gathered from slices (slices.cuh)
  int32_t slice_rows;  // that a warp has at a time then
  uint32_t slices_reciprocal;  // of 2^31
  bool writes_fours;  // rows of the gradient lie on 16 bytes and fill them
  int32_t slices, group_rows, slice_items;  // slices of a row, rows of a group, pairs of a slice and a group
  Acc margin;
  double exact_margin;
  double slope;  // of a term by its distances' arguments: 2 if these are squares, else 1
  Acc width;  // random rules: eligible is t > d - width, or t >= d - width if `closed`
  bool closed;
  const int64_t* seed;

  // Anchors are worked off in passes of as many as there are slots for; all passes have the same stride = max positives.
  int32_t slots;  // places for (anchor, positive) pairs and as many buckets
  Acc* d2_ap;  // [slots] selection distances in order of the positive; after finish() the pair's gradient coefficient
  Acc* threshold;  // [slots] the same, ascending
  uint64_t* best;  // [slots] bucket r: the closest negative with threshold[r] < d <= threshold[r + 1]
  uint32_t* best_index;  // [slots] double only: its index
  Entry<Acc>* entry;  // [slots] the pair's negative
  int32_t list_places;  // places of `list` that each candidate has before it overflows; if plain in pairs, of whole fours of rows
  int32_t* list;  // [slots] per candidate the entries that chose it: Pass::listed()
  int32_t* sorted_list;  // [slots] in the memory of `best`: the same, ascending
  int32_t* list_scratch;  // [slots] in the memory of `best`
  float* base;  // [A] by position, where buckets are in shared memory: buckets.cuh
  int32_t* tile_rank;  // [C] by position: of the row's index among those of its kSide neighbours that make up a tile
  int32_t* tile_index;  // [C] the same indices in order
  uint64_t* farthest;  // [A] by position
  uint32_t* farthest_index;  // [A] double only
  double* loss_of_anchor;  // [A] by index: their sum does not depend on how labels sort
  double* sum_d2_ap;  // [A]
  double* sum_d2_an;  // [A]
  int32_t* times_chosen;  // [C] by index: entries in its list
  int32_t* list_begin;  // [C] where some list overflows
  Facts* facts;  // [blocks]
  Counters* counters;  // [1]

  // outputs, see triplet.h
  void* loss;
  int64_t* stat_counts;
  void* stat_d2;
  const int64_t* pair_begin;
  int64_t* out_positive;
  int64_t* out_negative;
  void* out_d2_ap;
  void* out_d2_an;
  uint8_t* out_is_fallback;

  // An entry of the list of candidate `index`, at the place that times_chosen gave it.
  __device__ __forceinline__ void enter_list(int32_t index, int32_t place, int32_t entry) const {
    if (place < list_places) list[index * list_places + place] = entry;
    else atomicMax(&counters->list_overflows, 1);
  }
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a grid: one per multiprocessor, so that all are resident, as a cooperative launch demands. Small problems take fewer.
template <class Acc>
int64_t share_rows(const TripletArgs& args, Problem<Acc>& p) {
  const int64_t rows = args.num_candidates + (p.plain ? 0 : args.num_anchors), most = divide_up(rows, kRowsPerBlock);
  const int64_t blocks = most < args.multiprocessors ? most : args.multiprocessors;
  p.rows_per_block = blocks > 0 ? static_cast<int32_t>(divide_up(rows, blocks)) : 0;
  return blocks;
}

// Half precision that leaves its format is widened to floats first, in the workspace (widen.cuh).
template <Math M>
bool is_widened(const TripletArgs& args) {
  return (M == Math::split || M == Math::simt32) && args.dtype != DType::float32;
}

// Slots per row of input. With them a problem needs 22 N D + 830 N bytes, one that is widened 2 N D more.
template <class Acc>
int64_t slots_for(int64_t rows, int64_t dim, int64_t anchors, int64_t candidates, bool widened) {
  const int64_t per_row = sizeof(Acc) == 8 ? 14 + dim / 8 : 24 + (widened ? 3 * dim / 7 : dim / 2);
  const int64_t all = candidates < (int64_t(1) << 31) / (anchors + 1) ? anchors * candidates : INT32_MAX;
  const int64_t some = rows < (int64_t(1) << 31) / per_row ? rows * per_row : INT32_MAX;
  const int64_t wanted = all < some ? all : some;
  return wanted > candidates ? wanted : candidates;  // at least one anchor fits, whatever its class
}

// Whether negatives are drawn.
template <class Acc>
__host__ __device__ __forceinline__ bool draws(const Problem<Acc>& p) {
  return p.negatives == Negatives::random_semi_hard || p.negatives == Negatives::random_active;
}

// Options and sizes that every phase reads.
template <Math M>
void lay_out_sizes(const TripletArgs& args, Problem<typename MathTraits<M>::Acc>& p) {
  using Acc = typename MathTraits<M>::Acc;
  p.plain = args.num_anchors == args.num_candidates && args.anchor_offset == 0;
  p.anchors_are_candidates = args.anchor_offset >= 0;
  p.mining = args.pair_begin != nullptr;
  p.normalize = args.normalize;
  p.is_bfloat = args.dtype == DType::bfloat16;
  p.euclidean = args.distance == Distance::euclidean;
  p.cosine = args.distance == Distance::cosine;
  p.soft_margin = args.soft_margin;
  p.negatives = args.negatives;
  p.positives = args.positives;
  p.unordered = args.pairs == PairOrder::unordered;
  p.drops_pairs = p.unordered || p.positives != Positives::all || args.negatives_only > 0;
  p.positives_end = static_cast<int32_t>(args.num_candidates - args.negatives_only);
  p.gradient_rows = static_cast<int32_t>(args.num_candidates - args.constants);
  p.without_negative = draws(p) || (p.negatives == Negatives::semi_hard && args.fallback == Fallback::skip && !p.mining);
  p.direct = sizeof(Acc) == 8 || M == Math::simt32 || p.mining || draws(p) || args.dim > kExpandedDim;
  p.closed = p.negatives == Negatives::random_semi_hard && args.band > 0;
  p.width = static_cast<Acc>(p.closed ? args.band : args.margin);
  p.seed = args.seed;
  p.wants_gradient = args.grad_candidates != nullptr || args.grad_anchors != nullptr;
  p.is_usual = p.plain && p.wants_gradient && p.negatives == Negatives::semi_hard && !p.mining && !p.direct && !p.soft_margin &&
               args.distance == Distance::sqeuclidean && args.stat_counts == nullptr;
  p.reduction = args.reduction;
  p.anchor_offset = static_cast<int32_t>(args.anchor_offset);
  p.dim = static_cast<int32_t>(args.dim);
  p.pitch = static_cast<int32_t>(divide_up(args.dim * MathTraits<M>::kElementBytes, kStageBytes) * kStageBytes);
  p.margin = static_cast<Acc>(args.margin);
  p.exact_margin = args.margin;
  p.slope = args.distance == Distance::sqeuclidean ? 2 : 1;
  const int64_t longest = args.num_anchors > args.num_candidates ? args.num_anchors : args.num_candidates;
  p.has_table = false;  // choose_table()
  p.slot_bits = 0;
  for (RingLayout& layout : p.layouts) layout = narrow_ring();
  p.rows_per_block = p.slice_lanes = p.group_rows = p.slice_items = p.slice_helpers = 0;  // share_rows(),
  p.slices = p.slice_rows = 1;  // choose_slice()
  p.slices_reciprocal = 1u << 31;
  p.writes_fours = false;
  p.merges = 0;
  while ((int64_t(kSortChunk) << p.merges) < longest) ++p.merges;
}

// One set of rows and what prepare() makes of it.
template <class Acc>
void lay_out_rows(Carver& carver, const Problem<Acc>& p, Rows<Acc>& rows, const void* x, const int64_t* labels,
                  int64_t stride, int64_t count, void* gradient_out, int64_t element_bytes) {
  rows.x = x;
  rows.labels = labels;
  rows.stride = stride;
  rows.count = static_cast<int32_t>(count);
  for (int buffer = 0; buffer < 2; ++buffer) {
    rows.sorted_label[buffer] = carver.take<int64_t>(count);
    rows.sorted_index[buffer] = carver.take<int32_t>(count);
  }
  rows.position = carver.take<int32_t>(count);
  rows.mate_begin = carver.take<int32_t>(count);
  rows.mate_end = carver.take<int32_t>(count);
  rows.operand = carver.take<uint8_t>(count * p.pitch);
  rows.norm = carver.take<Acc>(count);
  rows.exponent = carver.take<int32_t>(count);
  rows.inverse_norm = carver.take<Acc>(count);
  rows.gradient_out = gradient_out;
  rows.gradient = nullptr;
  constexpr int64_t kVector = 16 / sizeof(Acc);  // elements, of whichever input type
  rows.aligned =
      reinterpret_cast<uintptr_t>(x) % (kVector * element_bytes) == 0 && stride % kVector == 0 && p.dim % kVector == 0;
}

// What prepare() counts.
template <class Acc>
void lay_out_facts(Carver& carver, const TripletArgs& args, Problem<Acc>& p) {
  p.times_chosen = carver.take<int32_t>(args.num_candidates);
  p.facts = carver.take<Facts>(divide_up(args.num_candidates + (p.plain ? 0 : args.num_anchors), kRowsPerBlock));
  p.counters = carver.take<Counters>(1);
}

// Lays the workspace out from `base` (null: only to size it) and returns the bytes.
template <Math M>
int64_t make_problem(const TripletArgs& args, uint8_t* base, Problem<typename MathTraits<M>::Acc>& p) {
  using Acc = typename MathTraits<M>::Acc;
  Carver carver{base};
  lay_out_sizes<M>(args, p);
  const bool widened = is_widened<M>(args);
  const int64_t element_bytes = args.dtype == DType::float64 ? 8 : args.dtype == DType::float32 || widened ? 4 : 2;
  lay_out_rows(carver, p, p.candidates, widened ? carver.take<float>(args.num_candidates * args.dim) : args.candidates,
               args.candidate_labels, widened ? args.dim : args.candidate_stride, args.num_candidates, args.grad_candidates,
               element_bytes);
  p.candidates.gradient = carver.take<Acc>(args.num_candidates * args.dim);
  if (p.plain) {
    p.anchors = p.candidates;
  } else {
    lay_out_rows(carver, p, p.anchors, widened ? carver.take<float>(args.num_anchors * args.dim) : args.anchors,
                 args.anchor_labels, widened ? args.dim : args.anchor_stride, args.num_anchors, args.grad_anchors,
                 element_bytes);
    p.anchors.gradient = carver.take<Acc>(args.num_anchors * args.dim);
  }

  const int64_t rows = p.plain ? args.num_candidates : args.num_anchors + args.num_candidates;  // N
  const int64_t slots = slots_for<Acc>(rows, args.dim, args.num_anchors, args.num_candidates, widened);
  p.slots = static_cast<int32_t>(slots);
  p.d2_ap = carver.take<Acc>(slots);
  p.threshold = carver.take<Acc>(slots);
  p.best = carver.take<uint64_t>(slots);
  p.best_index = carver.take<uint32_t>(sizeof(Acc) == 8 ? slots : 0);
  p.entry = carver.take<Entry<Acc>>(slots);
  p.list = carver.take<int32_t>(slots);
  p.list_places = static_cast<int32_t>(slots / args.num_candidates);
  if (p.plain && args.num_candidates > 1) p.list_places = static_cast<int32_t>(slots / divide_up(args.num_candidates, 4) / 8 * 2);
  p.sorted_list = reinterpret_cast<int32_t*>(p.best);
  p.list_scratch = p.sorted_list + slots;
  p.base = carver.take<float>(sizeof(Acc) == 4 ? args.num_anchors : 0);
  p.tile_rank = carver.take<int32_t>(sizeof(Acc) == 4 ? args.num_candidates : 0);
  p.tile_index = carver.take<int32_t>(sizeof(Acc) == 4 ? args.num_candidates : 0);
  p.farthest = carver.take<uint64_t>(args.num_anchors);
  p.farthest_index = carver.take<uint32_t>(sizeof(Acc) == 8 ? args.num_anchors : 0);
  p.loss_of_anchor = carver.take<double>(args.num_anchors);
  p.sum_d2_ap = carver.take<double>(args.num_anchors);
  p.sum_d2_an = carver.take<double>(args.num_anchors);
  p.list_begin = carver.take<int32_t>(args.num_candidates);
  lay_out_facts(carver, args, p);

  p.loss = args.loss;
  p.stat_counts = args.stat_counts;
  p.stat_d2 = args.stat_d2;
  p.pair_begin = args.pair_begin;
  p.out_positive = args.positive;
  p.out_negative = args.negative;
  p.out_d2_ap = args.d2_ap;
  p.out_d2_an = args.d2_an;
  p.out_is_fallback = args.is_fallback;
  return carver.used;
}

// ---- what every phase asks ------------------------------------------------------------------------------------------

template <class Acc>
__device__ __forceinline__ const int32_t* sorted_index(const Problem<Acc>& p, const Rows<Acc>& rows) {
  return rows.sorted_index[p.merges & 1];
}

// Position among the candidates of the anchor at position a, or -1: it is none.
template <class Acc>
__device__ __forceinline__ int32_t own_position(const Problem<Acc>& p, int32_t a) {
  if (p.plain) return a;
  if (!p.anchors_are_candidates) return -1;
  return p.candidates.position[p.anchor_offset + sorted_index(p, p.anchors)[a]];
}

// Pairs of an anchor whose label the candidates at positions begin .. end have: none if all of them have it.
template <class Acc>
__device__ __forceinline__ int32_t count_positives(const Problem<Acc>& p, int32_t begin, int32_t end) {
  const int32_t size = end - begin;
  if (size == 0 || size == p.candidates.count) return 0;
  return size - (p.anchors_are_candidates ? 1 : 0);
}

// Buckets of an anchor with so many positives. The closest negative of all needs one, beyond a threshold below every
// distance.
template <class Acc>
__device__ __forceinline__ int32_t count_buckets(const Problem<Acc>& p, int32_t positives) {
  return p.negatives == Negatives::hard ? min(positives, 1) : positives;
}

// Where element e of row `row` stands if four neighbouring rows, of `places` elements each, stand side by side, kEach of each
// in turn: then one access brings them to four groups of lanes that have a row each.
template <int kEach>
__host__ __device__ __forceinline__ int32_t side_by_side(int32_t row, int32_t places, int32_t e) {
  const uint32_t r = static_cast<uint32_t>(row), i = static_cast<uint32_t>(e);  // divisions are shifts
  return static_cast<int32_t>((r / 4 * static_cast<uint32_t>(places) + i / kEach * kEach) * 4 + r % 4 * kEach + i % kEach);
}

// Place of the positive at position c among the positives of an anchor that stands at position `own` (or -1).
__device__ __forceinline__ int32_t positive_rank(int32_t begin, int32_t own, int32_t c) {
  return c - begin - (own >= 0 && c > own ? 1 : 0);
}

constexpr int32_t kSlicedEntryStep = 4 * 32;  // from a pair's entry to that of the 32nd behind it, side by side by twos
constexpr int kPairBits = 8;  // of pairs of an anchor whose lists are gathered from slices
static_assert(kWarpSort <= 1 << kPairBits);
// In such a list: an anchor's index, the pair that speaks, and for how many of 32 with the same negative, all of them with
// coefficient 1; 0: the coefficient is to be looked up. In order of the bits, so of the index.
constexpr int kTimesBits = 6;
struct Listed {
  uint32_t bits;
  __device__ __forceinline__ explicit Listed(int32_t entry) : bits(static_cast<uint32_t>(entry)) {}
  __device__ __forceinline__ Listed(int32_t index, int32_t r, int32_t times)
      : bits(static_cast<uint32_t>(index) << (kPairBits + kTimesBits) | static_cast<uint32_t>(r << kTimesBits | times)) {}
  __device__ __forceinline__ int32_t entry() const { return static_cast<int32_t>(bits); }
  __device__ __forceinline__ int32_t index() const { return static_cast<int32_t>(bits >> (kPairBits + kTimesBits)); }
  __device__ __forceinline__ int32_t pair() const {
    return static_cast<int32_t>(bits >> kTimesBits) & ((1 << kPairBits) - 1);
  }
  __device__ __forceinline__ int32_t times() const { return static_cast<int32_t>(bits) & ((1 << kTimesBits) - 1); }
};

// The anchors of one pass and what is done with them. All blocks see the same facts, so all make the same passes.
struct alignas(16) Pass {
  int32_t stop[4];  // buckets where ranges end, or the one behind all of them
  int32_t begin, end;  // positions of anchors
  int32_t width;  // anchors whose slots fit
  int32_t stride;  // slots of each
  int32_t buckets;  // of each, with thresholds or beyond the last
  int32_t range;  // a power of two, five of which hold all buckets: buckets.cuh
  int32_t max_exponent;
  float max_norm;  // of any row, in units of 4^max_exponent
  bool in_shared;  // buckets fit in shared memory while a tile is swept
  int32_t layout;  // of the tile's memory
  bool by_fours;  // and `width` is a multiple of 4 that holds all anchors: thresholds are loaded by fours
  bool sliced;  // the gradient is gathered from slices (slices.cuh): one pass, whose entries stand side by side
  bool holds_all;  // anchors: the only pass
  __device__ __forceinline__ bool has(int32_t a) const { return a >= begin && a < end; }
  __device__ __forceinline__ int32_t slot(int32_t a) const { return (a - begin) * stride; }
  // Places of an anchor's entries, an even number, and of the weights of its class, from a multiple of 4 on.
  __device__ __forceinline__ int32_t entry_places() const { return (stride + 1) & ~1; }
  __device__ __forceinline__ int32_t weight_places() const { return (stride + 7) & ~3; }
  // Place of pair r of the anchor at position a in `entry`, and from there to that of pair r + 32.
  __device__ __forceinline__ int32_t entry(int32_t a, int32_t r) const {
    return sliced ? side_by_side<2>(a, entry_places(), r) : slot(a) + r;
  }
  __device__ __forceinline__ int32_t entry_step() const { return sliced ? kSlicedEntryStep : 32; }
  // What a list holds of pair r of the anchor at `index`: all in one pass its number in order of both, which no other order of
  // the labels changes; else the place of its entry.
  __device__ __forceinline__ int32_t numbered(int32_t index, int32_t r, int32_t place) const {
    return holds_all ? index * stride + r : place;
  }
  // What finish() enters in lists: if they are gathered from slices what slices.cuh takes apart.
  __device__ __forceinline__ int32_t listed(int32_t index, int32_t r, int32_t place) const {
    return sliced ? Listed(index, r, 0).entry() : numbered(index, r, place);
  }
  // An anchor's first bucket and the way to its next. Where they fit in shared memory, those of neighbouring anchors are
  // neighbours: lanes that are anchors then touch contiguous global memory and different banks.
  __device__ __forceinline__ int32_t bucket(int32_t a) const { return in_shared ? a - begin : slot(a); }
  __device__ __forceinline__ int32_t bucket_step() const { return in_shared ? width : 1; }
  __device__ __forceinline__ bool is_first() const { return begin == 0; }
  __device__ __forceinline__ bool is_last(int32_t anchors) const { return end == anchors; }
  // What is known only when all rows are.
  __device__ __forceinline__ void scale(const Facts& facts) {
    max_exponent = facts.max_exponent;
    max_norm = norm_of_order(facts.max_norm, facts.max_exponent);
    sliced = sliced && facts.max_exponent <= 100;  // no difference of rows overflows: a coefficient of 0 may meet any row
  }
  __device__ __forceinline__ void advance(int32_t anchors) {
    begin = end;
    end = end < anchors - width ? end + width : anchors;
  }
};

// Of doubles there is one, which is known when they are compiled: their kernels have no register to spare.
__device__ __forceinline__ const RingLayout& layout_of(const Problem<float>& p, const Pass& pass) { return p.layouts[pass.layout]; }
__device__ __forceinline__ RingLayout layout_of(const Problem<double>&, const Pass&) { return narrow_ring(); }

struct BlockState {  // what every phase finds at the beginning of shared memory
  Pass pass;
  uint32_t ticket;  // of the grid barrier that this block has arrived at and not waited for
  bool is_nan;  // some element is not finite, and so is all that comes out
};

template <class Acc>
__device__ __forceinline__ Pass first_pass(const Problem<Acc>& p, int32_t max_positives) {
  const int32_t stride = max(max_positives, 1);
  const int32_t buckets = count_buckets(p, stride);
  Pass pass{{},
            0,
            0,
            int64_t(p.anchors.count) * stride <= p.slots ? p.anchors.count : p.slots / stride,
            stride,
            buckets,
            1 << (32 - __clz(buckets / 5)),
            0,
            0,
            false,
            0,
            false,
            false,
            false};
  const int32_t shared = draws(p) ? 0 : buckets;
  while (pass.layout < kLayouts - 1 && p.layouts[pass.layout].slots < shared) ++pass.layout;
  pass.in_shared = !draws(p) && buckets <= p.layouts[pass.layout].slots;
  if (!pass.in_shared) pass.layout = 0;
  pass.advance(p.anchors.count);
  pass.holds_all = pass.is_last(p.anchors.count);
  const int32_t fours = (p.anchors.count + 3) / 4 * 4;
  pass.by_fours = pass.in_shared && pass.is_last(p.anchors.count) && int64_t(fours) * stride <= p.slots;
  if (pass.by_fours) pass.width = fours;
  for (int i = 0; i < 4; ++i) pass.stop[i] = min((i + 1) * pass.range, buckets + 1);
  // All anchors at once, in whole fours; lists in pairs, their entries told apart by 15 bits.
  const int32_t places = max(pass.entry_places(), pass.weight_places());
  pass.sliced = p.slice_lanes > 0 && pass.is_last(p.anchors.count) && stride <= kWarpSort &&
                      int64_t(p.anchors.count + 3) / 4 * 4 * places <= p.slots &&
                      int64_t(p.anchors.count) * ((stride + 31) / 32) < 0x7bff;
  return pass;
}

}  // namespace facenet_ext::cuda
