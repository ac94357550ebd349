#include "../kernels/batch_norm.h"

#include <cstdlib>

#include "operators.h"

namespace normfused::binding {
namespace {

void check_no_pre_activation(const char* op, const Name& pre_activation) {
  check(!pre_activation, op, "pre_activation is not part of a CPU kernel, apply it to x first; got '",
        pre_activation.value_or(""), "'");
}

// Counts the batch and gives the weight of its statistics in the running ones; None averages cumulatively.
double count_batch(const char* op, const OptionalTensor& num_batches_tracked, std::optional<double> momentum) {
  if (!num_batches_tracked) return momentum.value_or(0);
  const Tensor& t = *num_batches_tracked;
  check(t.is_cpu() && t.scalar_type() == ScalarType::Long && t.numel() == 1, op,
        "num_batches_tracked must be one int64 on the CPU, got ", torch::headeronly::toString(t.scalar_type()),
        " of shape ", shape_of(t));
  int64_t& count = *static_cast<int64_t*>(t.mutable_data_ptr());
  ++count;
  return momentum ? *momentum : 1.0 / static_cast<double>(count);
}

// Running statistics are written in place: every channel needs a place of its own.
void check_not_expanded(const char* op, const char* argument, const OptionalTensor& t) {
  if (t) check(t->numel() <= 1 || t->stride(0) != 0, op, argument, " is written in place and must not be expanded");
}

// Both are written, channel by channel: a place that they share would hold whichever came last.
void check_disjoint(const char* op, const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  if (!running_mean || running_mean->numel() == 0 || running_mean->dim() != 1 || running_var->dim() != 1) return;
  const int64_t stride = running_mean->stride(0) * static_cast<int64_t>(running_mean->element_size());
  const int64_t distance = static_cast<const char*>(running_var->const_data_ptr()) -
                           static_cast<const char*>(running_mean->const_data_ptr());
  // Of other strides only the first places are compared.
  const bool same_strides = stride > 0 && running_var->stride(0) == running_mean->stride(0) && distance % stride == 0;
  check(distance != 0 && !(same_strides && std::abs(distance / stride) < running_mean->numel()), op,
        "running_mean and running_var are written in place and must not overlap");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                                  OptionalTensor residual, OptionalTensor running_mean,
                                                  OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                  bool training, std::optional<double> momentum, double eps,
                                                  Name activation, Name pre_activation) {
  const char* op = "batch_norm_act";
  // First, as in torch.nn.BatchNorm: a batch is counted even if something is wrong with it.
  const double factor = training ? count_batch(op, num_batches_tracked, momentum) : 0;
  check_no_pre_activation(op, pre_activation);
  const Activation act = parse_activation(op, "activation", activation);
  const Input input(op, "x", x, Ambiguous::contiguous);
  const Extent& e = input.extent;
  check(e.C > 0, op, "x must have at least one channel, got shape ", shape_of(x));
  if (training) {
    check(e.N * e.S != 1, op, "expected more than 1 value per channel when training, got x of shape ", shape_of(x));
    check(eps > 0, op, "eps must be positive when training, got ", eps);
    check(running_mean.has_value() == running_var.has_value(), op,
          "running_mean and running_var must both be given or both be None");
    check_not_expanded(op, "running_mean", running_mean);
    check_not_expanded(op, "running_var", running_var);
    check_disjoint(op, running_mean, running_var);
  } else {
    check(eps >= 0, op, "eps must not be negative, got ", eps);
    check(running_mean.has_value(), op, "running_mean must be given in evaluation");
    check(running_var.has_value(), op, "running_var must be given in evaluation");
  }
  const ChannelArray weights(op, "weight", weight, input), biases(op, "bias", bias, input);
  const ChannelArray running_means(op, "running_mean", running_mean, input);
  const ChannelArray running_vars(op, "running_var", running_var, input);
  const OptionalTensor matched = residual ? OptionalTensor(input.match(op, "residual", *residual)) : std::nullopt;

  Tensor y = input.empty_like();
  Tensor mean = input.empty_statistics(e.C), invstd = input.empty_statistics(e.C);
  const Workspace workspace(cpu::batch_norm_workspace(e));
  cpu::batch_norm_forward(
      {
          .dtype = input.dtype,
          .activation = act,
          .extent = e,
          .training = training,
          .momentum = factor,
          .eps = eps,
          .x = input.tensor.const_data_ptr(),
          .residual = matched ? matched->const_data_ptr() : nullptr,
          .weight = weights.data(),
          .bias = biases.data(),
          .running_mean = running_means.data(),
          .running_var = running_vars.data(),
          .y = y.mutable_data_ptr(),
          .mean = mean.mutable_data_ptr(),
          .invstd = invstd.mutable_data_ptr(),
          .workspace = workspace.data(),
      },
      parallel_for);
  if (training) {
    running_means.write_back();
    running_vars.write_back();
  }
  return {y, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(Tensor dy, Tensor x, OptionalTensor weight,
                                                                   OptionalTensor bias, OptionalTensor residual,
                                                                   Tensor mean, Tensor invstd, bool training,
                                                                   Name activation, Name pre_activation, bool need_dx,
                                                                   bool need_dweight, bool need_dbias,
                                                                   bool need_dresidual) {
  const char* op = "batch_norm_act_backward";
  check_no_pre_activation(op, pre_activation);
  const Activation act = parse_activation(op, "activation", activation);
  const Input input(op, "x", x, Ambiguous::contiguous);
  const Extent& e = input.extent;
  check(residual.has_value() || !need_dresidual, op, "need_dresidual asks for the gradient of residual, which is None");
  const Tensor dys = input.match(op, "dy", dy);
  const ChannelArray weights(op, "weight", weight, input), biases(op, "bias", bias, input);
  const ChannelArray means(op, "mean", mean, input), invstds(op, "invstd", invstd, input);
  const OptionalTensor matched = residual ? OptionalTensor(input.match(op, "residual", *residual)) : std::nullopt;

  Tensor dx = need_dx ? input.empty_like() : input.empty_output();
  Tensor dweight = input.empty_statistics(need_dweight ? e.C : 0);
  Tensor dbias = input.empty_statistics(need_dbias ? e.C : 0);
  Tensor dresidual = need_dresidual ? input.empty_like() : input.empty_output();
  const Workspace workspace(cpu::batch_norm_workspace(e));
  cpu::batch_norm_backward(
      {
          .dtype = input.dtype,
          .activation = act,
          .extent = e,
          .training = training,
          .dy = dys.const_data_ptr(),
          .x = input.tensor.const_data_ptr(),
          .residual = matched ? matched->const_data_ptr() : nullptr,
          .weight = weights.data(),
          .bias = biases.data(),
          .mean = means.data(),
          .invstd = invstds.data(),
          .dx = need_dx ? dx.mutable_data_ptr() : nullptr,
          .dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr,
          .dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr,
          .dresidual = need_dresidual ? dresidual.mutable_data_ptr() : nullptr,
          .workspace = workspace.data(),
      },
      parallel_for);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace normfused::binding
