// Every two options of a layer together: they work, and are compared with the oracle and central differences, or they are
// refused with a reason.
#include <cmath>
#include <functional>
#include <string>

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

// Two key/value heads of two query heads each would rule shared queries out: four heads, of which two are routed.
RoutingAttentionConfig base(bool causal) {
  return {.model_dim = 9,
          .heads = 4,
          .head_dim = 4,
          .routed_heads = 2,
          .clusters = 3,
          .window = 4,
          .causal = causal,
          .gain = 1.3,
          .seed = 11};
}

std::vector<Option> options() {
  std::vector<Option> all;
  const auto add = [&](const char* dimension, const char* name, Change change) {
    all.push_back({name, std::move(change), dimension});
  };
  add("kv_heads", "two key/value heads", [](auto& c) { c.kv_heads = 2; });
  add("heads", "no local heads", [](auto& c) { c.routed_heads = 4; });
  add("heads", "no routed heads", [](auto& c) { c.routed_heads = 0, c.gain.reset(); });
  add("local_window", "another local window", [](auto& c) { c.local_window = 6; });
  add("lookahead", "lookahead", [](auto& c) { c.lookahead = 2; });
  add("routing", "random", [](auto& c) { c.routing = Routing::random; });
  add("routing", "dense", [](auto& c) { c.routing = Routing::dense; });
  add("membership", "balanced", [](auto& c) { c.membership = Membership::balanced; });
  add("membership", "balanced, all join", [](auto& c) {
    c.membership = Membership::balanced;
    c.unassigned = Unassigned::nearest;
  });
  add("membership", "balanced, one softmax", [](auto& c) {
    c.membership = Membership::balanced;
    c.combine = Combine::lse;
  });
  add("membership", "balanced, other lists of queries", [](auto& c) {
    c.membership = Membership::balanced;
    c.query_share = 1.5;
    c.shared_qk = false;
  });
  add("membership", "two probes", [](auto& c) { c.probes = 2; });
  add("shared", "shared", [](auto& c) { c.shared_qk = true; });
  add("shared", "separate", [](auto& c) { c.shared_qk = false; });
  add("self", "self visible", [](auto& c) { c.self = Self::visible; });
  add("self", "self only if alone", [](auto& c) { c.self = Self::only_if_alone; });
  add("self", "self never", [](auto& c) { c.self = Self::never; });
  add("induction", "induction", [](auto& c) { c.induction = true, c.key_taps = 2; });
  add("induction", "local induction", [](auto& c) { c.local_induction = true, c.key_taps = 3; });
  add("normalisation", "unit length", [](auto& c) { c.normalisation = Normalisation::unit_length; });
  add("logits", "raw logits", [](auto& c) { c.logits = Logits::raw; });
  add("logits", "normalised logits", [](auto& c) { c.logits = Logits::normalised; });
  add("logits", "normalised keys", [](auto& c) { c.logits = Logits::normalised_keys; });
  add("learned_gain", "learned gain", [](auto& c) { c.learned_gain = true; });
  add("learned_gain", "fixed gain", [](auto& c) { c.learned_gain = false; });
  add("memory", "memory", [](auto& c) { c.memory = 2; });
  add("soft_cap", "soft cap", [](auto& c) { c.soft_cap = 1.5; });
  add("bias", "biases", [](auto& c) { c.bias = true; });
  add("globals", "global tokens", [](auto& c) { c.globals = 2; });
  add("dense_up_to", "dense up to a length", [](auto& c) { c.dense_up_to = 6; });
  add("local_positions", "local bias", [](auto& c) { c.local_positions = PositionKind::bias; });
  add("local_positions", "local ALiBi", [](auto& c) { c.local_positions = PositionKind::alibi; });
  add("local_positions", "local T5 buckets", [](auto& c) {
    c.local_positions = PositionKind::t5_buckets;
    c.position_buckets = 8, c.max_distance = 9;
  });
  add("local_positions", "no local positions", [](auto& c) { c.local_positions = PositionKind::none; });
  add("routed_positions", "routed rotary", [](auto& c) { c.routed_positions = PositionKind::rotary; });
  add("routed_positions", "routed bias", [](auto& c) {
    c.routed_positions = PositionKind::bias;
    c.routed_distances = 5;
  });
  add("routed_positions", "routed ALiBi", [](auto& c) { c.routed_positions = PositionKind::alibi; });
  add("routed_positions", "routed T5 buckets", [](auto& c) {
    c.routed_positions = PositionKind::t5_buckets;
    c.position_buckets = 8, c.max_distance = 9;
  });
  add("local_positions", "local Shaw", [](auto& c) { c.local_positions = PositionKind::shaw; });
  add("routed_positions", "routed Shaw", [](auto& c) {
    c.routed_positions = PositionKind::shaw;
    c.routed_distances = 5;
  });
  add("membership", "balanced, less than the mean", [](auto& c) {
    c.membership = Membership::balanced;
    c.mean_epsilon = 0.5;
  });
  add("rotary_layout", "interleaved rotary", [](auto& c) { c.rotary_layout = RotaryLayout::interleaved; });
  return all;
}

