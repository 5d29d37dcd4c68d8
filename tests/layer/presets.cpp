#include "coterie/layer/presets.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "catch.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "errors.hpp"
#include "random.hpp"

// Restatements of the three public codes, in plain double loops, each from its own description.

using namespace coterie;
using test::Random;

namespace {

using Matrix = RowMatrix<double>;
using Rows = std::vector<Index>;

constexpr struct { Index model_dim = 12, heads = 2, d = 6, n = 40, clusters = 4; } preset;

Matrix dot_products(const Matrix& a, const Matrix& b) { return a * b.transpose(); }

// The rows of one sequence with the largest values of a column, in order of position.
Rows top_rows(const Eigen::VectorXd& values, Index count) {
  Rows rows(static_cast<std::size_t>(values.size()));
  for (Index i = 0; i < values.size(); ++i) rows[static_cast<std::size_t>(i)] = i;
  std::stable_sort(rows.begin(), rows.end(), [&](Index a, Index b) { return values(a) > values(b); });
  rows.resize(static_cast<std::size_t>(std::min<Index>(count, values.size())));
  std::sort(rows.begin(), rows.end());
  return rows;
}

Matrix layer_norm(const Matrix& x) {
  Matrix y = x;
  for (Index i = 0; i < x.rows(); ++i) {
    const double mean = x.row(i).mean();
    const double variance = (x.row(i).array() - mean).square().mean();
    y.row(i) = (x.row(i).array() - mean) / std::sqrt(variance + 1e-6);
  }
  return y;
}

Matrix unit_rows(const Matrix& x) {
  Matrix y = x;
  for (Index i = 0; i < x.rows(); ++i) y.row(i) /= std::max(x.row(i).norm(), 1e-12);
  return y;
}

// Adds softmax(logits) v of a cluster to the rows of its queries; a logit of -infinity is a pair that does not see.
// Returns which of the queries see a key.
std::vector<bool> add_cluster(const Matrix& logits, const Rows& queries, const Rows& keys, const Matrix& v,
                              Matrix& sum) {
  std::vector<bool> sees;
  for (std::size_t a = 0; a < queries.size(); ++a) {
    double total = 0, most = -1e300;
    Eigen::RowVectorXd out = Eigen::RowVectorXd::Zero(v.cols());
    for (std::size_t b = 0; b < keys.size(); ++b) most = std::max(most, logits(Index(a), Index(b)));
    for (std::size_t b = 0; b < keys.size(); ++b) {
      const double logit = logits(Index(a), Index(b));
      if (std::isinf(logit)) continue;
      const double p = std::exp(logit - most);
      total += p;
      out += p * v.row(keys[b]);
    }
    sees.push_back(total > 0);
    if (total > 0) sum.row(queries[a]) += out / total;
  }
  return sees;
}

constexpr double minus_infinity = -std::numeric_limits<double>::infinity();

struct Head {
  Matrix q, k, v, centroids;  // projected
};

// google-research, routing_transformer: one head.
Matrix google_head(const Head& h, bool causal, Index window) {
  const Matrix q =
      layer_norm(h.q / std::sqrt(double(preset.d)));  // the scale comes before the norm, which takes it away
  const Matrix k = causal ? q : layer_norm(h.k);
  Matrix sum = Matrix::Zero(preset.n, preset.d);
  Eigen::VectorXd count = Eigen::VectorXd::Zero(preset.n);
  const Matrix q_scores = dot_products(q, h.centroids), k_scores = dot_products(k, h.centroids);
  for (Index c = 0; c < preset.clusters; ++c) {
    const Rows queries = top_rows(q_scores.col(c), window), keys = top_rows(k_scores.col(c), window);
    Matrix logits(window, window);
    for (Index a = 0; a < window; ++a)
      for (Index b = 0; b < window; ++b)
        logits(a, b) =
            causal && b > a ? minus_infinity : q.row(queries[std::size_t(a)]).dot(k.row(keys[std::size_t(b)]));
    add_cluster(logits, queries, keys, h.v, sum);
    for (const Index i : queries) count(i) += 1;
  }
  for (Index i = 0; i < preset.n; ++i) sum.row(i) /= count(i) + 1e-2;
  return sum;
}

// Lingvo's fast path: one head. Of rows that see no key in a cluster it takes the mean of what it must not see; here
// they give nothing and do not count.
Matrix lingvo_head(const Head& h, bool causal, Index window) {
  const Matrix q = layer_norm(h.q), k = layer_norm(h.k);
  Matrix sum = Matrix::Zero(preset.n, preset.d);
  Eigen::VectorXd count = Eigen::VectorXd::Zero(preset.n);
  const auto closeness = [&](const Matrix& rows, Index c) {
    Eigen::VectorXd result(preset.n);
    for (Index i = 0; i < preset.n; ++i) result(i) = -(rows.row(i) - h.centroids.row(c)).squaredNorm();
    return result;
  };
  for (Index c = 0; c < preset.clusters; ++c) {
    const Rows queries = top_rows(closeness(q, c), Index(1.2 * double(preset.n) / double(preset.clusters))),
               keys = top_rows(closeness(k, c), window);
    Matrix logits(Index(queries.size()), window);
    for (std::size_t a = 0; a < queries.size(); ++a)
      for (std::size_t b = 0; b < keys.size(); ++b)
        logits(Index(a), Index(b)) = causal && keys[b] > queries[a]
                                         ? minus_infinity
                                         : q.row(queries[a]).dot(k.row(keys[b])) / std::sqrt(double(preset.d));
    const auto sees = add_cluster(logits, queries, keys, h.v, sum);
    for (std::size_t a = 0; a < queries.size(); ++a) count(queries[a]) += sees[a];
  }
  for (Index i = 0; i < preset.n; ++i) sum.row(i) /= std::max(1.0, count(i));
  return sum;
}

// The PyTorch port: one head. Memory is behind the keys of every cluster, and no mask reaches it.
Matrix pytorch_head(const Head& h, bool causal, bool shared, Index window,
                    const Matrix& memory_keys = Matrix(0, preset.d),
                    const Matrix& memory_values = Matrix(0, preset.d)) {
  const Matrix own_k = shared ? unit_rows(h.q) : h.k;
  const Matrix q_scores = dot_products(unit_rows(h.q), h.centroids),
               k_scores = dot_products(unit_rows(own_k), h.centroids);
  Matrix k(preset.n + memory_keys.rows(), preset.d), v(preset.n + memory_keys.rows(), preset.d);
  k << own_k, memory_keys;
  v << h.v, memory_values;
  Matrix sum = Matrix::Zero(preset.n, preset.d);
  Eigen::VectorXd count = Eigen::VectorXd::Zero(preset.n);
  for (Index c = 0; c < preset.clusters; ++c) {
    const Rows queries = top_rows(q_scores.col(c), window);
    Rows keys = top_rows(k_scores.col(c), window);
    for (Index m = 0; m < memory_keys.rows(); ++m) keys.push_back(preset.n + m);
    Matrix logits(window, Index(keys.size()));
    for (Index a = 0; a < window; ++a)
      for (Index b = 0; b < logits.cols(); ++b) {
        const Index i = queries[std::size_t(a)], j = keys[std::size_t(b)];
        logits(a, b) = h.q.row(i).dot(k.row(j)) / std::sqrt(double(preset.d));
        if (shared && i == j) logits(a, b) = -5e4;
        if (causal && j > i && j < preset.n) logits(a, b) = minus_infinity;
      }
    add_cluster(logits, queries, keys, v, sum);
    for (const Index i : queries) count(i) += 1;
  }
  for (Index i = 0; i < preset.n; ++i) sum.row(i) /= count(i) + 1e-5;
  return sum;
}

// The layer's output, and that of a restatement of its heads.
template <class Restated>
void require_preset(const RoutingAttentionConfig& config, double tolerance, Restated restated) {
  const RoutingAttention<double> layer(config);
  const Parameters<double>& p = layer.parameters();
  const Matrix x = 2 * Random(5).matrix<double>(preset.n, preset.model_dim);
  Matrix y(preset.n, preset.model_dim), expected = Matrix::Zero(preset.n, preset.model_dim);
  Context context;
  layer.forward(x, y, context);
  for (Index h = 0; h < preset.heads; ++h) {
    const auto columns = [&](const Matrix& w) -> Matrix {
      if (w.size() == 0) return {};
      return x * w.middleCols(h * preset.d, preset.d);
    };
    const Head head{columns(p.w_q), columns(p.w_k), columns(p.w_v),
                    layer.routers()[std::size_t(h)].centroids().eigen()};
    expected += restated(head) * p.w_o.middleRows(h * preset.d, preset.d);
  }
  REQUIRE((y - expected).cwiseAbs().maxCoeff() < tolerance);
  // Not because there is nothing to see.
  REQUIRE(expected.cwiseAbs().maxCoeff() > 0.1);
}

RoutingAttentionConfig sizes(bool causal, Index window) {
  return {.model_dim = preset.model_dim,
          .head_dim = preset.d,
          .causal = causal,
          .seed = 21,
          .routed = {.heads = preset.heads, .clusters = preset.clusters, .window = window}};
}

}  // namespace

