#include "support/interrupt.hpp"

#include "catch.hpp"

TEST_CASE("the first interrupt is noted, the second one is the system's again") {
  REQUIRE(std::signal(SIGINT, SIG_DFL) != SIG_ERR);
  {
    const examples::InterruptGuard guard;
    REQUIRE(guard.signal() == 0);
    std::raise(SIGINT);
    REQUIRE(guard.signal() == SIGINT);
    REQUIRE(std::signal(SIGINT, SIG_DFL) == SIG_DFL);
    REQUIRE(std::signal(SIGTERM, SIG_DFL) == SIG_DFL);
  }
  {
    std::signal(SIGINT, SIG_IGN);
    const examples::InterruptGuard guard;
    std::raise(SIGINT);
    REQUIRE(guard.signal() == 0);
  }
  REQUIRE(std::signal(SIGINT, SIG_DFL) == SIG_IGN);  // as it was before the guard
}
