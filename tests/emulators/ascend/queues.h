// TPipe, TQue, TQueBind, TBuf: buffers of the unified buffer and their hand-over between pipes.
#pragma once

#include <deque>

#include "tensors.h"

namespace AscendC {

enum class TPosition { GM, VECIN, VECOUT, VECCALC };
using QuePosition = TPosition;

// The pipe that fills, and the one that empties, what lies at a position.
constexpr int filling_pipe(TPosition position) {
  return position == TPosition::VECIN ? PIPE_MTE2 : PIPE_V;
}
constexpr int emptying_pipe(TPosition position) {
  return position == TPosition::VECOUT ? PIPE_MTE3 : PIPE_V;
}

template <TPosition source, TPosition destination, int32_t depth>
class TQueBind {
 public:
  TQueBind() = default;
  TQueBind(const TQueBind&) = delete;

  template <typename T>
  LocalTensor<T> AllocTensor() {
    for (size_t i = 0; i < buffers_.size(); ++i) {
      Buffer& b = buffers_[i];
      if (b.state != State::kFree) continue;
      ascend_emu::core().learn(kFilling, b.clock);  // whoever emptied it last is done
      ascend_emu::core().forget(b.begin, b.bytes);
      ascend_emu::core().tensor_taken();
      b.state = State::kTaken;
      return {b.begin, b.bytes, int64_t(i)};
    }
    ascend_emu::fail("AllocTensor: every buffer of the queue is in use, the device would hang");
  }

  template <typename T>
  void EnQue(const LocalTensor<T>& tensor) {
    Buffer& b = buffer_of(tensor, "EnQue");
    if (b.state != State::kTaken) ascend_emu::fail("EnQue of a tensor that was not allocated");
    if (int32_t(waiting_.size()) >= depth) ascend_emu::fail("EnQue: the queue is full");
    b.state = State::kQueued;
    b.clock = ascend_emu::core().snapshot(kFilling);
    waiting_.push_back(tensor.buffer());
  }

  template <typename T>
  LocalTensor<T> DeQue() {
    if (waiting_.empty()) ascend_emu::fail("DeQue of an empty queue, the device would hang");
    const int64_t i = waiting_.front();
    waiting_.pop_front();
    Buffer& b = buffers_[size_t(i)];
    b.state = State::kTaken;
    ascend_emu::core().learn(kEmptying, b.clock);
    return {b.begin, b.bytes, i};
  }

  template <typename T>
  void FreeTensor(LocalTensor<T>& tensor) {
    Buffer& b = buffer_of(tensor, "FreeTensor");
    if (b.state != State::kTaken) {
      ascend_emu::fail("FreeTensor of a tensor that is not in use (freed twice, or queued)");
    }
    b.state = State::kFree;
    b.clock = ascend_emu::core().snapshot(kEmptying);
    ascend_emu::core().tensor_freed();
  }

  void init(uint8_t num, int64_t bytes) {
    if (bytes % ascend_emu::kBlock) {
      ascend_emu::fail("InitBuffer: the length is not a multiple of 32 bytes");
    }
    for (int i = 0; i < num; ++i) {
      const int64_t begin = ascend_emu::core().reserve_queued(int(source), bytes);
      buffers_.push_back({begin, bytes, State::kFree, {}});
    }
  }

 private:
  static constexpr int kFilling = filling_pipe(source);
  static constexpr int kEmptying = emptying_pipe(destination);
  enum class State { kFree, kTaken, kQueued };
  struct Buffer {
    int64_t begin, bytes;
    State state;
    ascend_emu::Clock clock;
  };

  template <typename T>
  Buffer& buffer_of(const LocalTensor<T>& tensor, const char* what) {
    const int64_t i = tensor.buffer();
    if (i < 0 || i >= int64_t(buffers_.size()) || buffers_[size_t(i)].begin != tensor.begin()) {
      ascend_emu::fail(std::string(what) + " of a tensor of another queue");
    }
    return buffers_[size_t(i)];
  }

  std::vector<Buffer> buffers_;
  std::deque<int64_t> waiting_;
};

template <TPosition position, int32_t depth>
using TQue = TQueBind<position, position, depth>;

template <TPosition position = TPosition::VECCALC>
class TBuf {
 public:
  template <typename T>
  LocalTensor<T> Get() const {
    return {begin_, bytes_, -1};
  }
  void init(int64_t bytes) {
    bytes_ = (bytes + ascend_emu::kBlock - 1) / ascend_emu::kBlock * ascend_emu::kBlock;
    begin_ = ascend_emu::core().reserve(bytes_);
  }

 private:
  int64_t begin_ = 0, bytes_ = 0;
};

class TPipe {
 public:
  template <typename Queue>
  void InitBuffer(Queue& queue, uint8_t num, uint32_t bytes) {
    queue.init(num, bytes);
  }
  template <TPosition position>
  void InitBuffer(TBuf<position>& buffer, uint32_t bytes) {
    buffer.init(bytes);
  }
};

// ---- events and barriers ------------------------------------------------------------------

enum class HardEvent {
  MTE2_V,
  V_MTE2,
  MTE3_V,
  V_MTE3,
  MTE2_MTE3,
  MTE3_MTE2,
  V_S,
  S_V,
  MTE2_S,
  S_MTE2,
  MTE3_S,
  S_MTE3
};
// clang-format off
constexpr int kEventPipes[][2] = {
    {PIPE_MTE2, PIPE_V}, {PIPE_V, PIPE_MTE2}, {PIPE_MTE3, PIPE_V}, {PIPE_V, PIPE_MTE3},
    {PIPE_MTE2, PIPE_MTE3}, {PIPE_MTE3, PIPE_MTE2}, {PIPE_V, PIPE_S}, {PIPE_S, PIPE_V},
    {PIPE_MTE2, PIPE_S}, {PIPE_S, PIPE_MTE2}, {PIPE_MTE3, PIPE_S}, {PIPE_S, PIPE_MTE3}};
// clang-format on

template <HardEvent event>
void SetFlag(int32_t id) {
  const auto& pipes = kEventPipes[int(event)];
  ascend_emu::core().set_flag(pipes[0], pipes[1], id);
}
template <HardEvent event>
void WaitFlag(int32_t id) {
  const auto& pipes = kEventPipes[int(event)];
  ascend_emu::core().wait_flag(pipes[0], pipes[1], id);
}
template <pipe_t pipe>
void PipeBarrier() {
  ascend_emu::core().barrier(pipe);
}

}  // namespace AscendC