TEST_CASE("the google preset computes what the paper's code does") {
  // The norm comes after a scaling of queries there: its epsilon weighs d times as much.
  for (const bool causal : {false, true})
    for (const Index window : {10, 14})
      require_preset(presets::google(sizes(causal, window)), 1e-3,
                     [&](const Head& h) { return google_head(h, causal, window); });
}

TEST_CASE("the lingvo preset computes what Lingvo's fast path does, but for rows that see nothing") {
  for (const bool causal : {false, true})
    for (const Index window : {10, 14})
      require_preset(presets::lingvo(sizes(causal, window)), 1e-11,
                     [&](const Head& h) { return lingvo_head(h, causal, window); });
}

TEST_CASE("the pytorch preset computes what the PyTorch port does") {
  for (const bool causal : {false, true})
    for (const Index window : {10, 14})
      require_preset(presets::pytorch(sizes(causal, window)), 1e-11,
                     [&](const Head& h) { return pytorch_head(h, causal, causal, window); });
}

TEST_CASE("presets: the commitment loss is a mean over routers, and nothing is left of induction") {
  RoutingAttentionConfig config = sizes(true, 10);
  config.routed.matching = {.induction = true, .key_taps = 3};
  REQUIRE(presets::google(config).routed.commitment == 1e-4);  // two routers, counted twice
  REQUIRE_FALSE(presets::pytorch(config).routed.matching.induction);
  const RoutingAttention<float> layer(presets::google(config));
  config = sizes(false, 10);
  config.kv_heads = 1;
  REQUIRE(presets::google(config).routed.commitment == 1e-4);
  REQUIRE(presets::pytorch(config).routed.commitment == 0.5e-4);
}

