// main() of the tests where the installed Catch2, a version 2, comes without one.
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
