// The pybind11 module normfused._C: what was built, and how CUDA calls are divided. The operators live in libraries
// without Python symbols.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "kernels/cuda/devices.h"
#include "kernels/cuda/launch_plan.h"

#if defined(__clang__)
#define NORMFUSED_COMPILER_NAME ""
#else
#define NORMFUSED_COMPILER_NAME "g++ "
#endif

namespace py = pybind11;
using namespace normfused;

namespace {

constexpr const char* kMemoryFormats[] = {"contiguous", "channels_last"};
constexpr const char* kDtypes[] = {"float32", "float64", "bfloat16", "float16"};
constexpr const char* kDirections[] = {"forward", "backward"};
constexpr const char* kPaths[] = {"automatic", "empty", "one_kernel", "two_kernels", "block", "cluster", "cooperative"};
constexpr const char* kShapes[] = {"planes", "columns"};

// The enumerator of a name, by its place among the names.
template <class Enum, size_t n>
Enum parse(const std::string& what, const std::string& name, const char* const (&names)[n]) {
  std::string all;
  for (size_t i = 0; i < n; ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
    all += std::string(i > 0 ? ", " : "") + names[i];
  }
  throw std::invalid_argument(what + " must be one of " + all + ", got '" + name + "'");
}

const cuda::DeviceLimits& limits_of(const std::string& architecture) {
  if (const cuda::KnownDevice* device = cuda::known_device(architecture.c_str())) return device->limits;
  std::string all;
  for (const auto& device : cuda::kKnownDevices) all += std::string(all.empty() ? "" : ", ") + device.architecture;
  throw std::invalid_argument("device must be one of " + all + ", got '" + architecture + "'");
}

py::tuple view_tuple(const cuda::View& view) {
  return py::make_tuple(view.matrices, view.rows, view.channels, view.group);
}

// One kernel over the tensors: what its blocks are given, and its first launch.
py::dict pass_dict(const char* stage, const cuda::Pass& pass, const cuda::LaunchConfig& config) {
  py::dict info;
  info["stage"] = stage;
  info["shape"] = kShapes[static_cast<int>(pass.shape)];
  info["view"] = view_tuple(pass.view);
  info["vector"] = pass.vector;
  info["aligned"] = pass.aligned;
  info["splits"] = pass.splits;
  info["per_split"] = pass.per_split;
  if (pass.shape == cuda::Shape::planes) {
    info["slots_per_row"] = pass.slots_per_row;
  } else {
    info["tile_channels"] = pass.tile_channels;
    info["tile_vectors"] = pass.tile_vectors;
    info["row_groups"] = pass.row_groups;
  }
  info["grid"] = py::make_tuple(config.grid_x, config.grid_y);
  info["block"] = config.block;
  info["cluster"] = config.cluster;
  info["cooperative"] = config.cooperative;
  info["shared_bytes"] = config.shared_bytes;
  return info;
}

py::dict launch_plan(int64_t n, int64_t c, int64_t s, const std::string& memory_format, const std::string& dtype,
                     std::optional<int64_t> groups, const std::string& direction, bool reduces, bool residual,
                     bool aligned, const std::optional<std::string>& path, const std::string& device) {
  if (n < 0 || c < 1 || s < 0) throw std::invalid_argument("n and s must be >= 0 and c >= 1");
  if (groups && (*groups < 1 || c % *groups != 0)) throw std::invalid_argument("groups must divide c");
  if (groups && (!reduces || residual)) throw std::invalid_argument("GroupNorm always reduces and has no residual");
  const cuda::PlanRequest request = {
      .extent = {n, c, s, parse<MemoryFormat>("memory_format", memory_format, kMemoryFormats)},
      .dtype = parse<Dtype>("dtype", dtype, kDtypes),
      .groups = groups.value_or(0),
      .direction = parse<cuda::Direction>("direction", direction, kDirections),
      .reduces = reduces,
      .residual = residual,
      .aligned = aligned,
      .path = path ? parse<Path>("path", *path, kPaths) : Path::automatic};
  const cuda::LaunchPlan plan = cuda::plan_launches(request, limits_of(device));
  py::dict info;
  info["path"] = kPaths[static_cast<int>(plan.path)];
  info["view"] = view_tuple(plan.view);
  info["groups"] = plan.groups;
  info["chunks"] = plan.chunks();
  info["chunk"] = py::make_tuple(plan.chunk_matrices, plan.chunk_groups);
  info["workspace_bytes"] = plan.workspace_bytes;
  info["bytes_moved"] = plan.bytes_moved;
  py::list passes;
  if (plan.on_chip()) {
    py::dict held = pass_dict("on_chip", plan.reduce, cuda::on_chip_config(plan, 0));
    held["units"] = plan.units;
    held["units_per_launch"] = plan.units_per_launch;
    held["held"] = plan.held;
    passes.append(held);
  } else if (plan.path != Path::empty) {
    const auto add = [&](const char* stage, const cuda::Pass& pass, bool pass_reduces) {
      cuda::LaunchConfig config = cuda::pass_config(pass, plan.chunk(0), plan.groups, stage);
      if (pass_reduces) config.shared_bytes = pass.reduce_bytes;
      passes.append(pass_dict(stage, pass, config));
    };
    if (plan.path == Path::two_kernels) add("reduce", plan.reduce, true);
    add("apply", plan.apply, false);
  }
  info["passes"] = passes;
  return info;
}

}  // namespace

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
  m.def(
      "devices",
      [] {
        py::dict all;
        for (const auto& device : cuda::kKnownDevices) {
          const cuda::DeviceLimits& limits = device.limits;
          py::dict info;
          info["name"] = device.name;
          info["multiprocessors"] = limits.multiprocessors;
          info["threads_per_multiprocessor"] = limits.threads_per_multiprocessor;
          info["blocks_per_multiprocessor"] = limits.blocks_per_multiprocessor;
          info["shared_per_block"] = limits.shared_per_block;
          info["shared_per_multiprocessor"] = limits.shared_per_multiprocessor;
          info["shared_reserved_per_block"] = limits.shared_reserved_per_block;
          info["max_cluster"] = limits.max_cluster;
          info["l2_bytes"] = limits.l2_bytes;
          info["max_grid_x"] = limits.max_grid_x;
          info["max_grid_y"] = limits.max_grid_y;
          all[device.architecture] = info;
        }
        return all;
      },
      "The limits of each device that launch_plan() knows, by architecture.");
  m.def("launch_plan", &launch_plan,
        "How a CUDA call over an (n, c, s) input is divided into launches and blocks on a device.\n\n"
        "groups: None for BatchNorm. reduces: False where the statistics are given (evaluation). aligned: all tensors\n"
        "start at a multiple of 16 bytes. path: one to take where it can serve, by default the plan's own choice.\n"
        "Raises ValueError for sizes that no tensor has and for names that are not known.",
        py::arg("n"), py::arg("c"), py::arg("s"), py::arg("memory_format") = "contiguous", py::arg("dtype") = "float32",
        py::arg("groups") = py::none(), py::arg("direction") = "forward", py::arg("reduces") = true,
        py::arg("residual") = false, py::arg("aligned") = true, py::arg("path") = py::none(),
        py::arg("device") = "sm_90");
}
