#include "coterie/attention/reference.hpp"

#include "cases.hpp"
#include "catch.hpp"
#include "errors.hpp"
#include "gradient.hpp"

using namespace test;

namespace {

using Matrix = RowMatrix<double>;

const double infinity = std::numeric_limits<double>::infinity();

bool close(const Matrix& a, const Matrix& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() && (a - b).cwiseAbs().sum() < 1e-12;
}

// A plan in which every query sees the given key rows.
AttentionPlan plan_of(const std::vector<std::vector<std::int32_t>>& key_lists, Index key_tokens) {
  AttentionPlan plan;
  plan.tokens = static_cast<Index>(key_lists.size());
  plan.key_tokens = key_tokens;
  for (const auto& keys : key_lists) {
    const auto entry = static_cast<std::int32_t>(plan.entries.size());
    const auto begin = static_cast<std::int32_t>(plan.keys.size());
    const auto count = static_cast<std::int32_t>(keys.size());
    plan.groups.push_back({entry, entry + 1, begin, begin + count});
    plan.entries.push_back(entry);
    plan.keys.insert(plan.keys.end(), keys.begin(), keys.end());
    plan.visible.push_back({0, count});
  }
  complete(plan);
  return plan;
}

// Inputs of a case, and the gradients of loss() by all of them.
struct Problem {
  AttentionPlan plan;
  AttentionConfig config;
  Matrix q, k, v, bias, memory_keys, memory_values, relative_keys, relative_values, scales, g_out, g_lse;
  AttentionTerms<double> terms;

  Problem(const AttentionCase& c, std::uint64_t seed) {
    c.fill(plan);
    Random random(seed);
    const Index n = plan.tokens, kv = c.kv_heads;
    q = random.matrix<double>(n, c.heads * c.d);
    k = random.matrix<double>(plan.key_tokens, kv * c.d);
    v = random.matrix<double>(plan.key_tokens, kv * c.dv);
    bias = random.matrix<double>(c.bias_distances > 0 ? c.heads : 0, c.bias_distances);
    memory_keys = random.matrix<double>(plan.memory_tokens, kv * c.d);
    memory_values = random.matrix<double>(plan.memory_tokens, kv * c.dv);
    const Index tables = c.relative_by_head ? c.heads : 1, distances = c.relative_distances;
    relative_keys = random.matrix<double>(c.relative == RelativeTables::values ? 0 : distances, tables * c.d);
    relative_values = random.matrix<double>(c.relative == RelativeTables::keys ? 0 : distances, tables * c.dv);
    scales = random.matrix<double>(1, c.heads);
    g_out = random.matrix<double>(n, c.heads * c.dv);
    g_lse = random.matrix<double>(c.has_lse ? n : 0, c.has_lse ? c.heads : 0);
    config = {.heads = c.heads,
              .kv_heads = kv,
              .scales = {scales.data(), static_cast<std::size_t>(c.heads)},
              .soft_cap = c.soft_cap,
              .dropout = c.dropout,
              .dropout_seed = 5};
    terms = {.bias = {bias, c.bias_first},
             .memory_keys = memory_keys,
             .memory_values = memory_values,
             .relative_keys = {relative_keys, c.relative_first},
             .relative_values = {relative_values, c.relative_first}};
  }

  double loss() const {
    Matrix out(g_out.rows(), g_out.cols()), lse(g_lse.rows(), g_lse.cols());
    reference_forward(plan, q, k, v, out, lse, config, terms);
    double sum = (out.array() * g_out.array()).sum();
    for (Index i = 0; i < lse.rows(); ++i)
      for (Index h = 0; h < lse.cols(); ++h)
        if (lse(i, h) != -infinity) sum += lse(i, h) * g_lse(i, h);
    return sum;
  }
};

}  // namespace

