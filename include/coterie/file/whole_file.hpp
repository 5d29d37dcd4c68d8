// Whole files: read at once, or replaced at once, so that a crash leaves the old one or the new one.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#if defined(_WIN32)
#include <io.h>
#elif __has_include(<unistd.h>) && __has_include(<fcntl.h>)
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

/// Reads a file as a whole. Requires a regular file that can be read, fits in memory and does not shrink meanwhile
/// (FileError).
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
  try {
    if (bytes.size != size) throw std::bad_alloc();
    bytes.data = std::shared_ptr<std::byte[]>(new std::byte[bytes.size]);
  } catch (const std::bad_alloc&) {
    fail_file(function, path, "a file that fits in memory", join(size, " bytes"));
  }
  const std::size_t got = std::fread(bytes.data.get(), 1, bytes.size, file.get());
  if (got != bytes.size) fail_file(function, path, join(bytes.size, " bytes").c_str(), join(got));
  return bytes;
}

/// Brings what has been written to a file to the disk. False on error (errno).
inline bool flush_to_disk(std::FILE* file) {
  if (std::fflush(file) != 0) return false;
#if defined(_WIN32)
  return ::_commit(::_fileno(file)) == 0;
#elif defined(COTERIE_HAS_FSYNC)
  return ::fsync(::fileno(file)) == 0;
#else
  return true;
#endif
}

/// Brings the names in a directory to the disk, where the file system can do this.
inline void flush_names([[maybe_unused]] const std::filesystem::path& directory) {
#if defined(COTERIE_HAS_FSYNC)
  if (const int number = ::open(directory.c_str(), O_RDONLY); number >= 0) {
    static_cast<void>(::fsync(number));
    ::close(number);
  }
#endif
}

/// The path at the end of a chain of symbolic links, whether there is a file or not. Requires that it ends (FileError).
inline std::filesystem::path follow_links(const char* function, const std::filesystem::path& path) {
  std::filesystem::path end = path;
  std::error_code error;
  for (int links = 0; std::filesystem::is_symlink(end, error); ++links) {
    const std::filesystem::path target = std::filesystem::read_symlink(end, error);
    if (error) fail_file(function, end, "a readable link", error.message());
    if (links == 40) fail_file(function, path, "a name to write to", "links that do not end");
    end = end.parent_path() / target;  // an absolute target replaces all of it
  }
  return end;
}

/// A file that appears under its name when it is complete: written to a temporary one beside it, flushed to the disk,
/// renamed.
///
/// Whatever goes wrong before the renaming, the old file stays and the temporary one goes. A crash can leave it
/// ("name.tmp", or "name.tmp1" and so on where that exists). Permissions of the old file are kept; where `path` is a
/// symbolic link, the file that it points to is replaced or made.
class ReplacedFile {
 public:
  /// Requires a name of a regular file or of none, in a directory that can be written to (FileError).
  ReplacedFile(const char* function, const std::filesystem::path& path)
      : function_(function), path_(follow_links(function, path)) {
    std::error_code error;
    const std::filesystem::file_status old = std::filesystem::status(path_, error);
    if (std::filesystem::is_directory(old)) fail_file(function_, path_, "a file", "a directory");
    if (std::filesystem::exists(old) && !std::filesystem::is_regular_file(old))
      fail_file(function_, path_, "a regular file, or none", "another kind");
    for (int number = 0; number < most_temporaries && !file_; ++number) {
      temporary_ = path_;
      temporary_ += number == 0 ? std::string(".tmp") : join(".tmp", number);
      file_ = open_file(temporary_, "wbx");  // "x": never somebody else's file
      if (!file_ && errno != EEXIST) fail_file(function_, temporary_, "a file that can be made", last_error());
    }
    if (!file_)
      fail_file(function_, path_, "room for a temporary file beside it",
                join(most_temporaries,
                     " of them (.tmp, .tmp1, ...), left by programs that ended while they wrote: "
                     "delete them"));
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

  /// Gives the file its name. After an error (FileError, std::bad_alloc) the old file is there.
  void commit() {
    const std::filesystem::path directory = path_.has_parent_path() ? path_.parent_path() : ".";
    if (!flush_to_disk(file_.get())) fail_file(function_, temporary_, "room for the file", last_error());
    if (std::fclose(file_.release()) != 0) fail_file(function_, temporary_, "room for the file", last_error());
    std::error_code error;
    const std::filesystem::file_status old = std::filesystem::status(path_, error);
    if (std::filesystem::exists(old)) std::filesystem::permissions(temporary_, old.permissions(), error);
    std::filesystem::rename(temporary_, path_, error);
    if (error) fail_file(function_, path_, "a name to write to", error.message());
    done_ = true;
    flush_names(directory);
  }

 private:
  static constexpr int most_temporaries = 100;

  const char* function_;
  std::filesystem::path path_, temporary_;
  FileHandle file_;
  bool done_ = false;
};

}  // namespace coterie::detail

#undef COTERIE_HAS_FSYNC
