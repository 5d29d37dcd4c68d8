#include "coterie/retrieval/key_index.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>

#include "allocation.hpp"
#include "catch.hpp"
#include "coterie/attention/recall.hpp"
#include "coterie/attention/reference.hpp"
#include "coterie/plan/dense.hpp"
#include "errors.hpp"
#include "key_cache.hpp"
#include "random.hpp"

using namespace coterie;
using namespace test;

namespace {

/// The rows that each query and head sees, by the index's plans.
std::vector<std::vector<std::set<Index>>> seen_by(const KeyCache& cache, const KeyIndex<float>& index,
                                                  const KeyIndexQuery& query, Context& context) {
  std::vector<AttentionPlan> plans;
  index.plan(cache.q, cache.k, query, plans, context);
  std::vector<std::vector<std::set<Index>>> seen(plans.size());
  for (std::size_t h = 0; h < plans.size(); ++h) {
    validate(plans[h]);
    for (Index i = 0; i < cache.q.rows(); ++i) {
      std::vector<char> sees(static_cast<std::size_t>(cache.k.rows()), 0);
      detail::mark_keys(plans[h], i, 1, sees);
      std::set<Index> rows;
      for (Index j = 0; j < cache.k.rows(); ++j)
        if (sees[std::size_t(j)]) rows.insert(j);
      REQUIRE(static_cast<Index>(rows.size()) == [&] {  // no key twice
        Index sum = 0;
        for (std::int32_t e = plans[h].row_begin[std::size_t(i)]; e < plans[h].row_begin[std::size_t(i) + 1]; ++e) {
          const Interval v = plans[h].visible[std::size_t(plans[h].row_entries[std::size_t(e)])];
          sum += v.end - v.begin;
        }
        return sum;
      }());
      seen[h].push_back(std::move(rows));
    }
  }
  return seen;
}

}  // namespace

TEST_CASE("key index: with a budget of everything it is dense attention, at every number of keys") {
  Context context;
  for (const auto& [sinks, recent] : {std::pair<Index, Index>{0, 0}, {3, 5}, {1, 0}})
    for (const Index rank : {0, 4})
      for (const bool shared : {false, true})
        for (Index n = 0; n <= 40; n += n < 12 ? 1 : 3) {
          const KeyCache cache(n, 4, 4, 2, static_cast<std::uint64_t>(n));
          KeyIndex<float> index({.kv_heads = 2,
                                 .keys_per_cluster = 3,
                                 .page = 2,
                                 .segment = 8,
                                 .sinks = sinks,
                                 .recent = recent,
                                 .tail = n % 2 == 0,
                                 .rank = rank,
                                 .shared_choice = shared});
          index.build(cache.k, cache.v, context);
          CAPTURE(n, sinks, recent, rank, shared);
          REQUIRE(index.tokens() == n);
          // Whole segments and whole pages of what is neither first nor recent are in parts, each key once.
          const Index inside = std::max<Index>(0, n - sinks - recent) / 2 * 2;
          for (Index h = 0; h < 2; ++h) {
            std::set<Index> members;
            for (Index c = 0; c < index.parts(h); ++c) {
              REQUIRE(!index.members(h, c).empty());
              REQUIRE(std::is_sorted(index.members(h, c).begin(), index.members(h, c).end()));
              for (const std::int32_t key : index.members(h, c)) REQUIRE(members.insert(key).second);
            }
            REQUIRE(static_cast<Index>(members.size()) == inside);
            if (inside > 0) REQUIRE((*members.begin() == sinks && *members.rbegin() == sinks + inside - 1));
          }
          if (n == 0) {
            REQUIRE(cache.attend(index, {.budget = 1}, context).isZero(0));
            continue;
          }
          AttentionPlan dense;
          plan_dense({.tokens = 4, .keys = n}, dense);
          for (const double scale : {0.0, 0.7})
            REQUIRE(difference(cache.attend(index, {.budget = 1, .scale = scale}, context),
                               cache.reference(dense, scale)) < 2e-6);
          if (n > 1)
            REQUIRE(difference(cache.attend(index, {.budget = double(n)}, context), cache.reference(dense)) < 2e-6);
          std::vector<AttentionPlan> plans;
          index.plan(cache.q, cache.k, {.heads = 4, .budget = 1}, plans, context);
          REQUIRE(plans.size() == 4);
          for (const AttentionPlan& plan : plans) validate(plan);
          REQUIRE(attention_recall(plans, dense, cache.q, cache.k, cache.attention(), {}, context).mean == Approx(1));
        }
}

