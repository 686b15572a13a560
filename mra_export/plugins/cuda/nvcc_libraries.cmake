# An nvcc that came as a Python wheel keeps its libraries in lib, where it does not itself look. To be included before CUDA is enabled.
set(mra_nvcc "$ENV{CUDACXX}")
if(CMAKE_CUDA_COMPILER)
  set(mra_nvcc ${CMAKE_CUDA_COMPILER})
endif()
if(mra_nvcc)
  get_filename_component(mra_cuda_root ${mra_nvcc}/../.. ABSOLUTE)
  if(EXISTS ${mra_cuda_root}/lib/libcudart_static.a AND NOT EXISTS ${mra_cuda_root}/lib64)
    set(ENV{CUDAFLAGS} "$ENV{CUDAFLAGS} \"-L${mra_cuda_root}/lib\"")
    link_directories("${mra_cuda_root}/lib")  # CMake reads a folder out of nvcc's words up to its first space
  endif()
endif()
