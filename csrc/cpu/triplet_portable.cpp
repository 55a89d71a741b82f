// The CPU backend compiled for any machine. The flags are this file's alone (csrc/CMakeLists.txt); triplet.cpp picks at run
// time.
#include "simd_generic.h"

#include "engine.h"

namespace facenet_ext::cpu {

const Kernels kernels_portable = {"portable", run<Generic<float>>, run<Generic<double>>};

}  // namespace facenet_ext::cpu
