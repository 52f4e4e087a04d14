# A hash over what a module is built from, compiled into it, so that a core that does not belong to the sources beside it
# is noticed. fedkern.ops._core.loading.source_hash computes the same.
file(GLOB_RECURSE FEDKERN_SOURCES RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cpp
     ${CMAKE_CURRENT_SOURCE_DIR}/*.h ${CMAKE_CURRENT_SOURCE_DIR}/*.cu ${CMAKE_CURRENT_SOURCE_DIR}/*.cuh)
list(SORT FEDKERN_SOURCES COMPARE STRING)
set(FEDKERN_CUDA_ONLY "^cuda/|^bindings/cuda|_cuda\\.h$")
set(FEDKERN_CPU_ONLY "^cpu/|^bindings/cpu")

# Gives `source` of a module the hash of all of csrc/ but what matches `others`.
function(fedkern_source_hash source others)
  set(lines "")
  foreach(name IN LISTS FEDKERN_SOURCES)
    if(NOT name MATCHES "${others}")
      file(SHA256 ${CMAKE_CURRENT_SOURCE_DIR}/${name} hash)
      string(APPEND lines "${name} ${hash}\n")
      set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${name})
    endif()
  endforeach()
  string(SHA256 hash "${lines}")
  string(SUBSTRING ${hash} 0 16 hash)
  set_source_files_properties(${source} PROPERTIES COMPILE_DEFINITIONS FEDKERN_SOURCE_HASH="${hash}")
endfunction()