TEST_CASE("reference: two tokens by hand") {
  const AttentionPlan plan = plan_of({{0, 1}, {0, 1}}, 2);
  Matrix q(2, 2), k(2, 2), v(2, 2), out(2, 2), lse(2, 1);
  q << 0, std::log(3.0), std::log(4.0), 0;
  k << 1, 0, 0, 1;
  v << 1, 2, 3, 5;
  reference_forward(plan, q, k, v, out, lse, {.scale = 1});
  Matrix expected_out(2, 2), expected_lse(2, 1);  // rows of probabilities: 1/4 3/4 and 4/5 1/5
  expected_out << 10.0 / 4, 17.0 / 4, 7.0 / 5, 13.0 / 5;
  expected_lse << std::log(4.0), std::log(5.0);
  REQUIRE(close(out, expected_out));
  REQUIRE(close(lse, expected_lse));

  Matrix d_out = Matrix::Zero(2, 2), d_q = Matrix::Ones(2, 2), d_k = Matrix::Ones(2, 2), d_v = Matrix::Ones(2, 2);
  d_out(0, 0) = 1;  // dp = (1, 3), ds = (1/4 (1 - 5/2), 3/4 (3 - 5/2)) = (-3/8, 3/8)
  reference_backward(plan, q, k, v, d_out, d_q, d_k, d_v, {.scale = 1});
  Matrix by_q(2, 2), by_k(2, 2), by_v(2, 2);
  by_q << -0.375, 0.375, 0, 0;
  by_k << 0, -0.375 * std::log(3.0), 0, 0.375 * std::log(3.0);
  by_v << 0.25, 0, 0.75, 0;
  REQUIRE(close(d_q, by_q + Matrix::Ones(2, 2)));
  REQUIRE(close(d_k, by_k + Matrix::Ones(2, 2)));
  REQUIRE(close(d_v, by_v + Matrix::Ones(2, 2)));
}

TEST_CASE("reference: the scale is 1/sqrt(d), given, or given per head") {
  const AttentionPlan plan = plan_of({{0, 1}}, 2);
  Matrix q(1, 4), k(2, 4), v(2, 4), out(1, 4), lse(1, 1);
  q << 1, 1, 1, 1;
  k << 1, 1, 1, 1, 0, 0, 0, 0;
  v.setZero();
  const auto log_sum = [&](const AttentionConfig& config) {
    reference_forward(plan, q, k, v, out, lse, config);
    return lse(0, 0);
  };
  REQUIRE(log_sum({}) == Approx(std::log(1 + std::exp(2.0))));
  REQUIRE(log_sum({.scale = 0.5}) == Approx(std::log(1 + std::exp(2.0))));
  const double three = 3;
  REQUIRE(log_sum({.scale = 0.5, .scales = {&three, 1}}) == Approx(std::log(1 + std::exp(12.0))));
}

TEST_CASE("reference: bias goes by distance, and ends at the table's ends") {
  AttentionPlan plan;
  plan_dense({.tokens = 2, .keys = 4, .causal = true}, plan);  // queries at positions 2 and 3
  const Matrix q = Matrix::Zero(2, 1), k = Matrix::Zero(4, 1), v = Matrix::Identity(4, 4);
  Matrix out(2, 4), bias(1, 2);
  bias << std::log(2.0), std::log(3.0);  // distances up to 1, from 2 on
  reference_forward(plan, q, k, v, out, {}, {}, {.bias = {bias, 1}});
  Matrix expected(2, 4);
  expected << 3.0 / 7, 2.0 / 7, 2.0 / 7, 0, 0.3, 0.3, 0.2, 0.2;
  REQUIRE(close(out, expected));
}

