// The CPU backend compiled for AVX-512 F, BW, DQ and VL. The flags are this file's alone (csrc/CMakeLists.txt); triplet.cpp
// picks at run time.
#include "simd_avx512.h"

#include "engine.h"

namespace facenet_ext::cpu {

const Kernels kernels_avx512 = {"avx512", run<Avx512>, run<Generic<double>>};

}  // namespace facenet_ext::cpu
