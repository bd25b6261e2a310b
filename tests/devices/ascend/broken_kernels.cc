// Kernels that break a rule each, beside two that break none: what the emulator must say to them.
//
// All compute out = 2 * x for 256 floats, or would. `run_kernel` runs one on two cores with
// tensors of exactly that size and returns the emulator's message, or "".
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernel_operator.h"

namespace {

using namespace AscendC;

constexpr int32_t kCount = 128;  // floats a core
constexpr uint32_t kBytes = kCount * sizeof(float);

struct Memory {
  uint8_t *x, *out, *work;
};

using In = TQue<TPosition::VECIN, 2>;
using Out = TQue<TPosition::VECOUT, 2>;

// What a kernel has: x (2 * kCount) to read, out (2 * kCount) and work (2 * kCount) to write.
struct Kernel {
  explicit Kernel(const Memory& m) {
    x.SetGlobalBuffer(reinterpret_cast<float*>(m.x));
    out.SetGlobalBuffer(reinterpret_cast<float*>(m.out));
    work.SetGlobalBuffer(reinterpret_cast<float*>(m.work));
    begin = uint64_t(GetBlockIdx()) * kCount;
  }
  void init_queues() {
    pipe.InitBuffer(in_queue, 2, kBytes);
    pipe.InitBuffer(out_queue, 2, kBytes);
  }
  void init_buffers() {
    pipe.InitBuffer(a, kBytes);
    pipe.InitBuffer(b, kBytes);
  }
  void load(uint64_t from, uint32_t count = kCount) {
    LocalTensor<float> t = in_queue.AllocTensor<float>();
    DataCopy(t, x[from], count);
    in_queue.EnQue(t);
  }
  void compute() {
    LocalTensor<float> t = in_queue.DeQue<float>(), r = out_queue.AllocTensor<float>();
    Muls(r, t, 2.0f, kCount);
    out_queue.EnQue(r);
    in_queue.FreeTensor(t);
  }
  void store(uint64_t to) {
    LocalTensor<float> r = out_queue.DeQue<float>();
    DataCopy(out[to], r, kCount);
    out_queue.FreeTensor(r);
  }
  // By events instead of queues; `without` leaves one of them out.
  void by_events(const std::string& without) {
    init_buffers();
    LocalTensor<float> t = a.Get<float>(), r = b.Get<float>();
    DataCopy(t, x[begin], kCount);
    if (without != "MTE2_V") {
      SetFlag<HardEvent::MTE2_V>(0);
      WaitFlag<HardEvent::MTE2_V>(0);
    }
    Muls(r, t, 1.0f, kCount);
    if (without != "V_V") PipeBarrier<PIPE_V>();
    Muls(r, r, 2.0f, kCount);
    if (without != "V_MTE3") {
      SetFlag<HardEvent::V_MTE3>(1);
      WaitFlag<HardEvent::V_MTE3>(1);
    }
    DataCopy(out[begin], r, kCount);
  }