TEST_CASE("reference: several entries are averaged, or share one softmax over the multiset") {
  AttentionPlan plan;
  plan.tokens = 1;
  plan.key_tokens = 2;
  plan.entries = {0, 0, 0};
  plan.keys = {0, 0, 1, 1};
  plan.groups = {{0, 1, 0, 1}, {1, 2, 1, 3}, {2, 3, 3, 4}};
  plan.visible = {{0, 1}, {0, 2}, {0, 0}};  // sees 0; 0 and 1; nothing
  const Matrix q = Matrix::Ones(1, 1), v = Matrix::Identity(2, 2);
  Matrix k(2, 1), out(1, 2), lse(1, 1), expected(1, 2);
  k << std::log(3.0), 0;
  plan.combine = Combine::mean;
  complete(plan);
  reference_forward(plan, q, k, v, out, {}, {});
  expected << (1 + 0.75) / 2, 0.25 / 2;
  REQUIRE(close(out, expected));
  plan.combine = Combine::lse;
  complete(plan);
  reference_forward(plan, q, k, v, out, lse, {});
  expected << 6.0 / 7, 1.0 / 7;
  REQUIRE(close(out, expected));
  REQUIRE(lse(0, 0) == Approx(std::log(7.0)));
}

TEST_CASE("reference: memory rows come from the second source") {
  AttentionPlan plan;
  fill_memory(1, 2, 1, plan);
  const Matrix q = Matrix::Ones(1, 1), k = Matrix::Zero(1, 1);
  Matrix v(1, 3), memory_keys(2, 1), memory_values(2, 3), out(1, 3), expected(1, 3);
  v << 1, 0, 0;
  memory_keys << std::log(2.0), std::log(5.0);
  memory_values << 0, 1, 0, 0, 0, 1;
  reference_forward(plan, q, k, v, out, {}, {}, {.memory_keys = memory_keys, .memory_values = memory_values});
  expected << 1.0 / 8, 2.0 / 8, 5.0 / 8;
  REQUIRE(close(out, expected));
}

TEST_CASE("reference: query heads share key heads in order, and may have plans of their own") {
  Random random(1);
  const Matrix q = random.matrix<double>(3, 4 * 2), k = random.matrix<double>(3, 2 * 2),
               v = random.matrix<double>(3, 2 * 3);
  std::vector<AttentionPlan> plans(2);
  plan_dense({.tokens = 3}, plans[0]);
  plan_dense({.tokens = 3, .causal = true}, plans[1]);
  Matrix out(3, 4 * 3), one(3, 3);
  reference_forward(plans, q, k, v, out, {}, {.heads = 4, .kv_heads = 2});
  for (Index h = 0; h < 4; ++h) {
    const Index kv = h / 2;
    reference_forward(plans[static_cast<std::size_t>(kv)], q.middleCols(2 * h, 2), k.middleCols(2 * kv, 2),
                      v.middleCols(3 * kv, 3), one, {}, {});
    REQUIRE(close(out.middleCols(3 * h, 3), one));
  }
}

TEST_CASE("reference: what sees nothing is zero, and passes no gradient") {
  const AttentionPlan plan = plan_of({{}, {0}}, 2);
  Random random(2);
  const Matrix q = random.matrix<double>(2, 3), k = random.matrix<double>(2, 3), v = random.matrix<double>(2, 3),
               d_out = random.matrix<double>(2, 3), d_lse = random.matrix<double>(2, 1);
  Matrix out = Matrix::Ones(2, 3), lse(2, 1);
  reference_forward(plan, q, k, v, out, lse, {});
  REQUIRE(out.row(0).isZero(0));
  REQUIRE(lse(0, 0) == -infinity);
  REQUIRE(close(out.row(1), v.row(0)));
  Matrix d_q = Matrix::Zero(2, 3), d_k = Matrix::Zero(2, 3), d_v = Matrix::Zero(2, 3);
  reference_backward(plan, q, k, v, d_out, d_q, d_k, d_v, {}, {}, {.d_lse = d_lse});
  REQUIRE(d_q.row(0).isZero(0));
  REQUIRE(d_k.row(1).isZero(0));
  REQUIRE(d_v.row(1).isZero(0));
  REQUIRE(close(d_v.row(0), d_out.row(1)));
  REQUIRE(close(d_q.row(1), d_lse(1, 0) / std::sqrt(3.0) * k.row(0)));
}

