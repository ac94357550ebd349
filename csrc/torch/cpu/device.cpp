#include "../device.h"

#include <memory>

#include "block_cache.h"

namespace normfused::binding::device {
namespace {

// torch's thread pool, as the kernels want it.
void parallel_for(int64_t tasks, ParallelBody body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, body, context));
}

template <class Args>
void run_with(void (*kernel)(const Args&, ParallelFor), Args& args, int64_t workspace_bytes) {
  const std::unique_ptr<double[]> workspace(workspace_bytes ? new double[workspace_bytes / sizeof(double) + 1]
                                                            : nullptr);
  args.workspace = workspace.get();
  kernel(args, parallel_for);
}

}  // namespace

const char* const kType = "cpu";
const char* const kOutOfMemory = "DefaultCPUAllocator: can't allocate memory:";
const bool kNarrowChannels = false;

bool holds(const Tensor& t) { return t.is_cpu(); }

bool fuses_pre_activation(Activation pre_activation, Activation activation, bool residual) {
  return cpu::fuses_pre_activation(pre_activation, activation, residual);
}

Tensor empty_output(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType scalar_type,
                    const Tensor& like, int64_t bytes) {
  return empty_cached(sizes, strides, dim, scalar_type, like, bytes);
}

BatchCount::BatchCount(const char* op, const OptionalTensor& num_batches_tracked, const Tensor& x)
    : num_batches_tracked_(num_batches_tracked) {
  if (!num_batches_tracked) return;
  check_count(op, *num_batches_tracked, x);
  ++*static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
}

BatchCount::~BatchCount() = default;

void BatchCount::set_momentum(std::optional<double> momentum, BatchNormForward& args) const {
  if (momentum || !num_batches_tracked_) {
    args.momentum = momentum.value_or(0);
  } else {
    args.momentum = 1.0 / static_cast<double>(*static_cast<const int64_t*>(num_batches_tracked_->const_data_ptr()));
  }
}

void run(const char*, const Tensor&, BatchNormForward& args) {
  run_with(cpu::batch_norm_forward, args, cpu::batch_norm_workspace(args.extent));
}

void run(const char*, const Tensor&, BatchNormBackward& args) {
  run_with(cpu::batch_norm_backward, args, cpu::batch_norm_workspace(args.extent));
}

void run(const char*, const Tensor&, GroupNormForward& args) {
  run_with(cpu::group_norm_forward, args, cpu::group_norm_workspace(args.extent, args.groups));
}

void run(const char*, const Tensor&, GroupNormBackward& args) {
  run_with(cpu::group_norm_backward, args, cpu::group_norm_workspace(args.extent, args.groups));
}

}  // namespace normfused::binding::device
