#include "coterie/core/workspace.hpp"

#include <cstdint>
#include <cstring>

#include "allocation.hpp"
#include "catch.hpp"

using namespace coterie;
using test::allocations;

TEST_CASE("an arena hands out aligned memory that nobody else has") {
  Arena arena;
  const Arena::Scope scope(arena);
  std::vector<std::pair<unsigned char*, std::size_t>> taken;
  for (const Index size : {1, 3, 64, 65, 5000, 0, 100000, 7}) {
    unsigned char* const p = arena.take<unsigned char>(size);
    REQUIRE(reinterpret_cast<std::uintptr_t>(p) % Arena::alignment == 0);
    std::memset(p, static_cast<int>(taken.size() + 1), static_cast<std::size_t>(size));
    taken.emplace_back(p, static_cast<std::size_t>(size));
  }
  for (std::size_t i = 0; i < taken.size(); ++i)
    for (std::size_t b = 0; b < taken[i].second; ++b)
      if (taken[i].first[b] != i + 1) FAIL("memory was handed out twice");
  const View<double> m = arena.matrix<double>(3, 5);
  REQUIRE(m.rows() == 3);
  REQUIRE(m.cols() == 5);
  REQUIRE(m.stride() == 5);
}

TEST_CASE("an arena gives back at a scope's end, the inner one first") {
  Arena arena;
  const Arena::Scope outer(arena);
  int* const kept = arena.take<int>(10);
  kept[9] = 42;
  int* inner_first = nullptr;
  {
    const Arena::Scope inner(arena);
    inner_first = arena.take<int>(1000);
    arena.take<int>(1 << 20);
  }
  REQUIRE(arena.take<int>(1000) == inner_first);
  REQUIRE(kept[9] == 42);
}

TEST_CASE("an arena allocates nothing the second time, and holds little more than what was in use") {
  Arena arena;
  const auto use = [&] {
    const Arena::Scope outer(arena);
    arena.take<double>(3000);
    for (int i = 0; i < 5; ++i) {
      const Arena::Scope inner(arena);
      arena.take<float>(50000);
      arena.take<char>(7);
      arena.take<double>(20000);
    }
    arena.take<float>(100000);
  };
  use();
  const std::size_t bytes = arena.bytes();
  const std::size_t needed = 3000 * 8 + 400000;
  REQUIRE(bytes >= needed);
  REQUIRE(bytes <= 4 * needed);
  const long before = allocations();
  for (int i = 0; i < 3; ++i) use();
  REQUIRE(allocations() == before);
  REQUIRE(arena.bytes() == bytes);
}

TEST_CASE("reserve makes room in an empty arena only") {
  Arena arena;
  arena.reserve(10000);
  REQUIRE(arena.bytes() == 10000);
  const long before = allocations();
  {
    const Arena::Scope scope(arena);
    int* const p = arena.take<int>(2000);
    p[1999] = 5;
    arena.reserve(1 << 20);
    REQUIRE(p[1999] == 5);
    REQUIRE(arena.bytes() == 10000);
  }
  arena.reserve(100);
  REQUIRE(arena.bytes() == 10000);
  REQUIRE(allocations() == before);
}

TEST_CASE("clear gives everything back, and room that bytes_for has counted is enough") {
  Arena arena;
  for (const Index rows : {100, 3000, 7}) {
    arena.clear();
    arena.reserve(Arena::bytes_for<float>(rows * 3) + Arena::bytes_for<double>(5) + Arena::bytes_for<float>(rows));
    const std::size_t bytes = arena.bytes();
    const long before = allocations();
    float* const first = arena.matrix<float>(rows, 3).data();
    arena.take<double>(5);
    arena.take<float>(rows);
    REQUIRE(allocations() == before);
    REQUIRE(arena.bytes() == bytes);
    arena.clear();
    REQUIRE(arena.take<float>(1) == first);
  }
  REQUIRE(Arena::bytes_for<float>(0) == 0);
  REQUIRE(Arena::bytes_for<double>(9) == 128);
}

TEST_CASE("an arena that moves takes along what was taken, and leaves an empty one") {
  Arena from;
  int* const taken = from.take<int>(10);
  taken[9] = 42;
  Arena to(std::move(from));
  REQUIRE(taken[9] == 42);
  REQUIRE(to.take<int>(10) != taken);
  REQUIRE(from.bytes() == 0);  // NOLINT: moved from, and empty by contract
  from.take<int>(3)[2] = 1;
  to = std::move(from);
  REQUIRE(to.bytes() > 0);
  to.clear();
  REQUIRE(to.take<int>(1) != nullptr);
}

TEST_CASE("a workspace keeps its workers' arenas where they are, and makes them alike") {
  Workspace workspace;
  workspace.prepare(2);
  Arena* const first = &workspace.worker(0);
  workspace.prepare(8);
  workspace.prepare(3);
  REQUIRE(&workspace.worker(0) == first);
  {
    const Arena::Scope scope(workspace.worker(5));
    workspace.worker(5).take<char>(100000);
  }
  workspace.level();
  for (Index worker = 0; worker < 8; ++worker) REQUIRE(workspace.worker(worker).bytes() >= 100000);
  {
    const Arena::Scope scope(workspace.shared());
    workspace.shared().take<char>(100);
  }
  REQUIRE(workspace.bytes() >= 8 * 100000 + 100);
}

TEST_CASE("a workspace has one object of each type, and keeps it") {
  Workspace workspace;
  struct A {
    int value = 1;
  };
  struct B {
    int value = 2;
  };
  A& a = workspace.object<A>();
  a.value = 7;
  REQUIRE(workspace.object<B>().value == 2);
  REQUIRE(&workspace.object<A>() == &a);
  REQUIRE(workspace.object<A>().value == 7);
}
