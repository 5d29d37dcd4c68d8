#include "coterie/layer/heads_pass.hpp"

#include <cstring>
#include <memory>

#include "catch.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "gradient.hpp"
#include "random.hpp"

using namespace test;
using namespace coterie;

namespace {

// Three blocks of two heads each: local, routed, dense.
template <class T>
detail::LayerState<T> three_block_layer(bool shared, Index kv_heads = 0) {
  const RoutingAttentionConfig c{
      .model_dim = 10,
      .head_dim = 4,
      .kv_heads = kv_heads,
      .causal = true,
      .bias = true,
      .memory = 2,
      .globals = 1,
      .seed = 3,
      .local = {.heads = 2, .window = 4},
      .routed = {.heads = 2, .clusters = 3, .window = 4, .matching = {.shared_qk = shared}},
      .dense = {.heads = 2,
                .matching = {.shared_qk = shared},
                .positions = {.base = 500, .layout = RotaryLayout::interleaved}}};  // each block has its own
  return detail::make_layer_state<T>(detail::resolve(c));
}

template <class T>
struct Run {
  detail::RowPositions positions;
  std::array<detail::HeadsTape<T>, 3> tapes;

  void forward(const detail::LayerState<T>& layer, const Input<T>& input, View<T> y, Context& context) {
    detail::find_positions(input, layer.config.causal, positions);
    const detail::CheckedInput<T> in(input, positions);
    for (std::size_t i = 0; i < 3; ++i)
      detail::HeadsPass<T>(layer, layer.heads.blocks[i], in, context).forward(y, tapes[i]);
  }
  void backward(const detail::LayerState<T>& layer, const Input<T>& input, ConstView<T> d_y, View<T> d_x,
                Parameters<T>& gradients, Context& context) {
    const detail::CheckedInput<T> in(input, positions);
    for (std::size_t i = 0; i < 3; ++i)
      detail::HeadsPass<T>(layer, layer.heads.blocks[i], in, context).backward(d_y, tapes[i], {d_x, d_x, gradients});
  }
};

}  // namespace

TEST_CASE("local, routed and dense blocks share one output and have labels and plans of their own") {
  for (const bool shared : {true, false}) {
    const detail::LayerState<float> layer = three_block_layer<float>(shared);
    const RowMatrix<float> x = Random(1).matrix<float>(30, 10);
    RowMatrix<float> y(30, 10), sum = RowMatrix<float>::Zero(30, 10);
    Context context;
    Run<float> run;
    run.forward(layer, x, y, context);
    for (std::size_t i = 0; i < 3; ++i) {
      const detail::HeadBlock& block = layer.heads.blocks[i];
      sum += run.tapes[i].matrices.out.eigen() * layer.parameters.w_o.middleRows(block.first_col(), block.cols());
      REQUIRE(run.tapes[i].plans.used().size() == (i == 1 ? 2u : 1u));
      REQUIRE(run.tapes[i].plans.query_labels.size() == (i == 1 ? 60u : 0u));
    }
    REQUIRE((y - sum).cwiseAbs().maxCoeff() < 1e-5f);
    const AttentionPlan& dense = run.tapes[2].plans.used()[0];
    REQUIRE(dense.visible.back().end >= 30);  // the last query sees all tokens, or all but itself
    // A pass without a tape gives the same bits.
    RowMatrix<float> again(30, 10);
    detail::HeadsPlans plans;
    const Input<float> input(x);
    const detail::CheckedInput<float> in(input, run.positions);
    for (const detail::HeadBlock& block : layer.heads.blocks)
      detail::HeadsPass<float>(layer, block, in, context).forward(again, plans);
    REQUIRE(std::memcmp(y.data(), again.data(), sizeof(float) * 300) == 0);
  }
}