TEST_CASE("presets change the routed block and leave the rest alone") {
  RoutingAttentionConfig config = sizes(true, 10);
  config.local = {.heads = 2, .window = 5, .matching = {.induction = true, .key_taps = 3}};
  config.dense = {.heads = 2, .matching = {.shared_qk = true}};
  config.routed.positions.kind = PositionKind::alibi;
  config.memory = 2;
  for (RoutingAttentionConfig (*preset_of)(RoutingAttentionConfig) :
       {presets::google, presets::lingvo, presets::pytorch}) {
    RoutingAttentionConfig changed = preset_of(config);
    REQUIRE(changed.routed.membership.kind == MembershipKind::balanced);
    REQUIRE(changed.routed.heads == config.routed.heads);
    REQUIRE(changed.routed.clusters == config.routed.clusters);
    REQUIRE(changed.routed.window == config.routed.window);
    REQUIRE(changed.routed.positions == config.routed.positions);
    const RoutingAttention<float> layer(changed);
    changed.routed = config.routed;
    REQUIRE(changed == config);
  }
}

TEST_CASE("presets have no sinks and recent keys: several softmaxes have no place for them") {
  RoutingAttentionConfig config = sizes(true, 10);
  config.routed.recent = 4;
  for (RoutingAttentionConfig (*preset_of)(RoutingAttentionConfig) :
       {presets::google, presets::lingvo, presets::pytorch})
    REQUIRE(test::contains(test::message_of<ValueError>([&] { RoutingAttention<float> layer(preset_of(config)); }),
                           "routed.membership.combine: expected lse with sinks or recent keys"));
}

