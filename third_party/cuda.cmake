# Where nvcc comes from: CUDACXX, PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda; or, with STATESCAN_CUDA=wheels, the packages
# cuda-toolkit[nvcc,cccl] that the build backend asks for (python/build_backend/statescan_build.py pins them).

# Sets `result` to ON when CUDA kernels are to be built, and CMAKE_CUDA_COMPILER; else STATESCAN_CUDA_REASON says why not.
# Call before enable_language(CUDA).
function(statescan_find_cuda result)
  string(TOLOWER "${STATESCAN_CUDA}" mode)
  set(${result} OFF PARENT_SCOPE)
  if(mode MATCHES "^(off|0|no|false)$")
    set(STATESCAN_CUDA_REASON "STATESCAN_CUDA=${STATESCAN_CUDA}" PARENT_SCOPE)
    return()
  endif()
  if(mode STREQUAL "wheels")
    statescan_find_cuda_wheels(root)
    if(NOT root)
      message(FATAL_ERROR "statescan: STATESCAN_CUDA=wheels, but the cuda-toolkit[nvcc,cccl] packages are not installed for ${Python_EXECUTABLE}")
    endif()
    set(CMAKE_CUDA_COMPILER "${root}/bin/nvcc" CACHE FILEPATH "CUDA compiler" FORCE)
    # The packages have lib/ without lib64/, and no unversioned libcudart.so.
    set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${root}/lib" CACHE STRING "CUDA flags" FORCE)
    file(GLOB cudart "${root}/lib/libcudart.so.*")
    set(CUDA_CUDART "${cudart}" CACHE FILEPATH "CUDA runtime" FORCE)
  elseif(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(STATESCAN_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    if(STATESCAN_NVCC)
      set(CMAKE_CUDA_COMPILER "${STATESCAN_NVCC}" CACHE FILEPATH "CUDA compiler")
    elseif(mode STREQUAL "auto")
      set(STATESCAN_CUDA_REASON "no nvcc found; install the CUDA toolkit, or set STATESCAN_CUDA=wheels" PARENT_SCOPE)
      return()
    else()
      message(FATAL_ERROR "statescan: STATESCAN_CUDA=${STATESCAN_CUDA}, but no nvcc was found (PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda)")
    endif()
  endif()
  set(${result} ON PARENT_SCOPE)
endfunction()

function(statescan_find_cuda_wheels result)
  set(look [[
import importlib.util, pathlib
spec = importlib.util.find_spec("nvidia")
for base in spec.submodule_search_locations if spec else ():
    for root in sorted(pathlib.Path(base).glob("cu*"), reverse=True):
        if (root / "bin" / "nvcc").exists():
            print(root)
            raise SystemExit
]])
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "${look}" OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${result} "${root}" PARENT_SCOPE)
endfunction()

# Sets `result` to the architectures of this machine's GPUs that the compiler knows. Without one, to what two cores build in
# minutes: machine code for compute capability 9.0, and PTX, which the driver compiles at first use, for the others from 8.0 on.
function(statescan_local_architectures result)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE found ERROR_QUIET RESULT_VARIABLE status)
  if(NOT status STREQUAL "0")
    set(found "")
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" found "${found}")
  string(REPLACE "." "" found "${found}")
  list(REMOVE_DUPLICATES found)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE known)
  string(REGEX MATCHALL "sm_[0-9]+" known "${known}")
  set(architectures)
  foreach(number ${found})
    if("sm_${number}" IN_LIST known AND NOT number LESS 80)
      list(APPEND architectures ${number})
    endif()
  endforeach()
  if(NOT architectures)
    set(architectures 80-virtual 90)
  endif()
  list(TRANSFORM architectures REPLACE "^90$" "90a")  # kernels of Hopper's own instructions run on no other
  set(${result} "${architectures}" PARENT_SCOPE)
endfunction()
