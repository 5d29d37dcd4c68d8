# coterie::kernels: the library, with kernels and heads of layers compiled once in this build instead of in every file
# that calls them; whoever links it only declares them. Its flags are those of the directory that includes this file,
# and instruction set flags must be the same in all files that link it.

add_library(coterie_kernels STATIC EXCLUDE_FROM_ALL
  ${CMAKE_CURRENT_LIST_DIR}/kernels.cpp ${CMAKE_CURRENT_LIST_DIR}/heads.cpp)
add_library(coterie::kernels ALIAS coterie_kernels)
target_link_libraries(coterie_kernels PUBLIC coterie::coterie)
target_compile_definitions(coterie_kernels INTERFACE COTERIE_EXTERN_KERNELS COTERIE_EXTERN_HEADS)
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/heads.cpp PROPERTIES COMPILE_DEFINITIONS COTERIE_EXTERN_KERNELS)

# Kernels are fast in debug builds too, and where no build type is said.
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/kernels.cpp
    PROPERTIES COMPILE_OPTIONS $<$<NOT:$<CONFIG:Release,RelWithDebInfo,MinSizeRel>>:-O2>)
endif()
