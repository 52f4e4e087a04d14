# One hash over csrc/, compiled into the modules, so that a core that does not belong to the sources beside it is noticed.
# fedkern.ops.backend.source_hash computes the same.
file(GLOB_RECURSE FEDKERN_SOURCES RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/*.cpp
     ${CMAKE_CURRENT_SOURCE_DIR}/*.h ${CMAKE_CURRENT_SOURCE_DIR}/*.cu ${CMAKE_CURRENT_SOURCE_DIR}/*.cuh)
list(SORT FEDKERN_SOURCES COMPARE STRING)
set(lines "")
foreach(source IN LISTS FEDKERN_SOURCES)
  file(SHA256 ${CMAKE_CURRENT_SOURCE_DIR}/${source} hash)
  string(APPEND lines "${source} ${hash}\n")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${source})
endforeach()
string(SHA256 FEDKERN_SOURCE_HASH "${lines}")
string(SUBSTRING ${FEDKERN_SOURCE_HASH} 0 16 FEDKERN_SOURCE_HASH)

function(fedkern_source_hash source)
  set_source_files_properties(${source} PROPERTIES COMPILE_DEFINITIONS FEDKERN_SOURCE_HASH="${FEDKERN_SOURCE_HASH}")
endfunction()
