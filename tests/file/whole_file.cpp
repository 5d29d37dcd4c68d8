#include "coterie/file/whole_file.hpp"

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

#endif
