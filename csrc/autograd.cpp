// normfused._autograd: the autograd functions of autograd.py in C++, whose calls cost the host less. LibTorch's stable
// ABI knows no autograd, so that this serves only the torch that it was built with; ops.py sees to that.

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_numbers.h>
#include <torch/csrc/utils/python_strings.h>

#include <array>

namespace normfused {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using Stack = torch::jit::Stack;

// A node of the graph for T, held as this torch holds nodes.
template <class T>
auto make_node() {
  using Node = torch::autograd::CppNode<T>;
  using Held = decltype(torch::autograd::Edge::function);
  if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>) {
    return std::shared_ptr<Node>(new Node, [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Node>();
  }
}

// Function<T>::apply for plain tensors, without forward-mode gradients (functional.py sees to that), and one result
// that is new: what it does besides takes as long as the operator's own code.
template <class T, class Options, class... Others>
Tensor apply(const Options& options, const Tensor& x, const Others&... others) {
  const auto node = make_node<T>();
  variable_list inputs;
  inputs.reserve(1 + sizeof...(others));
  node->is_variable_input_.reserve(1 + sizeof...(others));
  const auto take = [&](const OptionalTensor& t) {
    node->is_variable_input_.push_back(t.has_value());
    if (t) inputs.push_back(*t);
  };
  take(x);
  (take(others), ...);
  node->set_ctx_grad_fn(node);
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  node->clear_input_metadata();
  const Tensor y = T::forward(&node->ctx_, x, others..., options);
  torch::autograd::set_history(y, node);
  node->output_info_.emplace_back(y);
  node->save_variables_to_ctx();
  return y;
}

// CppNode<T>::apply, which makes the node's name up at every call.
template <class T>
variable_list apply_backward(torch::autograd::CppNode<T>& node, variable_list&& dy) {
  at::OptionalDeviceGuard guard;
  if (!dy[0].defined()) dy[0] = node.output_info_[0].zeros(guard);
  variable_list gradients = T::backward(&node.ctx_, std::move(dy)), wanted;
  wanted.reserve(gradients.size());
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (node.is_variable_input_[i]) wanted.push_back(std::move(gradients[i]));
  }
  return wanted;
}

// Calls an operator below autograd; returns its results.
Stack call(const c10::OperatorHandle& op, Stack arguments) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.callBoxed(arguments);
  return arguments;
}

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

// The formulas of reference.py, which can be differentiated themselves: for create_graph=True.
PyObject* differentiable_batch_norm = nullptr;
PyObject* differentiable_group_norm = nullptr;

// Calls such a formula; returns its tensors, of which those that are None are undefined.
variable_list call_formula(PyObject* formula, const Stack& arguments) {
  const pybind11::gil_scoped_acquire gil;
  pybind11::tuple tuple(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    const IValue& a = arguments[i];
    pybind11::object value = pybind11::none();
    if (a.isTensor()) value = pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(a.toTensor()));
    if (a.isBool()) value = pybind11::bool_(a.toBool());
    if (a.isInt()) value = pybind11::int_(a.toInt());
    if (a.isDouble()) value = pybind11::float_(a.toDouble());
    if (a.isString()) value = pybind11::str(a.toStringRef());
    tuple[i] = std::move(value);
  }
  const auto result = pybind11::reinterpret_steal<pybind11::tuple>(PyObject_CallObject(formula, tuple.ptr()));
  if (!result) {
    python_error error;
    error.persist();
    throw std::move(error);
  }
  variable_list tensors;
  for (const auto& t : result) tensors.push_back(t.is_none() ? Tensor() : THPVariable_Unpack(t.ptr()));
  return tensors;
}

IValue given(const Tensor& t) { return t.defined() ? IValue(t) : IValue(); }

struct BatchNormOptions {
  OptionalTensor running_mean, running_var, num_batches_tracked;
  bool training;
  IValue momentum, eps, activation, pre_activation;
};

Stack batch_norm_act(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const BatchNormOptions& o) {
  static const c10::OperatorHandle op = find("normfused::batch_norm_act");
  return call(op, {x, weight, bias, residual, o.running_mean, o.running_var, o.num_batches_tracked, o.training,
                   o.momentum, o.eps, o.activation, o.pre_activation});
}

}  // namespace

