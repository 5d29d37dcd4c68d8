#include "coterie/router/config.hpp"

#include <cmath>
#include <limits>

#include "catch.hpp"
#include "coterie/router/kmeans.hpp"
#include "errors.hpp"

using namespace coterie;

TEST_CASE("settings out of their range are refused") {
  const auto refused = [](const KMeansConfig& config, const char* name) {
    const std::string text = test::message_of<ValueError>([&] { OnlineKMeans<float>{config}; });
    return test::contains(text, "OnlineKMeans: ") && test::contains(text, name);
  };
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  REQUIRE(refused({.clusters = 0, .dim = 4}, "clusters"));
  REQUIRE(refused({.clusters = 4, .dim = 2}, "dim"));
  for (const double decay : {-0.1, 1.0, nan})
    REQUIRE(refused({.clusters = 4, .dim = 4, .router = {.decay = decay}}, "router.decay: "));
  REQUIRE(refused({.clusters = 4, .dim = 4, .router = {.average = static_cast<Average>(3)}}, "average"));
  for (const double share : {-0.1, 1.0, nan})
    REQUIRE(refused({.clusters = 4, .dim = 4, .router = {.dead_share = share}}, "dead_share"));
  for (const double share : {-2.0, 0.5, 1.0, nan, inf})
    REQUIRE(refused({.clusters = 4, .dim = 4, .router = {.split_share = share}}, "split_share"));
  detail::check_config("here", {.clusters = 1, .dim = 3, .router = {.decay = 0, .dead_share = 0, .split_share = 1.01}});
}

TEST_CASE("bad settings give one error that names them all") {
  const std::string text = test::message_of<ValueError>([] {
    OnlineKMeans<float>(
        {.clusters = 0,
         .dim = 1,
         .router = {.decay = -1, .average = static_cast<Average>(-1), .dead_share = 1, .split_share = 1}});
  });
  for (const char* name : {"clusters", "dim", "decay", "average", "dead_share", "split_share"})
    REQUIRE(test::contains(text, name));
}
