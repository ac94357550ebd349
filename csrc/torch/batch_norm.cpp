#include <cstdlib>

#include "device.h"
#include "operators.h"

namespace normfused::binding {
namespace {

// The pre_activation called so, which has to be one that the kernels apply together with the others.
Activation parse_pre_activation(const char* op, const Name& name, Activation activation,
                                const OptionalTensor& residual) {
  const Activation pre_activation = parse_activation(op, "pre_activation", name);
  check(!name || device::fuses_pre_activation(pre_activation, activation, residual.has_value()), op, "pre_activation '",
        name.value_or(""), "' is not part of a ", device::kType,
        " kernel with this activation and residual, apply it to x first");
  return pre_activation;
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
  device::BatchCount count(op, training ? num_batches_tracked : std::nullopt, x);
  const Activation act = parse_activation(op, "activation", activation);
  const Activation pre_act = parse_pre_activation(op, pre_activation, act, residual);
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
  const ChannelArrays affine(op, "weight", weight, "bias", bias, input);
  const ChannelArrays running(op, "running_mean", running_mean, "running_var", running_var, input);
  const OptionalTensor matched = residual ? OptionalTensor(input.match(op, "residual", *residual)) : std::nullopt;

  Tensor y = input.empty_like();
  Tensor mean = input.empty_statistics(e.C), invstd = input.empty_statistics(e.C);
  BatchNormForward args = {
      .dtype = input.dtype,
      .activation = act,
      .extent = e,
      .training = training,
      .momentum = 0,
      .eps = eps,
      .x = input.tensor.const_data_ptr(),
      .residual = matched ? matched->const_data_ptr() : nullptr,
      .weight = affine.first(),
      .bias = affine.second(),
      .running_mean = running.first(),
      .running_var = running.second(),
      .y = y.mutable_data_ptr(),
      .mean = mean.mutable_data_ptr(),
      .invstd = invstd.mutable_data_ptr(),
      .workspace = nullptr,
      .narrow_parameters = affine.narrow(),
      .narrow_running = running.narrow(),
      .pre_activation = pre_act,
  };
  count.set_momentum(momentum, args);
  device::run(op, input.tensor, args);
  count.done();
  if (training) running.write_back();
  return {y, mean, invstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(Tensor dy, Tensor x, OptionalTensor weight,
                                                                   OptionalTensor bias, OptionalTensor residual,
                                                                   Tensor mean, Tensor invstd, bool training,
                                                                   Name activation, Name pre_activation, bool need_dx,
                                                                   bool need_dweight, bool need_dbias,
                                                                   bool need_dresidual) {
  const char* op = "batch_norm_act_backward";
  const Activation act = parse_activation(op, "activation", activation);
  const Activation pre_act = parse_pre_activation(op, pre_activation, act, residual);
  const Input input(op, "x", x, Ambiguous::contiguous);
  const Extent& e = input.extent;
  check(residual.has_value() || !need_dresidual, op, "need_dresidual asks for the gradient of residual, which is None");
  const Tensor dys = input.match(op, "dy", dy);
  const ChannelArrays affine(op, "weight", weight, "bias", bias, input);
  const ChannelArrays statistics(op, "mean", mean, "invstd", invstd, input, /*may_be_narrow=*/false);
  const OptionalTensor matched = residual ? OptionalTensor(input.match(op, "residual", *residual)) : std::nullopt;

  Tensor dx = need_dx ? input.empty_like() : input.empty_output();
  Tensor dweight = input.empty_statistics(need_dweight ? e.C : 0);
  Tensor dbias = input.empty_statistics(need_dbias ? e.C : 0);
  Tensor dresidual = need_dresidual ? input.empty_like() : input.empty_output();
  BatchNormBackward args = {
      .dtype = input.dtype,
      .activation = act,
      .extent = e,
      .training = training,
      .dy = dys.const_data_ptr(),
      .x = input.tensor.const_data_ptr(),
      .residual = matched ? matched->const_data_ptr() : nullptr,
      .weight = affine.first(),
      .bias = affine.second(),
      .mean = statistics.first(),
      .invstd = statistics.second(),
      .dx = need_dx ? dx.mutable_data_ptr() : nullptr,
      .dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr,
      .dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr,
      .dresidual = need_dresidual ? dresidual.mutable_data_ptr() : nullptr,
      .workspace = nullptr,
      .narrow_parameters = affine.narrow(),
      .pre_activation = pre_act,
  };
  device::run(op, input.tensor, args);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace normfused::binding
