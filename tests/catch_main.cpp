// Carries the precompiled header of all tests, and main() where the installed Catch2, a version 2, comes without one.
#ifdef COTERIE_CATCH_WITHOUT_MAIN
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
#endif
