#include "device.h"
#include "operators.h"

namespace normfused::binding {
namespace {

void check_groups(const char* op, int64_t num_groups, const Input& input) {
  check(num_groups > 0, op, "num_groups must be positive, got ", num_groups);
  check(input.extent.C > 0, op, "x must have at least one channel, got shape ", shape_of(input.tensor));
  check(input.extent.C % num_groups == 0, op, "num_groups must divide the channels of x, got ", num_groups,
        " for x of shape ", shape_of(input.tensor));
}

// Checks mean or rstd as the forward gives it; returns it dense.
Tensor check_statistics(const char* op, const char* argument, const Tensor& t, int64_t num_groups, const Input& input) {
  check_device(op, argument, t, input.tensor);
  check(t.scalar_type() == input.statistics_type() && t.dim() == 2 && t.size(0) == input.extent.N &&
            t.size(1) == num_groups && t.is_contiguous(),
        op, argument, " must be contiguous ", torch::headeronly::toString(input.statistics_type()), " of shape (",
        input.extent.N, ", ", num_groups, "), got ", torch::headeronly::toString(t.scalar_type()), " of shape ",
        shape_of(t));
  return t;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm_act(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                                  int64_t num_groups, double eps, Name activation) {
  const char* op = "group_norm_act";
  const Activation act = parse_activation(op, "activation", activation);
  const Input input(op, "x", x, Ambiguous::by_strides);
  check_groups(op, num_groups, input);
  check(input.extent.N != 1 || input.extent.numel() != num_groups, op,
        "expected more than 1 value per group, got x of shape ", shape_of(x), " with num_groups ", num_groups);
  const ChannelArrays affine(op, "weight", weight, "bias", bias, input);

  Tensor y = input.empty_like();
  Tensor mean = input.empty_statistics(input.extent.N, num_groups);
  Tensor rstd = input.empty_statistics(input.extent.N, num_groups);
  GroupNormForward args = {
      .dtype = input.dtype,
      .activation = act,
      .extent = input.extent,
      .groups = num_groups,
      .eps = eps,
      .x = input.tensor.const_data_ptr(),
      .weight = affine.first(),
      .bias = affine.second(),
      .y = y.mutable_data_ptr(),
      .mean = mean.mutable_data_ptr(),
      .rstd = rstd.mutable_data_ptr(),
      .workspace = nullptr,
      .narrow_parameters = affine.narrow(),
  };
  device::run(op, input.tensor, args);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act_backward(Tensor dy, Tensor x, OptionalTensor weight,
                                                           OptionalTensor bias, Tensor mean, Tensor rstd,
                                                           int64_t num_groups, Name activation, bool need_dx,
                                                           bool need_dweight, bool need_dbias) {
  const char* op = "group_norm_act_backward";
  const Activation act = parse_activation(op, "activation", activation);
  const Input input(op, "x", x, Ambiguous::by_strides);
  check_groups(op, num_groups, input);
  const Tensor dys = input.match(op, "dy", dy);
  const ChannelArrays affine(op, "weight", weight, "bias", bias, input);
  const Tensor means = check_statistics(op, "mean", mean, num_groups, input);
  const Tensor rstds = check_statistics(op, "rstd", rstd, num_groups, input);

  Tensor dx = need_dx ? input.empty_like() : input.empty_output();
  Tensor dweight = input.empty_statistics(need_dweight ? input.extent.C : 0);
  Tensor dbias = input.empty_statistics(need_dbias ? input.extent.C : 0);
  GroupNormBackward args = {
      .dtype = input.dtype,
      .activation = act,
      .extent = input.extent,
      .groups = num_groups,
      .dy = dys.const_data_ptr(),
      .x = input.tensor.const_data_ptr(),
      .weight = affine.first(),
      .bias = affine.second(),
      .mean = means.const_data_ptr(),
      .rstd = rstds.const_data_ptr(),
      .dx = need_dx ? dx.mutable_data_ptr() : nullptr,
      .dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr,
      .dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr,
      .workspace = nullptr,
      .narrow_parameters = affine.narrow(),
  };
  device::run(op, input.tensor, args);
  return {dx, dweight, dbias};
}

}  // namespace normfused::binding
