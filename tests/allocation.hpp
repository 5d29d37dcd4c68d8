#pragma once

namespace test {

/// How often this process has asked for memory so far, in all threads: by malloc and its kin, so also Eigen, with glibc and
/// under sanitizers; elsewhere by operator new alone.
long allocations();

}  // namespace test
