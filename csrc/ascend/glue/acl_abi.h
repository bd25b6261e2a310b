// The part of CANN's C interface that the glue calls, resolved by name at run time.
//
// Opaque types and plain integers: no header of CANN is needed to compile this, and its libraries
// only to run it. The ABI is CANN's, stable since 7.0: aclCreateTensor, aclCreateIntArray and the
// two phases of every aclnn operator.
#pragma once

#include <cstdint>

struct aclTensor;
struct aclIntArray;
struct aclOpExecutor;

namespace codellama_rt {
namespace ascend {

enum AclDataType : int { kAclFloat = 0, kAclFloat16 = 1, kAclInt32 = 3, kAclBFloat16 = 27 };
constexpr int kAclFormatNd = 2;

using CreateTensor = aclTensor* (*)(const int64_t* shape, uint64_t ndim, int dtype,
                                    const int64_t* strides, int64_t offset, int format,
                                    const int64_t* storage_shape, uint64_t storage_ndim,
                                    void* memory);
using DestroyTensor = int (*)(const aclTensor*);
using CreateIntArray = aclIntArray* (*)(const int64_t* values, uint64_t size);
using DestroyIntArray = int (*)(const aclIntArray*);
using RecentError = const char* (*)();
// The second phase of any operator; the first is its own: (arguments..., size, executor).
using Execute = int (*)(void* workspace, uint64_t size, aclOpExecutor* executor, void* stream);

}  // namespace ascend
}  // namespace codellama_rt
