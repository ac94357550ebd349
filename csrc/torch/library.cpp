// Every operator's schema. Gradients that are not asked for come back as empty tensors.
#include "block_cache.h"
#include "operators.h"

namespace normfused::cpu {
const char* instruction_set();
bool use_instruction_set(const char* name);
}  // namespace normfused::cpu

namespace normfused::binding {
namespace {

std::string cpu_instruction_set() { return cpu::instruction_set(); }

void use_cpu_instruction_set(std::string name) {
  check(cpu::use_instruction_set(name.c_str()), "use_cpu_instruction_set",
        "name must be baseline, or avx2 or avx512 "
        "where the CPU has it, got '",
        name, "'");
}

}  // namespace

STABLE_TORCH_LIBRARY(normfused, m) {
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
  // What the CPU kernels run on; tests go through every set that the machine has.
  m.def("cpu_instruction_set() -> str");
  m.def("use_cpu_instruction_set(str name) -> ()");
  // The memory that is kept for outputs.
  m.def("empty_cache() -> int");
  m.def("set_cache_limit(int bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normfused, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
  m.impl("group_norm_act", TORCH_BOX(&group_norm_act));
  m.impl("group_norm_act_backward", TORCH_BOX(&group_norm_act_backward));
}

STABLE_TORCH_LIBRARY_IMPL(normfused, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("use_cpu_instruction_set", TORCH_BOX(&use_cpu_instruction_set));
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
  m.impl("set_cache_limit", TORCH_BOX(&set_cache_limit));
}

}  // namespace normfused::binding
