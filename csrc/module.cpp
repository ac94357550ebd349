// The pybind11 module normfused._C: what was built. The operators live in libraries without Python symbols.
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#if defined(__clang__)
#define NORMFUSED_COMPILER_NAME ""
#else
#define NORMFUSED_COMPILER_NAME "g++ "
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = NORMFUSED_COMPILER_NAME __VERSION__;
    info["torch"] = TORCH_VERSION;
    // Each empty if there is nothing to say.
    info["cuda_version"] = NORMFUSED_CUDA_VERSION;
    info["cuda_archs"] = NORMFUSED_CUDA_ARCHS;
    info["cuda_why_not"] = NORMFUSED_CUDA_WHY_NOT;
    return info;
  });
}
