// The entry points of one instruction set, gathered; compiled once per instruction set.
#include "ops.h"

#define CLRT_STRING_(x) #x
#define CLRT_STRING(x) CLRT_STRING_(x)

namespace codellama_rt {
namespace CLRT_ISA {

#define CLRT_OP(name, Params, signature) void name(const Params&);
#define CLRT_DIRECT_OP(name, Params, signature) void name(const Params&);
#include "ops.def"
void read_memory(const void* memory, int64_t bytes);
int64_t multiply_add(Arithmetic arithmetic, int64_t num_rounds);
void fused_linear(const FusedLinearParams&);
DType linear_input(DType weight_dtype);

extern const KernelTable table;
const KernelTable table = {
    CLRT_STRING(CLRT_ISA),
#define CLRT_OP(name, Params, signature) name,
#define CLRT_DIRECT_OP(name, Params, signature) name,
#include "ops.def"
    read_memory,   // probe
    multiply_add,  // probe
    fused_linear,  // decoder_layer's
    linear_input,  // decoder_layer's
};

}  // namespace CLRT_ISA
}  // namespace codellama_rt
