#include "coterie/router/update_routers.hpp"

#include <stdexcept>

#include "allocation.hpp"
#include "catch.hpp"
#include "errors.hpp"
#include "router.hpp"

using namespace coterie;
using namespace router_test;

namespace {

constexpr Index heads = 4, clusters = 3, dim = 6;

// Runs tasks in order, and throws in place of one of them.
struct FailingTask {
  Index workers() const { return 1; }
  void for_each(Index count, TaskRef task) {
    for (Index i = 0; i < count; ++i) {
      if (left-- == 0) throw std::runtime_error("a task that fails");
      task(i, 0);
    }
  }
  Index left;
};

struct Routers {
  explicit Routers(Index updated) : statistics(heads, clusters, dim) {
    for (Index h = 0; h < heads; ++h) {
      kmeans.emplace_back(KMeansConfig{.clusters = clusters, .dim = dim, .seed = std::uint64_t(h)});
      if (h < updated) {
        observe(h, 7);
        kmeans.back().update(statistics, h);
      }
    }
    statistics.clear();
    for (Index h = 0; h < heads; ++h) observe(h, 8);
  }
  void observe(Index h, std::uint64_t seed) {
    const RowMatrix<float> rows = random_rows<float>(40, dim, seed + std::uint64_t(10 * h));
    std::vector<std::int32_t> labels(40);
    const OnlineKMeans<float>& router = kmeans[std::size_t(h)];
    router.assign(rows, labels, context);
    router.observe(rows, labels, statistics, h);
  }

  std::vector<OnlineKMeans<float>> kmeans;
  RouterStatistics<float> statistics;
  Context context;
};

}  // namespace

TEST_CASE("routers updated together have the bits of one update after the other") {
  for (const Index updated : {Index(0), Index(2), heads}) {
    Routers together(updated), alone(updated);
    ThreadPool pool(3);
    Workspace workspace;
    Context context(pool, workspace);
    std::vector<const float*> before;
    for (const auto& router : together.kmeans) before.push_back(router.centroids().data());
    detail::update_routers<float>(together.kmeans, together.statistics, context);
    for (Index h = 0; h < heads; ++h) {
      OnlineKMeans<float>& router = alone.kmeans[std::size_t(h)];
      const std::uint64_t revision = together.kmeans[std::size_t(h)].revision();
      router.update(alone.statistics, h);
      CHECK(same_state(together.kmeans[std::size_t(h)], router));
      CHECK(revision != router.revision());
      CHECK(together.kmeans[std::size_t(h)].centroids().data() == before[std::size_t(h)]);
    }
  }
}

TEST_CASE("a task that fails leaves every router where it was, and the update can be repeated") {
  Index failures = 0;
  for (const Index updated : {Index(0), Index(2), heads})
    for (Index failing = 0; failing < 3 * heads; ++failing) {
      Routers routers(updated), expected(updated);
      const std::vector<OnlineKMeans<float>> before = routers.kmeans;
      FailingTask executor{failing};
      Workspace workspace;
      Context context(executor, workspace);
      bool failed = false;
      try {
        detail::update_routers<float>(routers.kmeans, routers.statistics, context);
      } catch (const std::runtime_error&) {
        failed = true;
      }
      failures += failed;
      for (std::size_t h = 0; h < std::size_t(heads) && failed; ++h) {
        CHECK(same_state(routers.kmeans[h], before[h]));
        CHECK(routers.kmeans[h].revision() == before[h].revision());
      }
      if (failed) detail::update_routers<float>(routers.kmeans, routers.statistics, routers.context);
      detail::update_routers<float>(expected.kmeans, expected.statistics, expected.context);
      for (std::size_t h = 0; h < std::size_t(heads); ++h) CHECK(same_state(routers.kmeans[h], expected.kmeans[h]));
    }
  CHECK(failures == 8 + 6 + 4);  // a check of every head, and the first updates
}

TEST_CASE("statistics that do not fit leave every router where it was") {
  Routers routers(2);
  const std::vector<OnlineKMeans<float>> before = routers.kmeans;
  RouterStatistics<float> few(heads - 1, clusters, dim);
  CHECK(test::contains(
      test::message_of<ShapeError>([&] { detail::update_routers<float>(routers.kmeans, few, routers.context); }),
      "expected 4 heads, got 3"));
  routers.statistics.block().back() = std::nan("");
  CHECK_THROWS_AS(detail::update_routers<float>(routers.kmeans, routers.statistics, routers.context), ValueError);
  for (std::size_t h = 0; h < std::size_t(heads); ++h) CHECK(same_state(routers.kmeans[h], before[h]));
}

TEST_CASE("after the first update, routers updated together allocate nothing; frozen ones stay") {
  Routers routers(heads);
  routers.kmeans[1].freeze(true);
  const OnlineKMeans<float> before = routers.kmeans[1];
  detail::update_routers<float>(routers.kmeans, routers.statistics, routers.context);
  const long allocations = test::allocations();
  detail::update_routers<float>(routers.kmeans, routers.statistics, routers.context);
  CHECK(test::allocations() == allocations);
  CHECK(same_state(routers.kmeans[1], before));
  CHECK(routers.kmeans[2].updates() == 3);
}
