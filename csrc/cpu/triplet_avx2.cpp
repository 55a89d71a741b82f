// The CPU backend compiled for AVX2, FMA and F16C. The flags are this file's alone (csrc/CMakeLists.txt); triplet.cpp picks
// at run time.
#include "simd_avx2.h"

#include "engine.h"

namespace facenet_ext::cpu {

const Kernels kernels_avx2 = {"avx2", run<Avx2>, run<Generic<double>>};

}  // namespace facenet_ext::cpu
