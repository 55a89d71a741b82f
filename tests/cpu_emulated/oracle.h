// float64 brute force over all (anchor, positive, negative), in direct form. As in tests/oracle.py the two parts are apart: the
// selection must be legal and within rounding of the best; loss and gradient are then held tightly against float64 on the
// kernel's own selection and distances.
#pragma once

#include <cstdio>

#include "problem.h"

namespace facenet_ext::cpu::testing {

template <class T>
struct Tolerance {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr double selection = kFloat ? 1e-6 : 4e-15;  // of |a|^2 + |n|^2: what an expanded square can do
  static constexpr double direct = kFloat ? 2e-6 : 1e-14;     // relative
  static constexpr double loss = kFloat ? 2e-7 : 1e-13;       // relative
  static constexpr double gradient = kFloat ? 2e-6 : 1e-13;   // of sum |weight| |difference|, by the length of a row
};

struct Report {
  int failures = 0;
  int64_t pairs = 0;
  double worst_excess = 0, worst_gradient = 0;  // in units of the tolerance
  std::string context;
  void fail(const std::string& what) {
    if (++failures <= 20) std::printf("FAILED %s: %s\n", context.c_str(), what.c_str());
  }
};

template <class T>
class Oracle {
 public:
  Oracle(const Problem& problem, Report& r) : p(problem), report(r), x(p.x), ax(p.ax) {
    lengths = prepare(x, p.C);
    alengths = prepare(ax, p.A);
    for (int64_t a = 0; a < p.A; ++a) anorm.push_back(square(&ax[at(a)]));
    for (int64_t c = 0; c < p.C; ++c) norm.push_back(square(&x[at(c)]));
    begin.push_back(0);
    for (int64_t a = 0; a < p.A; ++a) {
      int64_t positives = 0, negatives = 0;
      for (int64_t c = 0; c < p.C; ++c) {
        if (p.labels[c] != p.alabels[a]) ++negatives;
        else if (c != p.self(a)) ++positives;
      }
      begin.push_back(begin.back() + (negatives > 0 ? positives : 0));
    }
    report.pairs += begin.back();
  }

  std::vector<int64_t> begin;  // [A + 1] pair_begin

  void check_selection(const Mined<T>& m) {
    const size_t end = static_cast<size_t>(begin.back());
    if (m.positive[end] != -7 || m.negative[end] != -7 || m.ap[end] != -7 || m.an[end] != -7 || m.fallback[end] != 7)
      report.fail("wrote beyond the last pair");
    std::vector<double> d2(static_cast<size_t>(p.C));
    std::vector<int64_t> negatives;
    for (int64_t a = 0; a < p.A; ++a) {
      int64_t pair = begin[a];
      if (pair == begin[a + 1]) continue;
      negatives.clear();
      for (int64_t c = 0; c < p.C; ++c) {
        d2[c] = distance(a, c);
        if (p.labels[c] != p.alabels[a]) negatives.push_back(c);
      }
      for (int64_t c = 0; c < p.C; ++c)
        if (p.labels[c] == p.alabels[a] && c != p.self(a)) check_pair(m, pair++, a, c, d2, negatives);
    }
  }

