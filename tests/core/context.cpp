#include "coterie/core/context.hpp"

#include <atomic>

#include "allocation.hpp"
#include "catch.hpp"

using namespace coterie;
using test::allocations;

namespace {

// A host program's own executor: runs backwards, and says how many workers it has today.
struct Backwards {
  int calls = 0;
  short workers() const { return 2; }
  void for_each(Index count, TaskRef f) {
    ++calls;
    for (Index task = count; task-- > 0;) f(task, task % 2);
  }
};

}  // namespace

TEST_CASE("a context runs on what it was made from") {
  Context own;
  REQUIRE(own.workers() == 1);
  REQUIRE(own.instructions() == InstructionSet::automatic);
  Index sum = 0;
  own.for_each(5, [&](Index task, Index worker) { sum += task + worker; });
  REQUIRE(sum == 10);

  Context slow(InstructionSet::baseline);
  REQUIRE(slow.instructions() == InstructionSet::baseline);
  REQUIRE(&slow.workspace() != &own.workspace());

  ThreadPool pool(3);
  Workspace workspace;
  Context context{pool, workspace, InstructionSet::avx2};
  REQUIRE(context.workers() == 3);
  REQUIRE(&context.workspace() == &workspace);
  REQUIRE(context.instructions() == InstructionSet::avx2);
  std::atomic<Index> total{0};
  context.for_each(100, [&](Index task, Index) { total += task; });
  REQUIRE(total == 4950);

  Backwards backwards;
  Context foreign{backwards, workspace};
  REQUIRE(foreign.workers() == 2);
  std::vector<Index> order;
  foreign.for_each(3, [&](Index task, Index) { order.push_back(task); });
  REQUIRE(order == std::vector<Index>{2, 1, 0});
  foreign.for_each(0, [&](Index, Index) { FAIL("there is no task"); });
  REQUIRE(backwards.calls == 1);

  STATIC_REQUIRE(!std::is_copy_constructible_v<Context>);
  STATIC_REQUIRE(!std::is_copy_assignable_v<Context>);
}

TEST_CASE("a context has an arena for every worker") {
  ThreadPool pool(4);
  Workspace workspace;
  Context context{pool, workspace};
  context.for_each(64, [&](Index task, Index worker) {
    const Arena::Scope scope(context.workspace().worker(worker));
    Index* const p = context.workspace().worker(worker).take<Index>(100);
    for (Index i = 0; i < 100; ++i) p[i] = task;
    for (Index i = 0; i < 100; ++i)
      if (p[i] != task) throw std::logic_error("an arena is shared");
  });
}

TEST_CASE("nothing is allocated after the first call, whichever worker gets the large task") {
  ThreadPool pool(3);
  Workspace workspace;
  Context context{pool, workspace};
  const auto run = [&](Index large) {
    context.for_each(3, [&](Index task, Index worker) {
      Arena& arena = context.workspace().worker(worker);
      const Arena::Scope scope(arena);
      arena.take<float>(task == large ? 100000 : 10)[0] = 1;
    });
  };
  run(0);
  const long before = allocations();
  for (int round = 0; round < 100; ++round) run(round % 3);
  REQUIRE(allocations() == before);
}
