# The CUDA kernels: sources, and what each is compiled for. nvcc is enough: no GPU, no CUDA build of torch.
set(cuda_sources runtime.cu norm.cu decode.cu)
set(hopper_sources attention_forward.cu attention_backward.cu hopper.cu) # instructions that no other chip has
list(TRANSFORM cuda_sources PREPEND ${CMAKE_CURRENT_LIST_DIR}/cuda/)
list(TRANSFORM hopper_sources PREPEND ${CMAKE_CURRENT_LIST_DIR}/cuda/)

# A module of the binding and the kernels; `ARGN` are sources of its own.
function(add_cuda_module name)
  pybind11_add_module(${name} MODULE NO_EXTRAS ${fastgpt_source_dir}/cuda/module.cpp ${cuda_sources} ${ARGN})
  target_include_directories(${name} PRIVATE ${fastgpt_source_dir}/include ${fastgpt_source_dir}/cuda)
  target_compile_definitions(${name} PRIVATE FASTGPT_MODULE=${name})
  target_compile_options(${name} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O2 -Wall -Wextra -fvisibility=hidden>)
  set_target_properties(${name} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR})
endfunction()

option(FASTGPT_CUDA "Build fastgpt._cuda" OFF)
if(FASTGPT_CUDA)
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
    message(FATAL_ERROR "fastgpt's CUDA kernels need nvcc 12.4 or later, found ${CMAKE_CUDA_COMPILER_VERSION} "
                        "(${CMAKE_CUDA_COMPILER})")
  endif()
  set(CMAKE_CUDA_STANDARD 17)
  # `real` is machine code; `virtual` is PTX, of which the driver makes code for chips newer than these.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 90-virtual)
  # Statistics are those of rounded values.
  set_source_files_properties(cuda/norm.cu PROPERTIES COMPILE_OPTIONS --fmad=false)
  # Many instances: the architectures are compiled side by side.
  set_source_files_properties(cuda/decode.cu PROPERTIES COMPILE_OPTIONS --threads=2)
  add_library(hopper OBJECT ${hopper_sources})
  set_target_properties(hopper PROPERTIES CUDA_ARCHITECTURES 90a-real POSITION_INDEPENDENT_CODE ON)
  target_include_directories(hopper PRIVATE include cuda)
  target_compile_options(hopper PRIVATE -Xcompiler=-Wall,-Wextra,-Wno-unused-parameter,-fvisibility=hidden)
  add_cuda_module(_cuda $<TARGET_OBJECTS:hopper>)
  target_compile_options(
    _cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-unused-parameter,-fvisibility=hidden>)
  set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static) # loads the driver when it is first used
endif()

if(FASTGPT_EMULATE)
  add_subdirectory(emulated)
endif()
