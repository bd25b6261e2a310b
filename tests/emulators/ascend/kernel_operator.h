// Ascend C as far as this project's kernels use it, emulated on the CPU that runs the tests.
//
// A kernel source that includes CANN's kernel_operator.h compiles unchanged against this one. What
// it computes is computed, and what it may not do is refused: accesses outside global tensors and
// buffers, addresses and lengths that are not multiples of 32 bytes, more unified buffer than there
// is, misused queues and events, reads of what nobody has written, accesses of two pipes, or of two
// cores, that nothing orders, and declarations that do not fit what the kernel does. It knows no
// time: nothing here says how fast a kernel is. Written from the public documentation of the
// interface; it contains no code of CANN.
#pragma once

#include "data_copy.h"
#include "declarations.h"
#include "launch.h"
#include "queues.h"
#include "register/op_def_registry.h"
#include "vector_ops.h"

#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR uint8_t*

namespace AscendC {

inline int64_t GetBlockIdx() { return ascend_emu::core().index; }
inline int64_t GetBlockNum() { return ascend_emu::core().num_cores; }
inline void SyncAll() { ascend_emu::Launcher::sync_all(); }
inline GM_ADDR GetUserWorkspace(GM_ADDR workspace) {
  return workspace + ascend_emu::kLibraryWorkspace;
}

}  // namespace AscendC
