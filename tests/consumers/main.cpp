#include <coterie/version.hpp>
#include <cstdio>
#if __has_include(<coterie/coterie.hpp>)
#include <coterie/coterie.hpp>
#endif

int main() { std::printf("coterie %s\n", coterie::version); }
