#include "coterie/retrieval/key_index.hpp"

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
#include "random.hpp"

using namespace coterie;
using namespace test;

namespace {

bool same_bits(const RowMatrix<float>& a, const RowMatrix<float>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(float)) == 0;
}

// A cache and queries; kv_heads heads of keys of width d and values of width dv.
struct Cache {
  RowMatrix<float> q, k, v;
  Index heads, kv_heads, d, dv;

  Cache(Index tokens, Index queries, Index query_heads, Index key_heads, std::uint64_t seed, Index width = 6,
        Index value_width = 5)
      : heads(query_heads), kv_heads(key_heads), d(width), dv(value_width) {
    Random random(seed);
    q = 3 * random.matrix<float>(queries, heads * d);
    k = 3 * random.matrix<float>(tokens, kv_heads * d);
    v = random.matrix<float>(tokens, kv_heads * dv);
  }

  AttentionConfig attention(double scale = 0) const { return {.heads = heads, .kv_heads = kv_heads, .scale = scale}; }
  RowMatrix<float> attend(const KeyIndex<float>& index, Index probes, Context& context, double scale = 0) const {
    RowMatrix<float> out = RowMatrix<float>::Constant(q.rows(), heads * dv, 99);
    index.attend(q, k, v, out, {.heads = heads, .probes = probes, .scale = scale}, context);
    return out;
  }
  // By plain loops in double, along plans.
  RowMatrix<double> reference(const Plans& plans, double scale = 0) const {
    RowMatrix<double> out(q.rows(), heads * dv), lse(q.rows(), heads);
    reference_forward(plans, RowMatrix<double>(q.cast<double>()), RowMatrix<double>(k.cast<double>()),
                      RowMatrix<double>(v.cast<double>()), view(out), view(lse), attention(scale));
    return out;
  }
};

double difference(const RowMatrix<float>& got, const RowMatrix<double>& want) {
  return got.size() == 0 ? 0 : (got.cast<double>() - want).cwiseAbs().maxCoeff();
}

// The keys that a query sees, by the definition: no plan, no index but its clusters.
std::vector<Index> keys_seen(const Cache& cache, const detail::KeyClusters<float, KeyIndexConfig>& clusters, Index row,
                             Index head, Index probes) {
  const KeyIndexConfig& config = clusters.config();
  const Index kv = head / (cache.heads / cache.kv_heads), n = cache.k.rows();
  const auto& of = clusters.of("test", kv);
  std::set<Index> seen;
  for (Index i = 0; i < std::min(n, config.sinks); ++i) seen.insert(i);
  for (Index i = std::max<Index>(0, n - config.recent); i < n; ++i) seen.insert(i);
  std::vector<Index> order(static_cast<std::size_t>(of.count));
  std::iota(order.begin(), order.end(), 0);
  const auto score = [&](Index c) {
    double sum = 0;
    for (Index j = 0; j < cache.d; ++j) sum += double(cache.q(row, head * cache.d + j)) * double(of.centroids(j, c));
    return sum;
  };
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return score(a) > score(b); });
  for (Index p = 0; p < std::min(probes, of.count); ++p)
    for (const std::int32_t key : of.members[static_cast<std::size_t>(order[static_cast<std::size_t>(p)])])
      REQUIRE(seen.insert(key).second);  // no key twice
  return {seen.begin(), seen.end()};
}

// A plan of one entry a query, by hand.
AttentionPlan plan_of(const std::vector<std::vector<Index>>& keys, Index key_tokens) {
  AttentionPlan plan;
  plan.tokens = static_cast<Index>(keys.size());
  plan.key_tokens = key_tokens;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const auto begin = static_cast<std::int32_t>(plan.keys.size());
    for (const Index key : keys[i]) plan.keys.push_back(static_cast<std::int32_t>(key));
    plan.entries.push_back(static_cast<std::int32_t>(i));
    plan.groups.push_back({static_cast<std::int32_t>(i), static_cast<std::int32_t>(i + 1), begin,
                           static_cast<std::int32_t>(plan.keys.size())});
    plan.visible.push_back({0, static_cast<std::int32_t>(keys[i].size())});
  }
  complete(plan);
  return plan;
}

}  // namespace

