# cmake -D SCRATCH=dir -P pages_planted.cmake: pages.cmake accepts what it should, and finds every planted fault.

cmake_minimum_required(VERSION 3.21)

function(try page text expected)
  file(REMOVE_RECURSE ${SCRATCH})
  file(WRITE ${SCRATCH}/tests/plan/a.cpp "TEST_CASE(\"T3: a window, [0, 1); equals dense\") {\n")
  file(WRITE ${SCRATCH}/tests/checks/CMakeLists.txt "add_test(NAME checks.b COMMAND c)\n")
  file(WRITE ${SCRATCH}/benchmarks/d.svg "")
  file(WRITE ${SCRATCH}/${page} "${text}")
  execute_process(COMMAND ${CMAKE_COMMAND} -D SOURCE=${SCRATCH} -P ${CMAKE_CURRENT_LIST_DIR}/pages.cmake
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if((expected STREQUAL "accepted" AND NOT result EQUAL 0) OR (expected STREQUAL "refused" AND result EQUAL 0))
    message(SEND_ERROR "${page} should be ${expected}:\n${text}\n${output}")
  endif()
endfunction()

set(head "| promise | test | file |\n|---|---|---|\n")

try(README.md "![a](benchmarks/d.svg) [b](tests/plan/a.cpp#c) [c](https://d.e/f) [d](#e)\n[](auto x) {}\n" accepted)
try(tests/README.md "[b](plan/a.cpp)\n${head}| p | `T3:`, `checks.b` | `plan/a.cpp` |\n" accepted)
try(tests/README.md "${head}| p | `equals dense` | |\n\n| a | b |\n|---|---|\n| c | `anything` |\n" accepted)

foreach(page IN ITEMS README.md examples/README.md tests/README.md)
  try(${page} "see [a](plan/b.cpp)\n" refused)
  try(${page} "${head}| p | `T3:`, `T4:` | |\n" refused)
  try(${page} "${head}| p | `checks.c` | |\n" refused)
  try(${page} "${head}| p | `T3:` | `plan/b.cpp` |\n" refused)
endforeach()
