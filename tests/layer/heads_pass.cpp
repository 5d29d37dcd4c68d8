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

// Three blocks of two heads each: local, routed, dense. The dense heads are made of the last routed ones.
template <class T>
detail::LayerState<T> three_blocks(bool shared, Index kv_heads = 0) {
  RoutingAttentionConfig c{.model_dim = 10,
                           .heads = 6,
                           .kv_heads = kv_heads,
                           .head_dim = 4,
                           .routed_heads = 4,
                           .clusters = 3,
                           .window = 4,
                           .causal = true,
                           .shared_qk = shared,
                           .memory = 2,
                           .bias = true,
                           .globals = 1,
                           .seed = 3};
  detail::LayerState<T> layer = detail::make_layer_state<T>(detail::resolve(c));
  detail::HeadBlock &routed = layer.heads.blocks[1], &dense = layer.heads.blocks[2];
  const Index half = routed.kv_count / 2;
  dense = routed;
  dense.kind = detail::BlockKind::dense;
  dense.commitment = 0;
  dense.positions = PositionKind::rotary;
  routed.count = dense.count = 2;
  routed.kv_count = dense.kv_count = half;
  dense.first = routed.first + 2;
  dense.kv_first = routed.kv_first + half;
  dense.dropout_stream = 2;
  if (!shared) dense.key_first = routed.key_first + half;
  if (routed.learned_gain) dense.gain_first = routed.gain_first + 2;
  layer.rotary[2] = Rotary(dense.head_dim, 500, RotaryLayout::interleaved);  // each block has its own
  while (layer.routers.size() > static_cast<std::size_t>(half)) layer.routers.pop_back();
  return layer;
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
    const detail::LayerState<float> layer = three_blocks<float>(shared);
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
    detail::LayerState<double> layer = three_blocks<double>(now.shared, now.kv_heads);
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
  RoutingAttentionConfig c{.model_dim = 8, .heads = 2, .routed_heads = 1, .clusters = 2, .window = 4};
  REQUIRE(streams(c) == std::vector<std::uint64_t>{0, 1});
  c.routed_heads = 2;
  REQUIRE(streams(c) == std::vector<std::uint64_t>{1});
  c.routing = Routing::dense;
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
  REQUIRE(runs({.model_dim = 12, .heads = 4, .kv_heads = 1, .window = 4, .causal = true}, {}));
  REQUIRE(runs({.model_dim = 12, .heads = 4, .window = 4}, source));
  REQUIRE(runs({.model_dim = 12,
                .heads = 4,
                .kv_heads = 2,
                .routed_heads = 4,
                .clusters = 2,
                .window = 4,
                .routed_positions = PositionKind::rotary},
               source));
  REQUIRE(runs({.model_dim = 12, .heads = 4, .routed_heads = 2, .clusters = 2, .window = 4, .causal = true}, {}));
}