TEST_CASE("key index: with all clusters probed it is dense attention, at every number of keys") {
  Context context;
  for (const Index sinks : {0, 1, 3})
    for (const Index recent : {0, 1, 5})
      for (Index n = 0; n <= 24; ++n) {
        const Cache cache(n, 4, 4, 2, static_cast<std::uint64_t>(n));
        KeyIndex<float> index({.kv_heads = 2, .clusters = 4, .sinks = sinks, .recent = recent});
        index.build(cache.k, context);
        REQUIRE(index.tokens() == n);
        // What is in no cluster is first or recent; the clusters share the rest.
        const Index inside = std::max<Index>(0, n - std::min(sinks, n) - recent);
        for (Index h = 0; h < 2; ++h) {
          REQUIRE(index.clusters(h) == std::min<Index>(4, inside));
          Index members = 0;
          for (Index c = 0; c < index.clusters(h); ++c) {
            members += static_cast<Index>(index.members(h, c).size());
            for (const std::int32_t key : index.members(h, c)) {
              REQUIRE(key >= sinks);
              REQUIRE(key < n - recent);
            }
          }
          REQUIRE(members == inside);
        }
        CAPTURE(n, sinks, recent);
        if (n == 0) {
          REQUIRE(cache.attend(index, 4, context).isZero(0));
          continue;
        }
        AttentionPlan dense;
        plan_dense({.tokens = 4, .keys = n}, dense);
        for (const double scale : {0.0, 0.7})
          REQUIRE(difference(cache.attend(index, 4, context, scale), cache.reference(dense, scale)) < 2e-6);
        std::vector<AttentionPlan> plans;
        index.plan(cache.q, {.heads = 4, .probes = 4}, plans, context);
        REQUIRE(plans.size() == 4);
        for (const AttentionPlan& plan : plans) validate(plan);
        REQUIRE(attention_recall(plans, dense, cache.q, cache.k, cache.attention(), {}, context).mean == Approx(1));
      }
}

TEST_CASE("key index: a query sees first, recent and its best clusters, once, as one softmax") {
  for (const Index groups : {1, 3}) {
    const Index n = 230, queries = 9, kv_heads = 2, heads = kv_heads * groups;
    const Cache cache(n, queries, heads, kv_heads, 5);
    const KeyIndexConfig config{.kv_heads = kv_heads, .clusters = 12, .sinks = 3, .recent = 7, .seed = 2};
    Context context;
    KeyIndex<float> index(config);
    index.build(cache.k, context);
    detail::KeyClusters<float, KeyIndexConfig> clusters(config);
    clusters.build(cache.k, context);
    bool choices_differ = false;
    for (const Index probes : {0, 1, 3, 12}) {
      std::vector<AttentionPlan> expected, plans;
      for (Index h = 0; h < heads; ++h) {
        std::vector<std::vector<Index>> keys;
        for (Index i = 0; i < queries; ++i) keys.push_back(keys_seen(cache, clusters, i, h, probes));
        choices_differ |= probes == 1 && keys[0] != keys[1];
        expected.push_back(plan_of(keys, n));
      }
      CAPTURE(groups, probes);
      REQUIRE(difference(cache.attend(index, probes, context), cache.reference(expected)) < 2e-6);
      index.plan(cache.q, {.heads = heads, .probes = probes}, plans, context);
      REQUIRE((cache.reference(plans) - cache.reference(expected)).cwiseAbs().maxCoeff() < 1e-12);
      for (Index h = 0; h < heads; ++h) {
        validate(plans[static_cast<std::size_t>(h)]);
        REQUIRE(statistics(plans[static_cast<std::size_t>(h)]).visible_pairs ==
                statistics(expected[static_cast<std::size_t>(h)]).visible_pairs);
        // What attend() derives is what complete() derives, but for what backward alone asks.
        AttentionPlan quick = plans[static_cast<std::size_t>(h)];
        for (AttentionPlan::Part& part : quick.parts) part.alone = false;
        const AttentionPlan slow = quick;
        std::vector<std::int32_t> scratch;
        detail::derive(quick, scratch);
        REQUIRE(quick.row_begin == slow.row_begin);
        REQUIRE(quick.row_entries == slow.row_entries);
        REQUIRE(quick.task_begin == slow.task_begin);
        REQUIRE(std::equal(quick.parts.begin(), quick.parts.end(), slow.parts.begin(), slow.parts.end(),
                           [](const AttentionPlan::Part& a, const AttentionPlan::Part& b) {
                             return a.group == b.group && a.entry_begin == b.entry_begin &&
                                    a.entry_end == b.entry_end && a.alone == b.alone;
                           }));
      }
    }
    REQUIRE(choices_differ);
  }
}

