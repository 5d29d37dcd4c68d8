// Files as a whole: read at once, or replaced at once so that a crash leaves the old one or the new one.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#if __has_include(<unistd.h>) && __has_include(<fcntl.h>)
#include <fcntl.h>
#include <unistd.h>
#define COTERIE_HAS_FSYNC
#endif

#include "coterie/core/check.hpp"

namespace coterie::detail {

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using FileHandle = std::unique_ptr<std::FILE, CloseFile>;

/// Opens a file of any name, also where paths are made of wide characters.
inline FileHandle open_file(const std::filesystem::path& path, const char* mode) {
#ifdef _WIN32
  return FileHandle(::_wfopen(path.c_str(), std::filesystem::path(mode).c_str()));
#else
  return FileHandle(std::fopen(path.c_str(), mode));
#endif
}

/// Throws FileError "function: 'path': expected ..., got ...".
[[noreturn]] inline void fail_file(const char* function, const std::filesystem::path& path, const char* expected,
                                   const std::string& got) {
  throw FileError(join(function, ": '", path.string(), "': expected ", expected, ", got ", got));
}
inline std::string last_error() { return std::generic_category().message(errno); }

/// The bytes of a file.
struct FileBytes {
  std::shared_ptr<std::byte[]> data;
  std::size_t size = 0;
};

/// Reads a file as a whole. Requires a regular file that can be read and does not shrink meanwhile (FileError).
inline FileBytes read_file(const char* function, const std::filesystem::path& path) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) fail_file(function, path, "a file", "none of this name");
  if (error) fail_file(function, path, "a file", error.message());
  if (status.type() != std::filesystem::file_type::regular) fail_file(function, path, "a regular file", "another kind");
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) fail_file(function, path, "a file with a size", error.message());
  const FileHandle file = open_file(path, "rb");
  if (!file) fail_file(function, path, "a readable file", last_error());
  FileBytes bytes;
  bytes.size = static_cast<std::size_t>(size);
  bytes.data = std::shared_ptr<std::byte[]>(new std::byte[bytes.size]);
  const std::size_t got = std::fread(bytes.data.get(), 1, bytes.size, file.get());
  if (got != bytes.size) fail_file(function, path, join(bytes.size, " bytes").c_str(), join(got));
  return bytes;
}

/// A file that appears under its name when it is complete: written to a temporary one beside it, flushed to the disk, renamed.
/// Whatever goes wrong before the renaming, the old file stays and the temporary one goes. A crash can leave it ("name.tmp").
/// Permissions of the old file are kept; where `path` is a symbolic link, the file that it points to is replaced.
class ReplacedFile {
 public:
  ReplacedFile(const char* function, const std::filesystem::path& path) : function_(function), path_(path) {
    std::error_code error;
    if (std::filesystem::is_symlink(path, error)) {
      path_ = std::filesystem::weakly_canonical(path, error);
      if (error) fail_file(function_, path, "a name to write to", error.message());
    }
    if (std::filesystem::is_directory(path_, error)) fail_file(function_, path_, "a file", "a directory");
    // "x": never somebody else's file. Other names where a crash has left one, or another process saves here as well.
    for (int number = 0; number < 100 && !file_; ++number) {
      temporary_ = path_;
      temporary_ += number == 0 ? std::string(".tmp") : join(".tmp", number);
      file_ = open_file(temporary_, "wbx");
      if (!file_ && errno != EEXIST) break;
    }
    if (!file_) fail_file(function_, temporary_, "a file that can be made", last_error());
  }

  ReplacedFile(const ReplacedFile&) = delete;
  ReplacedFile& operator=(const ReplacedFile&) = delete;
  ~ReplacedFile() {
    if (done_) return;
    file_.reset();
    std::error_code ignored;
    std::filesystem::remove(temporary_, ignored);
  }

  void write(const void* data, std::size_t size) {
    if (size > 0 && std::fwrite(data, 1, size, file_.get()) != size)
      fail_file(function_, temporary_, "room for the file", last_error());
  }

  /// Gives the file its name.
  void commit() {
    bool good = std::fflush(file_.get()) == 0;
#ifdef COTERIE_HAS_FSYNC
    good = good && ::fsync(::fileno(file_.get())) == 0;
#endif
    if (!good) fail_file(function_, temporary_, "room for the file", last_error());
    if (std::fclose(file_.release()) != 0) fail_file(function_, temporary_, "room for the file", last_error());
    std::error_code error;
    const std::filesystem::file_status old = std::filesystem::status(path_, error);
    if (std::filesystem::exists(old)) std::filesystem::permissions(temporary_, old.permissions(), error);
    std::filesystem::rename(temporary_, path_, error);
    if (error) fail_file(function_, path_, "a name to write to", error.message());
    done_ = true;
#ifdef COTERIE_HAS_FSYNC
    // The name is on the disk when its directory is. File systems that cannot do this have renamed all the same.
    const std::filesystem::path parent = path_.has_parent_path() ? path_.parent_path() : ".";
    if (const int directory = ::open(parent.c_str(), O_RDONLY); directory >= 0) {
      static_cast<void>(::fsync(directory));
      ::close(directory);
    }
#endif
  }

 private:
  const char* function_;
  std::filesystem::path path_, temporary_;
  FileHandle file_;
  bool done_ = false;
};

}  // namespace coterie::detail

#undef COTERIE_HAS_FSYNC
