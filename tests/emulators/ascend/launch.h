// Runs a kernel on a number of emulated cores, which take turns: a core runs until it ends or
// reaches SyncAll. Each has a stack of its own (ucontext), so that the order is always the same.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>

#include "global_memory.h"

namespace ascend_emu {

class Launcher {
 public:
  // Throws Violation with what the kernel did wrong, and on which core.
  static void run(int64_t num_cores, std::vector<Region> regions,
                  const std::function<void()>& kernel) {
    GlobalMemory memory(std::move(regions));
    current_memory() = &memory;
    Launcher launcher(num_cores, kernel);
    active() = &launcher;
    launcher.run_all();
    active() = nullptr;
    current_memory() = nullptr;
    current_core() = nullptr;
    if (!launcher.error_.empty()) throw Violation(launcher.error_);
  }

  static void sync_all() {
    if (!core().has_sync) fail("SyncAll: the kernel is not declared KERNEL_TYPE_MIX_AIV_1_0");
    Launcher& launcher = *active();
    core().barrier(PIPE_ALL);
    Fiber& fiber = *launcher.fibers_[core().index];
    fiber.state = State::kWaiting;
    swapcontext(&fiber.context, &launcher.scheduler_);
    if (launcher.failed()) throw Abandoned();
  }

 private:
  enum class State { kReady, kWaiting, kEnded };
  struct Abandoned {};
  struct Fiber {
    Core core;
    ucontext_t context;
    std::vector<uint8_t> stack = std::vector<uint8_t>(256 * 1024);
    State state = State::kReady;
  };

  Launcher(int64_t num_cores, const std::function<void()>& kernel) : kernel_(kernel) {
    static thread_local std::vector<std::unique_ptr<Fiber>> pool;
    while (int64_t(pool.size()) < num_cores) pool.emplace_back(new Fiber);
    for (int64_t c = 0; c < num_cores; ++c) {
      Fiber& fiber = *pool[c];
      fibers_.push_back(&fiber);
      fiber.core.reset(c, num_cores);
      fiber.state = State::kReady;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Launcher::enter, 0);
    }
  }

  static Launcher*& active() {
    static thread_local Launcher* launcher = nullptr;
    return launcher;
  }
  bool failed() const { return !error_.empty(); }

  void run_all() {
    for (bool waiting = true; waiting;) {
      waiting = false;
      bool ended = false;
      for (Fiber* fiber : fibers_) {
        if (fiber->state == State::kEnded) continue;
        current_core() = &fiber->core;
        fiber->state = State::kReady;
        swapcontext(&scheduler_, &fiber->context);
        waiting |= fiber->state == State::kWaiting;
        ended |= fiber->state == State::kEnded;
      }
      if (waiting && ended && !failed()) {
        error_ = "a core ends while others wait in SyncAll, the device would hang";
      }
      current_memory()->next_epoch();
    }
  }

  static void enter() {
    Launcher& launcher = *active();
    try {
      launcher.kernel_();
      core().finish();
    } catch (const Violation& violation) {
      if (!launcher.failed()) {
        launcher.error_ = "core " + std::to_string(core().index) + ": " + violation.what();
      }
    } catch (const Abandoned&) {
    }
    launcher.fibers_[core().index]->state = State::kEnded;
  }

  const std::function<void()>& kernel_;
  std::vector<Fiber*> fibers_;
  ucontext_t scheduler_;
  std::string error_;
};

}  // namespace ascend_emu
