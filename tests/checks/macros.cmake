# The headers compile after the macros that other people's headers define, one test for each set in macros.cpp.

# Every standard header that Coterie or Eigen/Core includes: what of them came after `min` and `max` would not compile.
set(standard new complex climits cstdlib iosfwd iostream)
file(GLOB_RECURSE headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/coterie/*.hpp)
foreach(header IN LISTS headers)
  file(STRINGS ${header} includes REGEX "^#include <[a-z_]+>")
  foreach(include IN LISTS includes)
    string(REGEX REPLACE "^#include <([a-z_]+)>.*" "\\1" include "${include}")
    list(APPEND standard ${include})
  endforeach()
endforeach()
list(REMOVE_DUPLICATES standard)
list(SORT standard)
list(TRANSFORM standard REPLACE "(.+)" "#include <\\1>\n")
list(JOIN standard "" standard)
file(CONFIGURE OUTPUT macros/standard.hpp CONTENT "@standard@" @ONLY)

set(compile_macros ${CMAKE_CXX_COMPILER} -std=gnu++20 -fsyntax-only -Wfatal-errors -I${CMAKE_CURRENT_BINARY_DIR}/macros
  "-I$<JOIN:$<TARGET_PROPERTY:coterie,INTERFACE_INCLUDE_DIRECTORIES>,$<SEMICOLON>-I>")
foreach(set IN ITEMS complex qt windows asserts planted)
  add_test(NAME checks.macros.${set}
    COMMAND ${compile_macros} -D SET_${set} ${CMAKE_CURRENT_SOURCE_DIR}/macros.cpp COMMAND_EXPAND_LISTS)
endforeach()
set_tests_properties(checks.macros.planted PROPERTIES WILL_FAIL ON)
