// Compiled under many flags by flags.cmake; returns non-zero where a result is wrong.
#include <algorithm>
#include <cmath>
#include <coterie/attention/attention.hpp>
#include <coterie/plan/local.hpp>
#include <cstdio>
#include <limits>

using namespace coterie;

namespace {

// Whether a prefix has the bits of the full run, with NaN in its future: the row invariant, in this file's own build.
bool prefixes_agree(const RowMatrix<float>& q, RowMatrix<float> k, RowMatrix<float> v, const RowMatrix<float>& out,
                    Index window, Context& context) {
#if defined(__FAST_MATH__)
  return true;  // not promised: sums may be regrouped, and NaN is assumed away
#endif
  for (Index n : {143, 100, 64, 31, 7, 1}) {  // more and more NaN
    AttentionPlan plan;
    plan_local({.tokens = n, .window = window, .causal = true}, plan);
    RowMatrix<float> prefix(n, v.cols());
    attention_forward(plan, q.topRows(n), k.topRows(n), v.topRows(n), prefix, {}, context);
    if (prefix != out.topRows(n)) return false;
    RowMatrix<float> full(out.rows(), out.cols());
    k.bottomRows(k.rows() - n).setConstant(std::numeric_limits<float>::quiet_NaN());
    v.bottomRows(v.rows() - n).setConstant(std::numeric_limits<float>::quiet_NaN());
    plan_local({.tokens = q.rows(), .window = window, .causal = true}, plan);
    attention_forward(plan, q, k, v, full, {}, context);
    if (full.topRows(n) != prefix) return false;
  }
  return true;
}

}  // namespace

int main() {
  const Index n = 150, d = 20, window = 40;
  RowMatrix<float> q(n, d), k(n, d), v(n, d), out(n, d), d_out(n, d);
  RowMatrix<float> d_q = RowMatrix<float>::Zero(n, d), d_k = d_q, d_v = d_q;
  for (Index i = 0; i < n; ++i)
    for (Index c = 0; c < d; ++c) {
      const auto x = static_cast<float>(i * d + c);
      q(i, c) = 2 * std::sin(x * 1.3f);
      k(i, c) = std::sin(x * 0.7f + 1);
      v(i, c) = std::sin(x * 0.3f + 2);
      d_out(i, c) = std::cos(x * 0.9f);
    }
  AttentionPlan plan;
  plan_local({.tokens = n, .window = window, .causal = true}, plan);
  AttentionTape<float> tape;
  Context context;
  attention_forward(plan, q, k, v, out, tape, {}, context);
  attention_backward(plan, q, k, v, out, tape, d_out, d_q, d_k, d_v, {}, context);

  // The definition, in double: out, and the directional derivative of sum(out * d_out) along v and along q.
  double error = 0, along_v = 0, along_q = 0, expected_q = 0, expected_v = 0;
  for (Index i = 0; i < n; ++i) {
    double p[64], sum = 0, dp_mean = 0, dp[64];
    const Index first = i < window ? 0 : i - window + 1;
    for (Index j = first; j <= i; ++j) {
      double s = 0;
      for (Index c = 0; c < d; ++c) s += double(q(i, c)) * k(j, c);
      sum += p[j - first] = std::exp(s / std::sqrt(double(d)));
    }
    for (Index c = 0; c < d; ++c) {
      double o = 0;
      for (Index j = first; j <= i; ++j) o += p[j - first] / sum * v(j, c);
      error = std::fmax(error, std::fabs(o - out(i, c)));
      expected_v += o * d_out(i, c);
      along_v += double(d_v(i, c)) * v(i, c);
      along_q += double(d_q(i, c)) * q(i, c);
    }
    for (Index j = first; j <= i; ++j) {
      dp[j - first] = 0;
      for (Index c = 0; c < d; ++c) dp[j - first] += double(d_out(i, c)) * v(j, c);
      dp_mean += p[j - first] / sum * dp[j - first];
    }
    for (Index j = first; j <= i; ++j)
      expected_q += p[j - first] / sum * (dp[j - first] - dp_mean) * std::log(p[j - first]);
  }
  const double error_v = std::fabs(along_v - expected_v), error_q = std::fabs(along_q - expected_q);
  const bool same_bits = prefixes_agree(q, k, v, out, window, context);
  if (!same_bits) std::printf("a prefix differs from the full run\n");
  const bool good = error < 1e-5 && error_v < 1e-3 && error_q < 1e-3;
  if (!good) std::printf("errors: out %g, d_v %g, d_q %g\n", error, error_v, error_q);
  return good && same_bits ? 0 : 1;
}
