// Errors of the library: the exceptions that checks of arguments throw, and the assertion used inside.
#pragma once

#include <cassert>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

namespace coterie {

/// A size, stride or overlap of a matrix that does not fit.
class ShapeError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// A label, offset or setting whose value has no meaning.
class ValueError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// A file that cannot be read or written.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {

/// The parts as one text, the same in every locale. Throws std::bad_alloc; never returns a part of the text.
template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  text.exceptions(std::ios::badbit | std::ios::failbit);  // rethrows std::bad_alloc, which a stream swallows otherwise
  text.imbue(std::locale::classic());                     // no grouping of digits, whatever the program has set
  (text << ... << parts);
  return text.str();
}

/// Throws Error("function: argument: expected ..., got ..."). Out of line, so that the checked code stays small.
template <class Error, class Expected, class Got>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* function, const char* argument, const Expected& expected,
                                                 const Got& got) {
  throw Error(join(function, ": ", argument, ": expected ", expected, ", got ", got));
}

/// Collects the faults of a config, so that one error names them all. Where nothing may allocate, build texts by join()
/// only once there is a fault.
class Faults {
 public:
  explicit Faults(const char* function) : function_(function) {}

  template <class Expected, class Got>
  void expect(bool good, const char* argument, const Expected& expected, const Got& got) {
    if (good) return;
    text_ += text_.empty() ? join(function_, ": ") : std::string("; ");
    text_ += join(argument, ": expected ", expected, ", got ", got);
  }

  void raise() const {
    if (!text_.empty()) throw ValueError(text_);
  }

 private:
  const char* function_;
  std::string text_;
};

}  // namespace detail
}  // namespace coterie

/// Asserts inside the library what earlier checks have established. Off with NDEBUG.
#define COTERIE_ASSERT(condition) assert(condition)