TEST_CASE("key index: what is seen, ranked out and estimated, by the definition in double") {
  // Parts are taken from the index; all else is restated here: choice, ranking by rounded keys, weights, the report.
  struct Case {
    Index groups, d, rank;
    bool tail, shared;
    double budget;
  };
  for (const Case& c : {Case{3, 64, 4, true, false, 0.15},
                        {3, 64, 4, true, true, 0.15},
                        {1, 5, 0, true, false, 0.2},
                        {3, 80, 2, false, false, 0.3},
                        {2, 6, 0, false, true, 60},
                        {1, 16, 1, true, false, 31},
                        {3, 16, 4, true, true, 8}}) {
    const Index n = 310, queries = 7, kv_heads = 2, heads = kv_heads * c.groups;
    KeyCache cache(n, queries, heads, kv_heads, 5, c.d, 9);
    cache.q *= 0.4f;
    Context context;
    const KeyIndexConfig config{.kv_heads = kv_heads,
                                .keys_per_cluster = 9,
                                .page = 4,
                                .segment = 64,
                                .sinks = 3,
                                .recent = 11,
                                .tail = c.tail,
                                .rank = c.rank,
                                .shared_choice = c.shared};
    KeyIndex<float> index(config);
    index.build(cache.k, cache.v, context);
    KeyIndexReport report;
    const KeyIndexQuery query{.heads = heads, .budget = c.budget};
    const RowMatrix<float> out = cache.attend(index, query, context, &report);
    const auto seen = seen_by(cache, index, query, context);
    const double scale = 1 / std::sqrt(double(c.d));
    Index ranked_out = 0;
    for (Index kv = 0; kv < kv_heads; ++kv) {
      const Index parts = index.parts(kv), group = c.shared ? c.groups : 1;
      const auto key = [&](Index j) { return cache.k.row(j).segment(kv * c.d, c.d).cast<double>(); };
      const auto value = [&](Index j) { return cache.v.row(j).segment(kv * 9, 9).cast<double>(); };
      std::vector<Eigen::RowVectorXd> mean_key, mean_value;
      RowMatrix<double> rounded = RowMatrix<double>::Zero(n, c.d);
      for (Index p = 0; p < parts; ++p) {
        Eigen::RowVectorXd k = Eigen::RowVectorXd::Zero(c.d), v = Eigen::RowVectorXd::Zero(9);
        for (const std::int32_t j : index.members(kv, p)) k += key(j), v += value(j);
        mean_key.push_back(k / double(index.members(kv, p).size()));
        mean_value.push_back(v / double(index.members(kv, p).size()));
        // Scales: of the four segments of 64 behind 3 sinks that are clustered together, behind them of the page.
        const Index first = index.members(kv, p).front(), whole = 3 + (n - 11 - 3) / 64 * 64;
        REQUIRE(whole == 3 + 4 * 64);
        const Index begin = first < whole ? 3 : first, count = first < whole ? 4 * 64 : 4;
        for (Index e = 0; e < c.d; ++e) {
          const double s = cache.k.block(begin, kv * c.d + e, count, 1).cwiseAbs().maxCoeff() / 127.0;
          for (const std::int32_t j : index.members(kv, p)) rounded(j, e) = std::nearbyint(key(j)(e) / s) * s;
        }
      }
      for (Index first = kv * c.groups; first < (kv + 1) * c.groups; first += group)
        for (Index i = 0; i < queries; ++i) {
          std::vector<Eigen::RowVectorXd> q;
          for (Index g = 0; g < group; ++g)
            q.push_back(scale * cache.q.row(i).segment((first + g) * c.d, c.d).cast<double>());
          std::vector<double> choice(std::size_t(parts), 0.0);
          for (Index g = 0; g < group; ++g) {
            double all = 0;
            for (Index p = 0; p < parts; ++p) all += std::exp(q[std::size_t(g)].dot(mean_key[std::size_t(p)]));
            for (Index p = 0; p < parts; ++p)
              choice[std::size_t(p)] += std::exp(q[std::size_t(g)].dot(mean_key[std::size_t(p)])) / all;
          }
          std::vector<Index> order(static_cast<std::size_t>(parts));
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(),
                           [&](Index a, Index b) { return choice[std::size_t(a)] > choice[std::size_t(b)]; });
          std::set<Index> must{0, 1, 2}, candidates, chosen;
          const Index covered = 3 + (n - 14) / 4 * 4;
          for (Index j = covered; j < n; ++j) must.insert(j);
          const double most = c.budget <= 1 ? std::floor(c.budget * double(n)) : c.budget;
          const Index want = std::max<Index>(0, Index(most) - Index(must.size()));
          for (const Index p : order) {
            const auto members = index.members(kv, p);
            if (want == 0 || (double(must.size() + candidates.size()) + double(members.size()) / 2 >
                                  most * double(std::max<Index>(1, c.rank)) &&
                              !(c.rank > 0 && chosen.empty())))
              break;
            chosen.insert(p);
            candidates.insert(members.begin(), members.end());
          }
          std::set<Index> expected = must;
          if (c.rank == 0 || Index(candidates.size()) <= want) {
            expected.insert(candidates.begin(), candidates.end());
          } else {
            std::vector<std::pair<double, Index>> weights;
            for (const Index j : candidates) {
              double weight = 0;
              for (Index g = 0; g < group; ++g) {
                double all = 0;
                for (Index p = 0; p < parts; ++p)
                  all +=
                      double(index.members(kv, p).size()) * std::exp(q[std::size_t(g)].dot(mean_key[std::size_t(p)]));
                weight += std::exp(q[std::size_t(g)].dot(rounded.row(j))) / all;
              }
              weights.emplace_back(-weight, j);
            }
            std::sort(weights.begin(), weights.end());
            for (Index j = 0; j < want; ++j) expected.insert(weights[std::size_t(j)].second);
            ranked_out += Index(candidates.size()) - want;
          }
          for (Index g = 0; g < group; ++g) {
            CAPTURE(kv, first + g, i, c.d, c.rank);
            REQUIRE(seen[std::size_t(first + g)][std::size_t(i)] == expected);
            double z = 0, ranked = 0, estimated = 0;
            Eigen::RowVectorXd sum = Eigen::RowVectorXd::Zero(9);
            const auto add = [&](double weight, const Eigen::RowVectorXd& v) {
              z += weight;
              sum += weight * v;
              return weight;
            };
            for (const Index j : expected) add(std::exp(q[std::size_t(g)].dot(key(j))), value(j));
            for (Index p = 0; p < parts && c.tail; ++p) {
              const auto members = index.members(kv, p);
              if (chosen.count(p) == 0)
                estimated += add(double(members.size()) * std::exp(q[std::size_t(g)].dot(mean_key[std::size_t(p)])),
                                 mean_value[std::size_t(p)]);
              else
                for (const std::int32_t j : members)
                  if (expected.count(j) == 0)
                    ranked += add(std::exp(q[std::size_t(g)].dot(rounded.row(j))), mean_value[std::size_t(p)]);
            }
            sum /= z;
            const auto got = out.row(i).segment((first + g) * 9, 9).cast<double>();
            REQUIRE((got - sum).cwiseAbs().maxCoeff() < 3e-6);
            REQUIRE(report.keys_seen(i, first + g) == double(expected.size()));
            REQUIRE(report.ranked_mass(i, first + g) == Approx(ranked / z).margin(1e-6));
            REQUIRE(report.estimated_mass(i, first + g) == Approx(estimated / z).margin(1e-6));
          }
        }
    }
    REQUIRE((ranked_out > 0) == (c.rank > 0 && c.budget != 8));
  }
}

