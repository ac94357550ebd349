// The operators' C++ signatures, in the order of schemas.h.
#pragma once

#include "checks.h"

namespace normfused::binding {

// A string argument. torch's own conversion to std::string leaks one with every call (pytorch#191340, until 2.14).
struct String : std::string {
  using std::string::string;
};
using Name = std::optional<String>;

}  // namespace normfused::binding

template <>
struct torch::stable::detail::ToImpl<normfused::binding::String> {
  static normfused::binding::String call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = torch::stable::detail::to<StringHandle>(value);
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    normfused::binding::String string(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return string;
  }
};

namespace normfused::binding {

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
