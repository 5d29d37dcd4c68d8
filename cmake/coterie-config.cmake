include(CMakeFindDependencyMacro)
find_dependency(Threads)
if(NOT TARGET Eigen3::Eigen)
  find_dependency(Eigen3 NO_MODULE)  # no version: see cmake/eigen.cmake in the sources
endif()
include(${CMAKE_CURRENT_LIST_DIR}/coterie-targets.cmake)
