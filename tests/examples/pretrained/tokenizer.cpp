#include "pretrained/tokenizer.hpp"

#include <sstream>

#include "catch.hpp"
#include "errors.hpp"
#include "pretrained/gguf.hpp"
#include "random.hpp"
#include "tiny_llama.hpp"

using pretrained::FileError;
using pretrained::PreTokenizer;
using pretrained::Tokenizer;
using pretrained::TokenKind;
using test::contains;
using test::message_of;
using test::TinyTokenizer;

namespace {

using Ids = std::vector<std::int32_t>;

std::vector<std::byte> file_of(const TinyTokenizer& tokenizer) {
  test::GgufWriter writer;
  tokenizer.write(writer);
  return writer.bytes();
}

Tokenizer tokenizer_of(const TinyTokenizer& tokenizer = {}) {
  const std::vector<std::byte> bytes = file_of(tokenizer);
  return Tokenizer(pretrained::parse_gguf(bytes));
}

std::string fault_of(const TinyTokenizer& tokenizer) {
  return message_of<FileError>([&] { tokenizer_of(tokenizer); });
}

// Words with '|' between them.
std::string words(PreTokenizer pattern, std::string_view text) {
  std::string result;
  pretrained::for_each_word(pattern, text, [&](std::string_view word) {
    REQUIRE(!word.empty());
    result += (result.empty() ? "" : "|") + std::string(word);
  });
  return result;
}
std::string gpt2(std::string_view text) { return words(PreTokenizer::gpt2, text); }
std::string smollm(std::string_view text) { return words(PreTokenizer::smollm, text); }

std::int32_t byte_token(char byte) { return TinyTokenizer::first_byte + static_cast<unsigned char>(byte); }

// Merges as they are defined: all pairs are looked at, again and again.
Ids slow_merge(const TinyTokenizer& tokenizer, const std::string& word) {
  std::vector<std::string> parts;
  for (const char c : word) parts.push_back(test::byte_letters({&c, 1}));
  for (;;) {
    std::size_t best = tokenizer.merges.size(), at = 0;
    for (std::size_t i = 0; i + 1 < parts.size(); ++i)
      for (std::size_t rank = 0; rank < best; ++rank)
        if (tokenizer.merges[rank] == parts[i] + " " + parts[i + 1]) {
          best = rank;
          at = i;
        }
    if (best == tokenizer.merges.size()) break;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
  Ids ids;
  for (const std::string& part : parts)
    ids.push_back(static_cast<std::int32_t>(std::find(tokenizer.tokens.begin(), tokenizer.tokens.end(), part) -
                                            tokenizer.tokens.begin()));
  return ids;
}

}  // namespace

TEST_CASE("pretrained: the pattern of GPT-2 cuts text into words") {
  REQUIRE(gpt2("").empty());
  REQUIRE(gpt2("Hello world") == "Hello| world");
  REQUIRE(gpt2("it's we'll I'd they've you're can't I'm") == "it|'s| we|'ll| I|'d| they|'ve| you|'re| can|'t| I|'m");
  REQUIRE(gpt2("IT'S 'x 's '") == "IT|'|S| '|x| '|s| '");
  REQUIRE(gpt2("a1b22 333") == "a|1|b|22| 333");
  REQUIRE(gpt2("x += y;\n") == "x| +=| y|;|\n");
  REQUIRE(gpt2("a   b") == "a|  | b");
  REQUIRE(gpt2("a\n\n\tb") == "a|\n\n|\t|b");
  REQUIRE(gpt2("a\tb \nc") == "a|\t|b| |\n|c");
  REQUIRE(gpt2("a   ") == "a|   ");
  REQUIRE(gpt2("   ") == "   ");
  REQUIRE(gpt2("a  's") == "a| | '|s");
}

TEST_CASE("pretrained: the pattern of smollm cuts numbers out first") {
  REQUIRE(smollm("a1b22 333") == "a|1|b|2|2| |3|3|3");
  REQUIRE(smollm("in  2024 ,x") == "in|  |2|0|2|4| ,|x");
  REQUIRE(smollm("a   b") == "a|  | b");
  REQUIRE(smollm("\u00bd\u0664\u2167x") == "\u00bd|\u0664|\u2167|x");
}

TEST_CASE("pretrained: classes of characters are those of Unicode") {
  REQUIRE(gpt2("\u00e9t\u00e9 \u65e5\u672c\u8a9e\u3002\u0645\u0631") ==
          "\u00e9t\u00e9| \u65e5\u672c\u8a9e|\u3002|\u0645\u0631");
  // A combining mark is no letter.
  REQUIRE(gpt2("e\u0301a") == "e|\u0301|a");
  REQUIRE(gpt2("\U0001f600\u200d\U0001f600 \U0001d7d8\U00020000") ==
          "\U0001f600\u200d\U0001f600| \U0001d7d8|\U00020000");
  // White space beyond ASCII goes with white space, but not before a word as ' ' does.
  REQUIRE(gpt2("a\u00a0\u3000\u2003b\u0085") == "a|\u00a0\u3000|\u2003|b|\u0085");
  using pretrained::character_class;
  using pretrained::CharacterClass;
  int letters = 0, numbers = 0, spaces = 0;
  for (char32_t c = 0; c < 0x110000; ++c) {
    const CharacterClass kind = character_class(c);
    letters += kind == CharacterClass::letter;
    numbers += kind == CharacterClass::number;
    spaces += kind == CharacterClass::space;
  }
  REQUIRE(letters == 141028);
  REQUIRE(numbers == 1911);
  REQUIRE(spaces == 25);
  REQUIRE(character_class(0x41) == CharacterClass::letter);
  REQUIRE(character_class(0x5B) == CharacterClass::other);
  REQUIRE(character_class(0xAA) == CharacterClass::letter);
  REQUIRE(character_class(0xB2) == CharacterClass::number);
  REQUIRE(character_class(0x323AF) == CharacterClass::letter);
  REQUIRE(character_class(0x323B0) == CharacterClass::other);
  REQUIRE(character_class(0x1FBF9) == CharacterClass::number);
  REQUIRE(character_class(0x10FFFF) == CharacterClass::other);
}

TEST_CASE("pretrained: pairs are merged by rank, inside of words") {
  const Tokenizer tokenizer = tokenizer_of();
  const std::int32_t he = TinyTokenizer::first_merged, ll = he + 1, hello = he + 3, w = he + 4, space_hello = he + 5;
  REQUIRE(tokenizer.encode("", true).empty());
  REQUIRE(tokenizer.encode("hello", true) == Ids{hello});
  REQUIRE(tokenizer.encode("hello hello", true) == Ids{hello, space_hello});
  REQUIRE(tokenizer.encode("he ll", true) == Ids{he, byte_token(' '), ll});
  REQUIRE(tokenizer.encode("a wx", true) == Ids{byte_token('a'), w, byte_token('x')});
  // Of three equal letters the leftmost pair.
  REQUIRE(tokenizer.encode("lll", true) == Ids{ll, byte_token('l')});
  REQUIRE(tokenizer.token_bytes(space_hello) == " hello");
  REQUIRE(tokenizer.token_bytes(byte_token('\n')) == "\n");
  REQUIRE(tokenizer.size() == 265);
}

TEST_CASE("pretrained: merges with a heap are merges as defined") {
  TinyTokenizer tiny;
  test::Random random(3);
  // Random merges of what there is, so that long tokens arise.
  std::vector<std::string> known{"a", "b", "c"};
  while (tiny.merges.size() < 60) {
    const std::string left = known[static_cast<std::size_t>(random.below(static_cast<coterie::Index>(known.size())))];
    const std::string right = known[static_cast<std::size_t>(random.below(static_cast<coterie::Index>(known.size())))];
    if (std::find(tiny.tokens.begin(), tiny.tokens.end(), left + right) != tiny.tokens.end()) continue;
    tiny.add(left + right);
    tiny.merges.push_back(left + " " + right);
    known.push_back(left + right);
  }
  const Tokenizer tokenizer = tokenizer_of(tiny);
  for (int i = 0; i < 300; ++i) {
    std::string word(static_cast<std::size_t>(1 + random.below(40)), 'a');
    for (char& c : word) c = static_cast<char>('a' + random.below(3));
    REQUIRE(tokenizer.encode(word, false) == slow_merge(tiny, word));
  }
}

TEST_CASE("pretrained: a long word takes no square of time") {
  TinyTokenizer tiny;
  for (std::string a = "a"; a.size() < 64; a += a) {
    tiny.add(a + a);
    tiny.merges.push_back(a + " " + a);
  }
  const Tokenizer tokenizer = tokenizer_of(tiny);
  const Ids ids = tokenizer.encode(std::string(1 << 20, 'a'), false);
  REQUIRE(ids.size() == (1 << 20) / 64);
  REQUIRE(tokenizer.token_bytes(ids[0]) == std::string(64, 'a'));
}

TEST_CASE("pretrained: special tokens are found in text only where that is asked for") {
  TinyTokenizer tiny;
  tiny.add("<|im_start|>user", 3);
  tiny.add("<tool>", 4);
  const Tokenizer tokenizer = tokenizer_of(tiny);
  const std::int32_t long_start = 265, tool = 266, hello = TinyTokenizer::first_merged + 3;
  REQUIRE(tokenizer.special("<|im_end|>") == TinyTokenizer::end_turn);
  REQUIRE(!tokenizer.special("hello"));
  const std::string text = "<|im_start|>hello<|im_end|><|im_start|>user<|im_end<tool>";
  Ids expected{TinyTokenizer::begin_turn, hello, TinyTokenizer::end_turn, long_start};
  for (const char c : std::string("<|im_end")) expected.push_back(byte_token(c));
  expected.push_back(tool);
  REQUIRE(tokenizer.encode(text, true) == expected);
  REQUIRE(tokenizer.decode(expected) == text);
  const Ids plain = tokenizer.encode(text, false);
  REQUIRE(std::none_of(plain.begin(), plain.end(), [](std::int32_t id) { return id < 3 || id == 265; }));
  REQUIRE(std::count(plain.begin(), plain.end(), tool) == 1);
  REQUIRE(tokenizer.decode(plain) == text);
  REQUIRE(tokenizer.kind(tool) == TokenKind::user_defined);
  REQUIRE(tokenizer.kind(hello) == TokenKind::normal);
  REQUIRE(tokenizer.bos() == 1);
  REQUIRE(tokenizer.eos() == 2);
  REQUIRE(!tokenizer.add_bos());
}

TEST_CASE("pretrained: any bytes come back from their tokens") {
  const Tokenizer tokenizer = tokenizer_of();
  test::Random random(5);
  const std::vector<std::string> parts{
      "\xff", "\xc3",  "\xa9",   "\xe2\x82",   "\xf0\x9f\x98", "\xed\xa0\x80", "\xc0\x80",   " ",
      "1",    "hello", "\u00e9", "\U0001f600", "\n",           "'s",           "<|im_end|>", std::string(1, '\0')};
  for (int i = 0; i < 500; ++i) {
    std::string text;
    for (coterie::Index n = random.below(20); n > 0; --n)
      text += random.below(3) == 0
                  ? std::string(1, static_cast<char>(random.below(256)))
                  : parts[static_cast<std::size_t>(random.below(static_cast<coterie::Index>(parts.size())))];
    for (const bool special : {false, true}) REQUIRE(tokenizer.decode(tokenizer.encode(text, special)) == text);
  }
}

TEST_CASE("pretrained: bytes that a vocabulary lacks are left out, and can be asked for") {
  TinyTokenizer tiny;
  tiny.tokens[3 + '-'] = "--gone--";
  const Tokenizer tokenizer = tokenizer_of(tiny);
  REQUIRE(!tokenizer.has_byte('-'));
  REQUIRE(tokenizer.has_byte('+'));
  REQUIRE(tokenizer.decode(tokenizer.encode("+-+", true)) == "++");
}

TEST_CASE("pretrained: a copy of a tokenizer outlives the original and the file") {
  std::optional<Tokenizer> copy;
  {
    const Tokenizer original = tokenizer_of();
    copy = original;
  }
  REQUIRE(copy->decode(copy->encode("<|im_end|>hello 1", true)) == "<|im_end|>hello 1");
}

TEST_CASE("pretrained: tokens that do not exist are refused") {
  const Tokenizer tokenizer = tokenizer_of();
  for (const std::int32_t id : {-1, 265}) {
    const std::string got = "token: expected 0 to 264, got " + std::to_string(id);
    REQUIRE(contains(message_of<coterie::ValueError>([&] { tokenizer.decode(Ids{3, id}); }), "decode: " + got));
    REQUIRE(contains(message_of<coterie::ValueError>([&] { tokenizer.token_bytes(id); }), "token_bytes: " + got));
    REQUIRE(contains(message_of<coterie::ValueError>([&] { tokenizer.kind(id); }), "kind: " + got));
  }
}

TEST_CASE("pretrained: a text whose positions do not fit is refused before it is read") {
  const Tokenizer tokenizer = tokenizer_of();
  const std::string_view claimed("a", std::size_t(1) << 31);
  REQUIRE(message_of<coterie::ValueError>([&] { tokenizer.encode(claimed, false); }) ==
          "Tokenizer::encode: text: expected fewer than 2147483648 bytes, got 2147483648");
}

TEST_CASE("pretrained: a damaged tokenizer is refused, with key and element") {
  const std::string tokens = "key 'tokenizer.ggml.tokens': ", merges = "key 'tokenizer.ggml.merges': ";
  const auto fault = [](auto&& change) {
    TinyTokenizer tiny;
    change(tiny);
    return fault_of(tiny);
  };
  REQUIRE(fault([](TinyTokenizer&) {}).empty());
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.pre = "default"; }),
                   "key 'tokenizer.ggml.pre': expected 'gpt-2' or 'smollm', got 'default'"));
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.tokens[5] = t.tokens[7]; }),
                   tokens + "element 7: expected a text that no other has"));
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.tokens[5].clear(); }), tokens + "element 5: expected a text"));
  for (const char* bad : {"a b", "\u0144", "\u65e5", "\xc4", "\xff"})
    REQUIRE(contains(fault([&](TinyTokenizer& t) { t.tokens[5] = bad; }),
                     tokens + "element 5: expected letters that stand for bytes"));
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.kinds.pop_back(); }),
                   "key 'tokenizer.ggml.token_type': expected 265 elements, got 264"));
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.kinds[9] = 7; }),
                   "key 'tokenizer.ggml.token_type': element 9: expected 1 to 6, got 7"));
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.merges[2] = "he"; }),
                   merges + "element 2: expected two tokens with a space between them, got 'he'"));
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.merges[2] = "h e l"; }), merges + "element 2: expected two tokens"));
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.merges[2] = "x y"; }),
                   merges + "element 2: expected tokens of tokenizer.ggml.tokens, got 'xy'"));
  REQUIRE(contains(fault([](TinyTokenizer& t) { t.merges[2] = t.merges[0]; }),
                   merges + "element 2: expected pairs that differ, got 'h e' twice"));
  const auto with = [](auto&& add) {
    test::GgufWriter writer;
    TinyTokenizer tiny;
    add(writer, tiny);
    const std::vector<std::byte> bytes = writer.bytes();
    return message_of<FileError>([&] { Tokenizer(pretrained::parse_gguf(bytes)); });
  };
  REQUIRE(contains(with([](auto& writer, auto&) { writer.set("tokenizer.ggml.model", "llama"); }),
                   "key 'tokenizer.ggml.model': expected 'gpt2', byte-level merges, got 'llama'"));
  REQUIRE(contains(with([](auto&, auto&) {}), "key 'tokenizer.ggml.model': expected one of this name, got none"));
  REQUIRE(contains(with([](auto& writer, auto&) {
                     writer.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", "gpt-2");
                     writer.set_list("tokenizer.ggml.tokens", std::vector<std::string>{"a"});
                     writer.set_list("tokenizer.ggml.merges", std::vector<std::string>{});
                     writer.set("tokenizer.ggml.eos_token_id", std::uint32_t(1));
                   }),
                   "key 'tokenizer.ggml.eos_token_id': expected a token, 0 to 0, got 1"));
}
