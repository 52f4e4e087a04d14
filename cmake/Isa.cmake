# ISA levels of the CPU core. Each operator file is compiled once per level into namespace fedkern::<level>; isa.cpp
# picks a level at run time, so no file without such flags may be compiled for more than the baseline.
set(FEDKERN_ISA "auto" CACHE STRING "all levels, or auto: those of this machine but portable, of which AVX2 has no need")
set(FEDKERN_ISA_LEVELS portable avx2 avx512)
set(FEDKERN_FLAGS_portable "")
set(FEDKERN_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(FEDKERN_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512)
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(FEDKERN_ISA_LEVELS portable)
elseif(FEDKERN_ISA STREQUAL "auto" AND EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo flags REGEX "^flags" LIMIT_COUNT 1)
  if(NOT ("${flags} " MATCHES " avx2 " AND "${flags} " MATCHES " fma " AND "${flags} " MATCHES " f16c "))
    set(FEDKERN_ISA_LEVELS portable)
  elseif("${flags} " MATCHES " avx512f .*avx512dq .*avx512bw .*avx512vl ")
    set(FEDKERN_ISA_LEVELS avx2 avx512)
  else()
    set(FEDKERN_ISA_LEVELS avx2)
  endif()
endif()
message(STATUS "fedkern: kernels for ${FEDKERN_ISA_LEVELS}")

# -ffast-math would flush denormals for the whole process at link time, and contraction breaks error-free
# transformations: kernels that want a fused multiply-add ask for it by name.
set(FEDKERN_NUMERIC_FLAGS -fno-math-errno -fno-trapping-math -ffp-contract=off)

set(FEDKERN_OPTIMIZE -O3)
# Bindings have no loops worth more, and the portable level serves processors without AVX2 alone: a fifth of the build.
set(FEDKERN_OPTIMIZE_BINDINGS -O2)
set(FEDKERN_OPTIMIZE_portable -O2)
# As fast as with -O3, fuse a hundredth faster, and compiled in two thirds of the time; other operators lose up to half.
set(FEDKERN_OPTIMIZE_distill -O2)
# The same bits and as fast, compiled in two thirds of the time; -O2 alone takes an eighth longer, hence the loops that
# distill_lines.h and its neighbours unroll.
set(FEDKERN_OPTIMIZE_distill_ensemble -O2 -fpeel-loops)
set(FEDKERN_OPTIMIZE_fuse -O2)

# Relative to the folder that Ninja compiles in: nvcc cuts the value of -I at commas, which a checkout's path may hold.
file(REAL_PATH ${CMAKE_BINARY_DIR} FEDKERN_BUILD)
file(REAL_PATH ${CMAKE_CURRENT_SOURCE_DIR}/include FEDKERN_INCLUDE)
file(RELATIVE_PATH FEDKERN_INCLUDE ${FEDKERN_BUILD} ${FEDKERN_INCLUDE})

function(fedkern_target target)
  target_compile_options(${target} PRIVATE -I${FEDKERN_INCLUDE})
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra ${FEDKERN_OPTIMIZE_BINDINGS}>)
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${FEDKERN_OUTPUT_DIR})
  if(NOT FEDKERN_SANITIZE)
    target_link_options(${target} PRIVATE -Wl,--gc-sections -s)
  endif()
endfunction()

function(fedkern_isa_objects target source)
  get_filename_component(operator ${source} NAME_WE)
  foreach(level IN LISTS FEDKERN_ISA_LEVELS)
    set(objects ${operator}_${level})
    add_library(${objects} OBJECT ${source})
    set(optimize ${FEDKERN_OPTIMIZE})
    foreach(of IN ITEMS ${operator} ${level})
      if(DEFINED FEDKERN_OPTIMIZE_${of} AND NOT FEDKERN_SANITIZE)
        set(optimize ${FEDKERN_OPTIMIZE_${of}})
      endif()
    endforeach()
    target_compile_options(${objects} PRIVATE -I${FEDKERN_INCLUDE})
    target_compile_definitions(${objects} PRIVATE FEDKERN_ISA=${level} FEDKERN_ISA_${level}=1)
    target_compile_options(${objects} PRIVATE -Wall -Wextra ${optimize} ${FEDKERN_NUMERIC_FLAGS} ${FEDKERN_FLAGS_${level}})
    target_compile_definitions(${target} PRIVATE FEDKERN_HAS_${level}=1)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
    if(NOT FEDKERN_SANITIZE)
      # An inline function that leaves such a file could serve everybody, and crash an older CPU.
      add_custom_command(
        TARGET ${target} PRE_LINK VERBATIM
        COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM} "-DOBJECTS=$<TARGET_OBJECTS:${objects}>" -DLEVEL=${level}
                -DOPERATOR=${operator} -P ${CMAKE_CURRENT_SOURCE_DIR}/../cmake/CheckExports.cmake)
    endif()
  endforeach()
endfunction()
