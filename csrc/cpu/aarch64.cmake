# Toolchain of Debian's cross compiler (g++-aarch64-linux-gnu): the CPU library for Arm hosts.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
