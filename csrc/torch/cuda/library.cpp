// normfused::* on CUDA. The operators' schemas come with the CPU's library, in either order of loading.
#include "launch_path.h"

namespace normfused::binding {

STABLE_TORCH_LIBRARY_FRAGMENT(normfused, m) { define_launch_path(m); }

STABLE_TORCH_LIBRARY_IMPL(normfused, CompositeExplicitAutograd, m) { implement_launch_path(m); }

STABLE_TORCH_LIBRARY_IMPL(normfused, CUDA, m) { implement_operators(m); }

}  // namespace normfused::binding