TEST_CASE("key index: keys go to the nearest centroid, and what all keys have in common changes nothing") {
  const Index n = 500, d = 6;
  Random random(3);
  RowMatrix<double> k = random.matrix<double>(n, d);
  const KeyIndexConfig config{.clusters = 10, .sinks = 2, .recent = 20};
  Context context;
  detail::KeyClusters<double, KeyIndexConfig> clusters(config), shifted(config);
  clusters.build(k, context);
  const auto& head = clusters.of("test", 0);
  for (Index c = 0; c < head.count; ++c)
    for (const std::int32_t key : head.members[static_cast<std::size_t>(c)]) {
      const auto distance = [&](Index other) {
        return (k.row(key) - head.mean.row(0) - head.centroids.col(other).transpose()).squaredNorm();
      };
      for (Index other = 0; other < head.count; ++other) REQUIRE(distance(c) <= distance(other) + 1e-12);
    }
  k.array() += 100;
  shifted.build(k, context);
  REQUIRE(shifted.of("test", 0).members == head.members);
}

TEST_CASE("key index: k-means finds what is there, and queries find it") {
  // Keys around 8 corners; values say which.
  const Index n = 900, blobs = 8;
  Random random(8);
  RowMatrix<float> k(n, 3), v = RowMatrix<float>::Zero(n, blobs), q(blobs, 3), out(blobs, blobs);
  const auto corner = [](Index blob, Index axis) { return (blob >> axis) % 2 == 1 ? 4.0f : -4.0f; };
  for (Index i = 0; i < n; ++i) {
    const Index blob = random.below(blobs);
    for (Index j = 0; j < 3; ++j) k(i, j) = 20 + corner(blob, j) + static_cast<float>(random.uniform(-0.5, 0.5));
    v(i, blob) = 1;
  }
  for (Index b = 0; b < blobs; ++b)
    for (Index j = 0; j < 3; ++j) q(b, j) = corner(b, j);
  Context context;
  KeyIndex<float> index({.clusters = blobs, .sinks = 0, .recent = 0});
  index.build(k, context);
  index.attend(q, k, v, out, {.probes = 1}, context);
  REQUIRE((out - RowMatrix<float>::Identity(blobs, blobs)).cwiseAbs().maxCoeff() < 1e-5f);
}

TEST_CASE("key index: keys that are appended enter clusters as they leave the recent ones, and are found") {
  const Index n = 120, more = 90, recent = 10;
  const Cache cache(n + more, 5, 2, 2, 11);
  const KeyIndexConfig config{.kv_heads = 2, .clusters = 6, .sinks = 2, .recent = recent};
  Context context;
  const auto rows = [&](Index count) { return view(cache.k).rows(0, count); };
  KeyIndex<float> steps(config), once(config);
  steps.build(rows(n), context);
  once.build(rows(n), context);
  for (Index count = n; count <= n + more; ++count) {
    steps.append(rows(count), context);
    REQUIRE(steps.tokens() == count);
    Index members = 0;
    for (Index c = 0; c < steps.clusters(1); ++c) members += static_cast<Index>(steps.members(1, c).size());
    REQUIRE(members == count - recent - 2);
  }
  once.append(rows(n + more), context);
  for (Index h = 0; h < 2; ++h)
    for (Index c = 0; c < 6; ++c) {
      const auto a = steps.members(h, c), b = once.members(h, c);
      REQUIRE(std::equal(a.begin(), a.end(), b.begin(), b.end()));
      REQUIRE(std::is_sorted(a.begin(), a.end()));
    }
  REQUIRE(same_bits(cache.attend(steps, 2, context), cache.attend(once, 2, context)));
  AttentionPlan dense;
  plan_dense({.tokens = 5, .keys = n + more}, dense);
  REQUIRE(difference(cache.attend(steps, 6, context), cache.reference(dense)) < 2e-6);

  // A key that the index has never seen the like of, with a query for it alone.
  Cache needle = cache;
  needle.k.row(n + 3).setConstant(9);
  needle.q.setConstant(5);
  KeyIndex<float> index(config);
  index.build(view(needle.k).rows(0, n), context);
  index.append(needle.k, context);
  const RowMatrix<float> out = needle.attend(index, 1, context);
  for (Index i = 0; i < 5; ++i) REQUIRE((out.row(i) - needle.v.row(n + 3)).cwiseAbs().maxCoeff() < 1e-5f);
}