TEST_CASE("reference: every gradient by central differences, added to what is there") {
  for (const AttentionCase& c : attention_cases({.tokens = 10, .window = 3, .clusters = 3, .d = 2})) {
    INFO(c.name);
    Problem p(c, 3);
    const auto ones_like = [](const Matrix& m) { return Matrix(Matrix::Ones(m.rows(), m.cols())); };
    Matrix d_q = ones_like(p.q), d_k = ones_like(p.k), d_v = ones_like(p.v), d_bias = ones_like(p.bias),
           d_memory_keys = ones_like(p.memory_keys), d_memory_values = ones_like(p.memory_values),
           d_relative_keys = ones_like(p.relative_keys), d_relative_values = ones_like(p.relative_values),
           d_scales = ones_like(p.scales);
    reference_backward(p.plan, p.q, p.k, p.v, p.g_out, d_q, d_k, d_v, p.config, p.terms,
                       {.d_bias = d_bias,
                        .d_memory_keys = d_memory_keys,
                        .d_memory_values = d_memory_values,
                        .d_scales = {d_scales.data(), static_cast<std::size_t>(d_scales.size())},
                        .d_lse = p.g_lse,
                        .d_relative_keys = d_relative_keys,
                        .d_relative_values = d_relative_values});
    const auto require = [&](Matrix& x, Matrix& gradient) {
      gradient.array() -= 1;
      require_gradient(x, gradient, [&] { return p.loss(); });
    };
    require(p.q, d_q);
    require(p.k, d_k);
    require(p.v, d_v);
    require(p.bias, d_bias);
    require(p.memory_keys, d_memory_keys);
    require(p.memory_values, d_memory_values);
    require(p.relative_keys, d_relative_keys);
    require(p.relative_values, d_relative_values);
    require(p.scales, d_scales);
  }
}

TEST_CASE("the gradient check finds a wrong gradient, and NaN") {
  Matrix x = Random(4).matrix<double>(2, 2);
  const auto loss = [&] { return x.squaredNorm(); };
  Matrix gradient = 2 * x;
  require_gradient(x, gradient, loss);
  gradient(1, 1) += 1e-6;
  REQUIRE(gradient_error(x, gradient, loss) > 1e-7);
  gradient(1, 1) = std::numeric_limits<double>::quiet_NaN();
  REQUIRE(gradient_error(x, gradient, loss) == infinity);
}

TEST_CASE("reference refuses what does not fit") {
  AttentionPlan plan, other;
  plan_dense({.tokens = 3}, plan);
  plan_dense({.tokens = 4}, other);
  Matrix q(3, 4), out(3, 4), wide(3, 5), lse(3, 1);
  q.setZero();
  const std::vector<AttentionPlan> three(3, plan), mixed = {plan, other}, incomplete(1);
  REQUIRE_THROWS_AS(reference_forward(plan, q, q, q, wide, {}, {}), ShapeError);
  REQUIRE_THROWS_AS(reference_forward(other, q, q, q, out, {}, {}), ShapeError);
  REQUIRE_THROWS_AS(reference_forward(plan, q, wide, q, out, {}, {}), ShapeError);
  REQUIRE_THROWS_AS(reference_forward(plan, q, q, q, out, lse, {.heads = 2}), ShapeError);
  REQUIRE_THROWS_AS(reference_forward(plan, q, q, q, out, {}, {.heads = 0}), ValueError);
  REQUIRE_THROWS_AS(reference_forward(plan, q, q, q, out, {}, {.heads = 2, .kv_heads = 3}), ValueError);
  REQUIRE_THROWS_AS(reference_forward(three, q, q, q, out, {}, {.heads = 2}), ShapeError);
  REQUIRE_THROWS_AS(reference_forward(mixed, q, q, q, out, {}, {.heads = 2}), ShapeError);
  REQUIRE_THROWS_AS(reference_forward(incomplete, q, q, q, out, {}, {}), ValueError);
}