TEST_CASE("the pytorch preset with memory: beside it a token never sees itself") {
  // The code writes a logit of -50000 for a token's own key and leaves memory alone.
  RoutingAttentionConfig config = sizes(true, 10);
  REQUIRE(presets::pytorch(config).routed.matching.self == Self::only_if_alone);
  config.memory = 2;
  config = presets::pytorch(config);
  REQUIRE(config.routed.matching.self == Self::never);
  RoutingAttentionConfig two_sided = sizes(false, 10);
  two_sided.memory = 2;
  REQUIRE(presets::pytorch(two_sided).routed.matching.self == Self::visible);

  const RoutingAttention<double> layer(config);
  const Parameters<double>& p = layer.parameters();
  const Matrix x = 2 * Random(5).matrix<double>(preset.n, preset.model_dim);
  Matrix y(preset.n, preset.model_dim), expected = Matrix::Zero(preset.n, preset.model_dim);
  Context context;
  layer.forward(x, y, context);
  for (Index h = 0; h < preset.heads; ++h) {
    const auto columns = [&](const Matrix& w) -> Matrix { return w.middleCols(h * preset.d, preset.d); };
    const Head head{x * columns(p.w_q), {}, x * columns(p.w_v), layer.routers()[std::size_t(h)].centroids().eigen()};
    expected += pytorch_head(head, true, true, 10, columns(p.memory_keys), columns(p.memory_values)) *
                p.w_o.middleRows(h * preset.d, preset.d);
  }
  REQUIRE((y - expected).cwiseAbs().maxCoeff() < 1e-11);
}

TEST_CASE("presets: how centroids follow a batch") {
  const Matrix x = 2 * Random(5).matrix<double>(preset.n, preset.model_dim);
  Context context;
  for (const int which : {0, 1, 2}) {
    RoutingAttentionConfig config = sizes(true, 10);
    config = which == 0 ? presets::google(config) : which == 1 ? presets::lingvo(config) : presets::pytorch(config);
    RoutingAttention<double> layer(config);
    OnlineKMeans<double>& router = layer.routers()[0];
    const Matrix start = router.centroids().eigen();
    // Far along the schedule the decay is the config's.
    router.set_centroids(start, std::vector<double>(preset.clusters, 7.0), 1000000);
    RoutingAttention<double>::Tape tape;
    Matrix y(preset.n, preset.model_dim);
    layer.forward(x, y, tape, context);
    layer.update_router(tape, context);
    std::vector<Matrix> rows = {x * layer.parameters().w_q.leftCols(preset.d)};
    if (!*layer.config().routed.matching.shared_qk) rows.push_back(x * layer.parameters().w_k.leftCols(preset.d));
    for (Index c = 0; c < preset.clusters; ++c) {
      Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(preset.d);
      double count = 0;
      for (const Matrix& side : rows) {
        const Matrix normal = which == 2 ? unit_rows(side) : layer_norm(side), scores = dot_products(normal, start);
        for (Index i = 0; i < preset.n; ++i) {
          Index best = 0;
          scores.row(i).maxCoeff(&best);
          if (best == c) sum += normal.row(i), count += 1;
        }
      }
      REQUIRE(count > 0);
      const Eigen::RowVectorXd old = start.row(c);
      Eigen::RowVectorXd expected = 0.999 * old + 0.001 * sum / count;
      if (which == 0) expected = (0.999 * 7 * old + 0.001 * sum) / (0.999 * 7 + 0.001 * count);
      if (which == 2) expected = 0.999 * old + 0.001 * sum / sum.norm();
      REQUIRE((router.centroids().eigen().row(c) - expected).norm() < 1e-12);
    }
  }
}
