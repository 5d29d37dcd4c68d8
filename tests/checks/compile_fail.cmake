# What must not compile. Each file tests/compile_fail/*.cpp holds numbered cases:
#
#     #include <coterie/core/matrix.hpp>
#     // CASE 1: a column-major matrix
#     #if CASE == 1
#     coterie::View<float> view = Eigen::MatrixXf();
#     #endif
#
# Every case is compiled alone with -D CASE=n, and its test passes when the compiler refuses. Case 0, the file without
# any of them, must compile: so a wrong include or a typing error outside the cases is no success.

set(compile ${CMAKE_CXX_COMPILER} -std=c++20 -fsyntax-only
  "-I$<JOIN:$<TARGET_PROPERTY:coterie,INTERFACE_INCLUDE_DIRECTORIES>,$<SEMICOLON>-I>")

file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/compile_fail/*.cpp)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})

foreach(source IN LISTS sources)
  get_filename_component(name ${source} NAME_WE)
  set(name checks.compile_fail.${name})
  add_test(NAME ${name} COMMAND ${compile} -D CASE=0 ${source} COMMAND_EXPAND_LISTS)
  file(STRINGS ${source} cases REGEX "^// CASE [0-9]+: ")
  foreach(case IN LISTS cases)
    string(REGEX REPLACE "^// CASE ([0-9]+): .*" "\\1" number "${case}")
    add_test(NAME ${name}.${number} COMMAND ${compile} -D CASE=${number} ${source} COMMAND_EXPAND_LISTS)
    set_tests_properties(${name}.${number} PROPERTIES WILL_FAIL ON)
  endforeach()
  if(NOT cases)
    message(FATAL_ERROR "${source}: no line '// CASE n: description'")
  endif()
endforeach()