// With names that a profiler shows.
struct BatchNormAct : torch::autograd::Function<BatchNormAct> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const OptionalTensor& residual, const BatchNormOptions& o) {
    Stack results = batch_norm_act(x, weight, bias, residual, o);
    // Without an activation the gradient does not depend on z, hence not on bias and residual.
    const bool keeps_z = !o.activation.isNone();
    const auto kept = [&](const OptionalTensor& t) { return keeps_z ? t.value_or(Tensor()) : Tensor(); };
    ctx->save_for_backward({x, weight.value_or(Tensor()), kept(bias), kept(residual)});
    // Nobody else holds these, so that nothing can change them: no need for autograd's guard.
    ctx->saved_data.emplace("mean", results[1]);
    ctx->saved_data.emplace("invstd", results[2]);
    // One tuple, for compiled autograd would make inputs of its graph of numbers that are not in one.
    ctx->saved_data.emplace(
        "options", c10::ivalue::Tuple::create({o.training, o.eps, o.activation, o.pre_activation, weight.has_value(),
                                               bias.has_value(), residual.has_value()}));
    return results[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    static const c10::OperatorHandle op = find("normfused::batch_norm_act_backward");
    const variable_list saved = ctx->get_saved_variables();
    const c10::ArrayRef<IValue> o = ctx->saved_data.at("options").toTupleRef().elements().asArrayRef();
    const IValue &training = o[0], &eps = o[1], &activation = o[2], &pre_activation = o[3];
    // Edges are counted for the tensors that were given.
    std::array<bool, 4> need{};
    size_t edge = 0;
    for (size_t i = 0; i < 4; ++i) need[i] = (i == 0 || o[3 + i].toBool()) && ctx->needs_input_grad(edge++);
    const bool passes_dy = activation.isNone() && need[3];

    const Tensor& x = saved[0];
    const IValue &mean = ctx->saved_data.at("mean"), &invstd = ctx->saved_data.at("invstd");
    const IValue weight = given(saved[1]), bias = given(saved[2]), residual = given(saved[3]);
    variable_list gradients(4);
    if (at::GradMode::is_enabled()) {
      const variable_list all = call_formula(differentiable_batch_norm, {dy[0], x, weight, bias, residual, mean, invstd,
                                                                         training, eps, activation, pre_activation});
      for (size_t i = 0; i < 4; ++i) gradients[i] = need[i] ? all[i] : Tensor();
    } else {
      const Stack all = call(op, {dy[0], x, weight, bias, residual, mean, invstd, training, activation, pre_activation,
                                  need[0], need[1], need[2], need[3] && !passes_dy});
      for (size_t i = 0; i < 4; ++i) gradients[i] = need[i] ? all[i].toTensor() : Tensor();
    }
    if (passes_dy) gradients[3] = dy[0];
    return gradients;
  }
};

namespace {

struct GroupNormOptions {
  IValue num_groups, eps, activation;
};

Stack group_norm_act(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                     const GroupNormOptions& o) {
  static const c10::OperatorHandle op = find("normfused::group_norm_act");
  return call(op, {x, weight, bias, o.num_groups, o.eps, o.activation});
}

}  // namespace

struct GroupNormAct : torch::autograd::Function<GroupNormAct> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                        const GroupNormOptions& o) {
    Stack results = group_norm_act(x, weight, bias, o);
    ctx->save_for_backward({x, weight.value_or(Tensor()), o.activation.isNone() ? Tensor() : bias.value_or(Tensor()),
                            results[1].toTensor(), results[2].toTensor()});
    ctx->saved_data.emplace("options", c10::ivalue::Tuple::create(
                                           {o.num_groups, o.eps, o.activation, weight.has_value(), bias.has_value()}));
    return results[0].toTensor();
  }

  static variable_list backward(AutogradContext* ctx, variable_list dy) {
    static const c10::OperatorHandle op = find("normfused::group_norm_act_backward");
    const variable_list saved = ctx->get_saved_variables();
    const c10::ArrayRef<IValue> o = ctx->saved_data.at("options").toTupleRef().elements().asArrayRef();
    const IValue &num_groups = o[0], &eps = o[1], &activation = o[2];
    std::array<bool, 3> need{};
    size_t edge = 0;
    for (size_t i = 0; i < 3; ++i) need[i] = (i == 0 || o[2 + i].toBool()) && ctx->needs_input_grad(edge++);

    const auto &x = saved[0], &mean = saved[3], &rstd = saved[4];
    const IValue weight = given(saved[1]), bias = given(saved[2]);
    variable_list gradients(3);
    if (at::GradMode::is_enabled()) {
      const variable_list all =
          call_formula(differentiable_group_norm, {dy[0], x, weight, bias, num_groups, eps, activation});
      for (size_t i = 0; i < 3; ++i) gradients[i] = need[i] ? all[i] : Tensor();
    } else {
      const Stack all =
          call(op, {dy[0], x, weight, bias, mean, rstd, num_groups, activation, need[0], need[1], need[2]});
      for (size_t i = 0; i < 3; ++i) gradients[i] = need[i] ? all[i].toTensor() : Tensor();
    }
    return gradients;
  }
};

}  // namespace normfused

namespace torch::autograd {

template <>
variable_list CppNode<normfused::BatchNormAct>::apply(variable_list&& dy) {
  const std::lock_guard lock(mutex_);
  return normfused::apply_backward(*this, std::move(dy));
}
template <>
variable_list CppNode<normfused::GroupNormAct>::apply(variable_list&& dy) {
  const std::lock_guard lock(mutex_);
  return normfused::apply_backward(*this, std::move(dy));
}

}  // namespace torch::autograd

