#pragma once

// Inputs for an attention case, and its run by the kernels and by the reference.

#include <cmath>
#include <limits>
#include <vector>

#include "cases.hpp"
#include "coterie/attention/attention.hpp"
#include "coterie/attention/reference.hpp"

namespace test {

/// The instruction sets that this machine can run.
inline std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets = {InstructionSet::baseline};
  for (InstructionSet set : {InstructionSet::avx2, InstructionSet::avx512})
    if (set <= coterie::detail::machine_instruction_set()) sets.push_back(set);
  return sets;
}

/// Everything an attention call reads.
template <class T>
struct Inputs {
  AttentionPlan plan;
  AttentionConfig config;
  RowMatrix<T> q, k, v, bias, memory_keys, memory_values, relative_keys, relative_values, d_out, d_lse;
  Index bias_first = 0, relative_first = 0;

  Inputs() = default;
  Inputs(const AttentionCase& c, std::uint64_t seed, double size = 1) {
    c.fill(plan);
    config.heads = c.heads;
    config.kv_heads = c.kv_heads;
    config.soft_cap = c.soft_cap;
    config.mean_epsilon = c.mean_epsilon;
    config.dropout = c.dropout;
    config.dropout_seed = 11;
    config.dropout_step = 3;
    Random random(seed);
    q = random.matrix<T>(plan.tokens, c.heads * c.d) * T(size);
    k = random.matrix<T>(plan.key_tokens, c.kv_heads * c.d) * T(size);
    v = random.matrix<T>(plan.key_tokens, c.kv_heads * c.dv);
    bias = random.matrix<T>(c.bias_distances ? c.heads : 0, c.bias_distances);
    memory_keys = random.matrix<T>(plan.memory_tokens, c.kv_heads * c.d) * T(size);
    memory_values = random.matrix<T>(plan.memory_tokens, c.kv_heads * c.dv);
    d_out = random.matrix<T>(plan.tokens, c.heads * c.dv);
    const Index tables = c.relative_by_head ? c.heads : 1;
    if (c.relative_distances > 0 && c.relative != RelativeTables::values)
      relative_keys = random.matrix<T>(c.relative_distances, tables * c.d) * T(size);
    if (c.relative_distances > 0 && c.relative != RelativeTables::keys)
      relative_values = random.matrix<T>(c.relative_distances, tables * c.dv);
    relative_first = c.relative_first;
    if (c.has_lse) d_lse = random.matrix<T>(plan.tokens, c.heads);
    bias_first = c.bias_first;
  }

  template <class U>
  Inputs<U> cast() const {
    Inputs<U> to;
    to.plan = plan;
    to.config = config;
    to.q = q.template cast<U>();
    to.k = k.template cast<U>();
    to.v = v.template cast<U>();
    to.bias = bias.template cast<U>();
    to.memory_keys = memory_keys.template cast<U>();
    to.memory_values = memory_values.template cast<U>();
    to.relative_keys = relative_keys.template cast<U>();
    to.relative_values = relative_values.template cast<U>();
    to.d_out = d_out.template cast<U>();
    to.d_lse = d_lse.template cast<U>();
    to.bias_first = bias_first;
    to.relative_first = relative_first;
    return to;
  }

  AttentionTerms<T> terms() const {
    return {{bias, bias_first},
            memory_keys,
            memory_values,
            {relative_keys, relative_first},
            {relative_values, relative_first}};
  }
};

/// Everything it writes. Gradients start from 0.5, so that writing instead of adding shows.
template <class T>
struct Outputs {
  RowMatrix<T> out, lse, d_q, d_k, d_v, d_bias, d_memory_keys, d_memory_values, d_relative_keys, d_relative_values;
  std::vector<double> d_scales;

  explicit Outputs(const Inputs<T>& in) {
    const auto like = [](const RowMatrix<T>& m) { return RowMatrix<T>::Constant(m.rows(), m.cols(), T(0.5)).eval(); };
    out = like(in.d_out);
    if (in.plan.combine != Combine::mean) lse = RowMatrix<T>::Constant(in.plan.tokens, in.config.heads, T(0.5));
    d_q = like(in.q);
    d_k = like(in.k);
    d_v = like(in.v);
    d_bias = like(in.bias);
    d_memory_keys = like(in.memory_keys);
    d_memory_values = like(in.memory_values);
    d_relative_keys = like(in.relative_keys);
    d_relative_values = like(in.relative_values);
    d_scales.assign(static_cast<std::size_t>(in.config.heads), 0.5);
  }

  AttentionTermGradients<T> terms(const Inputs<T>& in) {
    return {d_bias, d_memory_keys, d_memory_values, d_scales, in.d_lse, d_relative_keys, d_relative_values};
  }
};

template <class T>
Outputs<T> run(const Inputs<T>& in, Context& context, bool gradients = true) {
  Outputs<T> result(in);
  AttentionTape<T> tape;
  attention_forward(in.plan, in.q, in.k, in.v, result.out, tape, in.config, context, in.terms());
  if (result.lse.rows() > 0) result.lse = tape.lse().eigen();
  if (gradients)
    attention_backward(in.plan, in.q, in.k, in.v, result.out, tape, in.d_out, result.d_q, result.d_k, result.d_v,
                       in.config, context, in.terms(), result.terms(in));
  return result;
}

/// The definition: in double the judge, in float the yardstick.
template <class T>
Outputs<T> run_reference(const Inputs<T>& in, bool gradients = true) {
  Outputs<T> result(in);
  reference_forward(in.plan, in.q, in.k, in.v, result.out, result.lse, in.config, in.terms());
  if (gradients)
    reference_backward(in.plan, in.q, in.k, in.v, in.d_out, result.d_q, result.d_k, result.d_v, in.config, in.terms(),
                       result.terms(in));
  return result;
}

/// The largest difference; infinities must be equal.
template <class A, class B>
double largest_difference(const A& a, const B& b) {
  double most = 0;
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j) {
      const double x = a(i, j), y = b(i, j);
      if (x == y) continue;
      const double difference = std::abs(x - y);
      most = difference <= most ? most : difference;  // NaN counts as more
      if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
    }
  return most;
}

}  // namespace test
