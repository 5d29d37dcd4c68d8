// Every two options of a layer together: they work, and are compared with the oracle and central differences, or they
// are refused with a reason.
#include <cmath>
#include <functional>
#include <string>
#include <type_traits>

#include "catch.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "errors.hpp"
#include "oracle.hpp"

using namespace test;

namespace {

using Change = std::function<void(RoutingAttentionConfig&)>;

struct Option {
  std::string name;
  Change change;
  // What two changes set both is no pair: the options of one dimension exclude each other.
  std::string dimension;
};

// Two heads of each kind, so that key/value heads of two query heads are possible.
RoutingAttentionConfig base(bool causal) {
  return {.model_dim = 9,
          .head_dim = 4,
          .causal = causal,
          .seed = 11,
          .local = {.heads = 2, .window = 4},
          .routed = {.heads = 2, .clusters = 3, .window = 4, .matching = {.gain = 1.3}},
          .dense = {.heads = 2}};
}

// Options of a block of heads. `all_of_them`: of dense heads a few will do, for their passes are those of local heads.
template <class Block>
void add_block_options(std::vector<Option>& all, std::string block, Block RoutingAttentionConfig::*member,
                       bool all_of_them) {
  const auto add = [&](const char* dimension, const char* name, auto change) {
    all.push_back({block + ": " + name, [=](RoutingAttentionConfig& c) { change(c.*member); }, block + dimension});
  };
  const Index distances = std::is_same_v<Block, LocalHeads> ? 0 : 5;
  add("shared", "shared", [](Block& b) { b.matching.shared_qk = true; });
  add("self", "self only if alone", [](Block& b) { b.matching.self = Self::only_if_alone; });
  add("self", "self never", [](Block& b) { b.matching.self = Self::never; });
  add("induction", "induction", [](Block& b) { b.matching.induction = true, b.matching.key_taps = 2; });
  add("logits", "normalised logits", [](Block& b) { b.matching.logits = Logits::normalised; });
  add("learned_gain", "learned gain", [](Block& b) { b.matching.learned_gain = true; });
  add("positions", "bias", [=](Block& b) { b.positions = {.kind = PositionKind::bias, .distances = distances}; });
  add("positions", "T5 buckets",
      [](Block& b) { b.positions = {.kind = PositionKind::t5_buckets, .buckets = 8, .max_distance = 9}; });
  add("positions", "Shaw", [=](Block& b) { b.positions = {.kind = PositionKind::shaw, .distances = distances}; });
  if (!all_of_them) return;
  add("shared", "separate", [](Block& b) { b.matching.shared_qk = false; });
  add("self", "self visible", [](Block& b) { b.matching.self = Self::visible; });
  add("normalisation", "unit length", [](Block& b) { b.matching.normalisation = Normalisation::unit_length; });
  add("logits", "raw logits", [](Block& b) { b.matching.logits = Logits::raw; });
  add("logits", "normalised keys", [](Block& b) { b.matching.logits = Logits::normalised_keys; });
  add("learned_gain", "fixed gain", [](Block& b) { b.matching.learned_gain = false; });
  add("positions", "rotary, interleaved",
      [](Block& b) { b.positions = {.kind = PositionKind::rotary, .layout = RotaryLayout::interleaved}; });
  add("positions", "ALiBi", [](Block& b) { b.positions.kind = PositionKind::alibi; });
  add("positions", "no positions", [](Block& b) { b.positions.kind = PositionKind::none; });
}

std::vector<Option> options() {
  std::vector<Option> all;
  const auto add = [&](const char* dimension, const char* name, Change change) {
    all.push_back({name, std::move(change), dimension});
  };
  add("heads", "no local heads", [](auto& c) { c.local = {}; });
  add("heads", "no routed heads", [](auto& c) { c.routed = {}; });
  add("heads", "no dense heads", [](auto& c) { c.dense = {}; });
  add("heads", "local heads only", [](auto& c) { c.routed = {}, c.dense = {}; });
  add("heads", "routed heads only", [](auto& c) { c.local = {}, c.dense = {}; });
  add("heads", "dense heads only", [](auto& c) { c.local = {}, c.routed = {}; });
  add("kv_heads", "two query heads a key/value head",
      [](auto& c) { c.kv_heads = (c.local.heads + c.routed.heads + c.dense.heads) / 2; });
  add("local window", "another local window", [](auto& c) { c.local.window = 6; });
  add("lookahead", "lookahead", [](auto& c) { c.local.lookahead = 2; });
  add("routing", "random", [](auto& c) { c.routed.routing = Routing::random; });
  add("membership", "balanced", [](auto& c) { c.routed.membership.kind = MembershipKind::balanced; });
  add("membership", "balanced, all join",
      [](auto& c) { c.routed.membership = {.kind = MembershipKind::balanced, .unassigned = Unassigned::nearest}; });
  add("membership", "balanced, one softmax",
      [](auto& c) { c.routed.membership = {.kind = MembershipKind::balanced, .combine = Combine::lse}; });
  add("membership", "balanced, less than the mean",
      [](auto& c) { c.routed.membership = {.kind = MembershipKind::balanced, .mean_epsilon = 0.5}; });
  add("membership", "balanced, other lists of queries", [](auto& c) {
    c.routed.membership = {.kind = MembershipKind::balanced, .query_share = 1.5};
    c.routed.matching.shared_qk = false;
  });
  add("membership", "two probes", [](auto& c) { c.routed.membership.probes = 2; });
  add("sinks", "sinks", [](auto& c) { c.routed.sinks = 2; });
  add("recent", "recent keys", [](auto& c) { c.routed.recent = 3; });
  add_block_options(all, "local", &RoutingAttentionConfig::local, true);
  add_block_options(all, "routed", &RoutingAttentionConfig::routed, true);
  add_block_options(all, "dense", &RoutingAttentionConfig::dense, false);
  add("memory", "memory", [](auto& c) { c.memory = 2; });
  add("soft_cap", "soft cap", [](auto& c) { c.soft_cap = 1.5; });
  add("bias", "biases", [](auto& c) { c.bias = true; });
  add("globals", "global tokens", [](auto& c) { c.globals = 2; });
  add("dense_up_to", "dense up to a length", [](auto& c) { c.dense_up_to = 6; });
  return all;
}

// What is refused, by the path that the error names: the rules once more, by what was asked.
std::vector<std::string> refusals(const RoutingAttentionConfig& c) {
  std::vector<std::string> paths;
  const auto refuse_if = [&](bool refused, const std::string& path) {
    if (refused) paths.push_back(path);
  };
  const bool learned = c.routed.routing == Routing::learned;
  const bool balanced = c.routed.membership.kind == MembershipKind::balanced;
  const auto check_block = [&](const std::string& name, const auto& block, bool routed, bool dense) {
    if (block.heads == 0) return refuse_if(block != std::remove_cvref_t<decltype(block)>{}, name);
    const Matching& m = block.matching;
    const bool shares = m.shared_qk.value_or(m.induction || (routed && c.causal && c.kv_heads == 0));
    const Self self = m.self.value_or(m.induction ? Self::never : shares ? Self::only_if_alone : Self::visible);
    const Logits logits = m.logits.value_or(shares ? Logits::normalised : Logits::raw);
    refuse_if(m.induction && !c.causal, name + ".matching.induction");
    refuse_if(m.induction && !shares, name + ".matching.shared_qk");
    refuse_if(m.induction && self != Self::never, name + ".matching.self");
    refuse_if(m.induction && logits != Logits::normalised, name + ".matching.logits");
    refuse_if(c.kv_heads > 0 && shares, "kv_heads");
    refuse_if(!c.causal && self != Self::visible && (c.memory > 0 || (c.globals > 0 && !dense)),
              name + ".matching.self");
    refuse_if(m.normalisation == Normalisation::unit_length && !shares && logits == Logits::raw && !(routed && learned),
              name + ".matching.normalisation");
    if (!routed) return;
    const bool by_position = c.routed.sinks + c.routed.recent > 0;
    refuse_if(c.routed.sinks > 0 && !c.causal, "routed.sinks");
    refuse_if(c.routed.recent > 0 && !c.causal, "routed.recent");
    refuse_if(by_position && balanced && c.routed.membership.combine != Combine::lse, "routed.membership.combine");
    refuse_if(by_position && c.globals > 0, "globals");
    refuse_if(balanced && !learned, "routed.membership.kind");
    refuse_if(c.routed.membership.probes > 1 && !learned, "routed.membership.probes");
    refuse_if(c.routed.membership.query_share > 0 && shares, "routed.membership.query_share");
    refuse_if(c.globals > 0 && (balanced || c.routed.membership.probes > 1), "globals");
  };
  check_block("local", c.local, false, false);
  check_block("routed", c.routed, true, false);
  check_block("dense", c.dense, false, true);
  refuse_if(c.local.heads > 0 && c.local.lookahead > 0 && c.causal, "local.lookahead");
  const bool all_dense = c.local.heads == 0 && c.routed.heads == 0;
  refuse_if(c.globals > 0 && all_dense, "globals");
  refuse_if(c.dense_up_to > 0 && all_dense, "dense_up_to");
  return paths;
}

// The oracle's rows of a layer, routed by the layer's centroids.
RowMatrix<double> expected_rows(const RoutingAttention<double>& layer, const RowMatrix<double>& x,
                                const std::vector<Index>& offsets) {
  const RoutingAttentionConfig& c = layer.config();
  Oracle oracle{c, layer.parameters(), offsets};
  if (c.routed.heads > 0 && c.routed.routing == Routing::learned) {
    std::vector<ConstView<double>> centroids;
    for (const auto& router : layer.routers()) centroids.push_back(router.centroids());
    oracle.route(x, centroids);
  } else if (c.routed.heads > 0 && c.routed.routing == Routing::random) {
    RoutingAttention<double>::Tape tape;
    RowMatrix<double> y(x.rows(), c.model_dim);
    Context context;
    layer.forward({x, offsets}, y, tape, context);
    for (Index h = 0; h < detail::routed_kv_heads(c); ++h) {
      oracle.query_labels.emplace_back(tape.labels(h).begin(), tape.labels(h).end());
      oracle.key_labels.emplace_back(tape.key_labels(h).begin(), tape.key_labels(h).end());
    }
  }
  RowMatrix<double> expected(x.rows(), c.model_dim);
  for (Index i = 0; i < x.rows(); ++i) {
    const std::vector<double> row = oracle.row(x, i);
    for (Index j = 0; j < c.model_dim; ++j) expected(i, j) = row[static_cast<std::size_t>(j)];
  }
  return expected;
}

// The largest error of the derivative along a random direction of x and of all parameters together.
double gradient_error(RoutingAttention<double> layer, const RowMatrix<double>& x, const std::vector<Index>& offsets) {
  const Index n = x.rows(), model_dim = layer.config().model_dim;
  Random random(9);
  const RowMatrix<double> d_y = random.matrix<double>(n, model_dim), x_along = random.matrix<double>(n, model_dim);
  Context context;
  RoutingAttention<double>::Tape tape;
  RowMatrix<double> y(n, model_dim), d_x = RowMatrix<double>::Zero(n, model_dim);
  Parameters<double> gradients = layer.zero_gradients(), along = layer.zero_gradients();
  layer.forward({x, offsets}, y, tape, context);
  layer.backward({x, offsets}, tape, d_y, d_x, gradients, context);
  along.visit([&](std::string_view, View<double> m) {
    for (Index i = 0; i < m.rows(); ++i)
      for (Index j = 0; j < m.cols(); ++j) m(i, j) = random.uniform(-1, 1);
  });
  double slope = d_x.cwiseProduct(x_along).sum();
  visit(along, gradients, [&](std::string_view, View<double> a, ConstView<double> g) {
    for (Index i = 0; i < a.rows(); ++i)
      for (Index j = 0; j < a.cols(); ++j) slope += a(i, j) * g(i, j);
  });
  const Parameters<double> start = layer.parameters();
  const auto loss = [&](double step) {
    layer.parameters() = start;
    visit(layer.parameters(), along, [&](std::string_view, View<double> p, ConstView<double> a) {
      for (Index i = 0; i < p.rows(); ++i)
        for (Index j = 0; j < p.cols(); ++j) p(i, j) += step * a(i, j);
    });
    const RowMatrix<double> moved = x + step * x_along;
    layer.forward({moved, offsets}, y, context);
    return y.cwiseProduct(d_y).sum();
  };
  constexpr double step = 1e-6;
  const double difference = (loss(step) - loss(-step)) / (2 * step);
  return std::abs(slope - difference) / (1 + std::abs(difference));
}

}  // namespace

