// The operators' C++ signatures, in the order of library.cpp's schemas.
#pragma once

#include "checks.h"

namespace normfused::binding {

using Name = std::optional<std::string>;

std::tuple<Tensor, Tensor, Tensor> batch_norm_act(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                                  OptionalTensor residual, OptionalTensor running_mean,
                                                  OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                  bool training, std::optional<double> momentum, double eps,
                                                  Name activation, Name pre_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act_backward(Tensor dy, Tensor x, OptionalTensor weight,
                                                                   OptionalTensor bias, OptionalTensor residual,
                                                                   Tensor mean, Tensor invstd, bool training,
                                                                   Name activation, Name pre_activation, bool need_dx,
                                                                   bool need_dweight, bool need_dbias,
                                                                   bool need_dresidual);

std::tuple<Tensor, Tensor, Tensor> group_norm_act(Tensor x, OptionalTensor weight, OptionalTensor bias,
                                                  int64_t num_groups, double eps, Name activation);

std::tuple<Tensor, Tensor, Tensor> group_norm_act_backward(Tensor dy, Tensor x, OptionalTensor weight,
                                                           OptionalTensor bias, Tensor mean, Tensor rstd,
                                                           int64_t num_groups, Name activation, bool need_dx,
                                                           bool need_dweight, bool need_dbias);

}  // namespace normfused::binding
