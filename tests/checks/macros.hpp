// Macros of other people's headers, after which ours have to compile: C's complex.h, Qt, the headers of Windows, macOS.
#pragma once

// What our headers include comes first, as it does in programs that meet these macros and get through.
#include <Eigen/Core>
#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cerrno>
#include <cmath>
#include <concepts>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <limits>
#include <locale>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numbers>
#include <numeric>
#include <optional>
#include <random>
#include <set>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if __has_include(<unistd.h>) && __has_include(<fcntl.h>)
#include <fcntl.h>
#include <unistd.h>
#endif

#ifndef I
#define I (1.0fi)
#endif

#define emit
#define slots
#define signals public

#define near
#define far
#define small char
#define min(a, b) (((a) < (b)) ? (a) : (b))
#define max(a, b) (((a) > (b)) ? (a) : (b))

#define check(condition) \
  if (!(condition)) {    \
  }
#define require(condition) \
  if (!(condition)) {      \
  }
#define verify(condition) \
  if (!(condition)) {     \
  }
