# Every public header compiles alone, and two files that include all of them link.

set(root ${PROJECT_SOURCE_DIR}/include)
set(alone ${CMAKE_CURRENT_BINARY_DIR}/headers)
file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${root} ${root}/coterie/*.hpp)

set(sources)
foreach(header IN LISTS headers)
  string(REPLACE "/" "." source ${header}.cpp)
  # Twice: a header without its include guard fails too.
  file(CONFIGURE OUTPUT ${alone}/${source} CONTENT "#include <${header}>\n#include <${header}>\n")
  list(APPEND sources ${alone}/${source})
endforeach()

add_library(check_headers OBJECT ${sources})
target_link_libraries(check_headers PRIVATE coterie_kernels)

if(EXISTS ${root}/coterie/coterie.hpp)
  set(main "#include <coterie/coterie.hpp>\nint other();\nint main() { return other(); }\n")
  set(other "#include <coterie/coterie.hpp>\nint other();\nint other() { return 0; }\n")
  file(CONFIGURE OUTPUT ${alone}/main.cpp CONTENT "${main}")
  file(CONFIGURE OUTPUT ${alone}/other.cpp CONTENT "${other}")
  add_executable(check_linking ${alone}/main.cpp ${alone}/other.cpp)
  target_link_libraries(check_linking PRIVATE coterie_kernels)
  add_test(NAME checks.linking COMMAND check_linking)
endif()

# Nothing here is run for its speed.
foreach(target IN ITEMS check_headers check_linking)
  if(TARGET ${target} AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    target_compile_options(${target} PRIVATE -O0)
  endif()
endforeach()