TEST_CASE("key index: appended, built at once or rolled back, it is the same index") {
  const Index n = 150, kv_heads = 2;
  const KeyCache cache(n, 5, 4, kv_heads, 11);
  const KeyIndexConfig config{
      .kv_heads = kv_heads, .keys_per_cluster = 4, .page = 3, .segment = 24, .sinks = 2, .recent = 5};
  Context context;
  const auto rows = [&](const RowMatrix<float>& m, Index count) { return view(m).rows(0, count); };
  const auto require_same = [&](const KeyIndex<float>& a, const KeyIndex<float>& b) {
    REQUIRE(a.tokens() == b.tokens());
    for (Index h = 0; h < kv_heads; ++h) {
      REQUIRE(a.parts(h) == b.parts(h));
      for (Index c = 0; c < a.parts(h); ++c)
        REQUIRE(
            std::equal(a.members(h, c).begin(), a.members(h, c).end(), b.members(h, c).begin(), b.members(h, c).end()));
    }
    KeyCache known = cache;
    known.k = cache.k.topRows(a.tokens());
    known.v = cache.v.topRows(a.tokens());
    for (const double budget : {0.2, 0.5})
      REQUIRE(same_bits(known.attend(a, {.budget = budget}, context), known.attend(b, {.budget = budget}, context)));
  };
  KeyIndex<float> steps(config), jumps(config);
  std::vector<KeyIndex<float>> at;
  for (Index count = 0; count <= n; ++count) {
    KeyIndex<float> once(config);
    once.build(rows(cache.k, count), rows(cache.v, count), context);
    steps.append(rows(cache.k, count), rows(cache.v, count), context);
    require_same(steps, once);
    if (count % 37 == 0 || count == n) {
      jumps.append(rows(cache.k, count), rows(cache.v, count), context);
      require_same(jumps, once);
    }
    at.push_back(once);
  }
  for (const Index from : {n, Index(60)})
    for (Index to = 0; to <= from; to += 7) {
      KeyIndex<float> back = at[std::size_t(from)];
      back.rollback(to, cache.k, cache.v, context);
      require_same(back, at[std::size_t(to)]);
      back.append(rows(cache.k, from), rows(cache.v, from), context);
      require_same(back, at[std::size_t(from)]);
    }
  // A needle among new keys, with a query for it alone, is found in its page and in its cluster.
  for (const Index needle : {40, 130}) {
    KeyCache sharp = cache;
    sharp.k.row(needle).setConstant(9);
    sharp.q.setConstant(5);
    KeyIndex<float> index(config);
    index.append(rows(sharp.k, 100), rows(sharp.v, 100), context);
    index.append(sharp.k, sharp.v, context);
    const RowMatrix<float> out = sharp.attend(index, {.budget = 0.2}, context);
    for (Index i = 0; i < 5; ++i)
      for (Index h = 0; h < 4; ++h)
        REQUIRE((out.row(i).segment(h * 5, 5) - sharp.v.row(needle).segment(h / 2 * 5, 5)).cwiseAbs().maxCoeff() <
                1e-5f);
  }
}

