# FEDKERN_CUDA=auto builds fedkern._cuda where an nvcc is found that works, 1 insists on it, 0 leaves it out.
set(FEDKERN_CUDA auto CACHE STRING "auto, 0 or 1")
set(FEDKERN_CUDA_ENABLED OFF)
if(NOT FEDKERN_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "FEDKERN_CUDA is '${FEDKERN_CUDA}'; it takes auto, 0 or 1")
endif()

# Sets FEDKERN_NVCC to the compiler to try, or to nothing, in the order in which CMake would look.
macro(fedkern_find_nvcc)
  set(FEDKERN_NVCC "${CMAKE_CUDA_COMPILER}")
  if(NOT FEDKERN_NVCC)
    set(FEDKERN_NVCC "$ENV{CUDACXX}")
  endif()
  if(NOT FEDKERN_NVCC)
    find_program(FEDKERN_NVCC_FOUND nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
    if(FEDKERN_NVCC_FOUND)
      set(FEDKERN_NVCC "${FEDKERN_NVCC_FOUND}")
    endif()
  endif()
endmacro()

# Sets `problem` to why `nvcc` cannot build the core, or to nothing. enable_language() would stop everything, and
# check_language() keeps the reason to itself; so a project of its own asks for all that the core needs.
function(fedkern_try_nvcc nvcc problem)
  set(${problem} "" PARENT_SCOPE)
  execute_process(COMMAND ${nvcc} --version RESULT_VARIABLE result OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(NOT result EQUAL 0)
    string(STRIP "${said}" said)
    string(REGEX REPLACE "\n.*" "" said "${said}")
    set(${problem} "it does not run (--version: ${result}) ${said}" PARENT_SCOPE)
    return()
  endif()
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/FedkernTryCuda)
  file(REMOVE_RECURSE ${folder})
  file(WRITE ${folder}/CMakeLists.txt
       "cmake_minimum_required(VERSION 3.24)\n"
       "project(try LANGUAGES CXX CUDA)\n"
       "find_package(CUDAToolkit REQUIRED)\n"
       "if(NOT TARGET CUDA::cudart_static)\n"
       "  message(FATAL_ERROR \"the CUDA toolkit has no static runtime (libcudart_static)\")\n"
       "endif()\n")
  set(passed "")
  foreach(name IN ITEMS CMAKE_MAKE_PROGRAM CMAKE_TOOLCHAIN_FILE CMAKE_CXX_COMPILER CMAKE_CUDA_HOST_COMPILER CUDAToolkit_ROOT)
    if(${name})
      list(APPEND passed "-D${name}=${${name}}")
    endif()
  endforeach()
  execute_process(
    COMMAND ${CMAKE_COMMAND} -S ${folder} -B ${folder}/build -G ${CMAKE_GENERATOR} ${passed} -DCMAKE_CUDA_COMPILER=${nvcc}
            -DCMAKE_CUDA_ARCHITECTURES=80
    RESULT_VARIABLE result OUTPUT_VARIABLE said ERROR_VARIABLE said)
  if(NOT result EQUAL 0)
    # The first error alone, without its heading and the files of CMake it comes from.
    if(said MATCHES "CMake Error[^\n]*\n(.*)")
      set(said "${CMAKE_MATCH_1}")
      string(FIND "${said}" "\nCall Stack" end)
      string(SUBSTRING "${said}" 0 ${end} said)
    endif()
    string(REGEX REPLACE "[ \n]+" " " said "CMake says: ${said}")
    string(STRIP "${said}" said)
    set(${problem} "${said}" PARENT_SCOPE)
  endif()
endfunction()

# Sets `result` to the kinds of this machine's GPUs that the kernels and `nvcc` know, or to the oldest where it has none. All of
# them also as PTX, which newer GPUs translate; the core tells fedkern.ops._core.devices what it was built for.
function(fedkern_architectures nvcc result)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE gpus ERROR_QUIET RESULT_VARIABLE absent)
  execute_process(COMMAND ${nvcc} --list-gpu-code OUTPUT_VARIABLE known ERROR_QUIET)
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" gpus "${gpus}")
  set(found "")
  foreach(gpu IN LISTS gpus)
    string(REPLACE "." "" gpu ${gpu})
    if(gpu GREATER_EQUAL 80 AND known MATCHES "sm_${gpu}\n")
      list(APPEND found ${gpu})
    endif()
  endforeach()
  if(NOT found)
    set(found 80)
  endif()
  list(REMOVE_DUPLICATES found)
  set(${result} ${found} PARENT_SCOPE)
endfunction()

if(NOT FEDKERN_CUDA STREQUAL "0")
  fedkern_find_nvcc()
  if(FEDKERN_NVCC)
    fedkern_try_nvcc(${FEDKERN_NVCC} FEDKERN_NVCC_PROBLEM)
    if(NOT FEDKERN_NVCC_PROBLEM)
      set(FEDKERN_CUDA_ENABLED ON)
    elseif(FEDKERN_CUDA STREQUAL "1")
      message(FATAL_ERROR "FEDKERN_CUDA=1, but ${FEDKERN_NVCC} cannot build the CUDA core: ${FEDKERN_NVCC_PROBLEM}")
    else()
      message(WARNING "fedkern: building for the CPU alone, because ${FEDKERN_NVCC} cannot build the CUDA core "
                      "(FEDKERN_CUDA=0 leaves it out without trying): ${FEDKERN_NVCC_PROBLEM}")
    endif()
  elseif(FEDKERN_CUDA STREQUAL "1")
    message(FATAL_ERROR "FEDKERN_CUDA=1, but no nvcc was found; put it on PATH, or set CUDACXX or CUDA_HOME")
  else()
    message(STATUS "fedkern: no nvcc found, building for the CPU alone (FEDKERN_CUDA=1 would insist)")
  endif()
endif()

if(FEDKERN_CUDA_ENABLED)
  set(CMAKE_CUDA_COMPILER ${FEDKERN_NVCC})
  # CMake's own variable of the environment, with which pip can ask for others.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND "$ENV{CUDAARCHS}" STREQUAL "")
    fedkern_architectures(${FEDKERN_NVCC} CMAKE_CUDA_ARCHITECTURES)
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  message(STATUS "fedkern: building the CUDA core with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
endif()

function(fedkern_cuda_target target)
  set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                                             CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}" CUDA_VISIBILITY_PRESET hidden)
  # -lineinfo: profilers and compute-sanitizer name lines; the code is the same.
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-O3 -lineinfo --expt-relaxed-constexpr -Xcompiler=-fvisibility=hidden -Xptxas=-v>)
  # A fifth of the size. What reads it came with CUDA 12.4: every driver that CUDA 13 runs on.
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
  endif()
  target_link_libraries(${target} PRIVATE CUDA::cudart_static)
endfunction()
