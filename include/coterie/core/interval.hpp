// A range of ranks, shared by plans and kernels.
#pragma once

#include <cstdint>

namespace coterie {

/// A half-open range of ranks in a group's key list.
struct Interval {
  std::int32_t begin = 0, end = 0;

  constexpr std::int32_t size() const { return end - begin; }
};

}  // namespace coterie
