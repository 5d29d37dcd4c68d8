# cmake -D SCRATCH=dir -P lines_planted.cmake: lines.cmake accepts what it should, and finds every planted fault.

cmake_minimum_required(VERSION 3.21)

function(try file text expected)
  file(REMOVE_RECURSE ${SCRATCH})
  file(WRITE ${SCRATCH}/${file} "${text}")
  execute_process(COMMAND ${CMAKE_COMMAND} -D SOURCE=${SCRATCH} -P ${CMAKE_CURRENT_LIST_DIR}/lines.cmake
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if((expected STREQUAL "accepted" AND NOT result EQUAL 0)
      OR (expected STREQUAL "refused" AND (result EQUAL 0 OR NOT output MATCHES "${file}:[12]: 121 characters")))
    message(SEND_ERROR "${file} should be ${expected}:\n${text}\n${output}")
  endif()
endfunction()

string(REPEAT "x" 118 word)
string(REPEAT "\\[;√" 29 signs)  # 116 characters

try(include/coterie/core/a.hpp "\n\n# ${word}\n#\n" accepted)
try(include/coterie/core/a.hpp "# ${signs}..\n" accepted)
try(README.md "| ${word}x\n" accepted)
try(README.md "  ${word}x\n" accepted)

try(include/coterie/core/a.hpp "\n# ${word}x\n" refused)
try(include/coterie/core/a.hpp "# ${word}x" refused)
try(include/coterie/core/a.hpp "# ${signs}...\n" refused)
try(include/coterie/core/a.hpp "| ${word}x\n" refused)
foreach(file IN ITEMS tests/plan/a.cpp examples/a.hpp examples/README.md benchmarks/NOTES.md cmake/a.cmake cmake/run
    tests/CMakeLists.txt tests/checks/a.awk README.md CMakeLists.txt .ci/run)
  try(${file} "\n# ${word}x\n" refused)
endforeach()
