#include "coterie/core/executor.hpp"

#include <stdexcept>
#include <thread>

#include "catch.hpp"

using namespace coterie;

TEST_CASE("executors: every task once, workers in range and never twice at a time") {
  STATIC_REQUIRE(Executor<Serial>);
  STATIC_REQUIRE(Executor<ThreadPool>);
  STATIC_REQUIRE(!Executor<int>);
  const auto check = [](auto& executor) {
    for (const Index count : {0, 1, 2, 3, 1000}) {
      std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
      std::vector<std::atomic<int>> busy(static_cast<std::size_t>(executor.workers()));
      std::atomic<int> faults{0};
      executor.for_each(count, [&](Index task, Index worker) {
        if (worker < 0 || worker >= executor.workers() || task < 0 || task >= count) {
          ++faults;
          return;
        }
        faults += busy[static_cast<std::size_t>(worker)].exchange(1);
        ++calls[static_cast<std::size_t>(task)];
        busy[static_cast<std::size_t>(worker)] = 0;
      });
      REQUIRE(faults == 0);
      for (const auto& number : calls) REQUIRE(number == 1);
    }
  };
  Serial serial;
  check(serial);
  for (const Index workers : {1, 2, 3, 8}) {
    ThreadPool pool(workers);
    REQUIRE(pool.workers() == workers);
    check(pool);
  }
}

TEST_CASE("a pool really runs tasks at the same time") {
  ThreadPool pool(2);
  std::atomic<int> inside{0};
  std::atomic<bool> met{false};
  pool.for_each(2, [&](Index, Index) {  // each waits for the other
    ++inside;
    for (int i = 0; i < 100000 && inside < 2; ++i) std::this_thread::sleep_for(std::chrono::microseconds(100));
    if (inside == 2) met = true;
  });
  REQUIRE(met);
}

TEST_CASE("a pool passes on the exception of a task, and goes on working") {
  ThreadPool pool(3);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> ran{0};
    const auto run = [&](Index bad) {
      pool.for_each(100, [&](Index task, Index) {
        ++ran;
        if (task == bad) throw std::runtime_error("task");
      });
    };
    REQUIRE_THROWS_AS(run(round % 2 == 0 ? 0 : 57), std::runtime_error);
    ran = 0;
    run(-1);
    REQUIRE(ran == 100);
  }
  REQUIRE_THROWS_AS(pool.for_each(1, [](Index, Index) { throw std::logic_error("the only task"); }), std::logic_error);
}

TEST_CASE("several threads may use one pool") {
  ThreadPool pool(2);
  std::atomic<int> sum{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) pool.for_each(10, [&](Index, Index) { ++sum; });
    });
  for (std::thread& caller : callers) caller.join();
  REQUIRE(sum == 3 * 50 * 10);
}

TEST_CASE("a pool needs a worker") {
  REQUIRE_THROWS_AS(ThreadPool(0), ValueError);
  REQUIRE_THROWS_AS(ThreadPool(-3), ValueError);
}

TEST_CASE("a task reference calls what it refers to, const or not, and its copies do too") {
  Index sum = 0;
  auto add = [&](Index task, Index worker) { sum += 10 * task + worker; };
  const auto& constant = add;
  TaskRef first(add), second(constant), copy(first);
  first(1, 2);
  second(3, 4);
  copy(5, 6);
  REQUIRE(sum == 12 + 34 + 56);
}