  TPipe pipe;
  In in_queue;
  Out out_queue;
  TBuf<TPosition::VECCALC> a, b;
  GlobalTensor<float> x, out, work;
  uint64_t begin;
};

using Body = std::function<void(Kernel&)>;

Body with_queues(const Body& body) {
  return [body](Kernel& k) {
    k.init_queues();
    body(k);
  };
}
Body with_buffers(const Body& body) {
  return [body](Kernel& k) {
    k.init_buffers();
    Duplicate(k.a.Get<float>(), 1.0f, kCount);
    Duplicate(k.b.Get<float>(), 1.0f, kCount);
    PipeBarrier<PIPE_ALL>();
    body(k);
  };
}

// ---- memory -------------------------------------------------------------------------------

std::map<std::string, Body> memory_kernels() {
  std::map<std::string, Body> k;
  k["good_queues"] = with_queues([](Kernel& k) {
    k.load(k.begin);
    k.compute();
    k.store(k.begin);
  });
  k["good_events"] = [](Kernel& k) { k.by_events(""); };
  k["global_read_outside"] = with_queues([](Kernel& k) { k.load(kCount + 8); });
  k["global_write_outside"] = with_queues([](Kernel& k) {
    k.load(k.begin);
    k.compute();
    k.store(kCount + 8);
  });
  k["global_write_of_an_input"] =
      with_buffers([](Kernel& k) { DataCopy(k.x[k.begin], k.a.Get<float>(), kCount); });
  k["global_past_its_buffer"] = with_queues([](Kernel& k) {
    k.x.SetGlobalBuffer(k.x.element(0, 1), kCount / 2);
    k.load(0);
  });
  k["global_offset_past_its_buffer"] = with_queues([](Kernel& k) {
    k.x.SetGlobalBuffer(k.x.element(0, 1), kCount);
    k.load(kCount + 8);
  });
  k["local_past_its_buffer"] =
      with_buffers([](Kernel& k) { Muls(k.a.Get<float>(), k.a.Get<float>(), 2.0f, kCount + 8); });
  k["local_offset_past_its_buffer"] = with_buffers([](Kernel& k) { k.a.Get<float>()[kCount + 8]; });
  k["misaligned_address"] =
      with_buffers([](Kernel& k) { Muls(k.b.Get<float>()[4], k.a.Get<float>()[4], 2.0f, 8); });
  k["misaligned_copy_length"] = with_queues([](Kernel& k) { k.load(k.begin, 12); });
  k["misaligned_store_length"] =
      with_buffers([](Kernel& k) { DataCopy(k.out[k.begin], k.a.Get<float>(), 12); });
  k["copy_of_too_many_blocks"] = with_buffers([](Kernel& k) {
    DataCopyPad(k.out[k.begin], k.a.Get<float>(), DataCopyExtParams(4096, 4, 0, 0, 0));
  });
  k["misaligned_buffer_length"] = [](Kernel& k) { k.pipe.InitBuffer(k.in_queue, 2, 20); };
  k["unified_buffer_overflow"] = [](Kernel& k) {
    k.pipe.InitBuffer(k.in_queue, 2, 64 * 1024);
    k.pipe.InitBuffer(k.out_queue, 2, 64 * 1024);
  };
  k["uninitialised"] = [](Kernel& k) {
    k.init_buffers();
    Muls(k.b.Get<float>(), k.a.Get<float>(), 2.0f, kCount);
  };
  k["uninitialised_tail"] = with_queues([](Kernel& k) {
    k.load(k.begin, kCount - 8);
    k.compute();
  });
  k["uninitialised_after_free"] = with_queues([](Kernel& k) {
    for (int i = 0; i < 2; ++i) {
      k.load(k.begin);
      k.compute();
      k.store(k.begin);
    }
    LocalTensor<float> t = k.in_queue.AllocTensor<float>(), r = k.out_queue.AllocTensor<float>();
    Muls(r, t, 2.0f, kCount);
  });
  k["partial_overlap"] =
      with_buffers([](Kernel& k) { Muls(k.a.Get<float>()[8], k.a.Get<float>(), 2.0f, 64); });
  k["no_elements"] =
      with_buffers([](Kernel& k) { Muls(k.a.Get<float>(), k.a.Get<float>(), 2.0f, 0); });
  k["rounding_of_what_is_widened"] = with_buffers(
      [](Kernel& k) { Cast(k.a.Get<float>(), k.b.Get<half>(), RoundMode::CAST_RINT, kCount); });
  k["mask_too_long"] = with_buffers([](Kernel& k) {
    Mul(k.a.Get<float>(), k.a.Get<float>(), k.b.Get<float>(), uint64_t(65), 1,
        BinaryRepeatParams(1, 1, 1, 8, 8, 8));
  });
  k["no_repeats"] = with_buffers([](Kernel& k) {
    Exp(k.a.Get<float>(), k.a.Get<float>(), uint64_t(64), 0, UnaryRepeatParams(1, 1, 8, 8));
  });
  k["copy_cuts_an_element"] = with_buffers([](Kernel& k) {
    DataCopyPad(k.out[k.begin], k.a.Get<float>(), DataCopyExtParams(1, 10, 0, 0, 0));
  });
  k["padding_on_the_left"] = with_queues([](Kernel& k) {
    LocalTensor<float> t = k.in_queue.AllocTensor<float>();
    DataCopyPad(t, k.x[k.begin], DataCopyExtParams(1, 24, 0, 0, 0),
                DataCopyPadExtParams<float>(true, 1, 0, 0.0f));
  });
  k["place_of_a_maximum"] = with_buffers([](Kernel& k) {
    WholeReduceMax(k.a.Get<float>(), k.b.Get<float>(), 64, 1, 1, 1, 8,
                   ReduceOrder::ORDER_VALUE_INDEX);
  });
  k["padding_too_long"] = with_queues([](Kernel& k) {
    LocalTensor<float> t = k.in_queue.AllocTensor<float>();
    DataCopyPad(t, k.x[k.begin], DataCopyExtParams(1, 24, 0, 0, 0),
                DataCopyPadExtParams<float>(true, 0, 3, 0.0f));
  });
  return k;
}

// ---- queues and events ----------------------------------------------------------------------

std::map<std::string, Body> queue_kernels() {
  std::map<std::string, Body> k;
  k["dequeue_empty"] = with_queues([](Kernel& k) { k.compute(); });
  k["allocate_too_many"] = with_queues([](Kernel& k) {
    for (int i = 0; i < 3; ++i) k.in_queue.AllocTensor<float>();
  });
  k["enqueue_twice"] = with_queues([](Kernel& k) {
    LocalTensor<float> t = k.in_queue.AllocTensor<float>();
    k.in_queue.EnQue(t);
    k.in_queue.EnQue(t);
  });
  k["queue_full"] = [](Kernel& k) {
    k.pipe.InitBuffer(k.in_queue, 3, kBytes);
    for (int i = 0; i < 3; ++i) k.load(k.begin);
  };
  k["free_twice"] = with_queues([](Kernel& k) {
    LocalTensor<float> t = k.in_queue.AllocTensor<float>();
    k.in_queue.FreeTensor(t);
    k.in_queue.FreeTensor(t);
  });
  k["tensor_of_another_queue"] = with_queues([](Kernel& k) {
    LocalTensor<float> t = k.in_queue.AllocTensor<float>();
    k.out_queue.EnQue(t);
  });
  k["free_of_another_queue"] = with_queues([](Kernel& k) {
    LocalTensor<float> t = k.in_queue.AllocTensor<float>();
    k.out_queue.FreeTensor(t);
  });
  k["more_queue_buffers_than_events"] = [](Kernel& k) {
    In other;
    k.pipe.InitBuffer(k.in_queue, 6, kBytes);
    k.pipe.InitBuffer(other, 3, kBytes);
  };
  k["more_buffers_than_a_pipe_has"] = [](Kernel& k) {
    for (int i = 0; i < 65; ++i) k.pipe.InitBuffer(k.a, kBytes);
  };
  k["never_freed"] = with_queues([](Kernel& k) { k.load(k.begin); });
  k["wait_without_set"] = [](Kernel&) { WaitFlag<HardEvent::MTE2_V>(0); };
  k["set_twice"] = [](Kernel&) {
    SetFlag<HardEvent::MTE2_V>(0);
    SetFlag<HardEvent::MTE2_V>(0);
  };
  k["set_and_left"] = [](Kernel&) { SetFlag<HardEvent::MTE2_V>(0); };
  k["no_such_event"] = [](Kernel&) { SetFlag<HardEvent::MTE2_V>(8); };
  return k;
}

// ---- order between pipes and cores ------------------------------------------------------------

std::map<std::string, Body> order_kernels() {
  std::map<std::string, Body> k;
  k["no_event_MTE2_V"] = [](Kernel& k) { k.by_events("MTE2_V"); };
  k["no_event_V_MTE3"] = [](Kernel& k) { k.by_events("V_MTE3"); };
  k["no_barrier_V_V"] = [](Kernel& k) { k.by_events("V_V"); };
  k["load_over_a_running_read"] = with_buffers([](Kernel& k) {
    Muls(k.b.Get<float>(), k.a.Get<float>(), 2.0f, kCount);
    DataCopy(k.a.Get<float>(), k.x[k.begin], kCount);
  });
  k["compute_over_a_running_store"] = with_buffers([](Kernel& k) {
    DataCopy(k.out[k.begin], k.a.Get<float>(), kCount);
    Muls(k.a.Get<float>(), k.b.Get<float>(), 2.0f, kCount);
  });
  k["used_after_free"] = with_queues([](Kernel& k) {
    k.load(k.begin);
    LocalTensor<float> t = k.in_queue.DeQue<float>(), r = k.out_queue.AllocTensor<float>();
    k.in_queue.FreeTensor(t);
    k.load(k.begin);
    k.load(k.begin);
    Muls(r, t, 2.0f, kCount);
  });
  k["passed_on_without_computing"] = with_queues([](Kernel& k) {
    k.load(k.begin);
    LocalTensor<float> t = k.in_queue.DeQue<float>();
    DataCopy(k.out[k.begin], t, kCount);
  });
  k["scalar_read_of_a_vector"] = with_buffers([](Kernel& k) {
    Muls(k.a.Get<float>(), k.b.Get<float>(), 2.0f, kCount);
    k.a.Get<float>().GetValue(0);
  });
  k["vector_read_of_a_scalar"] = with_buffers([](Kernel& k) {
    k.a.Get<float>().SetValue(0, 3.0f);
    Muls(k.b.Get<float>(), k.a.Get<float>(), 2.0f, kCount);
  });
  k["load_of_a_running_store"] = with_buffers([](Kernel& k) {
    DataCopy(k.work[k.begin], k.a.Get<float>(), kCount);
    DataCopy(k.b.Get<float>(), k.work[k.begin], kCount);
  });
  k["scalar_read_of_written_memory"] = with_buffers([](Kernel& k) {
    DataCopy(k.work[k.begin], k.a.Get<float>(), kCount);
    PipeBarrier<PIPE_ALL>();
    k.work.GetValue(k.begin);
  });
  k["two_cores_write"] =
      with_buffers([](Kernel& k) { DataCopy(k.work, k.a.Get<float>(), kCount); });
  const auto exchange = [](bool synchronised) {
    return with_buffers([synchronised](Kernel& k) {
      KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
      DataCopy(k.work[k.begin], k.a.Get<float>(), kCount);
      if (synchronised) SyncAll();
      PipeBarrier<PIPE_ALL>();
      DataCopy(k.b.Get<float>(), k.work[kCount - k.begin], kCount);
    });
  };
  k["exchange_without_sync_all"] = exchange(false);
  k["good_exchange"] = exchange(true);
  k["overwrites_what_another_core_reads"] = with_buffers([](Kernel& k) {
    if (GetBlockIdx() == 0) DataCopy(k.b.Get<float>(), k.work[kCount], kCount);
    if (GetBlockIdx() == 1) DataCopy(k.work[kCount], k.a.Get<float>(), kCount);
  });
  k["sync_all_on_one_core"] = [](Kernel&) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);
    if (GetBlockIdx() == 0) SyncAll();
  };
  return k;
}

