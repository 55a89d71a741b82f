// kernels FIRST COUNT [threaded]: COUNT random problems through every path of the CPU backend, AVX-512 emulated. Exits with 1 on
// a failure.
#include <atomic>
#include <cstdlib>

#include "oracle.h"

namespace facenet_ext::cpu::testing {
namespace {

bool runs_here(const Kernels* k) { return k != &kernels_avx2 || (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")); }

// Whether tiles are looked at in whole numbers first (cpu/screen.h); "": when it is worth it.
void screen(const char* set) { setenv("FACENET_EXT_SCREENING", set, 1); }

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <class T>
bool all_nan(const std::vector<T>& v) {
  return std::all_of(v.begin(), v.end(), [](T e) { return std::isnan(e); });
}

// The gradient of the first candidates alone is those rows of the gradient of all.
template <class T>
void check_constants(const Kernels& k, Problem p, Loss<T> full, Report& report) {
  p.constants = Random{static_cast<uint64_t>(p.C * 7 + p.D)}.below(p.C + 1);
  full.grad.resize(static_cast<size_t>((p.C - p.constants) * p.D));
  const Loss<T> some = loss_of<T>(k, p, p.other_threads, false, true, true);
  if (some.loss != full.loss || !same_bits(some.grad, full.grad) || !same_bits(some.agrad, full.agrad))
    report.fail("loss or gradient depends on how many candidates are constants (" + std::to_string(p.constants) + ")");
}

template <class T>
void check_losses(const Kernels& k, const Problem& p, Oracle<T>& oracle, const Mined<T>& chosen, Report& report) {
  screen("off");
  const Loss<T> full = loss_of<T>(k, p, p.threads, true, true, true);
  screen("always");
  if (!p.finite) {  // must not look like a number
    const bool nan = std::isnan(full.loss) && std::isnan(full.d2[0]) && std::isnan(full.d2[1]) && std::isnan(full.d2[2]);
    if (!nan || !all_nan(full.grad) || !all_nan(full.agrad)) report.fail("a non-finite input, yet a number came out");
    Problem some = p;
    some.constants = p.C / 3;
    if (!all_nan(loss_of<T>(k, some, p.threads, false, true, true).grad)) report.fail("a non-finite input and constants");
    if (full.counts[0] || full.counts[1] || full.counts[2]) report.fail("a non-finite input, yet pairs were counted");
    return;
  }
  oracle.check_loss(chosen, full);
  // Without statistics the search stops at the margin, tiles are looked at in whole numbers first, and threads share the work:
  // no bit may change.
  const Loss<T> pruned = loss_of<T>(k, p, p.other_threads, false, true, true);
  if (pruned.loss != full.loss || !same_bits(pruned.grad, full.grad) || !same_bits(pruned.agrad, full.agrad))
    report.fail("loss or gradient depends on the statistics or on the number of threads (" + std::to_string(p.other_threads) + ")");
  if (p.C > kTile<T>) {
    const Loss<T> screened = loss_of<T>(k, p, p.other_threads, true, false, false);
    if (screened.loss != full.loss || std::memcmp(screened.counts, full.counts, sizeof full.counts) != 0 ||
        std::memcmp(screened.d2, full.d2, sizeof full.d2) != 0)
      report.fail("loss or statistics depend on screening");
  }
  screen("");
  if (loss_of<T>(k, p, p.threads, false, false, false).loss != full.loss) report.fail("loss depends on the gradient");
  check_constants(k, p, full, report);
  if (p.offset < 0) {
    if (!same_bits(loss_of<T>(k, p, p.threads, false, false, true).agrad, full.agrad)) report.fail("grad_anchors alone differs");
    if (!same_bits(loss_of<T>(k, p, p.threads, true, true, false).grad, full.grad)) report.fail("grad_candidates alone differs");
  }
}

// Integers: which negatives are eligible is no matter of rounding, and the draw is the least hash among them.
template <class T>
void check_draws(const Kernels& k, const Problem& p, const std::vector<int64_t>& begin, Report& report) {
  const Mined<T> m = mined<T>(k, p, begin, p.other_threads);
  const auto d2 = [&](int64_t a, int64_t c) {
    double sum = 0;
    for (int64_t i = 0; i < p.D; ++i) sum += (p.ax[a * p.D + i] - p.x[c * p.D + i]) * (p.ax[a * p.D + i] - p.x[c * p.D + i]);
    return sum;
  };
  for (int64_t a = 0; a < p.A; ++a) {
    const uint64_t anchor = static_cast<uint64_t>(p.offset < 0 ? p.C + a : p.self(a));
    const uint64_t key = mix(static_cast<uint64_t>(p.seed) + 0x9e3779b97f4a7c15u * (anchor + 1));
    for (int64_t pair = begin[a]; pair < begin[a + 1]; ++pair) {
      const double d_ap = d2(a, m.positive[pair]);
      int64_t drawn = -1;
      uint64_t least = ~uint64_t{0};
      for (int64_t n = 0; n < p.C; ++n) {
        const double gap = d2(a, n) - d_ap;
        const bool active = p.band > 0 ? gap <= p.band : gap < p.margin;
        if (p.labels[n] == p.alabels[a] || !active || (p.negatives == Negatives::random_semi_hard && gap <= 0)) continue;
        const uint64_t hash = mix(key ^ (static_cast<uint64_t>(n) * 0xd1342543de82ef95u + 1)) >> 32;
        if (hash < least) least = hash, drawn = n;
      }
      if (m.negative[pair] != drawn || m.fallback[pair] != (drawn < 0))
        return report.fail("drew " + std::to_string(m.negative[pair]) + " instead of " + std::to_string(drawn));
    }
  }
}

// The other rules: what tests/ checks on the machine's own paths is here held together across paths, threads and workspaces.
template <class T>
void check_rule(Problem p, const std::vector<int64_t>& begin, Report& report) {
  const bool draws = p.negatives == Negatives::random_semi_hard || p.negatives == Negatives::random_active;
  const std::string name = p.name + " rule " + std::to_string(static_cast<int>(p.negatives));
  Loss<T> avx512;
  for (const Kernels* k : {&kernels_avx512, &kernels_avx2, &kernels_portable}) {
    if (!runs_here(k)) continue;
    report.context = name + " [" + k->name + "]";
    if (draws && p.exact && p.distance == Distance::sqeuclidean) check_draws<T>(*k, p, begin, report);
    if (!p.finite) continue;
    screen("off");
    const Loss<T> full = loss_of<T>(*k, p, p.threads, true, true, true);
    screen("always");
    const Loss<T> alone = loss_of<T>(*k, p, p.other_threads, false, true, true);
    if (!std::isfinite(full.loss) || full.loss < 0) report.fail("loss " + std::to_string(full.loss));
    if (alone.loss != full.loss || !same_bits(alone.grad, full.grad) || !same_bits(alone.agrad, full.agrad))
      report.fail("loss or gradient depends on the statistics or on the number of threads (" + std::to_string(p.other_threads) + ")");
    if (draws || p.negatives == Negatives::hard) check_constants(*k, p, full, report);
    if (k == &kernels_avx512) avx512 = full;
    if (k == &kernels_avx2 && (full.counts[0] != avx512.counts[0] || full.counts[2] != avx512.counts[2]))
      report.fail("counts other terms than AVX-512");
  }
}

template <class T>
void check(const Problem& p, Report& report) {
  report.context = p.name;
  Oracle<T> oracle(p, report);
  screen("off");
  const Mined<T> avx512 = mined<T>(kernels_avx512, p, oracle.begin, p.threads);
  for (const Kernels* k : {&kernels_avx512, &kernels_avx2, &kernels_portable}) {
    if (!runs_here(k)) continue;
    report.context = p.name + " [" + k->name + "]";
    screen("always");
    const Mined<T> chosen = mined<T>(*k, p, oracle.begin, p.other_threads);
    oracle.check_selection(chosen);
    // Both fuse, in the same order over k: the same distances to the bit, so the same choice, near-ties included.
    if (k != &kernels_portable && (!same_bits(chosen.negative, avx512.negative) || !same_bits(chosen.fallback, avx512.fallback)))
      report.fail("chose another negative than AVX-512 with other threads");
    check_losses<T>(*k, p, oracle, chosen, report);
  }
  const Negatives rules[] = {Negatives::random_semi_hard, Negatives::random_active, Negatives::all, Negatives::all_semi_hard,
                             Negatives::hard};
  Problem other = p;
  Random r{static_cast<uint64_t>(p.C * 31 + p.D)};
  other.negatives = rules[r.below(5)];
  other.seed = static_cast<int64_t>(r.bits() >> 1);
  if (p.exact) other.margin = std::floor(p.margin) + 0.5;
  const bool banded = other.negatives == Negatives::random_semi_hard || other.negatives == Negatives::all_semi_hard;
  if (banded && r.one_in(3)) other.band = p.exact ? 2 : p.margin / 2;
  check_rule<T>(other, oracle.begin, report);
}

// The calling thread polls; when told to stop the call returns, having written no loss.
void check_interruption(Report& report) {
  Random r{1};
  Problem p;
  p.A = p.C = 64;
  p.D = 8;
  for (int64_t i = 0; i < p.C; ++i) p.labels.push_back(i % 8);
  for (int64_t i = 0; i < p.C * p.D; ++i) p.x.push_back(rounded(r.normal(), p.dtype));
  p.ax = p.x;
  p.alabels = p.labels;
  for (const Kernels* k : {&kernels_avx512, &kernels_avx2, &kernels_portable}) {
    if (!runs_here(k)) continue;
    float loss = 77;
    int polls = 0;
    Call call(p);
    call.args.loss = &loss;
    call.args.interrupted = [](void* count) { return ++*static_cast<int*>(count) > 0; };
    call.args.interrupted_context = &polls;
    report.context = std::string("interruption [") + k->name + "]";
    if (call.run(*k, 1).code != Code::interrupted || polls != 1 || loss != 77) report.fail("was not obeyed");
  }
}

}  // namespace
}  // namespace facenet_ext::cpu::testing

int main(int argc, char** argv) {
  using namespace facenet_ext::cpu::testing;
  const uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 200;
  const bool threaded = argc > 3;
  Report report;
  check_interruption(report);
  for (uint64_t seed = first; seed < first + count; ++seed) {
    check<float>(random_problem(seed, false, threaded), report);
    if (seed % 5 == 0) check<double>(random_problem(seed / 5 + 7'000'000, true, threaded), report);
  }
  std::printf("%llu problems, %lld pairs, %d failures; worst of tolerance: selection %.2f, gradient %.2f\n",
              static_cast<unsigned long long>(count), static_cast<long long>(report.pairs), report.failures,
              report.worst_excess, report.worst_gradient);
  return report.failures ? 1 : 0;
}
