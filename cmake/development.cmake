# What our own tests, examples and benchmarks are built with. Nothing here reaches a user.

option(COTERIE_WERROR "Treat warnings as errors" OFF)
option(COTERIE_NATIVE "Compile for this machine's instruction set" OFF)
set(COTERIE_SANITIZE "" CACHE STRING "Sanitizers to build with, such as address,undefined or thread")

add_library(coterie_dev INTERFACE)
target_link_libraries(coterie_dev INTERFACE coterie::coterie)

if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  target_compile_options(coterie_dev INTERFACE
    -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wno-sign-conversion
    $<$<BOOL:${COTERIE_WERROR}>:-Werror>)
endif()

if(COTERIE_SANITIZE)
  set(sanitize -fsanitize=${COTERIE_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  if(COTERIE_SANITIZE MATCHES "address.*undefined")  # AddressSanitizer stops at null pointers too, for less compiling
    list(APPEND sanitize -fno-sanitize=null,vptr)
  endif()
  target_compile_options(coterie_dev INTERFACE ${sanitize})
  target_link_options(coterie_dev INTERFACE ${sanitize})
endif()

if(COTERIE_NATIVE)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag(-march=native COTERIE_HAS_MARCH_NATIVE)
  if(COTERIE_HAS_MARCH_NATIVE)
    target_compile_options(coterie_dev INTERFACE -march=native)
  endif()
  # With AVX-512, g++ before 13 warns of its own avx512fintrin.h (GCC bug 105593: __Y of _mm512_undefined_*) wherever
  # Eigen inlines it, some 150 times a file. -isystem does not help: the warning is of the function it is inlined into.
  # The option hides -Wmaybe-uninitialized of our own code as well, in native builds with these compilers. All other
  # builds keep the warning, CI's with -Werror among them.
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    target_compile_options(coterie_dev INTERFACE -Wno-maybe-uninitialized)
  endif()
  # g++ tunes for the nearest CPU it knows, which can cost Eigen's products half their speed.
  if(COTERIE_HAS_MARCH_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_options(coterie_dev INTERFACE -mtune=generic)
  endif()
endif()

# Tests, examples and benchmarks share one instance of the kernels.
target_link_libraries(coterie_kernels PUBLIC coterie_dev)

# Under sanitizers kernels go without UBSan and call AddressSanitizer's checks instead of inlining them: one minute of
# compiling instead of many.
if(COTERIE_SANITIZE AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(kernel_options -O2 -fno-sanitize=undefined)
  if(COTERIE_SANITIZE MATCHES "address" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND kernel_options --param=asan-instrumentation-with-call-threshold=0)
  elseif(COTERIE_SANITIZE MATCHES "address")
    list(APPEND kernel_options -mllvm -asan-instrumentation-with-call-threshold=0)
  endif()
  set_source_files_properties(${PROJECT_SOURCE_DIR}/cmake/kernels/kernels.cpp
    PROPERTIES COMPILE_OPTIONS "${kernel_options}")
endif()
