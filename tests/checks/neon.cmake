# cmake -D CATCH2=dir -D EIGEN=dir -D SOURCE=dir -D SCRATCH=dir -P neon.cmake: cross-compiles the kernels and their
# tests for 64-bit ARM and runs them under an emulator. Says "skipped: " and why where that cannot be done.

cmake_minimum_required(VERSION 3.21)

find_program(COMPILER NAMES aarch64-linux-gnu-g++)
find_program(EMULATOR NAMES qemu-aarch64 qemu-aarch64-static)
foreach(needed IN ITEMS COMPILER EMULATOR)
  if(NOT ${needed})
    message(STATUS "skipped: no aarch64-linux-gnu-g++ or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    return()
  endif()
endforeach()
if(NOT EXISTS ${CATCH2}/catch2/catch.hpp)
  message(STATUS "skipped: Catch2 version 3 would have to be built for ARM first")
  return()
endif()

# Catch2's header alone: the other headers beside it are those of this machine's C library.
file(MAKE_DIRECTORY ${SCRATCH}/include)
file(CREATE_LINK ${CATCH2}/catch2 ${SCRATCH}/include/catch2 SYMBOLIC)

set(objects)
function(compile source)
  string(MAKE_C_IDENTIFIER ${source} name)
  execute_process(
    COMMAND ${COMPILER} -std=c++20 ${ARGN} -I${SOURCE}/include -I${SOURCE}/tests
      -isystem ${SCRATCH}/include -isystem ${EIGEN}
      -c ${source} -o ${SCRATCH}/${name}.o
    COMMAND_ERROR_IS_FATAL ANY)
  set(objects ${objects} ${SCRATCH}/${name}.o PARENT_SCOPE)
endfunction()

set(warnings -Wall -Wextra -Werror -DCOTERIE_EXTERN_KERNELS)
compile(${SOURCE}/cmake/kernels/kernels.cpp -O2)
compile(${SOURCE}/tests/catch_main.cpp -O0)
compile(${SOURCE}/tests/kernel/lanes.cpp -O1 ${warnings})
compile(${SOURCE}/tests/kernel/exp2.cpp -O2 ${warnings})  # without -O2 no multiply-adds
compile(${SOURCE}/tests/kernel/instruction_sets.cpp -O1 ${warnings})

# Static: the emulator needs no ARM libraries of this machine.
execute_process(COMMAND ${COMPILER} -static ${objects} -o ${SCRATCH}/neon COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${EMULATOR} ${SCRATCH}/neon --durations yes COMMAND_ERROR_IS_FATAL ANY)