  void check_loss(const Mined<T>& m, const Loss<T>& loss) {
    const bool euclidean = p.distance == Distance::euclidean;
    long double sum = 0, sum_ap = 0, sum_an = 0;  // of up to a million terms, to be better than float64
    double max_ap = 0;
    int64_t pairs = 0, active = 0, fallbacks = 0;
    std::vector<double> grad(x.size()), agrad(ax.size()), bound(static_cast<size_t>(p.C)), abound(static_cast<size_t>(p.A));
    // In float32 the loss takes far pairs' distances from the sweep, mining sums all directly: a term within the rounding of
    // both of its edge may be in or out.
    const double rounding = Tolerance<T>::kFloat && !p.exact ? Tolerance<T>::selection : 0;
    std::vector<double> other(x.size()), aother(ax.size()), extra(static_cast<size_t>(p.C)), aextra(static_cast<size_t>(p.A));
    double corners = 0, error_ap = 0, error_an = 0, largest_error = 0;
    int64_t uncertain = 0, sure = 0;
    for (int64_t a = 0; a < p.A; ++a)
      for (int64_t i = begin[a]; i < begin[a + 1]; ++i) {
        fallbacks += m.fallback[i];
        if (m.fallback[i] && p.fallback == Fallback::skip) continue;
        const double ap = m.ap[i], an = m.an[i], dp = std::sqrt(ap), dn = std::sqrt(an);
        ++pairs, sum_ap += ap, sum_an += an, max_ap = std::max(max_ap, ap);
        const double hinge = (euclidean ? dp - dn : ap - an) + p.margin;
        const double ep = rounding * (anorm[a] + norm[m.positive[i]]), en = rounding * (anorm[a] + norm[m.negative[i]]);
        error_ap += ep, error_an += en, largest_error = std::max(largest_error, ep);
        const double corner = euclidean ? (dp > 0 ? ep / (2 * dp) : 0) + (dn > 0 ? en / (2 * dn) : 0) : ep + en;
        const bool edge = rounding > 0 && std::fabs(hinge) <= corner;
        if (edge) {
          ++uncertain;
          add(a, m.positive[i], euclidean ? (dp > 0 ? 1 / dp : 0) : 2, other, aother, extra, aextra);
          add(a, m.negative[i], euclidean ? (dn > 0 ? -1 / dn : 0) : -2, other, aother, extra, aextra);
        }
        if (edge || hinge > 0) corners += corner;
        if (!(hinge > 0)) continue;
        ++active, sum += hinge, sure += !edge;
        // A squared distance passes on twice the difference, a distance the unit vector, 0 at 0.
        add(a, m.positive[i], euclidean ? (dp > 0 ? 1 / dp : 0) : 2, grad, agrad, bound, abound);
        add(a, m.negative[i], euclidean ? (dn > 0 ? -1 / dn : 0) : -2, grad, agrad, bound, abound);
      }
    const int64_t count = p.reduction == Reduction::sum ? 1 : p.reduction == Reduction::mean ? pairs : rounding > 0 ? loss.counts[1] : active;
    const double factor = count > 0 ? 1.0 / static_cast<double>(count) : 0;
    const double expected = static_cast<double>(sum * factor);
    near(loss.loss, expected, Tolerance<T>::loss * expected + corners * factor, "loss");
    const bool active_fits = rounding > 0 ? loss.counts[1] >= sure && loss.counts[1] <= sure + uncertain : loss.counts[1] == active;
    if (loss.counts[0] != pairs || !active_fits || loss.counts[2] != fallbacks)
      report.fail("counts " + std::to_string(loss.counts[0]) + " " + std::to_string(loss.counts[1]) + " " +
                  std::to_string(loss.counts[2]) + ", expected " + std::to_string(pairs) + " " + std::to_string(active) + " " +
                  std::to_string(fallbacks));
    const long double n = pairs > 0 ? pairs : 1;
    const double mean_ap = static_cast<double>(sum_ap / n), mean_an = static_cast<double>(sum_an / n);
    near(loss.d2[0], mean_ap, Tolerance<T>::loss * mean_ap + error_ap / static_cast<double>(n), "mean d2_ap");
    near(loss.d2[1], mean_an, Tolerance<T>::loss * mean_an + error_an / static_cast<double>(n), "mean d2_an");
    near(loss.d2[2], max_ap, largest_error, "max d2_ap");
    for (size_t i = 0; i < bound.size(); ++i) bound[i] += extra[i] / Tolerance<T>::gradient;
    for (size_t i = 0; i < abound.size(); ++i) abound[i] += aextra[i] / Tolerance<T>::gradient;
    check_gradient("grad_candidates", loss.grad, grad, bound, p.C, x, lengths, factor);
    if (p.offset < 0) check_gradient("grad_anchors", loss.agrad, agrad, abound, p.A, ax, alengths, factor);
  }

 private:
  const Problem& p;
  Report& report;
  std::vector<double> x, ax, norm, anorm, lengths, alengths;

  size_t at(int64_t row) const { return static_cast<size_t>(row * p.D); }
  double square(const double* row) const {
    double s = 0;
    for (int64_t k = 0; k < p.D; ++k) s += row[k] * row[k];
    return s;
  }
  std::vector<double> prepare(std::vector<double>& rows, int64_t n) const {
    std::vector<double> result;
    for (int64_t i = 0; i < n; ++i) {
      result.push_back(std::sqrt(square(&rows[at(i)])));
      const double divisor = std::max(result.back(), 1e-12);
      for (int64_t k = 0; p.normalize && k < p.D; ++k) rows[at(i) + static_cast<size_t>(k)] /= divisor;
    }
    return result;
  }
  double distance(int64_t a, int64_t c) const {
    const double *u = &ax[at(a)], *v = &x[at(c)];
    double s = 0;
    for (int64_t k = 0; k < p.D; ++k) s += (u[k] - v[k]) * (u[k] - v[k]);
    return std::isfinite(s) ? s : std::nan("");
  }

  void near(double got, double expected, double tolerance, const char* what) {
    // Below the smallest normal number of T, a rounding is absolute.
    if (!(std::fabs(got - expected) <= tolerance + std::numeric_limits<T>::min()))
      report.fail(std::string(what) + " " + std::to_string(got) + ", expected " + std::to_string(expected) + ", off by " +
                  std::to_string(std::fabs(got - expected) / tolerance) + " tolerances");
  }