TEST_CASE("every two options work together, or are refused with a reason") {
  const Index n = 19;
  const std::vector<Index> offsets = {0, 5, 5, 6, n};
  const std::vector<Option> all = options();
  Index working = 0, refused = 0;
  for (const bool causal : {false, true})
    for (std::size_t a = 0; a < all.size(); ++a)
      for (std::size_t b = a; b < all.size(); ++b) {
        if (a != b && all[a].dimension == all[b].dimension) continue;
        INFO((causal ? "causal: " : "two-sided: ") << all[a].name << " and " << all[b].name);
        RoutingAttentionConfig config = base(causal);
        all[a].change(config);
        all[b].change(config);
        std::string reason;
        try {
          detail::resolve(config);
        } catch (const ValueError& error) {
          reason = error.what();
        }
        const std::vector<std::string> paths = refusals(config);
        for (const std::string& path : paths) {
          INFO(reason);
          REQUIRE(contains(reason, " " + path + ": expected"));
        }
        INFO(reason);
        REQUIRE(reason.empty() == paths.empty());
        if (!paths.empty()) {
          ++refused;
          continue;
        }
        ++working;
        const RoutingAttention<double> layer = make_layer<double>(config);
        const RowMatrix<double> x = 2 * Random(31).matrix<double>(n, 9);
        RowMatrix<double> y(n, 9);
        Context context;
        layer.forward({x, offsets}, y, context);
        REQUIRE((y - expected_rows(layer, x, offsets)).cwiseAbs().maxCoeff() < 1e-11);
        REQUIRE(gradient_error(layer, x, offsets) < 1e-6);
        if (causal && config.routed.membership.kind == MembershipKind::nearest) {
          RowMatrix<double> changed = x, other(n, 9);
          changed.row(n - 2).setConstant(0.7);
          layer.forward({changed, offsets}, other, context);
          REQUIRE(same_bits<double>(other.topRows(n - 2), y.topRows(n - 2)));
        }
      }
  REQUIRE(working > 1000);
  REQUIRE(refused > 100);
}