// ---- what a kernel declares -------------------------------------------------------------------

struct Tiling {
  float numbers[2];
};
struct LongTiling {
  float numbers[2 * kCount + 1];
};

std::map<std::string, Body> declaring_kernels() {
  std::map<std::string, Body> k;
  const auto address = [](Kernel& k) { return reinterpret_cast<GM_ADDR>(k.x.element(0, 1)); };
  k["sync_all_of_vector_cores_alone"] = [](Kernel&) {
    KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
    SyncAll();
  };
  k["tiling_undeclared"] = [address](Kernel& k) {
    GET_TILING_DATA_WITH_STRUCT(Tiling, tiling, address(k));
  };
  k["tiling_of_another_struct"] = [address](Kernel& k) {
    REGISTER_TILING_DEFAULT(Tiling);
    GET_TILING_DATA_WITH_STRUCT(LongTiling, tiling, address(k));
  };
  k["tiling_longer_than_the_hosts"] = [address](Kernel& k) {
    REGISTER_TILING_DEFAULT(LongTiling);
    GET_TILING_DATA_WITH_STRUCT(LongTiling, tiling, address(k));
  };
  return k;
}

const std::map<std::string, Body>& kernels() {
  static const auto* all = [] {
    auto* k = new std::map<std::string, Body>(memory_kernels());
    for (const auto& named : queue_kernels()) k->insert(named);
    for (const auto& named : order_kernels()) k->insert(named);
    for (const auto& named : declaring_kernels()) k->insert(named);
    return k;
  }();
  return *all;
}

}  // namespace

#define CLRT_EXPORT extern "C" __attribute__((visibility("default")))

CLRT_EXPORT const char* run_kernel(const char* name, const float* x, float* out) {
  static std::string message;
  message.clear();
  std::vector<float> work(2 * kCount, 0.0f);
  const auto bytes = [](const float* p) {
    return reinterpret_cast<uint8_t*>(const_cast<float*>(p));
  };
  const Memory memory{bytes(x), bytes(out), bytes(work.data())};
  const Body& body = kernels().at(name);
  try {
    ascend_emu::Launcher::run(2,
                              {{memory.x, 2 * kBytes, false},
                               {memory.out, 2 * kBytes, true},
                               {memory.work, 2 * kBytes, true}},
                              [&] {
                                Kernel kernel(memory);
                                body(kernel);
                              });
  } catch (const ascend_emu::Violation& violation) {
    message = violation.what();
  }
  return message.c_str();
}

CLRT_EXPORT const char* kernel_names() {
  static std::string names;
  names.clear();
  for (const auto& named : kernels()) names += named.first + " ";
  return names.c_str();
}
