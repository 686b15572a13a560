# Toolchain file: the libraries of the x86_64 wheel (docs/install.md).
set(mra_machine x86_64)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
