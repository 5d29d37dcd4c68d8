# cmake -D PROGRAM=language_model -D FOLDER=directory -P resume.cmake: training that is stopped, saved and resumed ends
# with the numbers and the text of training that was not; the saved model is scored and writes by itself, and refuses
# other settings.

cmake_minimum_required(VERSION 3.21)

file(REMOVE_RECURSE ${FOLDER})
file(MAKE_DIRECTORY ${FOLDER})

# run(code argument...): fails unless the program ends with this code; leaves its standard output in `output`.
function(run expected)
  execute_process(COMMAND ${PROGRAM} ${ARGN} --threads 2
    WORKING_DIRECTORY ${FOLDER} RESULT_VARIABLE code OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  if(NOT code EQUAL expected)
    message(FATAL_ERROR "exit code ${code} instead of ${expected}: ${ARGN}\n${output}\n${errors}")
  endif()
  set(output "${output}" PARENT_SCOPE)
  set(errors "${errors}" PARENT_SCOPE)
endfunction()

# same(what a b)
function(same what a b)
  if(NOT a STREQUAL b OR a STREQUAL "")
    message(FATAL_ERROR "${what} differ:\n${a}\n${b}")
  endif()
endfunction()

set(model --context 64 --layers 1 --model-dim 16 --heads 2 --routed-heads 1 --clusters 4 --window 16)
set(write --generate 40 --temperature 0.8 --top-k 20 --top-p 0.9 --seed 3 --prompt "int main")

run(0 --steps 4 ${model} --save straight --json straight.json)
run(0 --steps 4 ${model} --save stopped --stop-at 2)
if(NOT output MATCHES "stopped after step 2")
  message(FATAL_ERROR "did not stop:\n${output}")
endif()
run(0 --resume stopped --json stopped.json)
foreach(name IN ITEMS straight stopped)
  file(READ ${FOLDER}/${name}.json ${name})
  string(REGEX REPLACE "\"tokens_per_second\": [0-9.]+" "" ${name} "${${name}}")
  run(0 --load ${name} ${write})
  set(${name}_text "${output}")
endforeach()
same("scores" "${straight}" "${stopped}")
same("texts" "${straight_text}" "${stopped_text}")
if(NOT straight_text MATCHES "^int main" OR NOT errors MATCHES "tokens/s")
  message(FATAL_ERROR "expected the text on standard output and its speed beside it:\n${straight_text}\n${errors}")
endif()

run(0 --load straight --evaluate stopped.json --stride 16)
if(NOT output MATCHES "stopped.json: [0-9]+[.][0-9]+ bits per byte" OR
    NOT output MATCHES "windows of 64 that begin every 16")
  message(FATAL_ERROR "no score with its protocol:\n${output}")
endif()

run(2 --load straight --layers 2 --window 8 --generate 1)
if(NOT errors MATCHES "--layers: expected 1, got 2; --window: expected 16, got 8")
  message(FATAL_ERROR "other settings are not named:\n${errors}")
endif()
run(2 --resume straight --seed 5)
run(2 --load straight --save other)
run(2 --prompt a)
run(1 --load straight.json --generate 1)
