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

constexpr Index cache_heads = 3, cache_width = 4;

KeyIndex<float> small_index() {
  return KeyIndex<float>(
      {.kv_heads = cache_heads, .keys_per_cluster = 8, .page = 4, .segment = 32, .sinks = 2, .recent = 10, .steps = 2});
}

// The keys of an index by head and cluster.
std::vector<std::vector<std::int32_t>> members_of(const KeyIndex<float>& index) {
  std::vector<std::vector<std::int32_t>> all;
  for (Index h = 0; h < cache_heads; ++h)
    for (Index c = 0; c < index.parts(h); ++c) {
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
  for (const double budget : {0.3, 1.0}) {
    index.attend(q, known, known, out, {.budget = budget}, context);
    expected.attend(q, known, known, wanted, {.budget = budget}, context);
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
    if (before > 0) old.build(k.topRows(before), k.topRows(before), usual);
    KeyIndex<float> expected = old;
    expected.build(k, k, usual);
    KeyIndex<float> index = old;
    REQUIRE(cancel_each_task(
                host, [&] { index = old; }, [&] { index.build(k, k, context); },
                [&] {
                  require_same(index, old, k);
                  index.build(k, k, context);
                  require_same(index, expected, k);
                }) > 5);
    std::unique_ptr<Context> fresh;
    REQUIRE(fail_each_allocation(
                [&] {
                  index = old;
                  fresh = std::make_unique<Context>();
                },
                [&] { index.build(k, k, *fresh); },
                [&](bool threw) {
                  require_same(index, threw ? old : expected, k);
                  index.build(k, k, *fresh);
                  require_same(index, expected, k);
                }) > 20);
  }
}

TEST_CASE("an index to which keys are appended takes all of them, or on error none") {
  const Index many = 600;
  const RowMatrix<float> k = Random(1).matrix<float>(many, cache_heads * cache_width);
  for (const Index length : {Index(200), many}) {
    INFO("keys: " << length);
    Cancellable host;
    Workspace workspace;
    Context context(host, workspace), usual;
    KeyIndex<float> old = small_index();
    old.build(k.topRows(150), k.topRows(150), usual);
    KeyIndex<float> expected = old;
    expected.append(k.topRows(length), k.topRows(length), usual);
    KeyIndex<float> index = old;
    REQUIRE(cancel_each_task(
                host, [&] { index = old; }, [&] { index.append(k.topRows(length), k.topRows(length), context); },
                [&] {
                  require_same(index, old, k);
                  index.append(k.topRows(length), k.topRows(length), context);
                  require_same(index, expected, k);
                }) >= 3);
    // Back: the unfinished segment becomes pages again, or on error nothing changes.
    KeyIndex<float> shorter = old;
    shorter.rollback(139, k, k, usual);
    REQUIRE(cancel_each_task(
                host, [&] { index = expected; }, [&] { index.rollback(139, k, k, context); },
                [&] {
                  require_same(index, expected, k);
                  index.rollback(139, k, k, context);
                  require_same(index, shorter, k);
                }) >= 3);
    std::unique_ptr<Context> fresh;
    REQUIRE(fail_each_allocation(
                [&] {
                  index = expected;
                  fresh = std::make_unique<Context>();
                },
                [&] { index.rollback(139, k, k, *fresh); },
                [&](bool threw) {
                  require_same(index, threw ? expected : shorter, k);
                  index.rollback(139, k, k, *fresh);
                  require_same(index, shorter, k);
                }) > 3);
    REQUIRE(fail_each_allocation(
                [&] {
                  index = old;
                  fresh = std::make_unique<Context>();
                },
                [&] { index.append(k.topRows(length), k.topRows(length), *fresh); },
                [&](bool threw) {
                  require_same(index, threw ? old : expected, k);
                  index.append(k.topRows(length), k.topRows(length), *fresh);
                  require_same(index, expected, k);
                }) > 3);
  }
}
