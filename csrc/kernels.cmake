# The kernels of every instruction set that the target processor may have: shared by the Python module
# (CMakeLists.txt) and the tests (tests/CMakeLists.txt), which need no Python.

# Vector shuffles, and the OpenMP runtime that torch brings (libgomp), are GCC's.
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR CMAKE_CXX_COMPILER_VERSION VERSION_LESS 11)
  message(FATAL_ERROR "fastgpt's CPU kernels need GCC 11 or later, found "
                      "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}; CXX=g++ may name one")
endif()

option(FASTGPT_EMULATE "Build what the tests run in place of hardware: AMX's kernels, fastgpt._cuda_emulated" OFF)

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

# One kernel source, compiled once per instruction set; cpu/isa.h picks one when the program runs.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(isas baseline avx2 avx512 amx)
  set(isa_flags_baseline "")
  set(isa_flags_avx2 -mavx2 -mfma -mf16c)
  set(isa_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
  set(isa_flags_amx ${isa_flags_avx512} -mavx512bf16 -mamx-tile -mamx-bf16 -DFASTGPT_AMX)
  if(FASTGPT_EMULATE) # the same kernels where AMX is not, slowly, for tests
    list(APPEND isas amx_emulated)
    set(isa_flags_amx_emulated ${isa_flags_avx512} -DFASTGPT_AMX -DFASTGPT_EMULATE_AMX)
  endif()
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  set(isas baseline) # NEON is part of the aarch64 baseline
  set(isa_flags_baseline "")
else()
  set(isas baseline)
  set(isa_flags_baseline "")
endif()

# Every read and write checked, and undefined behaviour ends the process: `make sanitize`. At -O1, which compiles
# in two minutes.
option(FASTGPT_SANITIZE "Build with the address and undefined behaviour sanitizers" OFF)
set(optimize -O3)
if(FASTGPT_SANITIZE)
  set(optimize -O1)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all -g1)
  add_link_options(-fsanitize=address,undefined)
endif()

set(fastgpt_source_dir ${CMAKE_CURRENT_LIST_DIR})

# Compiles `source`, which is written for the vectors of simd.h, into one object library <name>_<isa> per
# instruction set; the list of their objects is <name>_objects.
macro(add_per_isa name source)
  set(${name}_objects "")
  foreach(isa IN LISTS isas)
    add_library(${name}_${isa} OBJECT ${source})
    target_include_directories(${name}_${isa} PRIVATE ${fastgpt_source_dir}/include)
    target_compile_definitions(${name}_${isa} PRIVATE FASTGPT_ISA=${isa})
    # -ffp-contract=fast: a * b + c becomes one fused multiply-add where the set has it.
    # -fno-math-errno, -fno-trapping-math: neither changes a value. Never -ffast-math: infinities are used.
    target_compile_options(
      ${name}_${isa} PRIVATE ${optimize} -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -Wall -Wextra
                             -Wno-maybe-uninitialized # GCC 12: its own intrinsics headers trip it
                             -fvisibility=hidden ${isa_flags_${isa}})
    list(APPEND ${name}_objects $<TARGET_OBJECTS:${name}_${isa}>)
  endforeach()
endmacro()

add_per_isa(kernels ${fastgpt_source_dir}/cpu/kernels.cpp)
