# Fails where an object compiled for a wide instruction set defines a weak symbol outside its own
# namespace: of all copies of such a symbol the linker keeps one, and it could be the wide one, for
# code that runs on processors without that set.
#   cmake -DNM=nm -DNAMESPACE=neuroada::cpu::avx512 -DOBJECTS=a.o,b.o -P check_symbols.cmake
string(REPLACE "," ";" OBJECTS "${OBJECTS}")
set(defined 0)
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [TtWwVvu] [^\n]+" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(symbol MATCHES " T ${NAMESPACE}::")
      math(EXPR defined "${defined} + 1")
    elseif(symbol MATCHES " [WwVvu] " AND NOT symbol MATCHES "${NAMESPACE}::|DW\\.ref\\.")
      # DW.ref.* is a pointer that exception tables use, the same from every compilation.
      message(SEND_ERROR "weak symbol outside ${NAMESPACE}: ${symbol} in ${object}")
    endif()
  endforeach()
endforeach()
# Objects without symbols, as link-time optimisation makes them, would pass unread.
if(defined EQUAL 0)
  message(SEND_ERROR "no function of ${NAMESPACE} in ${OBJECTS}")
endif()