TEST_CASE("gradients of three blocks are those of their function") {
  struct Case {
    bool shared;
    Index kv_heads;
    Logits logits;
    int taps;
  };
  for (const Case& now : {Case{true, 0, Logits::normalised, 0}, Case{true, 0, Logits::raw, 0},
                          Case{true, 0, Logits::normalised_keys, 0}, Case{false, 3, Logits::raw, 0},
                          Case{false, 3, Logits::normalised_keys, 0}, Case{false, 0, Logits::normalised, 0}}) {
    INFO("shared " << now.shared << ", kv_heads " << now.kv_heads << ", logits " << static_cast<int>(now.logits));
    detail::LayerState<double> layer = three_block_layer<double>(now.shared, now.kv_heads);
    for (detail::HeadBlock& block : layer.heads.blocks)
      if (block.kind != detail::BlockKind::local || !now.shared) block.logits = now.logits;
    RowMatrix<double> x = Random(2).matrix<double>(12, 10);
    const RowMatrix<double> d_y = Random(3).matrix<double>(12, 10);
    RowMatrix<double> y(12, 10), d_x = RowMatrix<double>::Zero(12, 10);
    Context context;
    Run<double> run;
    run.forward(layer, x, y, context);
    Parameters<double> gradients = detail::zero_parameters<double>(layer.config);
    run.backward(layer, x, d_y, d_x, gradients, context);
    const std::vector<std::int32_t> labels = run.tapes[1].plans.query_labels;
    const auto loss = [&] {
      RowMatrix<double> out(12, 10);
      Run<double> other;
      other.forward(layer, x, out, context);
      return (out.array() * d_y.array()).sum();
    };
    require_gradient(x, d_x, loss, 1e-6);
    for (const auto& tensor : Parameters<double>::tensors()) {
      RowMatrix<double>& parameter = layer.parameters.*tensor.member;
      if (parameter.size() == 0 || tensor.name == "b_o") continue;
      INFO(tensor.name);
      require_gradient(parameter, gradients.*tensor.member, loss, 1e-6);
    }
  }
}

TEST_CASE("dropout of the blocks has streams of their own") {
  const auto streams = [](RoutingAttentionConfig c) {
    std::vector<std::uint64_t> all;
    for (const detail::HeadBlock& block : detail::head_blocks(detail::resolve(c)).blocks)
      if (block.count > 0) all.push_back(block.dropout_stream);
    return all;
  };
  RoutingAttentionConfig c{
      .model_dim = 12, .local = {.heads = 1, .window = 4}, .routed = {.heads = 1, .clusters = 2, .window = 4}};
  REQUIRE(streams(c) == std::vector<std::uint64_t>{0, 1});
  c.dense.heads = 1;
  REQUIRE(streams(c) == std::vector<std::uint64_t>{0, 1, 2});
  c.local = {};
  c.dense = {};
  REQUIRE(streams(c) == std::vector<std::uint64_t>{1});
  c.routed = {};
  c.dense.heads = 2;
  REQUIRE(streams(c) == std::vector<std::uint64_t>{1});
}

TEST_CASE("a layer takes inputs without tokens, whatever its heads") {
  Context context;
  RowMatrix<float> x(0, 12), y(0, 12);
  const auto runs = [&](const RoutingAttentionConfig& c, ConstView<float> source) {
    RoutingAttention<float> layer(c);
    RoutingAttention<float>::Tape tape;
    const Input<float> input(x, {}, source);
    layer.forward(input, y, context);
    layer.forward(input, y, tape, context);
    Parameters<float> gradients = layer.zero_gradients();
    RowMatrix<float> d_x(0, 12), d_source = RowMatrix<float>::Zero(source.rows(), 12);
    layer.backward(input, tape, y, {d_x, source.rows() > 0 ? View<float>(d_source) : View<float>()}, gradients,
                   context);
    layer.update_router(tape, context);
    return tape.tokens() == 0;
  };
  const RowMatrix<float> source = Random(4).matrix<float>(5, 12);
  REQUIRE(runs({.model_dim = 12, .kv_heads = 1, .causal = true, .local = {.heads = 4, .window = 4}}, {}));
  REQUIRE(runs({.model_dim = 12, .local = {.heads = 4, .window = 4}}, source));
  REQUIRE(runs({.model_dim = 12,
                .kv_heads = 2,
                .routed = {.heads = 4, .clusters = 2, .window = 4, .positions = {.kind = PositionKind::rotary}}},
               source));
  REQUIRE(runs({.model_dim = 12,
                .causal = true,
                .local = {.heads = 2, .window = 4},
                .routed = {.heads = 2, .clusters = 2, .window = 4}},
               {}));
}
