#include "coterie/file/whole_file.hpp"

#include "allocation.hpp"
#include "catch.hpp"
#include "errors.hpp"
#include "folder.hpp"

#if __has_include(<sys/resource.h>)
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#endif

using namespace coterie;
using test::contains;
using test::message_of;

namespace {

void replace(const std::filesystem::path& path, const std::string& text) {
  detail::ReplacedFile file("f", path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace

TEST_CASE("a file is read as it was written") {
  const test::Folder folder;
  const std::string text("some\0bytes\r\n\xff", 13);
  replace(folder / "a", text);
  REQUIRE(test::text_of(folder / "a") == text);
  const detail::FileBytes bytes = detail::read_file("f", folder / "a");
  REQUIRE(bytes.size == text.size());
  REQUIRE(std::memcmp(bytes.data.get(), text.data(), text.size()) == 0);
  replace(folder / "a", "");
  REQUIRE(detail::read_file("f", folder / "a").size == 0);
  REQUIRE(folder.files() == 1);
}

TEST_CASE("what cannot be read is named") {
  const test::Folder folder;
  const auto fault = [&](const std::filesystem::path& path) {
    return message_of<FileError>([&] { detail::read_file("f", path); });
  };
  REQUIRE(fault(folder / "none") == "f: '" + (folder / "none").string() + "': expected a file, got none of this name");
  REQUIRE(contains(fault(folder / ""), "expected a regular file, got another kind"));
  replace(folder / "a", "a");
  REQUIRE(!fault(folder / "a" / "b").empty());
}

TEST_CASE("a file that is not finished leaves the old one, and no other") {
  const test::Folder folder;
  replace(folder / "a", "old");
  {
    detail::ReplacedFile file("f", folder / "a");
    file.write("new", 3);
    REQUIRE(test::text_of(folder / "a") == "old");
    REQUIRE(folder.files() == 2);
  }
  REQUIRE(test::text_of(folder / "a") == "old");
  REQUIRE(folder.files() == 1);
  replace(folder / "a", "new");
  REQUIRE(test::text_of(folder / "a") == "new");
}

TEST_CASE("temporary files of others are left alone") {
  const test::Folder folder;
  std::ofstream(folder / "a.tmp") << "of a crash";
  detail::ReplacedFile one("f", folder / "a"), two("f", folder / "a");
  REQUIRE(folder.files() == 3);
  one.write("1", 1);
  two.write("2", 1);
  two.commit();
  one.commit();
  REQUIRE(test::text_of(folder / "a") == "1");
  REQUIRE(test::text_of(folder / "a.tmp") == "of a crash");
  REQUIRE(folder.files() == 2);
}

TEST_CASE("too many temporary files of others: the error says what to delete") {
  const test::Folder folder;
  replace(folder / "a", "old");
  std::ofstream(folder / "a.tmp") << "of a crash";
  for (int number = 1; number < 99; ++number) std::ofstream(folder / ("a.tmp" + std::to_string(number)));
  replace(folder / "a", "new");
  std::ofstream(folder / "a.tmp99") << "of a crash";
  const std::string fault = message_of<FileError>([&] { replace(folder / "a", "newer"); });
  REQUIRE(
      contains(fault, "f: '" + (folder / "a").string() + "': expected room for a temporary file beside it, got 100"));
  REQUIRE(contains(fault, "delete them"));
  REQUIRE(test::text_of(folder / "a") == "new");
  REQUIRE(folder.files() == 101);
}

TEST_CASE("where memory ends a file is read or named, and is replaced or as it was") {
  const test::Folder folder;
  const std::string longer(5000, 'x');
  int named = 0;
  std::size_t size = 0;
  const auto read = [&] {
    const std::string fault = message_of<FileError>([&] { size = detail::read_file("f", folder / "a").size; });
    named += contains(fault, "a': expected a file that fits in memory, got 5000 bytes");
    if (!fault.empty()) throw FileError(fault);
  };
  replace(folder / "a", longer);
  REQUIRE(test::fail_each_allocation([&] { size = 0; }, read, [&](bool threw) { REQUIRE((threw || size == 5000)); }) >
          1);
  REQUIRE(named >= 1);
  const auto check = [&](bool threw) {
    REQUIRE(test::text_of(folder / "a") == (threw ? "old" : longer));
    REQUIRE(folder.files() == 1);
  };
  REQUIRE(test::fail_each_allocation([&] { replace(folder / "a", "old"); }, [&] { replace(folder / "a", longer); },
                                     check) > 2);
  REQUIRE(test::text_of(folder / "a") == longer);
}

TEST_CASE("what cannot be written is named, and leaves nothing") {
  const test::Folder folder;
  const std::string fault = message_of<FileError>([&] { replace(folder / "none/a", "x"); });
  REQUIRE(contains(fault, "f: '" + (folder / "none/a").string()));
  std::filesystem::create_directory(folder / "d");
  REQUIRE(contains(message_of<FileError>([&] { replace(folder / "d", "x"); }), "expected a file, got a directory"));
  {
    detail::ReplacedFile file("f", folder / "late");
    std::filesystem::create_directories(folder / "late/full");  // in the way of the renaming
    REQUIRE_THROWS_AS(file.commit(), FileError);
  }
  REQUIRE(folder.files() == 2);
}

#if __has_include(<sys/resource.h>)

TEST_CASE("a full disk leaves the old file") {
  const test::Folder folder;
  replace(folder / "a", "old");
  struct rlimit usual;
  REQUIRE(getrlimit(RLIMIT_FSIZE, &usual) == 0);
  struct rlimit small = usual;
  small.rlim_cur = 1000;
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  REQUIRE(setrlimit(RLIMIT_FSIZE, &small) == 0);
  // Found when a buffer is full, and found when it is flushed.
  const std::string much = message_of<FileError>([&] { replace(folder / "a", std::string(100000, 'x')); });
  const std::string little = message_of<FileError>([&] { replace(folder / "a", std::string(1001, 'x')); });
  setrlimit(RLIMIT_FSIZE, &usual);
  signal(SIGXFSZ, handler);
  REQUIRE(contains(much, "expected room for the file"));
  REQUIRE(contains(little, "expected room for the file"));
  REQUIRE(test::text_of(folder / "a") == "old");
  REQUIRE(folder.files() == 1);
}

TEST_CASE("permissions and links survive") {
  const test::Folder folder;
  replace(folder / "a", "old");
  std::filesystem::permissions(folder / "a", std::filesystem::perms(0640));
  std::filesystem::create_symlink(folder / "a", folder / "link");
  replace(folder / "link", "new");
  REQUIRE(std::filesystem::is_symlink(folder / "link"));
  REQUIRE(test::text_of(folder / "a") == "new");
  REQUIRE(std::filesystem::status(folder / "a").permissions() == std::filesystem::perms(0640));
  REQUIRE(folder.files() == 2);
}

TEST_CASE("links to nothing and to links: what they point to is made") {
  const test::Folder folder;
  std::filesystem::create_directory(folder / "d");
  std::filesystem::create_symlink("d/link", folder / "far");       // relative to the folder that it is in
  std::filesystem::create_symlink("made", folder / "d" / "link");  // there is none yet
  replace(folder / "far", "new");
  REQUIRE(std::filesystem::is_symlink(folder / "far"));
  REQUIRE(std::filesystem::is_symlink(folder / "d" / "link"));
  REQUIRE(test::text_of(folder / "d" / "made") == "new");
  replace(folder / "far", "newer");
  REQUIRE(test::text_of(folder / "d" / "made") == "newer");
  std::filesystem::create_symlink("round", folder / "round");
  REQUIRE(contains(message_of<FileError>([&] { replace(folder / "round", "x"); }), "links that do not end"));
  REQUIRE(folder.files() == 3);
}

TEST_CASE("what is no regular file is not replaced") {
  const test::Folder folder;
  REQUIRE(mkfifo((folder / "pipe").c_str(), 0600) == 0);
  std::filesystem::create_symlink("pipe", folder / "link");
  std::filesystem::create_symlink("/dev/null", folder / "null");
  for (const char* name : {"pipe", "link", "null"}) {
    INFO(name);
    REQUIRE(contains(message_of<FileError>([&] { replace(folder / name, "x"); }),
                     "expected a regular file, or none, got another kind"));
  }
  REQUIRE(std::filesystem::is_fifo(folder / "pipe"));
  REQUIRE(std::filesystem::is_character_file("/dev/null"));
  REQUIRE(folder.files() == 3);
}

#endif
