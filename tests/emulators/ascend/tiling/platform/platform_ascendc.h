// See op_def_registry.h: what op_host asks about the machine.
#pragma once

#include "register/op_def_registry.h"

namespace platform_ascendc {

class PlatformAscendC {
 public:
  explicit PlatformAscendC(fe::PlatFormInfos* infos) : infos_(infos) {}
  uint32_t GetCoreNumAiv() const { return infos_->num_vector_cores; }
  uint32_t GetLibApiWorkSpaceSize() const { return ascend_emu::kLibraryWorkspace; }

 private:
  fe::PlatFormInfos* infos_;
};

}  // namespace platform_ascendc
