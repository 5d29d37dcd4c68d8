// What an index is after a task that was cancelled, or memory that has run out: what it was before.
#include <memory>

#include "allocation.hpp"
#include "cancellable.hpp"
#include "catch.hpp"
#include "coterie/retrieval/key_index.hpp"
#include "random.hpp"

using namespace test;
using namespace coterie;

namespace {

constexpr Index cache_heads = 3, cache_clusters = 5, cache_width = 4;

KeyIndex<float> small_index() {
  return KeyIndex<float>({.kv_heads = cache_heads, .clusters = cache_clusters, .sinks = 2, .recent = 10});
}

// The keys of an index by head and cluster.
std::vector<std::vector<std::int32_t>> members_of(const KeyIndex<float>& index) {
  std::vector<std::vector<std::int32_t>> all;
  for (Index h = 0; h < cache_heads; ++h)
    for (Index c = 0; c < index.clusters(h); ++c) {
      const auto members = index.members(h, c);
      all.emplace_back(members.begin(), members.end());
    }
  return all;
}

// Requires that two indices are the same, in what they hold and in what they attend to over the keys that they know.
void require_same(const KeyIndex<float>& index, const KeyIndex<float>& expected, const RowMatrix<float>& k) {
  REQUIRE(index.tokens() == expected.tokens());
  REQUIRE(members_of(index) == members_of(expected));
  const RowMatrix<float> q = Random(9).matrix<float>(6, cache_heads * cache_width), known = k.topRows(index.tokens());
  RowMatrix<float> out(6, cache_heads * cache_width), wanted = out;
  Context context;
  for (const Index probes : {Index(2), cache_clusters}) {
    index.attend(q, known, known, out, {.probes = probes}, context);
    expected.attend(q, known, known, wanted, {.probes = probes}, context);
    REQUIRE(out == wanted);
  }
}

}  // namespace

TEST_CASE("an index whose build fails is as it was, whether it knew keys or not") {
  const RowMatrix<float> k = Random(1).matrix<float>(400, cache_heads * cache_width);
  for (const Index before : {0, 150}) {
    INFO("keys before: " << before);
    Cancellable host;
    Workspace workspace;
    Context context(host, workspace), usual;
    KeyIndex<float> old = small_index();
    if (before > 0) old.build(k.topRows(before), usual);
    KeyIndex<float> expected = old;
    expected.build(k, usual);
    KeyIndex<float> index = old;
    REQUIRE(cancel_each_task(
                host, [&] { index = old; }, [&] { index.build(k, context); },
                [&] {
                  require_same(index, old, k);
                  index.build(k, context);
                  require_same(index, expected, k);
                }) > 5);
    std::unique_ptr<Context> fresh;
    REQUIRE(fail_each_allocation(
                [&] {
                  index = old;
                  fresh = std::make_unique<Context>();
                },
                [&] { index.build(k, *fresh); },
                [&](bool threw) {
                  require_same(index, threw ? old : expected, k);
                  index.build(k, *fresh);
                  require_same(index, expected, k);
                }) > 20);
  }
}

TEST_CASE("an index to which keys are appended takes all of them, or on error none") {
  const Index many = 9000;  // more than are taken at a time
  const RowMatrix<float> k = Random(1).matrix<float>(many, cache_heads * cache_width);
  for (const Index length : {Index(200), many}) {
    INFO("keys: " << length);
    Cancellable host;
    Workspace workspace;
    Context context(host, workspace), usual;
    KeyIndex<float> old = small_index();
    old.build(k.topRows(150), usual);
    KeyIndex<float> expected = old;
    expected.append(k.topRows(length), usual);
    KeyIndex<float> index = old;
    REQUIRE(cancel_each_task(
                host, [&] { index = old; }, [&] { index.append(k.topRows(length), context); },
                [&] {
                  require_same(index, old, k);
                  index.append(k.topRows(length), context);
                  require_same(index, expected, k);
                }) >= 6);
    std::unique_ptr<Context> fresh;
    REQUIRE(fail_each_allocation(
                [&] {
                  index = old;
                  fresh = std::make_unique<Context>();
                },
                [&] { index.append(k.topRows(length), *fresh); },
                [&](bool threw) {
                  require_same(index, threw ? old : expected, k);
                  index.append(k.topRows(length), *fresh);
                  require_same(index, expected, k);
                }) > 3);
  }
}
