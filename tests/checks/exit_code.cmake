# cmake -D EXPECTED=code -P exit_code.cmake -- command...: fails unless the command ends with exactly that code.

cmake_minimum_required(VERSION 3.21)

set(command)
set(started OFF)
math(EXPR last "${CMAKE_ARGC} - 1")
foreach(i RANGE ${last})
  if(started)
    list(APPEND command "${CMAKE_ARGV${i}}")
  elseif(CMAKE_ARGV${i} STREQUAL "--")
    set(started ON)
  endif()
endforeach()
execute_process(COMMAND ${command} RESULT_VARIABLE code)
if(NOT code EQUAL EXPECTED)
  message(FATAL_ERROR "exit code ${code} instead of ${EXPECTED}: ${command}")
endif()
