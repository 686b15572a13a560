# Toolchain file: the libraries of the aarch64 wheel (docs/install.md).
set(mra_machine aarch64)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
