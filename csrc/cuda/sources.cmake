# The device's sources: compiled by nvcc for the library, by the host's compiler for the emulator.
set(cuda_kernels
    apply_rotary_pos_emb attention attention_any attention_bf16 attention_f16 attention_quantized
    attention_wgmma copy_blocks cublaslt embedding flash_attention limits linear linear_many merge_attention
    paged_attention reshape_and_cache rms_norm rope_and_cache silu_and_mul tensor_map)
set(cuda_host_sources aot.cc check.cc launch.cc cuda/dispatch.cc cuda/runtime.cc)