// What is refused, and the setting that the error names.
struct Rule {
  const char* argument;
  bool (*applies)(const RoutingAttentionConfig&);
};

std::vector<Rule> rules() {
  using C = RoutingAttentionConfig;
  static constexpr auto balanced = [](const C& c) { return c.membership == Membership::balanced; };
  static constexpr auto learned = [](const C& c) { return c.routed_heads > 0 && c.routing == Routing::learned; };
  static constexpr auto shares = [](const C& c) {
    return c.shared_qk.value_or((c.causal && c.kv_heads == 0) || c.induction);
  };
  return {
      {"induction", [](const C& c) { return c.induction && !c.causal; }},
      {"local_induction", [](const C& c) { return c.local_induction && !c.causal; }},
      {"lookahead", [](const C& c) { return c.lookahead > 0 && c.causal; }},
      {"shared_qk", [](const C& c) { return c.induction && c.shared_qk == false; }},
      {"self", [](const C& c) { return c.induction && c.self && c.self != Self::never; }},
      {"logits",
       [](const C& c) {
         return c.induction &&
                c.logits.value_or(c.shared_qk == false ? Logits::raw : Logits::normalised) != Logits::normalised;
       }},
      {"kv_heads",
       [](const C& c) {
         return c.kv_heads > 0 &&
                ((c.routed_heads > 0 && shares(c)) || (c.routed_heads < c.heads && c.local_induction));
       }},
      {"membership", [](const C& c) { return balanced(c) && !learned(c); }},
      {"probes", [](const C& c) { return c.probes > 1 && !learned(c); }},
      {"query_share", [](const C& c) { return c.query_share > 0 && shares(c); }},
      {"globals",
       [](const C& c) {
         return c.globals > 0 && ((c.routed_heads > 0 && (balanced(c) || c.probes > 1)) ||
                                  (c.routed_heads == c.heads && c.routing == Routing::dense));
       }},
      {"dense_up_to",
       [](const C& c) { return c.dense_up_to > 0 && c.routed_heads == c.heads && c.routing == Routing::dense; }},
      {"self",
       [](const C& c) {
         return (c.globals > 0 || c.memory > 0) && c.routed_heads > 0 && !c.causal &&
                c.self.value_or(c.induction ? Self::never
                                : shares(c) ? Self::only_if_alone
                                            : Self::visible) != Self::visible;
       }},
      {"logits",
       [](const C& c) {
         return c.routed_heads == 0 && c.logits && c.logits != (shares(c) ? Logits::normalised : Logits::raw);
       }},
      {"learned_gain",
       [](const C& c) { return c.routed_heads == 0 && c.learned_gain.value_or(shares(c)) != shares(c); }},
      {"normalisation",
       [](const C& c) {
         return c.routed_heads == 0 && !c.local_induction && c.normalisation != Normalisation::layer_norm;
       }},
      {"routed_positions", [](const C& c) { return c.routed_heads == 0 && c.routed_positions != PositionKind::none; }},
  };
}

// The oracle's rows of a layer, routed by the layer's centroids.
RowMatrix<double> expected_rows(const RoutingAttention<double>& layer, const RowMatrix<double>& x,
                                const std::vector<Index>& offsets) {
  const RoutingAttentionConfig& c = layer.config();
  Oracle oracle{c, layer.parameters(), offsets};
  if (c.routed_heads > 0 && c.routing == Routing::learned) {
    std::vector<ConstView<double>> centroids;
    for (const auto& router : layer.routers()) centroids.push_back(router.centroids());
    oracle.route(x, centroids);
  } else if (c.routed_heads > 0 && c.routing == Routing::random) {
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
        bool expected = false;
        for (const Rule& rule : rules())
          if (rule.applies(config)) {
            expected = true;
            INFO(reason);
            REQUIRE(contains(reason, std::string(rule.argument) + ": expected"));
          }
        INFO(reason);
        REQUIRE(reason.empty() == !expected);
        if (expected) {
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
        if (causal && config.membership == Membership::nearest) {
          RowMatrix<double> changed = x, other(n, 9);
          changed.row(n - 2).setConstant(0.7);
          layer.forward({changed, offsets}, other, context);
          REQUIRE(same_bits<double>(other.topRows(n - 2), y.topRows(n - 2)));
        }
      }
  REQUIRE(working > 1000);
  REQUIRE(refused > 100);
}
