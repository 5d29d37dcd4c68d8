// Command-line options and result files of the example programs.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace examples {

/// A fault of the command line; programs end with exit code 2.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// `--name value`, `--name=value` and flags, bound to variables that hold their defaults.
class Options {
 public:
  Options(std::string program, std::string purpose) : program_(std::move(program)), purpose_(std::move(purpose)) {}

  /// A whole number in [lowest, highest].
  void add(const std::string& name, std::int64_t& value, std::int64_t lowest, std::int64_t highest, const char* help) {
    const auto get = [&value] { return std::to_string(value); };
    add_value(name, "N", help, get(), get, [&value, lowest, highest, name](const std::string& text) {
      std::int64_t number = 0;
      const char* end = text.data() + text.size();
      const auto [rest, error] = std::from_chars(text.data(), end, number);
      if (error != std::errc() || rest != end || number < lowest || number > highest)
        throw UsageError(name + ": expected a whole number from " + std::to_string(lowest) + " to " +
                         std::to_string(highest) + ", got '" + text + "'");
      value = number;
    });
  }

  /// A number above 0, at most `highest`.
  void add(const std::string& name, double& value, double highest, const char* help) {
    add_number(name, value, highest, help, "above 0", [](double number) { return number > 0; });
  }

  /// A number of at least 0, at most `highest`.
  void add_from_zero(const std::string& name, double& value, double highest, const char* help) {
    add_number(name, value, highest, help, "of at least 0", [](double number) { return number >= 0; });
  }

  /// A file name.
  void add(const std::string& name, std::string& value, const char* help) {
    add_value(
        name, "FILE", help, "", [&value] { return value; },
        [&value, name](const std::string& text) {
          if (text.empty()) throw UsageError(name + ": expected a file name, got ''");
          value = text;
        });
  }

  /// Any text.
  void add_text(const std::string& name, std::string& value, const char* help) {
    add_value(
        name, "TEXT", help, "", [&value] { return value; }, [&value](const std::string& text) { value = text; });
  }

  /// One of several words.
  void add(const std::string& name, std::string& value, const std::vector<std::string>& choices, const char* help) {
    std::string list;
    for (const std::string& choice : choices) list += (list.empty() ? "" : "|") + choice;
    const auto get = [&value] { return value; };
    add_value(name, list, help, value, get, [&value, choices, list, name](const std::string& text) {
      for (const std::string& choice : choices)
        if (text == choice) {
          value = text;
          return;
        }
      throw UsageError(name + ": expected " + list + ", got '" + text + "'");
    });
  }

  /// A flag.
  void add(const std::string& name, bool& value, const char* help) {
    const auto get = [&value] { return std::string(value ? "1" : "0"); };
    entries_.push_back({name, "", help, "", get, [&value](const std::string&) { value = true; }, false});
  }

  /// Reads the command line; with --help prints the options and ends the program. Throws UsageError.
  void parse(int count, char** arguments) {
    for (int i = 1; i < count; ++i) {
      const std::string argument = arguments[i];
      if (argument == "--help" || argument == "-h") {
        print_help();
        std::exit(0);
      }
      const std::size_t equals = argument.find('=');
      const bool joined = argument.starts_with("--") && equals != std::string::npos;
      const std::string name = joined ? argument.substr(0, equals) : argument;
      Entry* entry = find(name);
      if (entry == nullptr) throw UsageError("unknown option '" + name + "'");
      const bool takes_value = !entry->placeholder.empty();
      if (!takes_value && joined) throw UsageError(name + ": takes no value");
      if (takes_value && !joined && i + 1 == count) throw UsageError(name + ": a value is missing");
      entry->set(!takes_value ? "" : joined ? argument.substr(equals + 1) : arguments[++i]);
      entry->given = true;
    }
  }

  /// Sets an option that takes a value as the command line does, but for given(). Throws UsageError.
  void assign(const std::string& name, const std::string& text) { find(name)->set(text); }

  /// The value of an option, as text that assign() would take.
  std::string value(const std::string& name) { return find(name)->get(); }

