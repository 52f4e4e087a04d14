# Fails when an ISA-specific object file defines anything global besides its operator's table.
execute_process(COMMAND ${NM} -C --defined-only --extern-only ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" lines "${symbols}")
foreach(line IN LISTS lines)
  if(line MATCHES " [A-Za-z] " AND NOT line MATCHES "fedkern::${LEVEL}::${OPERATOR}_table" AND NOT line MATCHES "DW.ref|__gxx_personality")
    message(FATAL_ERROR "csrc/cpu/${OPERATOR}.cpp compiled for ${LEVEL} exports '${line}'; put it into an anonymous namespace, "
                        "or use no inline function of the standard library that is not inlined")
  endif()
endforeach()
