# The device's sources: compiled by nvcc for the library, by the host's compiler for the emulator.
set(cuda_kernels
    attention/attention attention/attention_any attention/attention_float
    attention/attention_quantized attention/attention_wgmma linear/linear linear/linear_many
    ops/apply_rotary_pos_emb ops/copy_blocks ops/embedding ops/merge_attention ops/reshape_and_cache
    ops/rms_norm ops/rope_and_cache ops/silu_and_mul runtime/limits runtime/tensor_map)
set(cuda_host_sources
    bind/mindspore.cc common/check.cc common/launch.cc cuda/runtime/dispatch.cc
    cuda/runtime/runtime.cc)
