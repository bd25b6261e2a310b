// The GIL where the interpreter may be ending: a thread that asks for it then never gets it.
//
// Up to Python 3.13 the interpreter answers such a thread with pthread_exit, which unwinds its
// stack; on the way through C++ that meets a frame that may not throw (a destructor, pybind11's
// dispatcher) and ends the process by std::terminate. Asking beforehand whether the interpreter is
// ending would leave a gap between the question and the wait. So the unwinding is caught where it
// begins, and the thread sleeps until the process is gone, as it does by itself from Python 3.14
// on.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace codellama_rt {

// Runs code that may wait for the GIL, Python's own above all. Nothing in it may need destruction.
template <typename Body>
auto or_sleep_for_good(const Body& body) -> decltype(body()) {
  try {
    return body();
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
}

// Lets other threads have the GIL for the length of its life.
class GilReleased {
 public:
  GilReleased() : thread_(PyEval_SaveThread()) {}
  ~GilReleased() {
    or_sleep_for_good([&] { PyEval_RestoreThread(thread_); });
  }
  GilReleased(const GilReleased&) = delete;

 private:
  PyThreadState* thread_;
};

// Has the GIL for the length of its life, on a thread that may be any.
class GilHeld {
 public:
  GilHeld() : state_(or_sleep_for_good([] { return PyGILState_Ensure(); })) {}
  ~GilHeld() { PyGILState_Release(state_); }
  GilHeld(const GilHeld&) = delete;

 private:
  PyGILState_STATE state_;
};

}  // namespace codellama_rt
