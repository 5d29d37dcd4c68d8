# cmake -D SCRATCH=dir -P floors_planted.cmake: floors.cmake accepts what it should, and finds every planted fault.

cmake_minimum_required(VERSION 3.21)

function(try header text expected)
  file(REMOVE_RECURSE ${SCRATCH})
  file(WRITE ${SCRATCH}/coterie/${header} "${text}")
  execute_process(COMMAND ${CMAKE_COMMAND} -D INCLUDE=${SCRATCH} -P ${CMAKE_CURRENT_LIST_DIR}/floors.cmake
    RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if((expected STREQUAL "accepted" AND NOT result EQUAL 0) OR (expected STREQUAL "refused" AND result EQUAL 0))
    message(SEND_ERROR "${header} should be ${expected}:\n${text}\n${output}")
  endif()
endfunction()

try(core/a.hpp "#include <vector>\n#include <Eigen/Core>\n#include <coterie/core/b.hpp>\n" accepted)
try(plan/a.hpp "#include \"coterie/core/b.hpp\"\n#include \"coterie/plan/b.hpp\"\n" accepted)
try(kernel/a.hpp "#include <coterie/core/b.hpp>\n#include <coterie/kernel/b.hpp>\n" accepted)
try(router/a.hpp "#include <coterie/kernel/product.hpp>\n#include <coterie/core/b.hpp>\n" accepted)
try(attention/a.hpp "#include <coterie/plan/b.hpp>\n#include <coterie/kernel/b.hpp>\n" accepted)
try(layer/a.hpp "#include <coterie/attention/b.hpp>\n#include <coterie/router/b.hpp>\n" accepted)
try(router/a.hpp "#include <coterie/kernel/nearest.hpp>\n#include <coterie/kernel/normalise.hpp>\n" accepted)
try(file/a.hpp "#include <coterie/core/b.hpp>\n#include <coterie/file/b.hpp>\n" accepted)
try(file/whole_file.hpp "#include <fcntl.h>\n#include <unistd.h>\n#include <io.h>\n" accepted)
try(retrieval/a.hpp
  "#include <coterie/attention/b.hpp>\n#include <coterie/router/b.hpp>\n#include <coterie/kernel/b.hpp>\n" accepted)
try(decoder/a.hpp "#include <coterie/layer/b.hpp>\n#include <coterie/decoder/b.hpp>\n" accepted)
try(saved/a.hpp
  "#include <coterie/layer/b.hpp>\n#include <coterie/retrieval/b.hpp>\n#include <coterie/file/b.hpp>\n" accepted)
try(coterie.hpp "#include <coterie/layer/b.hpp>\n" accepted)

try(core/a.hpp "#include <coterie/plan/b.hpp>\n" refused)
try(core/a.hpp "  #  include <coterie/kernel/b.hpp>\n" refused)
try(core/a.hpp "#include <boost/assert.hpp>\n" refused)
try(core/a.hpp "#include <coterie/coterie.hpp>\n" refused)
try(core/a.hpp "#include \"b.hpp\"\n" refused)
try(plan/a.hpp "#include \"coterie/kernel/b.hpp\"\n" refused)
try(kernel/a.hpp "#include <coterie/plan/b.hpp>\n" refused)
try(kernel/a.hpp "#include <immintrin.h>\n" refused)
try(router/a.hpp "#include <coterie/kernel/tile.hpp>\n" refused)
try(router/a.hpp "#include <coterie/plan/b.hpp>\n" refused)
try(router/a.hpp "#include <coterie/attention/b.hpp>\n" refused)
try(attention/a.hpp "#include <coterie/router/b.hpp>\n" refused)
try(attention/a.hpp "#include <coterie/layer/b.hpp>\n" refused)

# Files see the core alone, and only those who save see files.
try(file/a.hpp "#include <coterie/kernel/b.hpp>\n" refused)
try(file/a.hpp "#include <coterie/plan/b.hpp>\n" refused)
try(file/a.hpp "#include <coterie/layer/b.hpp>\n" refused)
try(file/a.hpp "#include <coterie/saved/b.hpp>\n" refused)
try(file/json.hpp "#include <unistd.h>\n" refused)
foreach(room IN ITEMS core plan kernel router attention layer retrieval decoder)
  try(${room}/a.hpp "#include <coterie/file/b.hpp>\n" refused)
endforeach()
# Retrieval and layers do not see each other.
try(retrieval/a.hpp "#include <coterie/layer/b.hpp>\n" refused)
try(layer/a.hpp "#include <coterie/retrieval/b.hpp>\n" refused)
try(decoder/a.hpp "#include <coterie/retrieval/b.hpp>\n" refused)
# Nothing sees decoders or what saves.
foreach(room IN ITEMS core plan kernel file router attention layer retrieval saved)
  try(${room}/a.hpp "#include <coterie/decoder/b.hpp>\n" refused)
endforeach()
foreach(room IN ITEMS core plan kernel file router attention layer retrieval decoder)
  try(${room}/a.hpp "#include <coterie/saved/b.hpp>\n" refused)
endforeach()

try(attic/a.hpp "#include <vector>\n" refused)
string(REPEAT "//\n" 500 long)
try(core/a.hpp "${long}" accepted)
try(core/a.hpp "${long}//\n" refused)
