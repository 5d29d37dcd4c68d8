#include "coterie/file/safetensors_writer.hpp"

#include "allocation.hpp"
#include "catch.hpp"
#include "errors.hpp"
#include "folder.hpp"
#include "random.hpp"

using namespace coterie;
using test::contains;
using test::message_of;
using test::Random;

TEST_CASE("what is written reads back: float, double, whole numbers, metadata, any names") {
  const RowMatrix<float> a = Random(1).matrix<float>(3, 5), none(0, 4);
  const RowMatrix<double> b = Random(2).matrix<double>(40, 33);  // more than a buffer
  const std::string odd = "\"\\\n\x01/\xC3\xA9";
  SafetensorsWriter writer;
  writer.add("a", a);
  writer.add("blocks.0.b", b);
  writer.add("part", a.block(1, 1, 2, 3));
  writer.add("none", none);
  writer.add(odd, b.row(3));
  writer.add_number("n", -5);
  writer.set_metadata("key", "old");
  writer.set_metadata("key", "value");
  writer.set_metadata(odd, odd);
  const std::vector<std::byte> bytes = writer.bytes();
  const SafetensorsView file = parse_safetensors(bytes);
  REQUIRE(file.tensors().size() == 6);
  REQUIRE(file.metadata().size() == 2);
  REQUIRE(file.metadata().find("key")->second == "value");
  REQUIRE(file.metadata().find(odd)->second == odd);
  RowMatrix<float> a2(3, 5), part(2, 3), none2(0, 4);
  RowMatrix<double> b2(40, 33), row(1, 33);
  file.read("a", a2);
  file.read("blocks.0.b", b2);
  file.read("part", part);
  file.read("none", none2);
  file.read(odd, row);
  REQUIRE(a2 == a);
  REQUIRE(b2 == b);
  REQUIRE(part == a.block(1, 1, 2, 3));
  REQUIRE(row == b.row(3));
  REQUIRE(file.numbers<std::int64_t>("n") == std::vector<std::int64_t>{-5});
  // Whoever maps the file finds every number at a multiple of its size.
  for (const SafetensorsTensor& tensor : file.tensors()) {
    INFO(tensor.name);
    REQUIRE((tensor.bytes.data() - bytes.data()) % (detail::dtype_info(tensor.dtype).bits / 8) == 0);
  }
}

TEST_CASE("the bytes of a small file are those of the format") {
  RowMatrix<float> w(1, 2);
  w << 1, -2;
  SafetensorsWriter writer;
  writer.add("w", w);
  const std::vector<std::byte> bytes = writer.bytes();
  const std::string header = R"({"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}})";
  std::string expected(1, static_cast<char>((header.size() + 7) / 8 * 8));
  expected += std::string(7, '\0') + header;
  expected.resize(8 + (header.size() + 7) / 8 * 8, ' ');
  expected += std::string("\0\0\x80\x3f\0\0\0\xc0", 8);
  REQUIRE(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()) == expected);

  const std::vector<std::byte> empty = SafetensorsWriter().bytes();
  REQUIRE(empty.size() == 16);
  const SafetensorsView file = parse_safetensors(empty);
  REQUIRE(file.tensors().empty());
  REQUIRE(file.metadata().empty());
}

TEST_CASE("files are written as bytes() has them, over old ones") {
  const test::Folder folder;
  const RowMatrix<double> b = Random(2).matrix<double>(40, 33);
  SafetensorsWriter writer;
  writer.add("b", b);
  for (int time = 0; time < 2; ++time) writer.write(folder / "b.safetensors");
  const std::vector<std::byte> bytes = writer.bytes();
  REQUIRE(test::text_of(folder / "b.safetensors") ==
          std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
  REQUIRE(folder.files() == 1);
  REQUIRE(contains(message_of<FileError>([&] { writer.write(folder / "no/b"); }), "SafetensorsWriter::write: '"));
}

TEST_CASE("names and texts that no reader would take are refused, and nothing is added") {
  const RowMatrix<float> a = Random(1).matrix<float>(3, 5);
  SafetensorsWriter writer;
  writer.add("a", a);
  const std::vector<std::byte> before = writer.bytes();
  REQUIRE(message_of<ValueError>([&] { writer.add("a", a); }) ==
          "SafetensorsWriter::add: name: expected one that is new, got 'a' twice");
  REQUIRE_THROWS_AS(writer.add_number("a", 1), ValueError);
  REQUIRE_THROWS_AS(writer.add("__metadata__", a), ValueError);
  REQUIRE_THROWS_AS(writer.add("\xff", a), ValueError);
  REQUIRE_THROWS_AS(writer.set_metadata("\xff", ""), ValueError);
  REQUIRE_THROWS_AS(writer.set_metadata("a", "\xff"), ValueError);
  REQUIRE(writer.bytes() == before);
}

TEST_CASE("where memory ends the file is the old one or the new one, and the writer is as it was") {
  const test::Folder folder;
  const RowMatrix<float> a = Random(1).matrix<float>(3, 5);
  const std::string name = "a name that is too long for short strings";
  SafetensorsWriter old, writer;
  old.add_number("n", 1);
  writer.set_metadata("config.model_dim", "a value that is too long for short strings");
  const auto prepare = [&] { old.write(folder / "a"); };
  const auto attempt = [&] {
    SafetensorsWriter some = writer;
    some.add(name, a);
    some.write(folder / "a");
  };
  const auto check = [&](bool threw) {
    const SafetensorsView file = read_safetensors(folder / "a");
    REQUIRE(folder.files() == 1);
    REQUIRE(file.find(threw ? "n" : name) != nullptr);
    REQUIRE(file.metadata().size() == (threw ? 0 : 1));
  };
  REQUIRE(test::fail_each_allocation(prepare, attempt, check) > 20);

  SafetensorsWriter one;
  const auto add = [&] {
    one.add(name, a);
    one.set_metadata("some key that is not short", "some value that is not short");
  };
  const auto again = [&](bool threw) {
    REQUIRE(threw);
    if (one.bytes() == SafetensorsWriter().bytes()) one.add(name, a);
    const std::vector<std::byte> bytes = one.bytes();
    const SafetensorsView file = parse_safetensors(bytes);
    REQUIRE(file.find(name) != nullptr);
  };
  REQUIRE(test::fail_each_allocation([&] { one = SafetensorsWriter(); }, add, again) > 3);
}
