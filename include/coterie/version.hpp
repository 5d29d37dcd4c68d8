#pragma once

// The one place of the version: CMake, the installed package and the tests read it from here.
#define COTERIE_VERSION_MAJOR 0
#define COTERIE_VERSION_MINOR 1
#define COTERIE_VERSION_PATCH 0

#define COTERIE_DETAIL_QUOTE(x) #x
#define COTERIE_DETAIL_DOTTED(major, minor, patch) \
  COTERIE_DETAIL_QUOTE(major) "." COTERIE_DETAIL_QUOTE(minor) "." COTERIE_DETAIL_QUOTE(patch)

namespace coterie {

inline constexpr int version_major = COTERIE_VERSION_MAJOR;
inline constexpr int version_minor = COTERIE_VERSION_MINOR;
inline constexpr int version_patch = COTERIE_VERSION_PATCH;

/// "major.minor.patch".
inline constexpr char version[] =
    COTERIE_DETAIL_DOTTED(COTERIE_VERSION_MAJOR, COTERIE_VERSION_MINOR, COTERIE_VERSION_PATCH);

}  // namespace coterie

#undef COTERIE_DETAIL_DOTTED
#undef COTERIE_DETAIL_QUOTE
