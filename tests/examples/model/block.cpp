#include "model/block.hpp"

#include <set>

#include "catch.hpp"
#include "gradient.hpp"

using namespace transformer;
using Matrix = RowMatrix<double>;

namespace {

// More rows than a chunk has, a sequence of one row, and an empty one.
struct BlockExample {
  coterie::RoutingAttentionConfig config{.model_dim = 6,
                                         .seed = 3,
                                         .local = {.heads = 1, .window = 16, .lookahead = 4},
                                         .routed = {.heads = 1, .clusters = 3, .window = 16}};
  Index hidden = 7;
  bool crosses = false;
  std::vector<Index> offsets{0, 1, 20, 20, 140}, source_offsets{0, 9, 12, 15, 50};
  Matrix x, source, d_y;

  explicit BlockExample(bool crosses_) : crosses(crosses_) {
    Random random(5);
    x = random_matrix<double>(140, 6, [&] { return random.normal(); });
    source = random_matrix<double>(50, 6, [&] { return random.normal(); });
    d_y = random_matrix<double>(140, 6, [&] { return random.normal(); });
  }
  coterie::Input<double> input(std::uint64_t step = 0) const {
    if (crosses) return {x, offsets, source, source_offsets, step};
    return {x, offsets, {}, {}, step};
  }

  /// Weights away from their special starts (norms of 1, biases of 0).
  Block<double> block() const {
    Random random(11);
    Block<double> block(config, hidden, random);
    block.visit("", block.zero_gradients(), [&](std::string_view, View<double> w, ConstView<double>) {
      for (Index i = 0; i < w.rows(); ++i)
        for (Index j = 0; j < w.cols(); ++j) w(i, j) += 0.1 * random.normal();
    });
    return block;
  }
};

struct Outcome {
  Matrix y, d_x, d_source;
  Block<double>::Gradients gradients;
};

/// `times` passes forward and backward.
Outcome run(const BlockExample& example, const Block<double>& block, int times, Context& context) {
  Outcome outcome{{}, {}, Matrix::Zero(example.source.rows(), example.source.cols()), block.zero_gradients()};
  Block<double>::Tape tape;
  for (int i = 0; i < times; ++i) {
    block.forward(example.input(), outcome.y, tape, context);
    const View<double> d_source = example.crosses ? View<double>(outcome.d_source) : View<double>();
    block.backward(example.input(), tape, example.d_y, outcome.d_x, d_source, outcome.gradients, context);
  }
  return outcome;
}

}  // namespace

TEST_CASE(
    "a block's gradients are those of central differences, of its own rows and across, without feed-forward too") {
  BlockExample example(GENERATE(false, true));
  example.hidden = GENERATE(7, 0);
  Block<double> block = example.block();
  Context context;
  // What is added to is there twice.
  Outcome outcome = run(example, block, 2, context);
  Block<double>::Tape scratch;
  Matrix y;
  const auto loss = [&] {
    block.forward(example.input(), y, scratch, context);
    return y.cwiseProduct(example.d_y).sum();
  };
  {
    INFO("x");
    test::require_gradient(example.x, outcome.d_x, loss);
  }
  if (example.crosses) {
    INFO("source");
    outcome.d_source /= 2;
    test::require_gradient(example.source, outcome.d_source, loss);
  }
  std::set<std::string> names;
  block.visit("block", outcome.gradients, [&](const std::string& name, View<double> w, ConstView<double> gradient) {
    INFO(name);
    REQUIRE(names.insert(name).second);
    REQUIRE(gradient.eigen().norm() > 0);
    test::require_gradient(w, Matrix(gradient.eigen() / 2), loss);
  });
  // Two norms of two, four of the attention, four of the feed-forward.
  REQUIRE(names.size() == (example.hidden > 0 ? 12u : 6u));
}

TEST_CASE("a block gives the same bits with every number of threads") {
  const BlockExample example(GENERATE(false, true));
  const Block<double> block = example.block();
  Context serial;
  const Outcome alone = run(example, block, 1, serial);
  for (const Index threads : {2, 3, 8}) {
    coterie::ThreadPool pool(threads);
    coterie::Workspace workspace;
    Context context{pool, workspace};
    const Outcome outcome = run(example, block, 1, context);
    REQUIRE(outcome.y == alone.y);
    REQUIRE(outcome.d_x == alone.d_x);
    REQUIRE(outcome.d_source == alone.d_source);
    Block<double> copy = block;
    std::vector<Matrix> all;
    copy.visit("", outcome.gradients,
               [&](std::string_view, View<double>, ConstView<double> g) { all.emplace_back(g.eigen()); });
    std::size_t i = 0;
    copy.visit("", alone.gradients,
               [&](std::string_view, View<double>, ConstView<double> g) { REQUIRE(all[i++] == g.eigen()); });
  }
}

TEST_CASE("a block hands its input's step to random routing, and reads its source") {
  BlockExample example(true);
  example.config.routed.routing = coterie::Routing::random;
  const Block<double> block = example.block();
  Context context;
  Block<double>::Tape tape;
  Matrix first, again, other;
  block.forward(example.input(1), first, tape, context);
  block.forward(example.input(1), again, tape, context);
  REQUIRE(first == again);
  block.forward(example.input(2), other, tape, context);
  REQUIRE(first != other);
  example.source.row(49) *= 2;
  block.forward(example.input(1), other, tape, context);
  REQUIRE(first.topRows(20) == other.topRows(20));  // sequences whose source is the same
  REQUIRE(first != other);
}
