# -DFEDKERN_SANITIZE=address,undefined builds the core instrumented; run Python with the runtime preloaded:
#   LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 pytest
set(FEDKERN_SANITIZE "" CACHE STRING "Sanitizers for the core, as -fsanitize= takes them")
if(FEDKERN_SANITIZE)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${FEDKERN_SANITIZE}> $<$<COMPILE_LANGUAGE:CXX>:-fno-omit-frame-pointer>
                      $<$<COMPILE_LANGUAGE:CXX>:-g>)
  add_link_options(-fsanitize=${FEDKERN_SANITIZE})
endif()
