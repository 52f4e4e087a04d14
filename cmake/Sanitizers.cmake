# -DFEDKERN_SANITIZE=address,undefined builds the core instrumented (preset "sanitize"); cmake/sanitize.sh does that and
# runs the operator tests with the runtimes preloaded, as a Python that is not instrumented itself needs.
set(FEDKERN_SANITIZE "" CACHE STRING "Sanitizers for the core, as -fsanitize= takes them")
if(FEDKERN_SANITIZE)
  # Instrumented kernels compile for minutes with more, and their stacks say less.
  set(FEDKERN_OPTIMIZE -O1)
  set(FEDKERN_OPTIMIZE_BINDINGS -O1)
  # What the undefined-behaviour sanitizer finds must stop the process: a test does not read stderr.
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${FEDKERN_SANITIZE}> $<$<COMPILE_LANGUAGE:CXX>:-fno-sanitize-recover=all>
                      $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer> $<$<COMPILE_LANGUAGE:CXX>:-g1>)
  add_link_options(-fsanitize=${FEDKERN_SANITIZE})
endif()
