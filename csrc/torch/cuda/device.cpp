#include "../device.h"

#include <atomic>

#include "../../kernels/cuda/status.h"
#include "launch_path.h"
#include "stream.h"

namespace normfused::binding::device {
namespace {

using cuda::Status;

// For every call of the process, once chosen: tests and benchmarks go through the paths.
std::atomic<Path> chosen_path = Path::automatic;

void check_status(const char* op, Status status) { check(status == 0, op, "CUDA: ", cuda::status_message(status)); }

template <class Args>
void run_with(const char* op, const Tensor& x, Args& args, Status (*workspace)(const Args&, int64_t*),
              Status (*kernels)(const Args&, void*)) {
  const CurrentStream stream(x);
  args.path = chosen_path;
  int64_t bytes = 0;
  check_status(op, workspace(args, &bytes));
  // From torch's allocator, which may hand it on to the next call on this stream as soon as we return.
  OptionalTensor memory;
  if (bytes > 0) {
    memory = empty_vector(bytes, ScalarType::Byte, x);
    args.workspace = memory->mutable_data_ptr();
  }
  check_status(op, kernels(args, stream.get()));
}

}  // namespace

const bool kNarrowChannels = true;

bool fuses_pre_activation(Activation, Activation, bool) { return true; }

Tensor empty_output(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType scalar_type,
                    const Tensor& like, int64_t) {
  return empty_strided(sizes, strides, dim, scalar_type, like);
}

BatchCount::BatchCount(const char* op, const OptionalTensor& num_batches_tracked, const Tensor& x)
    : num_batches_tracked_(num_batches_tracked) {
  if (!num_batches_tracked) return;
  check_count(op, *num_batches_tracked, x);
  pending_ = true;
}

// The forward counts by itself; a call that did not get that far does so here.
BatchCount::~BatchCount() {
  if (!pending_) return;
  const CurrentStream stream(*num_batches_tracked_);
  cuda::count_batch(static_cast<int64_t*>(num_batches_tracked_->mutable_data_ptr()), stream.get());
}

void BatchCount::set_momentum(std::optional<double> momentum, BatchNormForward& args) const {
  args.momentum = momentum.value_or(0);
  if (!num_batches_tracked_) return;
  args.num_batches_tracked = static_cast<int64_t*>(num_batches_tracked_->mutable_data_ptr());
  args.cumulative = !momentum;
}

void run(const char* op, const Tensor& x, BatchNormForward& args) {
  run_with<BatchNormForward>(op, x, args, cuda::batch_norm_workspace, cuda::batch_norm_forward);
}

void run(const char* op, const Tensor& x, BatchNormBackward& args) {
  run_with<BatchNormBackward>(op, x, args, cuda::batch_norm_workspace, cuda::batch_norm_backward);
}

void run(const char* op, const Tensor& x, GroupNormForward& args) {
  run_with<GroupNormForward>(op, x, args, cuda::group_norm_workspace, cuda::group_norm_forward);
}

void run(const char* op, const Tensor& x, GroupNormBackward& args) {
  run_with<GroupNormBackward>(op, x, args, cuda::group_norm_workspace, cuda::group_norm_backward);
}

void use_launch_path(std::string name) {
  constexpr std::pair<const char*, Path> kPaths[] = {{"automatic", Path::automatic},
                                                     {"two_kernels", Path::two_kernels},
                                                     {"block", Path::block},
                                                     {"cluster", Path::cluster},
                                                     {"cooperative", Path::cooperative}};
  for (const auto& [known, path] : kPaths) {
    if (name == known) {
      chosen_path = path;
      return;
    }
  }
  check(false, "use_launch_path", "name must be automatic, two_kernels, block, cluster or cooperative, got '", name,
        "'");
}

}  // namespace normfused::binding::device
