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
  # g++ tunes for the nearest CPU it knows, which can cost Eigen's products half their speed.
  if(COTERIE_HAS_MARCH_NATIVE AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_options(coterie_dev INTERFACE -mtune=generic)
  endif()
endif()

# Kernels and heads of layers are instantiated once per build, in a file each; whoever links this target only declares them.
add_library(coterie_kernels STATIC ${PROJECT_SOURCE_DIR}/tests/kernels.cpp ${PROJECT_SOURCE_DIR}/tests/heads.cpp)
target_link_libraries(coterie_kernels PUBLIC coterie_dev)
target_compile_definitions(coterie_kernels INTERFACE COTERIE_EXTERN_KERNELS COTERIE_EXTERN_HEADS)
set_source_files_properties(${PROJECT_SOURCE_DIR}/tests/heads.cpp PROPERTIES COMPILE_DEFINITIONS COTERIE_EXTERN_KERNELS)

# Kernels are optimised even in debug builds. Under sanitizers they go without UBSan and call AddressSanitizer's checks instead of
# inlining them: one minute of compiling instead of many.
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set(kernel_options $<$<CONFIG:Debug>:-O2> -fno-sanitize=undefined)
  if(COTERIE_SANITIZE MATCHES "address" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND kernel_options --param=asan-instrumentation-with-call-threshold=0)
  elseif(COTERIE_SANITIZE MATCHES "address")
    list(APPEND kernel_options -mllvm -asan-instrumentation-with-call-threshold=0)
  endif()
  set_source_files_properties(${PROJECT_SOURCE_DIR}/tests/kernels.cpp PROPERTIES COMPILE_OPTIONS "${kernel_options}")
endif()
