// What may follow an output: what followed its longest suffix where that has occurred before, in
// its prompt, in itself, or in texts of others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "suffix/automaton.h"

namespace codellama_rt {

class SuffixDrafter {
 public:
  using Text = std::shared_ptr<const SuffixAutomaton>;

  struct Draft {
    int32_t length = 0;           // of the suffix
    std::vector<int32_t> tokens;  // that followed it
  };

  struct Outcome {
    int32_t length;  // of the suffix by which the token had been expected; 0: none had been
    bool is_hit;
  };

  // An empty output. The prompt does not change any more; the other texts may grow.
  SuffixDrafter(Text prompt, const std::vector<Text>& others) : prompt_(std::move(prompt)) {
    cursors_.push_back({prompt_, prompt_->at_repeated()});
    const int32_t tail = std::max(0, prompt_->size() - kTail);
    for (const Text& other : others) {
      cursors_.push_back({other, {}});
      for (int32_t i = tail; i < prompt_->size(); ++i) {
        other->advance(cursors_.back().place, (*prompt_)[i]);
      }
    }
    expect();
    if (prompt_->repeated().length >= match_.length) {  // its own end is no place to go on from
      match_ = prompt_->repeated();
      source_ = prompt_.get();
    }
  }

  SuffixDrafter(const SuffixDrafter&) = delete;  // it points into itself

  int32_t size() const { return output_.size(); }  // of the output

  // Appends a token to the output. Returns how that had been expected.
  Outcome push(int32_t token) {
    const Outcome outcome{match_.length, match_.length > 0 && at(match_.next) == token};
    output_.append(token);
    for (Reading& reading : cursors_) reading.text->advance(reading.place, token);
    expect();
    return outcome;
  }

  // What followed the longest suffix, at most so many tokens. The prompt goes on with the output,
  // and the output with what is returned.
  Draft propose(int32_t most) const {
    Draft draft{match_.length, {}};
    if (match_.length == 0) return draft;
    const int32_t end =
        source_ == prompt_.get() ? prompt_->size() + output_.size() : source_->size();
    for (int32_t next = match_.next; int32_t(draft.tokens.size()) < most; ++next) {
      const bool is_own = source_ == prompt_.get() || source_ == &output_;
      if (next >= end && !is_own) break;
      const int32_t token = next < end ? at(next) : draft.tokens[size_t(next - end)];
      if (token == kTextEnd) break;
      draft.tokens.push_back(token);
    }
    return draft;
  }

 private:
  static constexpr int32_t kTail = 64;  // of the prompt, as far as other texts are compared with it

  struct Reading {
    Text text;
    SuffixAutomaton::Cursor place;
  };

  // The token at a position of the source; the output stands behind the prompt.
  int32_t at(int32_t position) const {
    const int32_t size = source_->size();
    return position < size ? (*source_)[position] : output_[position - size];
  }

  // Finds the longest suffix. Of equal ones the output's goes first, then the prompt's.
  void expect() {
    match_ = output_.repeated();
    source_ = &output_;
    for (const Reading& reading : cursors_) {
      const bool has_more = reading.text == prompt_ && output_.size() > 0;
      const SuffixAutomaton::Match found = reading.text->match(reading.place, has_more);
      if (found.length <= match_.length) continue;
      match_ = found;
      source_ = reading.text.get();
    }
  }

  Text prompt_;
  SuffixAutomaton output_;
  std::vector<Reading> cursors_;  // the first is that of the prompt
  SuffixAutomaton::Match match_;
  const SuffixAutomaton* source_ = nullptr;
};

}  // namespace codellama_rt