TEST_CASE("key index: before there are clusters every query sees every key") {
  const Cache cache(60, 3, 1, 1, 4);
  Context context;
  AttentionPlan dense;
  plan_dense({.tokens = 3, .keys = 60}, dense);
  KeyIndex<float> never({.clusters = 5, .sinks = 2, .recent = 8}), early = never;
  never.append(cache.k, context);
  REQUIRE(never.clusters(0) == 0);
  REQUIRE(difference(cache.attend(never, 0, context), cache.reference(dense)) < 2e-6);
  early.build(view(cache.k).rows(0, 10), context);  // all of them first or recent
  early.append(cache.k, context);
  REQUIRE(early.clusters(0) == 0);
  REQUIRE(same_bits(cache.attend(early, 1, context), cache.attend(never, 0, context)));
  early.build(cache.k, context);
  REQUIRE(early.clusters(0) == 5);
  // Building again forgets what was before.
  KeyIndex<float> fresh(early.config());
  fresh.build(cache.k, context);
  early.build(view(cache.k).rows(0, 40), context);
  early.build(cache.k, context);
  REQUIRE(same_bits(cache.attend(early, 2, context), cache.attend(fresh, 2, context)));
  REQUIRE(!same_bits(cache.attend(early, 2, context), cache.attend(never, 2, context)));
}

TEST_CASE("key index: equal keys are one cluster, equal scores go to the lower one") {
  Cache cache(50, 3, 1, 1, 6);
  const KeyIndexConfig config{.clusters = 4, .sinks = 0, .recent = 0};
  Context context;
  KeyIndex<float> index(config);
  index.build(cache.k, context);
  cache.q.setZero();
  std::vector<AttentionPlan> plans;
  index.plan(cache.q, {.probes = 2}, plans, context);
  const auto size = [&](Index c) { return static_cast<Index>(index.members(0, c).size()); };
  REQUIRE(statistics(plans[0]).keys_per_query.min == size(0) + size(1));
  REQUIRE(statistics(plans[0]).keys_per_query.max == size(0) + size(1));
  cache.k.rowwise() = RowMatrix<float>(cache.k.row(0)).row(0);
  index.build(cache.k, context);
  REQUIRE(index.clusters(0) == 1);
  REQUIRE(index.members(0, 0).size() == 50);
  index.plan(cache.q, {.probes = 4}, plans, context);
  REQUIRE(statistics(plans[0]).keys_per_query.min == 50);
}

TEST_CASE("key index: a batch has the bits of its rows one by one, for any number of workers") {
  const Cache cache(700, 600, 4, 2, 7, 17, 9);
  const KeyIndexConfig config{.kv_heads = 2, .clusters = 20};
  Context serial;
  KeyIndex<float> index(config);
  index.build(cache.k, serial);
  const RowMatrix<float> batch = cache.attend(index, 5, serial);
  for (const Index row : {0, 1, 255, 256, 599}) {
    Cache one = cache;
    one.q = cache.q.row(row);
    REQUIRE(same_bits(one.attend(index, 5, serial), RowMatrix<float>(batch.row(row))));
  }
  for (const Index workers : {2, 3, 8}) {
    ThreadPool pool(workers);
    Workspace workspace;
    Context context(pool, workspace);
    KeyIndex<float> other(config);
    other.build(cache.k, context);
    REQUIRE(same_bits(cache.attend(other, 5, context), batch));
    REQUIRE(same_bits(cache.attend(index, 5, context), batch));
  }
  KeyIndex<float> seeded({.kv_heads = 2, .clusters = 20, .seed = 1});
  seeded.build(cache.k, serial);
  REQUIRE(!same_bits(cache.attend(seeded, 5, serial), batch));
}

