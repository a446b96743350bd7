# CUTLASS and CuTe headers: STATESCAN_CUTLASS_INCLUDE_DIR (CMake or environment), else the nvidia-cutlass package of the build
# interpreter, pinned in python/build_backend/statescan_build.py. Defines the target statescan_cutlass.
set(_cutlass "${STATESCAN_CUTLASS_INCLUDE_DIR}")
if(NOT _cutlass)
  set(_cutlass "$ENV{STATESCAN_CUTLASS_INCLUDE_DIR}")
endif()
if(NOT _cutlass AND Python_EXECUTABLE)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u, pathlib; s = u.find_spec('cutlass_library'); print(pathlib.Path(s.origin).parent / 'source' / 'include' if s else '')"
    OUTPUT_VARIABLE _cutlass OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
if(NOT EXISTS "${_cutlass}/cute/tensor.hpp")
  message(FATAL_ERROR "statescan: CUTLASS headers not found; pip install --no-deps nvidia-cutlass==4.2.0.0, or set STATESCAN_CUTLASS_INCLUDE_DIR")
endif()
# An isolated build has the headers in a new temporary folder each time; a link keeps the path stable for ccache.
file(CREATE_LINK "${_cutlass}" "${CMAKE_BINARY_DIR}/cutlass_include" SYMBOLIC)
add_library(statescan_cutlass INTERFACE)
target_include_directories(statescan_cutlass SYSTEM INTERFACE "${CMAKE_BINARY_DIR}/cutlass_include")
