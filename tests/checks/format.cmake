# cmake -D SOURCE=dir -P format.cmake: fails where clang-format would change a file. Its versions disagree with each
# other, so only the one that the project uses counts.

cmake_minimum_required(VERSION 3.21)

set(wanted 14)
find_program(CLANG_FORMAT NAMES clang-format-${wanted} clang-format)
if(NOT CLANG_FORMAT)
  message(STATUS "skipped: clang-format ${wanted} is not installed")
  return()
endif()
execute_process(COMMAND ${CLANG_FORMAT} --version OUTPUT_VARIABLE version)
if(NOT version MATCHES "version ${wanted}\\.")
  string(STRIP "${version}" version)
  message(STATUS "skipped: clang-format ${wanted} is not installed, only ${version}")
  return()
endif()

set(patterns)
foreach(folder IN ITEMS include tests examples benchmarks)
  list(APPEND patterns ${SOURCE}/${folder}/*.hpp ${SOURCE}/${folder}/*.cpp)
endforeach()
file(GLOB_RECURSE files ${patterns})
execute_process(COMMAND ${CLANG_FORMAT} --dry-run -Werror ${files} RESULT_VARIABLE result)
list(LENGTH files count)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "not formatted; fix with: clang-format -i FILE")
endif()
message(STATUS "${count} files are formatted")
