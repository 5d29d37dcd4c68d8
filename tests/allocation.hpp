#pragma once

namespace test {

/// How often this process has asked for memory so far, in all threads: by malloc and its kin, so also Eigen, where the C
/// library is glibc and no sanitizer has taken them over; elsewhere by operator new alone.
long allocations();

}  // namespace test