TEST_CASE("key index: a prompt in blocks: causal queries see no later row, and equal single queries") {
  const Index n = 200, block = 16;
  for (const bool shared : {false, true}) {
    const KeyCache cache(n, block, 4, 2, 21);
    const KeyIndexConfig config{.kv_heads = 2,
                                .keys_per_cluster = 4,
                                .page = 4,
                                .segment = 32,
                                .sinks = 2,
                                .recent = 8,
                                .shared_choice = shared};
    Context context;
    KeyIndex<float> index(config);
    index.build(view(cache.k).rows(0, n - block), view(cache.v).rows(0, n - block), context);
    for (const Index rank : {0, 4}) {
      const RowMatrix<float> out = cache.attend(index, {.budget = 0.3, .causal = true, .rank = rank}, context);
      for (Index i = 0; i < block; ++i) {
        // A query of its own, of a cache that ends with its row.
        KeyCache one = cache;
        one.q = cache.q.row(i);
        one.k = cache.k.topRows(n - block + i + 1);
        one.v = cache.v.topRows(n - block + i + 1);
        REQUIRE(difference(one.attend(index, {.budget = 0.3, .rank = rank}, context),
                           RowMatrix<double>(out.row(i).cast<double>())) < 1e-6);
        // Later rows may be anything.
        KeyCache later = cache;
        later.k.bottomRows(block - i - 1).setConstant(std::numeric_limits<float>::quiet_NaN());
        later.v.bottomRows(block - i - 1).setConstant(std::numeric_limits<float>::infinity());
        const RowMatrix<float> got = later.attend(index, {.budget = 0.3, .causal = true, .rank = rank}, context);
        REQUIRE(same_bits(RowMatrix<float>(got.topRows(i + 1)), RowMatrix<float>(out.topRows(i + 1))));
      }
    }
    // Everything is causal dense attention.
    AttentionPlan dense;
    plan_dense({.tokens = block, .keys = n, .causal = true}, dense);
    REQUIRE(difference(cache.attend(index, {.budget = 1, .causal = true}, context), cache.reference(dense)) < 2e-6);
    // Parts behind the first query's row are refused.
    index.append(cache.k, cache.v, context);
    RowMatrix<float> out(block, 4 * 5);
    REQUIRE(contains(message_of<ValueError>(
                         [&] { index.attend(cache.q, cache.k, cache.v, out, {.heads = 4, .causal = true}, context); }),
                     "causal: expected parts that hold no row behind the first query's"));
  }
}

TEST_CASE("key index: equal keys, and one cluster that holds most keys, keep the budget and the value") {
  Context context;
  KeyCache cache(3300, 3, 1, 1, 6);
  cache.k.rowwise() = RowMatrix<float>(cache.k.row(0)).row(0);
  KeyIndex<float> index({.keys_per_cluster = 16});
  index.build(cache.k, cache.v, context);
  AttentionPlan dense;
  plan_dense({.tokens = 3, .keys = 3300}, dense);
  KeyIndexReport report;
  // All weights are equal, and means are exact; only the int8 copy is not.
  REQUIRE(difference(cache.attend(index, {.budget = 0.05, .rank = 0}, context), cache.reference(dense)) < 2e-5);
  const RowMatrix<float> out = cache.attend(index, {.budget = 0.05}, context, &report);
  REQUIRE(difference(out, cache.reference(dense)) < 1e-2);
  REQUIRE(report.keys_seen.maxCoeff() <= 0.05 * 3300);
  // Some keys unlike all others: the large cluster is not in their way.
  for (Index j = 0; j < 20; ++j) cache.k.row(100 + 150 * j) *= -3;
  index.build(cache.k, cache.v, context);
  cache.attend(index, {.budget = 0.05}, context, &report);
  REQUIRE(report.keys_seen.maxCoeff() <= 0.05 * 3300);
}

