# cmake -D SOURCE=dir -P lines.cmake: fails where a line of a source or text file has more than 120 characters. Exempt
# are rows of Markdown tables, which begin with |, and lines of one word, such as an address.

cmake_minimum_required(VERSION 3.21)

set(most 120)
file(GLOB files RELATIVE ${SOURCE} ${SOURCE}/*.md ${SOURCE}/CMakeLists.txt ${SOURCE}/.ci/*)
set(patterns)
foreach(folder IN ITEMS include tests examples benchmarks cmake)
  foreach(name IN ITEMS *.hpp *.cpp *.cmake *.md *.awk *.sh *.in CMakeLists.txt run)
    list(APPEND patterns ${SOURCE}/${folder}/${name})
  endforeach()
endforeach()
file(GLOB_RECURSE nested RELATIVE ${SOURCE} ${patterns})
list(APPEND files ${nested})

# The second and later bytes of a character in UTF-8.
string(ASCII 128 first)
string(ASCII 191 last)

string(REPEAT "[^\n]" ${most} full)
set(faults)
foreach(file IN LISTS files)
  file(READ ${SOURCE}/${file} text)
  if(NOT text MATCHES "[^\n]${full}")
    continue()
  endif()
  string(REGEX REPLACE "[][;\\]" "x" text "${text}")  # they have a meaning in CMake's lists
  string(REGEX REPLACE "[${first}-${last}]" "" text "${text}")
  string(REPLACE "\n" ";" lines "${text}")
  set(number 0)
  foreach(line IN LISTS lines)
    math(EXPR number "${number} + 1")
    string(LENGTH "${line}" length)
    if(length GREATER most AND NOT line MATCHES "^ *[^ ]+$" AND NOT (file MATCHES "\\.md$" AND line MATCHES "^[|]"))
      list(APPEND faults "${file}:${number}: ${length} characters, at most ${most}")
    endif()
  endforeach()
endforeach()

list(LENGTH files count)
if(faults)
  list(JOIN faults "\n" faults)
  message(FATAL_ERROR "${faults}")
endif()
message(STATUS "${count} files, no line above ${most} characters")