TEST_CASE("key index: NaN and infinity reach the queries that see them and no others") {
  const Index n = 300;
  const Cache clean(n, 40, 1, 1, 9);
  const KeyIndexConfig config{.clusters = 10, .sinks = 1, .recent = 5};
  Context context;
  KeyIndex<float> index(config);
  index.build(clean.k, context);
  const RowMatrix<float> expected = clean.attend(index, 2, context);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    // In a value: of a key that some see.
    Cache cache = clean;
    const std::int32_t key = index.members(0, 3).front();
    cache.v.row(key).setConstant(bad);
    std::vector<AttentionPlan> plans;
    index.plan(cache.q, {.probes = 2}, plans, context);
    const RowMatrix<float> got = cache.attend(index, 2, context);
    Index seeing = 0;
    for (Index i = 0; i < 40; ++i) {
      std::vector<char> sees(static_cast<std::size_t>(n), 0);
      detail::mark_keys(plans[0], i, 1, sees);
      if (sees[static_cast<std::size_t>(key)]) {
        ++seeing;
        REQUIRE(!got.row(i).allFinite());
      } else {
        REQUIRE(same_bits(RowMatrix<float>(got.row(i)), RowMatrix<float>(expected.row(i))));
      }
    }
    REQUIRE(seeing > 0);
    REQUIRE(seeing < 40);
    // In a query.
    cache = clean;
    cache.q.row(7).setConstant(bad);
    const RowMatrix<float> other = cache.attend(index, 2, context);
    REQUIRE(!other.row(7).allFinite());
    for (const Index i : {0, 6, 8, 39})
      REQUIRE(same_bits(RowMatrix<float>(other.row(i)), RowMatrix<float>(expected.row(i))));
    // In keys: no centroid becomes one, and every key is in a cluster.
    cache = clean;
    cache.k.row(50).setConstant(bad);
    KeyIndex<float> with_bad(config);
    with_bad.build(cache.k, context);
    Index members = 0;
    for (Index c = 0; c < with_bad.clusters(0); ++c) members += static_cast<Index>(with_bad.members(0, c).size());
    REQUIRE(members == n - 6);
    const RowMatrix<float> out = cache.attend(with_bad, 2, context);
    Index finite = 0;
    for (Index i = 0; i < 40; ++i) finite += out.row(i).allFinite();
    REQUIRE(finite > 0);
    cache.k.setConstant(bad);
    with_bad.build(cache.k, context);
    REQUIRE(with_bad.clusters(0) == 1);
    REQUIRE(with_bad.members(0, 0).size() == static_cast<std::size_t>(n - 6));
  }
}

TEST_CASE("key index: nothing allocates after warm-up, whatever the queries, for any number of workers") {
  const Cache cache(2000, 300, 4, 2, 10, 16, 16);
  for (const Index workers : {1, 3}) {
    ThreadPool pool(workers);
    Workspace workspace;
    Context context(pool, workspace);
    KeyIndex<float> index({.kv_heads = 2, .clusters = 40});
    index.build(cache.k, context);
    RowMatrix<float> out(300, 4 * 16);
    const auto attend = [&](Index first, Index count) {
      index.attend(view(cache.q).rows(first, count), cache.k, cache.v, view(out).rows(first, count),
                   {.heads = 4, .probes = 6}, context);
    };
    // Warm-up: one query, and one batch; every worker gets room for any other.
    attend(0, 1);
    attend(0, 300);
    const long before = allocations();
    for (Index i = 0; i < 300; ++i) attend(i, 1);
    for (Index i = 0; i < 5; ++i) attend(i, 290 - i);
    REQUIRE(allocations() == before);
  }
}

