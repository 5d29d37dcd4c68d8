#include "support/options.hpp"

#include "catch.hpp"

using namespace examples;

namespace {

struct Program {
  std::int64_t steps = 7;
  double minutes = 0, temperature = 0.5;
  std::string pattern = "routed", file, prompt = "a";
  bool compare = false;
  Options options{"program", "A test."};

  Program() {
    options.add("--steps", steps, 1, 100, "");
    options.add("--minutes", minutes, 60, "");
    options.add("--pattern", pattern, {"local", "routed"}, "");
    options.add("--file", file, "");
    options.add_from_zero("--temperature", temperature, 100, "");
    options.add_text("--prompt", prompt, "");
    options.add("--compare", compare, "");
  }
  void parse(std::vector<std::string> arguments) {
    std::vector<char*> pointers{nullptr};
    for (std::string& argument : arguments) pointers.push_back(argument.data());
    options.parse(static_cast<int>(pointers.size()), pointers.data());
  }
};

}  // namespace

TEST_CASE("options are read with a space or an equals sign") {
  Program program;
  program.parse({"--steps", "100", "--minutes=0.5", "--pattern", "local", "--file", "a=b", "--compare"});
  REQUIRE(program.steps == 100);
  REQUIRE(program.minutes == 0.5);
  REQUIRE(program.pattern == "local");
  REQUIRE(program.file == "a=b");
  REQUIRE(program.compare);
  REQUIRE(program.options.given("--steps"));
}

TEST_CASE("options that are not given keep their defaults") {
  Program program;
  program.parse({});
  REQUIRE(program.steps == 7);
  REQUIRE(program.pattern == "routed");
  REQUIRE_FALSE(program.options.given("--steps"));
}

TEST_CASE("numbers may be 0 and texts empty where that has a meaning") {
  Program program;
  program.parse({"--temperature", "0", "--prompt="});
  REQUIRE(program.temperature == 0);
  REQUIRE(program.prompt.empty());
}

TEST_CASE("values of options read back as what they were") {
  Program program, other;
  program.parse({"--steps=9", "--minutes=0.1", "--pattern=local", "--temperature=0", "--prompt=b c"});
  for (const char* name : {"--steps", "--minutes", "--pattern", "--temperature", "--prompt"})
    other.options.assign(name, program.options.value(name));
  REQUIRE(other.steps == 9);
  REQUIRE(other.minutes == 0.1);
  REQUIRE(other.pattern == "local");
  REQUIRE(other.temperature == 0);
  REQUIRE(other.prompt == "b c");
  REQUIRE_FALSE(other.options.given("--steps"));
  REQUIRE_THROWS_AS(other.options.assign("--steps", "0"), UsageError);
}

TEST_CASE("bad command lines are refused") {
  const std::vector<std::vector<std::string>> bad{{"--unknown"},
                                                  {"stray"},
                                                  {"--steps"},
                                                  {"--steps", ""},
                                                  {"--steps", "0"},
                                                  {"--steps", "101"},
                                                  {"--steps", "1.5"},
                                                  {"--steps", "-1"},
                                                  {"--steps", "10x"},
                                                  {"--steps=99999999999999999999"},
                                                  {"--minutes", "nan"},
                                                  {"--minutes", "0"},
                                                  {"--minutes", "inf"},
                                                  {"--minutes", "1m"},
                                                  {"--temperature", "-0.1"},
                                                  {"--temperature", "nan"},
                                                  {"--temperature", "101"},
                                                  {"--prompt"},
                                                  {"--pattern", "dense"},
                                                  {"--pattern="},
                                                  {"--file="},
                                                  {"--compare=yes"}};
  for (const auto& arguments : bad) {
    INFO(arguments.front());
    REQUIRE_THROWS_AS(Program().parse(arguments), UsageError);
  }
}

TEST_CASE("a result file is there in full or not at all") {
  const std::filesystem::path path = std::filesystem::temp_directory_path() / "coterie_result_test.json";
  std::filesystem::remove(path);
  {
    const ResultFile file(path.string());
    REQUIRE_FALSE(std::filesystem::exists(path));
    file.write("{}\n");
  }
  REQUIRE(std::filesystem::file_size(path) == 3);
  REQUIRE_FALSE(std::filesystem::exists(path.string() + ".partial"));
  std::filesystem::remove(path);
  REQUIRE_THROWS_AS(ResultFile((path / "nowhere").string()), UsageError);
  REQUIRE_THROWS_AS(ResultFile(std::filesystem::temp_directory_path().string()), UsageError);
  REQUIRE_NOTHROW(ResultFile("").write("x"));
}

TEST_CASE("exit codes tell usage errors from others") {
  REQUIRE(run_program("program", [] {}) == 0);
  REQUIRE(run_program("program", [] { return 130; }) == 130);
  REQUIRE(run_program("program", [] { throw UsageError("a"); }) == 2);
  REQUIRE(run_program("program", [] { throw std::runtime_error("b"); }) == 1);
}