namespace normfused {
namespace {

// Whether an argument is what this path takes; all else, subclasses among it, is left to Python.
bool is_tensor_or_none(PyObject* o) { return o == Py_None || THPVariable_CheckExact(o); }
bool is_name_or_none(PyObject* o) { return o == Py_None || PyUnicode_CheckExact(o); }
// A mode that sees every call, torch.jit.trace, a transform of torch.func; or what torch.utils.checkpoint computes
// again.
bool is_watched() {
  return at::impl::torch_function_mode_enabled() || at::tracer::impl::is_dispatch_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::get_current_graph_task_id() != -1;
}

OptionalTensor tensor(PyObject* o) { return o == Py_None ? OptionalTensor() : THPVariable_Unpack(o); }
IValue name(PyObject* o) { return o == Py_None ? IValue() : IValue(THPUtils_unpackString(o)); }

PyObject* call_batch_norm_act(PyObject*, PyObject* const* a, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 12, "batch_norm_act: 12 arguments are expected, got ", count);
  bool served = THPVariable_CheckExact(a[0]) && PyBool_Check(a[7]) && PyFloat_CheckExact(a[9]) &&
                (a[8] == Py_None || PyFloat_CheckExact(a[8])) && is_name_or_none(a[10]) && is_name_or_none(a[11]);
  for (int i = 1; i < 7; ++i) served = served && is_tensor_or_none(a[i]);
  if (!served || is_watched()) Py_RETURN_NOTIMPLEMENTED;

  const Tensor& x = THPVariable_Unpack(a[0]);
  if (x.dim() < 2 || x.is_meta()) Py_RETURN_NOTIMPLEMENTED;
  const OptionalTensor weight = tensor(a[1]), bias = tensor(a[2]), residual = tensor(a[3]);
  const BatchNormOptions options = {
      .running_mean = tensor(a[4]),
      .running_var = tensor(a[5]),
      .num_batches_tracked = tensor(a[6]),
      .training = a[7] == Py_True,
      .momentum = a[8] == Py_None ? IValue() : IValue(PyFloat_AS_DOUBLE(a[8])),
      .eps = PyFloat_AS_DOUBLE(a[9]),
      .activation = name(a[10]),
      .pre_activation = name(a[11]),
  };
  TORCH_CHECK(!torch::autograd::compute_requires_grad(options.running_mean, options.running_var),
              "batch_norm_act: running_mean and running_var get no gradient and must not require one");
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = torch::autograd::compute_requires_grad(x, weight, bias, residual)
            ? apply<BatchNormAct>(options, x, weight, bias, residual)
            : batch_norm_act(x, weight, bias, residual, options)[0].toTensor();
    // What autograd saved of them before is no longer what it was.
    if (options.training && options.running_mean && options.running_var) {
      options.running_mean->unsafeGetTensorImpl()->bump_version();
      options.running_var->unsafeGetTensorImpl()->bump_version();
    }
    if (options.training && options.num_batches_tracked) {
      options.num_batches_tracked->unsafeGetTensorImpl()->bump_version();
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyObject* call_group_norm_act(PyObject*, PyObject* const* a, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "group_norm_act: 6 arguments are expected, got ", count);
  const bool served = THPVariable_CheckExact(a[0]) && is_tensor_or_none(a[1]) && is_tensor_or_none(a[2]) &&
                      PyLong_CheckExact(a[3]) && PyFloat_CheckExact(a[4]) && is_name_or_none(a[5]);
  if (!served || is_watched()) Py_RETURN_NOTIMPLEMENTED;

  const Tensor& x = THPVariable_Unpack(a[0]);
  // Autocast wants float32 of a GPU.
  if (x.is_meta() || (x.is_cuda() && at::autocast::is_autocast_enabled(at::kCUDA))) Py_RETURN_NOTIMPLEMENTED;
  const OptionalTensor weight = tensor(a[1]), bias = tensor(a[2]);
  const GroupNormOptions options = {THPUtils_unpackLong(a[3]), PyFloat_AS_DOUBLE(a[4]), name(a[5])};
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    y = torch::autograd::compute_requires_grad(x, weight, bias)
            ? apply<GroupNormAct>(options, x, weight, bias)
            : group_norm_act(x, weight, bias, options)[0].toTensor();
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

PyObject* set_formulas(PyObject*, PyObject* const* a, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "set_formulas: 2 arguments are expected, got ", count);
  Py_XSETREF(differentiable_batch_norm, Py_NewRef(a[0]));
  Py_XSETREF(differentiable_group_norm, Py_NewRef(a[1]));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyCFunction fast(_PyCFunctionFast function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace
}  // namespace normfused

PyMODINIT_FUNC PyInit__autograd() {
  using namespace normfused;
  static PyMethodDef methods[] = {
      {"batch_norm_act", fast(call_batch_norm_act), METH_FASTCALL,
       "y of the operator of that name, with its arguments in its order, and a gradient where one is wanted;\n"
       "NotImplemented where an argument is more than a plain tensor, or Python watches calls."},
      {"group_norm_act", fast(call_group_norm_act), METH_FASTCALL, "The same for GroupNorm."},
      {"set_formulas", fast(set_formulas), METH_FASTCALL,
       "The differentiable backward formulas of BatchNorm and GroupNorm, for create_graph=True."},
      {}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "normfused._autograd", nullptr, -1, methods};
  return PyModule_Create(&module);
}
