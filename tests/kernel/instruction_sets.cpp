// Every instruction set of the machine, forced by name: that the names choose, that two sets agree, that no head width and
// no size of a group falls out. tests/attention/forward.cpp and backward.cpp hold each against the reference more closely,
// over more sizes; this file is what checks.neon runs under an emulator too.
#include "coterie/kernel/dispatch.hpp"

#include "kernel/row_bits.hpp"

using namespace test;

namespace {

const char* name_of(InstructionSet set) {
  constexpr const char* names[] = {"automatic", "baseline", "avx2", "avx512"};
  return names[static_cast<int>(set)];
}

// Rounding of a sum of `terms` numbers that are sums of products themselves, as attention_backward's tests allow it.
template <class T>
bool close(const RowMatrix<T>& a, const auto& b, double terms) {
  const double size = b.size() ? std::max(1.0, double(b.cwiseAbs().maxCoeff())) : 1;
  return largest_difference(a, b) <= 8 * double(std::numeric_limits<T>::epsilon()) * std::sqrt(terms) * size;
}

template <class T>
void check_close(const Outputs<T>& got, const auto& expected, double tokens, double pairs) {
  CHECK(close(got.out, expected.out, tokens));
  if (got.lse.allFinite()) CHECK(close(got.lse, expected.lse, tokens));
  CHECK(close(got.d_q, expected.d_q, tokens));
  CHECK(close(got.d_k, expected.d_k, tokens));
  CHECK(close(got.d_v, expected.d_v, tokens));
  CHECK(close(got.d_bias, expected.d_bias, pairs));
}

}  // namespace

TEST_CASE("instruction sets: the machine's are found, and names choose them") {
  const std::vector<InstructionSet> sets = instruction_sets();
  for (InstructionSet set : {InstructionSet::baseline, InstructionSet::avx2, InstructionSet::avx512}) {
    if (std::find(sets.begin(), sets.end(), set) == sets.end()) {
      WARN("not tested, for this machine lacks it: " << name_of(set));
      CHECK_THROWS_AS(detail::kernels<float>(set), ValueError);
      continue;
    }
    INFO(name_of(set));
    // Tables of their own: no two names run the same functions.
    for (InstructionSet other : sets) {
      const bool same = detail::kernels<float>(set).forward == detail::kernels<float>(other).forward &&
                        detail::kernels<float>(set).backward == detail::kernels<float>(other).backward;
      CHECK(same == (set == other));
    }
  }
  CHECK(detail::resolve(InstructionSet::automatic) == sets.back());
}

TEMPLATE_TEST_CASE("instruction sets: within the stated error of the reference and of each other, every case", "",
                   float, double) {
  for (const AttentionCase& c : attention_cases({.tokens = 100, .window = 40, .clusters = 3, .d = 16})) {
    const Inputs<TestType> in(c, 21);
    const double tokens = double(in.plan.tokens), pairs = double(statistics(in.plan).visible_pairs);
    const Outputs<double> expected = run_reference(in.template cast<double>());
    std::vector<Outputs<TestType>> outputs;
    for (InstructionSet set : instruction_sets()) {
      Context context(set);
      INFO(c.name << ", " << name_of(set));
      const Outputs<TestType> got = run(in, context);
      check_close(got, expected, tokens, pairs);
      for (const Outputs<TestType>& other : outputs) check_close(got, other, tokens, pairs);
      outputs.push_back(got);
    }
  }
}

TEMPLATE_TEST_CASE("instruction sets: head widths, and clusters of 1 to 40 tokens, as the reference", "", float,
                   double) {
  Random random(22);
  int turn = 0;
  for (Index d : {1, 3, 8, 16, 24, 32, 40, 64, 80, 96, 128}) {
    ++turn;  // so that a size has another pattern at another width
    for (Index size = 1; size <= 40; ++size) {
      const int pattern = turn++ % 4;

      // Two clusters of exactly `size` tokens, in mixed order.
      std::vector<std::int32_t> labels(static_cast<std::size_t>(2 * size));
      for (std::size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<std::int32_t>(i % 2);
      for (std::size_t i = labels.size(); i > 1; --i)
        std::swap(labels[i - 1], labels[static_cast<std::size_t>(random.below(Index(i)))]);
      const ClusteredConfig config{.clusters = 2,
                                   .window = pattern == 2   ? std::max<Index>(1, size / 3)
                                             : pattern == 3 ? size
                                                            : 0,
                                   .causal = pattern > 0,
                                   .self = pattern == 3 ? Self::only_if_alone : Self::visible};
      const AttentionCase c{.name = "clusters",
                            .fill = [&](AttentionPlan& plan) { plan_clustered(labels, labels, config, plan); },
                            .kv_heads = 1,
                            .d = d,
                            .dv = d,
                            .bias_distances = size % 2 ? 7 : 0,
                            .bias_first = -2};
      const Inputs<TestType> in(c, 23);
      const Outputs<double> expected = run_reference(in.template cast<double>());
      for (InstructionSet set : instruction_sets()) {
        Context context(set);
        INFO(name_of(set) << ", d " << d << ", clusters of " << size << ", pattern " << pattern);
        check_close(run(in, context), expected, double(2 * size + d), double(statistics(in.plan).visible_pairs + d));
      }
    }
  }
}

TEMPLATE_TEST_CASE("instruction sets: a row has the same bits alone, in groups of any size and in full tiles", "",
                   float, double) {
  for (InstructionSet set : instruction_sets()) {
    Context context(set);
    INFO(name_of(set));
    check_row_bits<TestType>([&](const Inputs<TestType>& in, bool gradients) { return run(in, context, gradients); },
                             24);
  }
}