TEST_CASE("key index: a batch has the bits of its rows one by one, for any number of workers") {
  for (const bool shared : {false, true})
    for (const Index rank : {0, 4}) {
      const KeyCache cache(700, 600, 4, 2, 7, 17, 9);
      const KeyIndexConfig config{
          .kv_heads = 2, .keys_per_cluster = 16, .segment = 256, .rank = rank, .shared_choice = shared};
      const KeyIndexQuery query{.budget = 0.25, .samples = 5};
      Context serial;
      KeyIndex<float> index(config);
      index.build(cache.k, cache.v, serial);
      KeyIndexReport report, one_report;
      const RowMatrix<float> batch = cache.attend(index, query, serial, &report);
      for (const Index row : {0, 1, 63, 64, 511, 512, 599}) {
        KeyCache one = cache;
        one.q = cache.q.row(row);
        REQUIRE(same_bits(one.attend(index, query, serial, &one_report), RowMatrix<float>(batch.row(row))));
        REQUIRE(one_report.sampled_mass == report.sampled_mass.row(row));
        REQUIRE(one_report.estimated_mass == report.estimated_mass.row(row));
      }
      for (const Index workers : {2, 3, 8}) {
        ThreadPool pool(workers);
        Workspace workspace;
        Context context(pool, workspace);
        KeyIndex<float> other(config);
        other.build(cache.k, cache.v, context);
        REQUIRE(same_bits(cache.attend(other, query, context), batch));
        REQUIRE(same_bits(cache.attend(index, query, context), batch));
      }
    }
}

TEST_CASE("key index: the report's masses are those of the keys") {
  // Peaked heads: keys around 30 centres, queries near some of them.
  const Index n = 4000, queries = 40, d = 24;
  Random random(8);
  KeyCache cache(n, queries, 1, 1, 8, d, 3);
  const RowMatrix<float> centres = 2 * random.matrix<float>(30, d);
  for (Index i = 0; i < n; ++i) cache.k.row(i) = centres.row(random.below(30)) + 0.7f * random.matrix<float>(1, d);
  for (Index i = 0; i < queries; ++i)
    cache.q.row(i) = 1.5f * centres.row(random.below(30)) + random.matrix<float>(1, d);
  Context context;
  KeyIndex<float> index({.keys_per_cluster = 32});
  index.build(cache.k, cache.v, context);
  KeyIndexReport report;
  const KeyIndexQuery query{.heads = 1, .budget = 0.05, .samples = 4000};
  cache.attend(index, query, context, &report);
  const auto seen = seen_by(cache, index, query, context);
  double worst = 0, mean_true = 0, mean_sampled = 0;
  for (Index i = 0; i < queries; ++i) {
    double all = 0, kept = 0;
    for (Index j = 0; j < n; ++j) {
      const double weight = std::exp(double(cache.q.row(i).dot(cache.k.row(j))) / std::sqrt(double(d)));
      all += weight;
      if (seen[0][std::size_t(i)].count(j) == 1) kept += weight;
    }
    const double out = report.sampled_mass(i, 0) + report.ranked_mass(i, 0);  // ranked: of a smaller sum
    const double left = 1 - kept / all;
    REQUIRE(report.estimated_mass(i, 0) + report.ranked_mass(i, 0) <= left + 0.01);
    worst = std::max(worst, std::abs(out - left) - 4 * report.sampled_error(i, 0));
    mean_true += left / double(queries);
    mean_sampled += out / double(queries);
  }
  REQUIRE(mean_true > 0.02);
  REQUIRE(std::abs(mean_sampled - mean_true) < 0.1 * mean_true);
  REQUIRE(worst < 0.02);
}

