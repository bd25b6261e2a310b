# libcodellama_rt_cuda.so and _cuda, where an NVIDIA driver and an nvcc are, or on request. nvcc is
# taken from the path, or from the pip wheels of the extra [cuda-build]. CMake's own CUDA language is
# not used: it does not find the wheels' parts.
set(CODELLAMA_RT_CUDA AUTO CACHE STRING "CUDA kernels: ON, OFF, or AUTO (with a driver and nvcc)")
if(NOT CODELLAMA_RT_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "CODELLAMA_RT_CUDA must be ON, OFF or AUTO, got '${CODELLAMA_RT_CUDA}'")
endif()
if(CODELLAMA_RT_CUDA STREQUAL "OFF")
  return()
endif()
if(CODELLAMA_RT_CUDA STREQUAL "AUTO")
  find_program(CODELLAMA_RT_NVIDIA_SMI nvidia-smi)
  find_library(CODELLAMA_RT_CUDA_DRIVER libcuda.so.1)
  if(NOT CODELLAMA_RT_NVIDIA_SMI AND NOT CODELLAMA_RT_CUDA_DRIVER AND NOT EXISTS /proc/driver/nvidia)
    message(STATUS "No NVIDIA driver: no CUDA kernels (CODELLAMA_RT_CUDA=ON compiles them anyway)")
    return()
  endif()
endif()

find_program(CODELLAMA_RT_NVCC nvcc HINTS ENV CUDA_HOME PATH_SUFFIXES bin)
if(NOT CODELLAMA_RT_NVCC)
  # Where Python looks for packages: pip's build environment is not its site-packages.
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import sys; print(';'.join(p for p in sys.path if p))"
    OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  list(TRANSFORM packages APPEND /nvidia/cu13/bin)
  find_program(CODELLAMA_RT_NVCC nvcc PATHS ${packages} NO_DEFAULT_PATH)
endif()
if(CODELLAMA_RT_NVCC)
  get_filename_component(cuda_root ${CODELLAMA_RT_NVCC} REALPATH)
  get_filename_component(cuda_root ${cuda_root} DIRECTORY)
  get_filename_component(cuda_root ${cuda_root} DIRECTORY)
  find_library(CODELLAMA_RT_CUDART cudart_static NO_DEFAULT_PATH
               PATHS ${cuda_root} /usr/local/cuda PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib)
endif()
if(NOT CODELLAMA_RT_NVCC OR NOT CODELLAMA_RT_CUDART)
  if(CODELLAMA_RT_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CODELLAMA_RT_CUDA=ON, but there is no nvcc with libcudart_static; "
                        "the wheels of codellama_rt's extra cuda-build have both")
  endif()
  message(STATUS "No nvcc: no CUDA kernels")
  return()
endif()
message(STATUS "CUDA kernels by ${CODELLAMA_RT_NVCC}")

include(${CMAKE_CURRENT_LIST_DIR}/sources.cmake)
set(csrc ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
file(GLOB cuda_headers ${csrc}/cuda/*/*.h ${csrc}/cuda/*/*.cuh ${csrc}/common/*.h ${csrc}/*.h)
# Machine code for Ampere and for Hopper apart; what comes after them compiles the former's PTX.
set(CODELLAMA_RT_CUDA_ARCHITECTURES "80;90a" CACHE STRING "80, 90a or both")
set(nvcc_flags -O3 -std=c++17 -DCLRT_CUDA -I${csrc} -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas=-v
    -diag-suppress=177)
foreach(architecture ${CODELLAMA_RT_CUDA_ARCHITECTURES})
  set(code sm_${architecture})
  if(NOT architecture MATCHES "a$")
    set(code [${code},compute_${architecture}])
  endif()
  list(APPEND nvcc_flags -gencode=arch=compute_${architecture},code=${code})
endforeach()
set(cuda_objects)
foreach(stem ${cuda_kernels} runtime/runtime)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/cuda/${stem}.o)
  add_custom_command(
    OUTPUT ${object}
    COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/compile.py ${object}.log
            ${CODELLAMA_RT_NVCC} ${nvcc_flags} -c ${CMAKE_CURRENT_LIST_DIR}/${stem}.cu -o ${object}
    DEPENDS ${CMAKE_CURRENT_LIST_DIR}/${stem}.cu ${cuda_headers} VERBATIM)
  list(APPEND cuda_objects ${object})
endforeach()
set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)

# The host's part is compiled a second time, for this device.
set(host_sources ${cuda_host_sources})
list(TRANSFORM host_sources PREPEND ${csrc}/)
add_library(codellama_rt_cuda SHARED ${cuda_objects} ${host_sources})
target_compile_definitions(codellama_rt_cuda PRIVATE CLRT_CUDA)
target_link_libraries(codellama_rt_cuda PRIVATE ${CODELLAMA_RT_CUDART} Threads::Threads dl rt)
target_link_options(codellama_rt_cuda PRIVATE -Wl,-Bsymbolic -Wl,--exclude-libs,ALL
                    -Wl,--no-undefined)

pybind11_add_module(_cuda MODULE csrc/bind/python.cc csrc/cuda/runtime/module.cc)
target_compile_definitions(_cuda PRIVATE CLRT_CUDA)
target_link_libraries(_cuda PRIVATE codellama_rt_cuda)
set_target_properties(_cuda PROPERTIES INSTALL_RPATH "$ORIGIN" BUILD_WITH_INSTALL_RPATH ON)
install(TARGETS codellama_rt_cuda _cuda LIBRARY DESTINATION .)

# What the compiler said of registers and spills, for tools/inspect_cuda.py: of no use in a wheel.
install(CODE "file(GLOB logs \"${CMAKE_CURRENT_BINARY_DIR}/cuda/*/*.log\")
  file(WRITE \"${CMAKE_CURRENT_BINARY_DIR}/cuda/ptxas.txt\" \"\")
  foreach(log IN LISTS logs)
    file(READ \"\${log}\" text)
    file(APPEND \"${CMAKE_CURRENT_BINARY_DIR}/cuda/ptxas.txt\" \"\${text}\")
  endforeach()" COMPONENT development EXCLUDE_FROM_ALL)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/cuda/ptxas.txt DESTINATION . RENAME cuda_ptxas.txt
        COMPONENT development EXCLUDE_FROM_ALL)
