# Toolchain, included by zig-x86_64.cmake and zig-aarch64.cmake: libraries for glibc 2.28 and newer, made on any machine by the compiler
# of the Python package ziglang (in python3 on PATH). libc++ goes in statically: where they run they need glibc alone.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ${mra_machine})
set(CMAKE_CXX_COMPILER ${CMAKE_CURRENT_LIST_DIR}/zig/${mra_machine}/clang++)
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
# CUDA 13 takes libc++ on some systems only. Its headers then add isnan and isinf to those of libc++, but not where GNU's <math.h> was
# read; the kernels use neither, and what runs on the GPU is the same with both libraries.
# In the environment, where CMake's own first look at nvcc finds them.
set(mra_libcxx "-D_ALLOW_UNSUPPORTED_LIBCPP -D_GLIBCXX_MATH_H=1")
if(NOT "$ENV{CUDAFLAGS}" MATCHES _ALLOW_UNSUPPORTED_LIBCPP)
  set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} ${mra_libcxx}")
endif()
set(CMAKE_SHARED_LINKER_FLAGS_INIT -Wl,-s)
set(MRA_FINALIZE ON)  # Zig links no crtbeginS.o