TEST_CASE("key index: keys with NaN or infinity are seen by all queries, queries with them reach their row alone") {
  const Index n = 300;
  const KeyCache clean(n, 40, 1, 1, 9);
  const KeyIndexConfig config{.keys_per_cluster = 8, .page = 4, .segment = 64, .sinks = 1, .recent = 5};
  const KeyIndexQuery query{.heads = 1, .budget = 0.2};
  Context context;
  KeyIndex<float> index(config);
  index.build(clean.k, clean.v, context);
  const RowMatrix<float> expected = clean.attend(index, query, context);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const Index row : {50, 290}) {  // in a segment, in a page
      KeyCache cache = clean;
      cache.v(row, 2) = bad;
      KeyIndex<float> other(config);
      other.build(cache.k, cache.v, context);
      const RowMatrix<float> got = cache.attend(other, query, context);
      for (Index i = 0; i < 40; ++i) {
        REQUIRE(!std::isfinite(got(i, 2)));
        REQUIRE((std::isfinite(got(i, 0)) && std::isfinite(got(i, 4))));
      }
      cache = clean;
      cache.k.row(row).setConstant(std::numeric_limits<float>::quiet_NaN());
      other.build(cache.k, cache.v, context);
      for (Index c = 0; c < other.parts(0); ++c)
        for (const std::int32_t key : other.members(0, c)) REQUIRE(key != row);
      REQUIRE(!cache.attend(other, query, context).row(7).allFinite());
    }
    KeyCache cache = clean;
    cache.q.row(7).setConstant(bad);
    const RowMatrix<float> other = cache.attend(index, query, context);
    REQUIRE(!other.row(7).allFinite());
    for (const Index i : {0, 6, 8, 39})
      REQUIRE(same_bits(RowMatrix<float>(other.row(i)), RowMatrix<float>(expected.row(i))));
    cache = clean;
    cache.k.setConstant(bad);
    KeyIndex<float> none(config);
    none.build(cache.k, cache.v, context);
    REQUIRE(none.parts(0) == 0);
    REQUIRE(!cache.attend(none, query, context).row(0).allFinite());
    none.rollback(20, cache.k, cache.v, context);
    none.append(cache.k, cache.v, context);
    REQUIRE(none.parts(0) == 0);
  }
}

TEST_CASE(
    "key index: a head with NaN leaves the others of its group alone, and is NaN even where nothing else is seen") {
  Context context;
  AttentionPlan dense;
  plan_dense({.tokens = 3, .keys = 120}, dense);
  for (const Index rank : {0, 4})
    for (const bool tail : {false, true}) {
      const KeyCache clean(120, 3, 4, 2, 31);
      KeyCache cache = clean;
      cache.q.block(1, 6, 1, 6).setConstant(std::numeric_limits<float>::quiet_NaN());
      KeyIndex<float> index({.kv_heads = 2,
                             .keys_per_cluster = 4,
                             .page = 4,
                             .segment = 40,
                             .sinks = 0,
                             .recent = 0,
                             .tail = tail,
                             .rank = rank,
                             .shared_choice = true});
      index.build(cache.k, cache.v, context);
      RowMatrix<double> expected = clean.reference(dense);
      for (const double budget : {1.0, 0.1, 0.001}) {
        RowMatrix<float> out = cache.attend(index, {.budget = budget}, context);
        CAPTURE(rank, tail, budget);
        for (Index e = 5; e < 10; ++e) REQUIRE(std::isnan(out(1, e)));
        out.block(1, 5, 1, 5).setZero();
        REQUIRE(out.allFinite());
        expected.block(1, 5, 1, 5).setZero();
        if (budget == 1) REQUIRE(difference(out, expected) < 2e-6);
      }
      // All heads of the group, and no part is chosen for anybody.
      cache.q.row(1).setConstant(std::numeric_limits<float>::quiet_NaN());
      for (const double budget : {1.0, 0.001}) {
        const RowMatrix<float> out = cache.attend(index, {.budget = budget}, context);
        for (Index e = 0; e < out.cols(); ++e) REQUIRE(std::isnan(out(1, e)));
        REQUIRE((out.row(0).allFinite() && out.row(2).allFinite()));
      }
    }
}

TEST_CASE("key index: a shared choice ranks by the better key, however far all keys are above their means") {
  // Means are 0, so that what is known of the parts is nothing beside the best keys: 2^-1000 of it.
  const Index n = 64, d = 4;
  for (const float size : {1.0f, 30.0f}) {
    KeyCache cache(n, 1, 2, 1, 32, d, 3);
    cache.k.setZero();
    for (Index j = 0; j < n; ++j) cache.k(j, j % 2 == 0 ? 0 : 1) = (j / 2 % 2 == 0 ? 1 : -1) * size * float(1 + j / 4);
    cache.q.setZero();
    cache.q(0, 0) = cache.q(0, d + 1) = size;
    Context context;
    KeyIndex<float> index({.keys_per_cluster = 64,
                           .page = 64,
                           .segment = 64,
                           .sinks = 0,
                           .recent = 0,
                           .tail = false,
                           .shared_choice = true});
    index.build(cache.k, cache.v, context);
    REQUIRE(index.parts(0) == 1);
    const auto seen = seen_by(cache, index, {.heads = 2, .budget = 4, .scale = 1}, context);
    // The best key of either head: rows of the last group of four.
    for (const auto& rows : seen)
      for (const Index row : {60, 61}) REQUIRE(rows[0].count(row) == 1);
  }
}

