// Conversations by the model's own template, where that is ChatML: <|im_start|>role, a line, <|im_end|>.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gguf_file.hpp"
#include "tokenizer.hpp"

namespace pretrained {

/// The texts around the messages of a conversation.
class ChatTemplate {
 public:
  /// Reads tokenizer.chat_template. The system line is the one that the template puts in by itself, if any.
  /// Requires: a template that writes ChatML, and tokens of its marks (FileError).
  ChatTemplate(const GgufFile& file, const Tokenizer& tokenizer) {
    const std::string key = "tokenizer.chat_template", text = file.get<std::string>(key);
    for (const char* mark : {"<|im_start|>", "<|im_end|>"}) {
      if (text.find(mark) == std::string::npos || !tokenizer.special(mark))
        file.fail_key(key, std::string("expected a template with ") + mark + ", a token of the file, got another");
    }
    end_ = *tokenizer.special("<|im_end|>");
    const std::string begin = "<|im_start|>system";
    const std::size_t from = text.find(begin), to = from == std::string::npos ? from : text.find("<|im_end|>", from);
    if (to == std::string::npos) return;
    std::string line = text.substr(from + begin.size(), to - from - begin.size());
    if (line.starts_with("\\n")) line.erase(0, 1), line[0] = '\n';
    // A template that puts in a variable has quotes here.
    if (line.starts_with("\n") && line.find_first_of("'{") == std::string::npos) system_ = line.substr(1);
  }

  /// The token that ends a message.
  std::int32_t end() const { return end_; }

  /// The text that makes the model answer `message`; `first`: it begins the conversation. Encode it with parse_special.
  std::string question(const std::string& message, bool first) const {
    std::string text;
    if (first && !system_.empty()) text += "<|im_start|>system\n" + system_ + "<|im_end|>\n";
    return text + "<|im_start|>user\n" + message + "<|im_end|>\n<|im_start|>assistant\n";
  }
  /// The text between an answer, whose end() has been read, and the next question.
  static std::string after_answer() { return "\n"; }

 private:
  std::string system_;
  std::int32_t end_ = 0;
};

}  // namespace pretrained
