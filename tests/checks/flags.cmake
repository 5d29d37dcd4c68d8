# The library under the flags that users compile with: no warnings, and the same results. Where the machine cannot run
# the instructions of a variant, it is compiled only.

include(CheckCXXCompilerFlag)
include(CheckCXXSourceRuns)

check_cxx_source_runs(
  "int main() { return __builtin_cpu_supports(\"avx2\") && __builtin_cpu_supports(\"fma\") ? 0 : 1; }"
  COTERIE_RUNS_AVX2)

function(add_flags_check name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "COMPILE_ONLY" "" "FLAGS")
  string(MAKE_C_IDENTIFIER "COTERIE_HAS_${name}" accepted)
  list(JOIN arg_FLAGS " " flags)
  check_cxx_compiler_flag("${flags}" ${accepted})
  if(NOT ${accepted})
    message(STATUS "checks.flags.${name}: ${flags} is not known to this compiler, left out")
    return()
  endif()
  set(target check_flags_${name})
  if(arg_COMPILE_ONLY)
    add_library(${target} OBJECT flags.cpp)
  else()
    add_executable(${target} flags.cpp)
    add_test(NAME checks.flags.${name} COMMAND ${target})
  endif()
  target_link_libraries(${target} PRIVATE coterie::coterie)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wpsabi -Werror ${arg_FLAGS})
endfunction()

if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  if(COTERIE_RUNS_AVX2)
    set(avx2)
  else()
    set(avx2 COMPILE_ONLY)
  endif()
  add_flags_check(O0 FLAGS -O0)
  add_flags_check(fast-math FLAGS -O2 -ffast-math)
  add_flags_check(native FLAGS -O2 -march=native)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")  # a minute of compiling, and the same macros with any compiler
    add_flags_check(avx2 ${avx2} FLAGS -O1 -mavx2)
    add_flags_check(avx512 COMPILE_ONLY FLAGS -O1 -mavx512f -mfma)  # Eigen asks for both
  endif()

  # Files built for different instruction sets in one program, of which one has its kernels elsewhere. Eigen asks for
  # one alignment in all of them.
  check_cxx_compiler_flag(-march=native COTERIE_HAS_MARCH_NATIVE)
  if(COTERIE_HAS_MARCH_NATIVE)
    foreach(name IN ITEMS plain native)
      add_library(check_mixed_${name} OBJECT mixed.cpp)
      target_compile_definitions(check_mixed_${name} PRIVATE NAME=${name} EIGEN_MAX_ALIGN_BYTES=64)
    endforeach()
    target_link_libraries(check_mixed_plain PRIVATE coterie_kernels)
    target_link_libraries(check_mixed_native PRIVATE coterie::coterie)
    target_compile_options(check_mixed_native PRIVATE -march=native)
    add_executable(check_mixed mixed_main.cpp)
    target_link_libraries(check_mixed PRIVATE check_mixed_native check_mixed_plain coterie_kernels)
    add_test(NAME checks.flags.mixed COMMAND check_mixed)
  endif()
endif()
