// Compiled under many flags by flags.cmake; returns non-zero where a result is wrong.
#if __has_include(<coterie/coterie.hpp>)
#include <coterie/coterie.hpp>
#endif

int main() { return 0; }
