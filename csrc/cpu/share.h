// Who does what: a core should rarely read what another has just written. Two cores of one machine may be 80 ns apart, or,
// where they share no cache, 400; then a call at (1800, 40, 128) takes 3.0 ms where tiles dealt one by one take 3.6.
//
// Every phase has work for each thread, and whoever is done with its own helps the others; results do not depend on who did
// what. Phases over rows give thread t the t-th part of them. A tile (I, J) of the sweep reads and writes the state of the
// anchors of both blocks, 0.7 KB an anchor at K = 40. So the blocks form two groups for each thread, and groups meet as teams
// do in a tournament (the circle method):
//
//               thread 0   thread 1
//     round 0    (0, 3)     (1, 2)      Within a round nobody touches another thread's groups. From one to the next each of
//     round 1    (0, 2)     (1, 3)      two threads keeps one group, and the last one leaves it with its part of the rows.
//     round 2    (0, 1)     (2, 3)
//
// No barrier stands between rounds: a thread that runs ahead waits at a block's lock.
#pragma once

#include "call.h"

namespace facenet_ext::cpu {
namespace {

// visit(t, i) for i < count(t) of every thread t: the own ones, then what others have left.
template <class S, class Count, class Visit>
void own_first(const Call<S>& c, Count count, Visit visit) {
  constexpr int kLine = 64 / sizeof(int64_t);
  for (int t = 0; t < c.threads; ++t) c.w.next[t * kLine] = 0;
#pragma omp parallel num_threads(c.threads)
  for (int ahead = 0; ahead < c.threads; ++ahead) {
    const int of = (omp_get_thread_num() + ahead) % c.threads;
    const int64_t n = count(of);
    int64_t i;
    while ((i = __atomic_fetch_add(c.w.next + of * kLine, 1, __ATOMIC_RELAXED)) < n) visit(of, i);
  }
}

struct Range {
  int64_t begin, end;
  int64_t size() const { return begin < end ? end - begin : 0; }
};

// Rows [begin, end) by pieces of `step`, which begin at multiples of it: visit(from, to).
template <class S, class Visit>
void own_rows_first(const Call<S>& c, int64_t begin, int64_t end, int64_t step, Visit visit) {
  const int64_t first = begin / step, pieces = begin < end ? (end + step - 1) / step - first : 0;
  const auto part = [=, &c](int t) { return first + pieces * t / c.threads; };
  own_first(
      c, [&](int t) { return part(t + 1) - part(t); },
      [&](int t, int64_t i) {
        const int64_t at = (part(t) + i) * step;
        visit(at > begin ? at : begin, at + step < end ? at + step : end);
      });
}

// The tiles (I, J), I <= J, of so many blocks: which one is a thread's i-th.
struct Tournament {
  int64_t blocks;
  int threads;

  struct Meeting {
    int64_t I, J;
  };
  Meeting meeting(int thread, int64_t i) const {
    for (int round = 0;; ++round) {
      const Range a = group(round, thread, 0), b = group(round, thread, 1);
      const int64_t here = meetings(round, thread);
      if (i >= here) {
        i -= here;
        continue;
      }
      if (i < a.size() * b.size()) return across(a, b, i);
      i -= a.size() * b.size();  // the last round: inside the groups too
      if (i < inside(a)) return pair(a, i);
      return pair(b, i - inside(a));
    }
  }
  int64_t count(int thread) const {
    int64_t sum = 0;
    for (int round = 0; round < rounds(); ++round) sum += meetings(round, thread);
    return sum;
  }

 private:
  int groups() const { return 2 * threads; }
  int rounds() const { return groups() - 1; }
  static int64_t inside(const Range& r) { return r.size() * (r.size() + 1) / 2; }
  int64_t meetings(int round, int thread) const {
    const Range a = group(round, thread, 0), b = group(round, thread, 1);
    return a.size() * b.size() + (round == rounds() - 1 ? inside(a) + inside(b) : 0);
  }
  // The two groups that a thread has in a round, the lower one first.
  Range group(int round, int thread, int which) const {
    const int last = groups() - 1;
    const int x = thread == 0 ? last : (round - thread + last) % last, y = (round + thread) % last;
    const int low = last - (x > y ? x : y), high = last - (x > y ? y : x), g = which == 0 ? low : high;
    return {blocks * g / groups(), blocks * (g + 1) / groups()};
  }
  // Strips of kStrip blocks of b stay in L2 while those of a go by.
  static constexpr int64_t kStrip = 4;
  static Meeting across(const Range& a, const Range& b, int64_t i) {
    const int64_t strip = i / (kStrip * a.size()), left = b.size() - strip * kStrip, wide = left < kStrip ? left : kStrip;
    i -= strip * kStrip * a.size();
    return {a.begin + i / wide, b.begin + strip * kStrip + i % wide};
  }
  // Of r's n (n + 1) / 2 pairs: (i, i + s), s = 1 .., then the blocks with themselves: half as much work, which leaves the
  // other threads the least to wait for.
  static Meeting pair(const Range& r, int64_t i) {
    const int64_t n = r.size();
    for (int64_t s = 1; s < n; ++s) {
      if (i < n - s) return {r.begin + i, r.begin + i + s};
      i -= n - s;
    }
    return {r.begin + i, r.begin + i};
  }
};

}  // namespace
}  // namespace facenet_ext::cpu
