// The 64-byte tiles of AVX-512, compiled for whatever the compiler's flags allow: tested also where no machine runs them.
#define COTERIE_OPAQUE(x)  // no register holds these vectors
#include "coterie/kernel/dispatch.hpp"

#include "kernel/row_bits.hpp"

using namespace test;
namespace detail = coterie::detail;

namespace {

template <class T>
using WideMicro = detail::Micro<T, 64, 4, 6>;

template <class T>
detail::KernelTable<T> wide_table() {
  using Forward = detail::Forward<T, WideMicro<T>>;
  using Backward = detail::Backward<T, WideMicro<T>>;
  detail::KernelTable<T> table = detail::kernels<T>(InstructionSet::baseline);
  table.forward = [](const detail::AttentionArguments<T>& part, T* scratch) { Forward::run(part, scratch); };
  table.backward = [](const detail::AttentionArguments<T>& part, const detail::AttentionGradientArguments<T>& gradients,
                      T* scratch) { Backward::run(part, gradients, scratch); };
  table.forward_scratch = Forward::scratch_size;
  table.backward_scratch = Backward::scratch_size;
  return table;
}

template <class T>
Outputs<T> run_wide(const Inputs<T>& given, const detail::KernelTable<T>& table, Context& context, bool gradients) {
  Outputs<T> got(given);
  AttentionTape<T> tape;
  const detail::AttentionCall<T> call("test", given.plan, given.q, given.k, given.v, given.config, given.terms());
  detail::forward<T>(call, got.out, &tape, table, context);
  if (got.lse.rows() > 0) got.lse = tape.lse().eigen();
  if (gradients)
    detail::backward<T>(call, got.out, tape, given.d_out, {got.d_q, got.d_k, got.d_v, got.terms(given)}, table, context);
  return got;
}

}  // namespace

TEST_CASE("64-byte tiles: every case as the reference, NaN kept from the past") {
  const detail::KernelTable<float> table = wide_table<float>();
  Context context;
  for (const CaseSizes sizes : {CaseSizes{}, CaseSizes{300, 70, 2, 19}})
    for (const AttentionCase& c : attention_cases(sizes)) {
      const Inputs<float> in(c, 2);
      const Outputs<double> expected = run_reference(in.cast<double>());
      const Outputs<float> got = run_wide(in, table, context, true);
      INFO(c.name);
      CHECK(largest_difference(got.out, expected.out) < 2e-6);
      CHECK(largest_difference(got.lse, expected.lse) < 4e-6);
      CHECK(largest_difference(got.d_q, expected.d_q) < 1e-5);
      CHECK(largest_difference(got.d_k, expected.d_k) < 4e-5);
      CHECK(largest_difference(got.d_v, expected.d_v) < 4e-5);
      CHECK(largest_difference(got.d_bias, expected.d_bias) < 4e-4);
      CHECK(largest_difference(got.d_memory_keys, expected.d_memory_keys) < 4e-5);
      CHECK(largest_difference(got.d_relative_keys, expected.d_relative_keys) < 4e-4);
      CHECK(largest_difference(got.d_relative_values, expected.d_relative_values) < 4e-4);
      if (!c.causal) continue;
      const Index from = in.plan.tokens / 2;
      Inputs<float> changed = in;
      changed.k.bottomRows(in.plan.tokens - from).setConstant(std::numeric_limits<float>::quiet_NaN());
      changed.v.bottomRows(in.plan.tokens - from).setConstant(std::numeric_limits<float>::quiet_NaN());
      CHECK(run_wide(changed, table, context, false).out.topRows(from) == got.out.topRows(from));
    }
}

TEST_CASE("64-byte tiles: a row has the same bits alone, in groups of any size and in full tiles") {
  const detail::KernelTable<float> table = wide_table<float>();
  Context context;
  check_row_bits<float>(
      [&](const Inputs<float>& in, bool gradients) { return run_wide(in, table, context, gradients); }, 25);
}
