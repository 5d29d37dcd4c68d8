// A layer after calls that failed half way: memory ended, or a task threw.

#include <stdexcept>

#include "allocation.hpp"
#include "catch.hpp"
#include "coterie/layer/routing_attention.hpp"
#include "random.hpp"

using namespace test;
using namespace coterie;

namespace {

RoutingAttentionConfig everything() {
  return {.model_dim = 8,
          .head_dim = 4,
          .causal = true,
          .memory = 1,
          .globals = 1,
          .dense_up_to = 3,
          .seed = 2,
          .local = {.heads = 1, .window = 4},
          .routed = {.heads = 2, .clusters = 3, .window = 4}};
}

bool same(const RowMatrix<float>& a, const RowMatrix<float>& b) { return a == b; }

std::vector<RowMatrix<float>> centroids(const RoutingAttention<float>& layer) {
  std::vector<RowMatrix<float>> all;
  for (const OnlineKMeans<float>& router : layer.routers()) all.push_back(router.centroids().eigen());
  return all;
}

// Throws in its call number `fails`, in the last task.
struct Failing {
  int calls = 0, fails = -1;
  Index workers() const { return 1; }
  template <class F>
  void for_each(Index count, F&& f) {
    const bool fail = calls++ == fails;
    for (Index task = 0; task < count; ++task) {
      if (fail && task == count - 1) throw std::runtime_error("a task");
      f(task, Index(0));
    }
  }
};

}  // namespace

TEST_CASE("a forward pass after one that ran out of memory gives the usual bits") {
  RoutingAttentionConfig members = everything();
  members.globals = 0;
  members.routed.membership.kind = MembershipKind::balanced;
  for (const RoutingAttentionConfig& config : {everything(), members}) {
    const RoutingAttention<float> layer(config);
    const RowMatrix<float> x = Random(1).matrix<float>(20, 8);
    RowMatrix<float> expected(20, 8), y(20, 8);
    {
      Context context;
      layer.forward(x, expected, context);
    }
    std::unique_ptr<Context> context;
    std::unique_ptr<RoutingAttention<float>::Tape> tape;
    const auto prepare = [&] {
      context = std::make_unique<Context>();
      tape = std::make_unique<RoutingAttention<float>::Tape>();
    };
    const long without = fail_each_allocation(
        prepare, [&] { layer.forward(x, y, *context); },
        [&](bool threw) {
          if (!threw) REQUIRE(same(y, expected));
          layer.forward(x, y, *context);
          REQUIRE(same(y, expected));
        });
    const long with = fail_each_allocation(
        prepare, [&] { layer.forward(x, y, *tape, *context); },
        [&](bool threw) {
          if (threw) REQUIRE(tape->tokens() == -1);
          layer.forward(x, y, *tape, *context);
          REQUIRE(same(y, expected));
        });
    REQUIRE(without > 20);
    REQUIRE(with > 20);
  }
}

TEST_CASE("an update of the routers moves all of them or none, whatever fails") {
  const RoutingAttentionConfig config = everything();
  const RowMatrix<float> x = Random(1).matrix<float>(40, 8);
  RowMatrix<float> y(40, 8);
  Context context;
  RoutingAttention<float>::Tape tape;
  RoutingAttention<float> fresh(config);
  fresh.forward(x, y, tape, context);
  for (const bool first : {true, false}) {
    INFO("first update " << first);
    RoutingAttention<float> start(config);
    if (!first) start.update_router(tape, context);
    RoutingAttention<float> moved(start);
    moved.update_router(tape, context);
    const auto before = centroids(start), after = centroids(moved);
    REQUIRE(before != after);
    RouterStatistics<float> statistics = start.zero_statistics();
    start.observe(tape, statistics, context);

    std::unique_ptr<RoutingAttention<float>> layer;
    const auto prepare = [&] { layer = std::make_unique<RoutingAttention<float>>(start); };
    const auto check = [&](bool threw) {
      REQUIRE(centroids(*layer) == (threw ? before : after));
      if (threw) layer->update_router(tape, context);
      REQUIRE(centroids(*layer) == after);
    };
    const long by_tape = fail_each_allocation(
        prepare, [&] { layer->update_router(tape, context); }, check);
    const long by_statistics = fail_each_allocation(
        prepare, [&] { layer->update_router(statistics); }, check);
    if (first) {
      REQUIRE(by_tape > 10);
      REQUIRE(by_statistics > 10);
    }
    int thrown = 0;
    for (int fails = 0;; ++fails) {
      Failing executor{0, fails};
      Workspace workspace;
      Context failing(executor, workspace);
      prepare();
      try {
        layer->update_router(tape, failing);
        if (executor.calls <= fails) break;
      } catch (const std::runtime_error&) {
        ++thrown;
        check(true);
      }
    }
    REQUIRE(thrown >= 2);
  }
}
