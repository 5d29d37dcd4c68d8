// Errors of the library: the exceptions that checks of arguments throw, and the assertion used inside.
#pragma once

#include <cassert>
#include <concepts>
#include <initializer_list>
#include <locale>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

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

/// A part of a message: a text, which it refers to, or a number. One type, so that messages compile once and not again
/// for every length of a literal.
class MessagePart {
 public:
  MessagePart(const char* text) : MessagePart(std::string_view(text)) {}         // NOLINT: converts on purpose
  MessagePart(const std::string& text) : MessagePart(std::string_view(text)) {}  // NOLINT
  MessagePart(std::string_view text) : text_(text) {}                            // NOLINT
  MessagePart(char letter) : kind_(Kind::letter), letter_(letter) {}             // NOLINT
  template <std::floating_point Real>
  MessagePart(Real number) : kind_(Kind::real), real_(number) {}  // NOLINT
  template <std::integral Integer>
  MessagePart(Integer number) {  // NOLINT
    if constexpr (std::is_signed_v<Integer>) {
      kind_ = Kind::integer;
      integer_ = number;
    } else {
      kind_ = Kind::natural;
      natural_ = number;
    }
  }

  void write(std::ostream& to) const {
    switch (kind_) {
      case Kind::text:
        to << text_;
        break;
      case Kind::letter:
        to << letter_;
        break;
      case Kind::real:
        to << real_;
        break;
      case Kind::integer:
        to << integer_;
        break;
      case Kind::natural:
        to << natural_;
        break;
    }
  }

 private:
  enum class Kind { text, letter, real, integer, natural };

  Kind kind_ = Kind::text;
  union {
    std::string_view text_;
    char letter_;
    double real_;
    long long integer_;
    unsigned long long natural_;
  };
};

/// The parts as one text, the same in every locale. Throws std::bad_alloc; never returns a part of the text.
[[gnu::noinline]] inline std::string join_parts(std::initializer_list<MessagePart> parts) {
  std::ostringstream text;
  text.exceptions(std::ios::badbit | std::ios::failbit);  // rethrows std::bad_alloc, which a stream swallows otherwise
  text.imbue(std::locale::classic());                     // no grouping of digits, whatever the program has set
  for (const MessagePart& part : parts) part.write(text);
  return text.str();
}

/// join_parts of any number of parts.
template <class... Parts>
std::string join(const Parts&... parts) {
  return join_parts({MessagePart(parts)...});
}

/// Throws Error("function: argument: expected ..., got ..."). Out of line, so that the checked code stays small.
template <class Error>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const char* function, const char* argument,
                                                 const MessagePart& expected, const MessagePart& got) {
  throw Error(join_parts({function, ": ", argument, ": expected ", expected, ", got ", got}));
}

/// Collects the faults of a config, so that one error names them all. Where nothing may allocate, build texts by join()
/// only once there is a fault.
class Faults {
 public:
  explicit Faults(const char* function) : function_(function) {}

  void expect(bool good, const char* argument, const MessagePart& expected, const MessagePart& got) {
    if (!good) add(argument, expected, got);
  }

  void raise() const {
    if (!text_.empty()) throw ValueError(text_);
  }

 private:
  [[gnu::cold, gnu::noinline]] void add(const char* argument, const MessagePart& expected, const MessagePart& got) {
    text_ += text_.empty() ? join_parts({function_, ": "}) : std::string("; ");
    text_ += join_parts({argument, ": expected ", expected, ", got ", got});
  }

  const char* function_;
  std::string text_;
};

}  // namespace detail
}  // namespace coterie

/// Asserts inside the library what earlier checks have established. Off with NDEBUG.
#define COTERIE_ASSERT(condition) assert(condition)
