// normfused::*, with every schema, on the CPU.
#include "../schemas.h"
#include "block_cache.h"

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
  define_operators(m);
  // What the CPU kernels run on; tests go through every set that the machine has.
  m.def("cpu_instruction_set() -> str");
  m.def("use_cpu_instruction_set(str name) -> ()");
  // The memory that is kept for outputs.
  m.def("empty_cache() -> int");
  m.def("set_cache_limit(int bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(normfused, CPU, m) { implement_operators(m); }

STABLE_TORCH_LIBRARY_IMPL(normfused, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("use_cpu_instruction_set", TORCH_BOX(&use_cpu_instruction_set));
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
  m.impl("set_cache_limit", TORCH_BOX(&set_cache_limit));
}

}  // namespace normfused::binding
