# cmake -D KERNELS=library -D DISPATCH=dispatch.hpp -D SINGLE=160 -P machine_code.cmake: fails where the innermost loops
# of the micro-kernels are not what they should be; see machine_code.awk. KERNELS may also be the text that objdump
# printed.

cmake_minimum_required(VERSION 3.21)

find_program(AWK NAMES awk)
find_program(OBJDUMP NAMES objdump)
if(NOT AWK OR NOT OBJDUMP)
  message(STATUS "skipped: awk or objdump is not installed")
  return()
endif()

# Vectors and rows of sums, from where they are chosen.
file(READ ${DISPATCH} dispatch)
set(expected)
foreach(micro IN ITEMS Avx2Micro Avx512Micro)
  if(NOT dispatch MATCHES "COTERIE_MICRO\\(${micro}, [A-Z0-9_]+, [0-9]+, ([0-9]+), ([0-9]+)\\)")
    message(FATAL_ERROR "no COTERIE_MICRO(${micro}, ...) in ${DISPATCH}")
  endif()
  string(APPEND expected " ${micro} ${CMAKE_MATCH_1} ${CMAKE_MATCH_2}")
endforeach()

set(check COMMAND ${AWK} -v expected=${expected} -v single=${SINGLE} -f ${CMAKE_CURRENT_LIST_DIR}/machine_code.awk)
if(KERNELS MATCHES "\\.txt$")
  execute_process(${check} ${KERNELS} COMMAND_ERROR_IS_FATAL ANY)
else()
  execute_process(COMMAND ${OBJDUMP} -d -C --no-show-raw-insn ${KERNELS} ${check} COMMAND_ERROR_IS_FATAL ANY)
endif()
