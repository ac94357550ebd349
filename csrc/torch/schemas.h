// Every operator's schema, and what implements it. Gradients that are not asked for come back as empty tensors.
#pragma once

#include "operators.h"

namespace normfused::binding {

template <class Library>
void define_operators(Library& m) {
  m.def(
      "batch_norm_act(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "str? activation, str? pre_activation) -> (Tensor y, Tensor mean, Tensor invstd)");
  m.def(
      "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
      "Tensor invstd, bool training, str? activation, str? pre_activation, bool need_dx, bool need_dweight, "
      "bool need_dbias, bool need_dresidual) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
  m.def(
      "group_norm_act(Tensor x, Tensor? weight, Tensor? bias, int num_groups, float eps, str? activation) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
      "int num_groups, str? activation, bool need_dx, bool need_dweight, bool need_dbias) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias)");
}

// The same functions for every device: each library links device.h's for its own.
template <class Library>
void implement_operators(Library& m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
  m.impl("group_norm_act", TORCH_BOX(&group_norm_act));
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward));
}

}  // namespace normfused::binding