TEST_CASE("key index: a prompt no longer than the sinks, and a budget above all numbers of keys") {
  const KeyCache cache(12, 12, 4, 2, 33);
  Context context;
  AttentionPlan dense;
  plan_dense({.tokens = 12, .keys = 12, .causal = true}, dense);
  for (const Index rank : {0, 4}) {
    KeyIndex<float> index({.kv_heads = 2, .sinks = 20, .rank = rank});
    index.build(cache.k, cache.v, context);
    for (const double budget : {1.0, 1e19, 1e300})
      REQUIRE(difference(cache.attend(index, {.budget = budget, .causal = true}, context), cache.reference(dense)) <
              2e-6);
  }
  KeyIndex<float> index({.kv_heads = 2, .page = 2, .segment = 4, .sinks = 0, .recent = 0});
  index.build(cache.k, cache.v, context);
  plan_dense({.tokens = 12, .keys = 12}, dense);
  REQUIRE(difference(cache.attend(index, {.budget = 1e300}, context), cache.reference(dense)) < 2e-6);
}

TEST_CASE("key index: nothing allocates after warm-up, whatever the queries, for any number of workers") {
  const KeyCache cache(2000, 300, 4, 2, 10, 16, 16);
  for (const Index workers : {1, 3})
    for (const bool shared : {false, true})
      for (const Index rank : {0, 4}) {
        ThreadPool pool(workers);
        Workspace workspace;
        Context context(pool, workspace);
        KeyIndex<float> index({.kv_heads = 2, .keys_per_cluster = 16, .rank = rank, .shared_choice = shared});
        index.build(cache.k, cache.v, context);
        RowMatrix<float> out(300, 4 * 16);
        const auto attend = [&](Index first, Index count) {
          index.attend(view(cache.q).rows(first, count), cache.k, cache.v, view(out).rows(first, count),
                       {.heads = 4, .budget = 0.15}, context);
        };
        // Warm-up: one query, and one batch; every worker gets room for any other.
        attend(0, 1);
        attend(0, 300);
        const long before = allocations();
        for (Index i = 0; i < 300; i += 3) attend(i, 1);
        for (Index i = 0; i < 5; ++i) attend(i, 290 - i);
        REQUIRE(allocations() == before);
        // Causal, with a report that has its size.
        KeyIndexReport report;
        const KeyIndexQuery causal{.heads = 4, .budget = 0.15, .causal = true, .samples = 2};
        const auto last = view(cache.q).rows(0, 60);
        index.attend(last, cache.k, cache.v, view(out).rows(0, 60), causal, context, &report);
        const long then = allocations();
        index.attend(last, cache.k, cache.v, view(out).rows(0, 60), causal, context, &report);
        REQUIRE(allocations() == then);
      }
}