TEST_CASE("key index: wrong arguments are named, and nothing is written") {
  const auto config_fault = [](const KeyIndexConfig& config) {
    return message_of<ValueError>([&] { KeyIndex<float> index(config); });
  };
  const std::string all =
      config_fault({.kv_heads = 0, .clusters = 0, .sinks = -1, .recent = -2, .sample = -3, .steps = -4});
  for (const char* part : {"KeyIndex: kv_heads: expected at least 1, got 0", "clusters: expected at least 1, got 0",
                           "sinks: expected at least 0, got -1", "recent: expected at least 0, got -2",
                           "sample: expected at least 0, got -3", "steps: expected at least 0, got -4"})
    REQUIRE(contains(all, part));

  const Cache cache(100, 6, 4, 2, 12);
  Context context;
  KeyIndex<float> index({.kv_heads = 2, .clusters = 8});
  index.build(cache.k, context);
  RowMatrix<float> out = RowMatrix<float>::Constant(6, 4 * 5, 3), kept = out;
  const auto shape_fault = [&](ConstView<float> q, ConstView<float> k, ConstView<float> v, View<float> to) {
    return message_of<ShapeError>([&] { index.attend(q, k, v, to, {.heads = 4}, context); });
  };
  REQUIRE(contains(shape_fault(view(cache.q).columns(0, 23), cache.k, cache.v, out),
                   "KeyIndex::attend: q: expected 6 x 24, got 6 x 23"));
  REQUIRE(contains(shape_fault(cache.q, view(cache.k).rows(0, 99), cache.v, out), "k: expected 100 x 12, got 99 x 12"));
  REQUIRE(contains(shape_fault(cache.q, cache.k, view(cache.v).columns(0, 9), out),
                   "v: expected a positive multiple of 2 columns, got 9 columns"));
  REQUIRE(contains(shape_fault(cache.q, cache.k, view(cache.v).rows(0, 99), out), "v: expected 100 x 10, got 99 x 10"));
  REQUIRE(
      contains(shape_fault(cache.q, cache.k, cache.v, view(out).columns(0, 19)), "out: expected 6 x 20, got 6 x 19"));
  RowMatrix<float> shared = cache.q;
  REQUIRE(contains(shape_fault(shared, cache.k, cache.v, view(shared).columns(0, 20)),
                   "out: expected storage of its own, got an overlap with q"));
  const auto value_fault = [&](const ProbeConfig& config) {
    return message_of<ValueError>([&] { index.attend(cache.q, cache.k, cache.v, out, config, context); });
  };
  REQUIRE(contains(value_fault({.heads = 3}), "heads: expected 0, or a positive multiple of kv_heads = 2, got 3"));
  REQUIRE(contains(value_fault({.heads = 4, .probes = 9}), "probes: expected 0 to clusters = 8, got 9"));
  REQUIRE(contains(value_fault({.heads = 4, .probes = -1}), "probes: expected 0 to clusters = 8, got -1"));
  REQUIRE(contains(value_fault({.heads = 4, .scale = std::numeric_limits<double>::infinity()}),
                   "scale: expected a finite number, got inf"));
  REQUIRE(same_bits(out, kept));
  std::vector<AttentionPlan> plans;
  REQUIRE(contains(message_of<ValueError>([&] { index.plan(cache.q, {.heads = 5}, plans, context); }),
                   "KeyIndex::plan: heads"));
  REQUIRE(plans.empty());

  const RowMatrix<float> before = cache.attend(index, 3, context);
  REQUIRE(contains(message_of<ShapeError>([&] { index.append(view(cache.k).rows(0, 99), context); }),
                   "KeyIndex::append: k: expected at least 100 rows, got 99 rows"));
  REQUIRE(contains(message_of<ShapeError>([&] { index.append(RowMatrix<float>(101, 13), context); }),
                   "KeyIndex::append: k: expected 101 x 12, got 101 x 13"));
  REQUIRE(contains(message_of<ShapeError>([&] { index.build(RowMatrix<float>(101, 13), context); }),
                   "KeyIndex::build: k: expected 101 x 12, got 101 x 13"));
  REQUIRE(contains(message_of<ShapeError>([&] { index.build(RowMatrix<float>(101, 1), context); }),
                   "KeyIndex::build: k: expected 101 x 2, got 101 x 1"));
  REQUIRE(contains(message_of<ValueError>([&] { index.clusters(2); }),
                   "KeyIndex::clusters: kv_head: expected in [0, 2), got 2"));
  REQUIRE(contains(message_of<ValueError>([&] { index.members(0, 8); }),
                   "KeyIndex::members: cluster: expected in [0, 8), got 8"));
  REQUIRE(same_bits(cache.attend(index, 3, context), before));
}
