// How launch plans are chosen, for those who measure.
#pragma once

#include "../schemas.h"

namespace normfused::binding::device {

// Every later call is divided so where that can serve it. name: "automatic", "two_kernels", "block", "cluster" or
// "cooperative".
void use_launch_path(std::string name);

}  // namespace normfused::binding::device

namespace normfused::binding {

template <class Library>
void define_launch_path(Library& m) {
  m.def("use_launch_path(str name) -> ()");
}

template <class Library>
void implement_launch_path(Library& m) {
  m.impl("use_launch_path", TORCH_BOX(&device::use_launch_path));
}

}  // namespace normfused::binding
