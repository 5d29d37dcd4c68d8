#include <coterie/version.hpp>
#include <string>

int main() {
  const std::string numbers = std::to_string(coterie::version_major) + "." + std::to_string(coterie::version_minor) +
                              "." + std::to_string(coterie::version_patch);
  return numbers == coterie::version && numbers == PROJECT_VERSION ? 0 : 1;
}
