// The suffix automaton of a growing text of tokens (Blumer et al. 1985, The smallest automaton
// recognizing the subwords of a text): which of the text's suffixes has occurred before, and where.
//
// A state stands for the strings that occur at the same places; `length` is the longest of them,
// `link` the state of the longest suffix of them that occurs at more places. For n tokens there are
// at most 2n states and 3n edges, and appending a token costs O(1), amortised. The edges of all
// states are in one hash table, because most states have one edge and the alphabet is large; those
// of a state are chained, to be copied where a state is cloned.
//
// Memory   16 bytes per state, 16 per edge, 8 to 16 of the table per edge, 4 of the text per token
// Measured in docs/speculation.md
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace codellama_rt {

constexpr int32_t kTextEnd = -1;  // between texts that stand behind one another; no token

class SuffixAutomaton {
 public:
  // Where a string ends: the length of the string and the position after it. Length 0: nowhere.
  struct Match {
    int32_t length = 0, next = 0;
  };

  // A walk along the automaton: the longest suffix of what was read that occurs in the text.
  struct Cursor {
    int32_t state = 0, length = 0;
  };

  SuffixAutomaton() : states_(1) {}

  int32_t size() const { return int32_t(text_.size()); }
  int32_t operator[](int32_t position) const { return text_[size_t(position)]; }

  // Allocated, in bytes.
  size_t num_bytes() const {
    return states_.capacity() * sizeof(State) + edges_.capacity() * sizeof(Edge) +
           table_.capacity() * sizeof(int32_t) + text_.capacity() * sizeof(int32_t);
  }

  void append(int32_t token) {
    const int32_t position = size();
    const int32_t added = add_state({states_[size_t(last_)].length + 1, 0, position, kNone});
    int32_t state = last_;
    int32_t edge = kNone;
    while (state != kNone && (edge = find(state, token)) == kNone) {
      add_edge(state, token, added);
      state = state == 0 ? kNone : states_[size_t(state)].link;
    }
    if (state != kNone) states_[size_t(added)].link = suffix_state(state, edge, token);
    last_ = added;
    text_.push_back(token);
    State& longest = states_[size_t(states_[size_t(added)].link)];
    repeated_ = {longest.length, longest.end + 1};
    longest.end = position;  // the latest of its places that was looked at
  }

  // The longest suffix of the text that occurs earlier as well.
  Match repeated() const { return repeated_; }

  // A cursor that has read the text itself, and is at its longest suffix that occurs earlier.
  Cursor at_repeated() const {
    const int32_t state = states_[size_t(last_)].link;
    return {state, states_[size_t(state)].length};
  }

  // Reads a token. The text may have grown since the last one.
  void advance(Cursor& cursor, int32_t token) const {
    settle(cursor);
    int32_t edge;
    while ((edge = find(cursor.state, token)) == kNone) {
      if (cursor.state == 0) return;
      cursor.state = states_[size_t(cursor.state)].link;
      cursor.length = states_[size_t(cursor.state)].length;
    }
    cursor = {edges_[size_t(edge)].target, cursor.length + 1};
  }

  // The longest suffix of what was read after which the text goes on; `has_more`: also at its end.
  Match match(Cursor cursor, bool has_more) const {
    settle(cursor);
    while (cursor.state != 0) {
      const State& state = states_[size_t(cursor.state)];
      const int32_t next = state.end + 1;
      if (next == size() ? has_more : (*this)[next] != kTextEnd) return {cursor.length, next};
      cursor.state = state.link;
      cursor.length = states_[size_t(state.link)].length;
    }
    return {};
  }

 private:
  static constexpr int32_t kNone = -1;

  struct State {
    int32_t length = 0, link = 0;  // the first state is the empty string and its own link
    int32_t end = 0;               // one place where its strings end
    int32_t first_edge = kNone;
  };

  struct Edge {
    int32_t source, token, target;
    int32_t next;  // of the same source
  };

  int32_t add_state(const State& state) {
    states_.push_back(state);
    return int32_t(states_.size()) - 1;
  }

  // The state of the longest suffix that a new text shares with what stands at an edge's end; of
  // that state's strings some are longer, and then it is divided.
  int32_t suffix_state(int32_t state, int32_t edge, int32_t token) {
    const int32_t target = edges_[size_t(edge)].target;
    const State whole = states_[size_t(target)];
    const int32_t length = states_[size_t(state)].length + 1;
    if (length == whole.length) return target;
    const int32_t clone = add_state({length, whole.link, whole.end, kNone});
    for (int32_t e = whole.first_edge; e != kNone; e = edges_[size_t(e)].next) {
      add_edge(clone, edges_[size_t(e)].token, edges_[size_t(e)].target);
    }
    states_[size_t(target)].link = clone;
    while (edge != kNone && edges_[size_t(edge)].target == target) {
      edges_[size_t(edge)].target = clone;
      if (state == 0) break;
      state = states_[size_t(state)].link;
      edge = find(state, token);
    }
    return clone;
  }

  // A state may have been divided since the cursor came to it: its shorter strings are the link's.
  void settle(Cursor& cursor) const {
    while (cursor.state != 0) {
      const int32_t link = states_[size_t(cursor.state)].link;
      if (cursor.length > states_[size_t(link)].length) return;
      cursor.state = link;
    }
  }

  static uint64_t hash(int32_t state, int32_t token) {
    uint64_t key = (uint64_t(uint32_t(state)) << 32 | uint32_t(token)) * 0x9E3779B97F4A7C15u;
    return key ^ key >> 32;
  }

  int32_t find(int32_t state, int32_t token) const {
    if (table_.empty()) return kNone;
    const size_t mask = table_.size() - 1;
    for (size_t i = hash(state, token) & mask;; i = (i + 1) & mask) {
      const int32_t edge = table_[i];
      if (edge == kNone) return kNone;
      const Edge& found = edges_[size_t(edge)];
      if (found.source == state && found.token == token) return edge;
    }
  }

  void add_edge(int32_t source, int32_t token, int32_t target) {
    if (2 * (edges_.size() + 1) > table_.size()) grow_table();
    State& state = states_[size_t(source)];
    edges_.push_back({source, token, target, state.first_edge});
    state.first_edge = int32_t(edges_.size()) - 1;
    enter(state.first_edge);
  }

  void enter(int32_t edge) {
    const size_t mask = table_.size() - 1;
    size_t i = hash(edges_[size_t(edge)].source, edges_[size_t(edge)].token) & mask;
    while (table_[i] != kNone) i = (i + 1) & mask;
    table_[i] = edge;
  }

  void grow_table() {
    table_.assign(table_.empty() ? 16 : 2 * table_.size(), kNone);
    for (size_t edge = 0; edge < edges_.size(); ++edge) enter(int32_t(edge));
  }

  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<int32_t> table_;  // edges by hash, open addressing, at most half full
  std::vector<int32_t> text_;
  int32_t last_ = 0;
  Match repeated_;
};

}  // namespace codellama_rt
