# A version asked of find_package refuses either Eigen 3.4.0 or Eigen 5, however it is spelled; so ask for none and
# compare by hand.
if(NOT TARGET Eigen3::Eigen)
  find_package(Eigen3 REQUIRED NO_MODULE)
  if(Eigen3_VERSION VERSION_LESS 3.4)
    message(FATAL_ERROR "coterie needs Eigen 3.4 or newer, found ${Eigen3_VERSION} in ${Eigen3_DIR}")
  endif()
endif()