TEST_CASE("key index: wrong arguments are named, and nothing is written") {
  const auto config_fault = [](const KeyIndexConfig& config) {
    return message_of<ValueError>([&] { KeyIndex<float> index(config); });
  };
  const std::string all = config_fault({.kv_heads = 0,
                                        .keys_per_cluster = 0,
                                        .page = 0,
                                        .segment = 0,
                                        .sinks = -1,
                                        .recent = -2,
                                        .rank = -3,
                                        .steps = -4});
  for (const char* part :
       {"KeyIndex: kv_heads: expected at least 1, got 0", "keys_per_cluster: expected at least 1, got 0",
        "page: expected at least 1, got 0", "segment: expected a positive multiple of page = 0, got 0",
        "sinks: expected at least 0, got -1", "recent: expected at least 0, got -2",
        "rank: expected at least 0, got -3", "steps: expected at least 0, got -4"})
    REQUIRE(contains(all, part));
  REQUIRE(contains(config_fault({.page = 16, .segment = 40}),
                   "segment: expected a positive multiple of page = 16, got 40"));
  REQUIRE(contains(config_fault({.sinks = Index(1) << 40}), "sinks: expected at most 2147483647"));

  const KeyCache cache(100, 6, 4, 2, 12);
  Context context;
  KeyIndex<float> index({.kv_heads = 2, .keys_per_cluster = 8, .page = 2, .segment = 16, .recent = 4});
  index.build(cache.k, cache.v, context);
  RowMatrix<float> out = RowMatrix<float>::Constant(6, 4 * 5, 3), kept = out;
  const auto shape_fault = [&](ConstView<float> q, ConstView<float> k, ConstView<float> v, View<float> to) {
    return message_of<ShapeError>([&] { index.attend(q, k, v, to, {.heads = 4}, context); });
  };
  REQUIRE(contains(shape_fault(view(cache.q).columns(0, 23), cache.k, cache.v, out),
                   "KeyIndex::attend: q: expected 6 x 24, got 6 x 23"));
  REQUIRE(contains(shape_fault(cache.q, view(cache.k).rows(0, 99), cache.v, out),
                   "k: expected at least 100 rows, got 99 rows"));
  REQUIRE(contains(shape_fault(cache.q, cache.k, view(cache.v).columns(0, 9), out),
                   "v: expected a positive multiple of 2 columns, got 9 columns"));
  REQUIRE(contains(shape_fault(cache.q, cache.k, view(cache.v).rows(0, 99), out), "v: expected 100 x 10, got 99 x 10"));
  REQUIRE(
      contains(shape_fault(cache.q, cache.k, view(cache.v).columns(0, 8), out), "v: expected 100 x 10, got 100 x 8"));
  REQUIRE(
      contains(shape_fault(cache.q, cache.k, cache.v, view(out).columns(0, 19)), "out: expected 6 x 20, got 6 x 19"));
  RowMatrix<float> shared = cache.q;
  REQUIRE(contains(shape_fault(shared, cache.k, cache.v, view(shared).columns(0, 20)),
                   "out: expected storage of its own, got an overlap with q"));
  const auto value_fault = [&](const KeyIndexQuery& query) {
    return message_of<ValueError>([&] { index.attend(cache.q, cache.k, cache.v, out, query, context); });
  };
  REQUIRE(contains(value_fault({.heads = 3}), "heads: expected 0, or a positive multiple of kv_heads = 2, got 3"));
  REQUIRE(contains(value_fault({.heads = 4, .budget = 0}), "budget: expected a finite number above 0, got 0"));
  REQUIRE(contains(value_fault({.heads = 4, .budget = -1}), "budget: expected a finite number above 0, got -1"));
  REQUIRE(contains(value_fault({.heads = 4, .rank = -2}), "rank: expected at least -1, got -2"));
  REQUIRE(contains(value_fault({.heads = 4, .samples = -1}), "samples: expected at least 0, got -1"));
  REQUIRE(contains(value_fault({.heads = 4, .scale = std::numeric_limits<double>::infinity()}),
                   "scale: expected a finite number, got inf"));
  REQUIRE(same_bits(out, kept));
  std::vector<AttentionPlan> plans;
  REQUIRE(contains(message_of<ValueError>([&] { index.plan(cache.q, cache.k, {.heads = 5}, plans, context); }),
                   "KeyIndex::plan: heads"));
  REQUIRE(plans.empty());

  const RowMatrix<float> before = cache.attend(index, {.budget = 0.3}, context);
  const RowMatrix<float> narrow(101, 13), few(101, 1), value(101, 10);
  REQUIRE(contains(
      message_of<ShapeError>([&] { index.append(view(cache.k).rows(0, 99), view(cache.v).rows(0, 99), context); }),
      "KeyIndex::append: k: expected at least 100 rows, got 99 rows"));
  REQUIRE(contains(message_of<ShapeError>([&] { index.append(narrow, value, context); }),
                   "KeyIndex::append: k: expected 101 x 12, got 101 x 13"));
  REQUIRE(contains(message_of<ShapeError>([&] { index.build(narrow, value, context); }),
                   "KeyIndex::build: k: expected 101 x 12, got 101 x 13"));
  REQUIRE(contains(message_of<ShapeError>([&] { index.build(few, value, context); }),
                   "KeyIndex::build: k: expected 101 x 2, got 101 x 1"));
  REQUIRE(contains(message_of<ShapeError>([&] { index.build(cache.k, value, context); }),
                   "KeyIndex::build: v: expected 100 x 10, got 101 x 10"));
  REQUIRE(contains(message_of<ValueError>([&] { index.rollback(101, cache.k, cache.v, context); }),
                   "KeyIndex::rollback: tokens: expected in [0, 100], got 101"));
  REQUIRE(contains(message_of<ShapeError>([&] { index.rollback(90, cache.k, view(cache.v).rows(0, 80), context); }),
                   "KeyIndex::rollback: v: expected at least 90 rows, got 80 rows"));
  REQUIRE(
      contains(message_of<ValueError>([&] { index.parts(2); }), "KeyIndex::parts: kv_head: expected in [0, 2), got 2"));
  REQUIRE(contains(message_of<ValueError>([&] { index.members(0, index.parts(0)); }),
                   "KeyIndex::members: part: expected in [0, "));
  REQUIRE(same_bits(cache.attend(index, {.budget = 0.3}, context), before));
}