  /// Whether the command line named this option.
  bool given(const std::string& name) const {
    for (const Entry& entry : entries_)
      if (entry.name == name) return entry.given;
    return false;
  }

 private:
  struct Entry {
    std::string name, placeholder, help, start;
    std::function<std::string()> get;
    std::function<void(const std::string&)> set;
    bool given;
  };

  void add_value(const std::string& name, const std::string& placeholder, const char* help, const std::string& start,
                 std::function<std::string()> get, std::function<void(const std::string&)> set) {
    entries_.push_back({name, placeholder, help, start, std::move(get), std::move(set), false});
  }

  template <class Good>
  void add_number(const std::string& name, double& value, double highest, const char* help, const std::string& bound,
                  Good good) {
    const auto get = [&value] {
      char text[32];
      return std::string(text, std::to_chars(text, text + sizeof text, value).ptr);  // the shortest that reads back
    };
    add_value(name, "X", help, "", get, [&value, highest, name, bound, good](const std::string& text) {
      char* rest = nullptr;
      const double number = std::strtod(text.c_str(), &rest);
      if (text.empty() || *rest != '\0' || !(good(number) && number <= highest))
        throw UsageError(name + ": expected a number " + bound + ", at most " + std::to_string(std::llround(highest)) +
                         ", got '" + text + "'");
      value = number;
    });
  }

  Entry* find(const std::string& name) {
    for (Entry& entry : entries_)
      if (entry.name == name) return &entry;
    return nullptr;
  }

  void print_help() const {
    std::cout << "usage: " << program_ << " [options]\n\n" << purpose_ << "\n\n";
    for (const Entry& entry : entries_) {
      std::string left = "  " + entry.name + (entry.placeholder.empty() ? "" : " " + entry.placeholder);
      left.resize(std::max<std::size_t>(left.size() + 2, 22), ' ');
      std::cout << left << entry.help << (entry.start.empty() ? "" : " [" + entry.start + "]") << "\n";
    }
    std::cout << "  --help              this text\n";
  }

  std::string program_, purpose_;
  std::vector<Entry> entries_;
};

/// A result file: checked to be writable before the work begins, and written in full or not at all.
class ResultFile {
 public:
  /// Throws UsageError if the file cannot be written. An empty path: no file is wanted.
  explicit ResultFile(std::string path) : path_(std::move(path)) {
    if (path_.empty()) return;
    std::error_code error;
    in_place_ = std::filesystem::exists(path_, error) && !std::filesystem::is_regular_file(path_, error);
    if (in_place_) {  // a pipe or a device
      if (std::filesystem::is_directory(path_, error) || !std::ofstream(path_, std::ios::app)) fail<UsageError>();
    } else {
      if (!std::ofstream(partial())) fail<UsageError>();
      std::filesystem::remove(partial(), error);
    }
  }

  /// Throws std::runtime_error if that fails.
  void write(const std::string& text) const {
    if (path_.empty()) return;
    const std::string target = in_place_ ? path_ : partial();
    std::ofstream file(target);
    if (!(file << text << std::flush)) fail<std::runtime_error>();
    file.close();
    if (in_place_) return;
    std::error_code error;
    std::filesystem::rename(target, path_, error);
    if (error) fail<std::runtime_error>();
  }

 private:
  std::string partial() const { return path_ + ".partial"; }
  template <class Error>
  [[noreturn]] void fail() const {
    throw Error("cannot write the file '" + path_ + "'");
  }

  std::string path_;
  bool in_place_ = false;
};

/// Runs a program's body and turns errors into a message and an exit code: 2 for the command line, 1 for the rest. A
/// body may return an exit code of its own.
template <class Body>
int run_program(const char* program, Body&& body) {
  try {
    if constexpr (std::is_void_v<decltype(body())>) {
      body();
      return 0;
    } else {
      return body();
    }
  } catch (const UsageError& error) {
    std::cerr << program << ": " << error.what() << "\nTry '" << program << " --help'.\n";
    return 2;
  } catch (const std::bad_alloc&) {
    std::cerr << program << ": not enough memory for these sizes\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << program << ": " << error.what() << "\n";
    return 1;
  }
}

}  // namespace examples
