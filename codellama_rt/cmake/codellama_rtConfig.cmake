# codellama_rt's operators on the CPU, from the installed Python package:
#   find_package(codellama_rt CONFIG REQUIRED)
#   target_link_libraries(program PRIVATE codellama_rt::cpu)
# with -Dcodellama_rt_DIR=$(python -c "import codellama_rt; print(codellama_rt.get_cmake_dir())").
get_filename_component(_codellama_rt_package "${CMAKE_CURRENT_LIST_DIR}" DIRECTORY)
set(_codellama_rt_library "${_codellama_rt_package}/libcodellama_rt_cpu.so")
if(NOT EXISTS "${_codellama_rt_library}")
  set(codellama_rt_FOUND FALSE)
  set(codellama_rt_NOT_FOUND_MESSAGE
      "${_codellama_rt_library} does not exist: the package was not built")
  return()
endif()
if(NOT TARGET codellama_rt::cpu)
  add_library(codellama_rt::cpu SHARED IMPORTED)
  set_target_properties(codellama_rt::cpu PROPERTIES
    IMPORTED_LOCATION "${_codellama_rt_library}"
    INTERFACE_INCLUDE_DIRECTORIES "${_codellama_rt_package}/include")
endif()
