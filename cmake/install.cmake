include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(package share/cmake/coterie)

install(DIRECTORY include/coterie TYPE INCLUDE FILES_MATCHING PATTERN "*.hpp")
install(TARGETS coterie EXPORT coterie-targets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT coterie-targets NAMESPACE coterie:: DESTINATION ${package})

# While the major version is 0, a new minor version may break; hence SameMinorVersion.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/coterie-config-version.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES cmake/coterie-config.cmake ${PROJECT_BINARY_DIR}/coterie-config-version.cmake DESTINATION ${package})
install(DIRECTORY cmake/kernels DESTINATION ${package})

configure_file(cmake/coterie.pc.in coterie.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/coterie.pc DESTINATION share/pkgconfig)