  void check_pair(const Mined<T>& m, int64_t pair, int64_t a, int64_t positive, const std::vector<double>& d2,
                  const std::vector<int64_t>& negatives) {
    const auto wrong = [&](const std::string& what) {
      report.fail("anchor " + std::to_string(a) + " positive " + std::to_string(positive) + " negative " +
                  std::to_string(m.negative[pair]) + (m.fallback[pair] ? " (fallback): " : ": ") + what);
    };
    const int64_t n = m.negative[pair];
    if (m.positive[pair] != positive) return wrong("listed positive is " + std::to_string(m.positive[pair]));
    if (n < 0 || n >= p.C || p.labels[n] == p.alabels[a]) return wrong("no negative at all");
    if (m.fallback[pair] > 1) return wrong("flag is neither 0 nor 1");
    const bool fallback = m.fallback[pair];
    const double dp = d2[positive], dn = d2[n], tolerance = p.exact ? 0 : Tolerance<T>::selection;
    const auto slack = [&](int64_t i, int64_t j) { return tolerance * (2 * anorm[a] + norm[i] + norm[j]); };
    const auto reported = [&](double got, double d, int64_t c, const char* what) {
      const double rounding = p.exact ? 0 : Tolerance<T>::direct * d + (p.normalize ? tolerance * (anorm[a] + norm[c]) : 0);
      if (std::isnan(d) ? std::isfinite(got) : !(std::fabs(got - d) <= rounding))
        wrong(std::string(what) + " " + std::to_string(got) + " instead of " + std::to_string(d));
    };
    reported(m.ap[pair], dp, positive, "d2_ap");
    reported(m.an[pair], dn, n, "d2_an");
    if (!fallback && !(dn > dp - slack(n, positive))) wrong("not farther than the positive");
    if (p.exact && !fallback && !(dn > dp)) wrong("not strictly farther than the positive");
    for (const int64_t c : negatives) {
      const double better = fallback ? d2[c] - dn : dn - d2[c], unit = slack(c, n);
      if (fallback && std::isnan(dn)) {
        if (std::isfinite(d2[c])) return wrong("a fallback at distance NaN though there are others");
        if (n != negatives[0]) return wrong("not the first of those at distance NaN");
      }
      if (fallback && d2[c] > dp + slack(c, positive)) return wrong("negative " + std::to_string(c) + " is farther than the positive");
      const bool legal = fallback ? std::isfinite(d2[c]) : d2[c] > dp + slack(c, positive);
      if (legal && unit > 0) report.worst_excess = std::max(report.worst_excess, better / unit);
      if (legal && better > unit) return wrong("negative " + std::to_string(c) + " is better by " + std::to_string(better));
      if (legal && p.exact && better == 0 && c < n) return wrong("of equals not the first");
    }
  }

  void add(int64_t a, int64_t c, double weight, std::vector<double>& grad, std::vector<double>& agrad, std::vector<double>& bound,
           std::vector<double>& abound) const {
    const double *u = &ax[at(a)], *v = &x[at(c)];
    double* ga = p.offset < 0 ? &agrad[at(a)] : &grad[at(p.self(a))];
    double* gc = &grad[at(c)];
    double square_sum = 0;
    for (int64_t k = 0; k < p.D; ++k) {
      const double d = u[k] - v[k];
      ga[k] += weight * d;
      gc[k] -= weight * d;
      square_sum += d * d;
    }
    // A normalised row is rounded once: its differences carry an error of its length, not of theirs.
    const double size = std::fabs(weight) * (std::sqrt(square_sum) + (p.normalize ? 0.2 : 0));
    (p.offset < 0 ? abound[a] : bound[p.self(a)]) += size;
    bound[c] += size;
  }

  void check_gradient(const char* what, const std::vector<T>& got, std::vector<double>& expected, const std::vector<double>& bound,
                      int64_t n, const std::vector<double>& rows, const std::vector<double>& length, double factor) {
    for (int64_t i = 0; i < n; ++i) {
      double* g = &expected[at(i)];
      double along = 0, inverse = 1, error = 0;
      if (p.normalize) {
        inverse = 1 / std::max(length[i], 1e-12);
        for (int64_t k = 0; length[i] >= 1e-12 && k < p.D; ++k) along += g[k] * rows[at(i) + k];
      }
      for (int64_t k = 0; k < p.D; ++k) {
        g[k] = (g[k] - along * rows[at(i) + k]) * inverse * factor;
        const double e = static_cast<double>(got[at(i) + k]) - g[k];
        error += e * e;
      }
      const double tolerance = Tolerance<T>::gradient * bound[i] * inverse * factor;
      error = std::sqrt(error);
      if (tolerance > 0) report.worst_gradient = std::max(report.worst_gradient, error / tolerance);
      if (!(error <= tolerance + std::numeric_limits<T>::min()))
        return report.fail(std::string(what) + " row " + std::to_string(i) + " is off by " + std::to_string(error / tolerance) +
                           " tolerances");
    }
  }
};

}  // namespace facenet_ext::cpu::testing
