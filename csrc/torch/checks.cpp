#include "checks.h"

#include "device.h"

namespace normfused::binding {
namespace {

constexpr int64_t kMaxDims = 64;

// Whether strides are those of a dense tensor in a memory format; strides of dimensions of size 1 mean nothing.
bool is_dense(const int64_t* sizes, const int64_t* strides, int64_t dim, bool channels_last) {
  int64_t expected = 1;
  const auto next = [&](int64_t d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
    return true;
  };
  if (channels_last && !next(1)) return false;
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (!(channels_last && d == 1) && !next(d)) return false;
  }
  return true;
}

// Whether PyTorch would keep channels_last (the rule of c10::is_channels_last_strides_2d and _3d).
bool has_channels_last_strides(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  if ((dim != 4 && dim != 5) || strides[1] == 0) return false;
  int64_t least = 0;
  const auto next = [&](int64_t d) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
    return true;
  };
  if (!next(1)) return false;
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (d != 1 && !next(d)) return false;
  }
  return true;
}

// Not torch::stable::copy_, which looks the operator up by its name on every call (5 us).
void copy(const Tensor& to, const Tensor& from) { TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0)); }

Tensor empty_dense(const Tensor& like, bool channels_last, ScalarType scalar_type) {
  const auto sizes = like.sizes();
  const int64_t dim = like.dim();
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  const auto next = [&](int64_t d) {
    strides[d] = stride;
    stride *= channels_last || sizes[d] > 0 ? sizes[d] : 1;
  };
  if (channels_last) next(1);
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (!(channels_last && d == 1)) next(d);
  }
  return device::empty_output(sizes.data(), strides, dim, scalar_type, like,
                              like.numel() * static_cast<int64_t>(like.element_size()));
}

bool parse_dtype(ScalarType scalar_type, Dtype& dtype) {
  switch (scalar_type) {
    case ScalarType::Float: dtype = Dtype::float32; return true;
    case ScalarType::Double: dtype = Dtype::float64; return true;
    case ScalarType::BFloat16: dtype = Dtype::bfloat16; return true;
    case ScalarType::Half: dtype = Dtype::float16; return true;
    default: return false;
  }
}

}  // namespace

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType scalar_type,
                     const Tensor& like) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(scalar_type), device_type,
                               like.get_device_index(), &handle) != AOTI_TORCH_SUCCESS) {
    // The stable ABI tells of a failure, not of its kind; nothing else fails here.
    std::ostringstream message;
    message << device::kOutOfMemory << " normfused could not allocate a tensor of ";
    for (int64_t d = 0; d < dim; ++d) message << (d ? " x " : "") << sizes[d];
    message << " elements of " << torch::headeronly::toString(scalar_type);
    throw std::runtime_error(message.str());
  }
  return Tensor(handle);
}

Tensor empty_vector(int64_t n, ScalarType scalar_type, const Tensor& like) {
  const int64_t stride = 1;
  return empty_strided(&n, &stride, 1, scalar_type, like);
}

void check_device(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  check(device::holds(t) && t.get_device_index() == x.get_device_index(), op, argument, " must be on the device of x, ",
        device_of(x), ", got ", device_of(t));
}

void check_count(const char* op, const Tensor& t, const Tensor& x) {
  check_device(op, "num_batches_tracked", t, x);
  check(t.scalar_type() == ScalarType::Long && t.numel() == 1, op, "num_batches_tracked must be one int64, got ",
        torch::headeronly::toString(t.scalar_type()), " of shape ", shape_of(t));
}

Input::Input(const char* op, const char* argument, const Tensor& x, Ambiguous ambiguous)
    : tensor(x), scalar_type(x.scalar_type()) {
  check(device::holds(x), op, argument, " must be on ", device::kType, " as the other tensors are, got ", device_of(x));
  check(parse_dtype(scalar_type, dtype), op, argument, " must be float32, float64, float16 or bfloat16, got ",
        torch::headeronly::toString(scalar_type));
  const int64_t dim = x.dim();
  check(dim >= 2 && dim <= kMaxDims, op, argument, " must be (N, C, *), got shape ", shape_of(x));
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const bool contiguous = is_dense(sizes.data(), strides.data(), dim, false);
  channels_last = !(contiguous && ambiguous == Ambiguous::contiguous) &&
                  has_channels_last_strides(sizes.data(), strides.data(), dim);
  extent = {sizes[0], sizes[1], 1, channels_last ? MemoryFormat::channels_last : MemoryFormat::contiguous};
  for (int64_t d = 2; d < dim; ++d) extent.S *= sizes[d];
  if (channels_last ? !is_dense(sizes.data(), strides.data(), dim, true) : !contiguous) {
    tensor = empty_like();
    copy(tensor, x);
  }
}

Tensor Input::empty_like() const { return empty_dense(tensor, channels_last, scalar_type); }

Tensor Input::empty_output() const { return empty_vector(0, scalar_type, tensor); }

Tensor Input::empty_statistics(int64_t n) const { return empty_vector(n, statistics_type(), tensor); }

Tensor Input::empty_statistics(int64_t n, int64_t m) const {
  const int64_t sizes[] = {n, m}, strides[] = {m > 0 ? m : 1, 1};
  return empty_strided(sizes, strides, 2, statistics_type(), tensor);
}

Tensor Input::match(const char* op, const char* argument, const Tensor& t) const {
  check_device(op, argument, t, tensor);
  check(t.scalar_type() == scalar_type, op, argument, " must have the dtype of x, ",
        torch::headeronly::toString(scalar_type), ", got ", torch::headeronly::toString(t.scalar_type()));
  const int64_t dim = tensor.dim();
  bool same = t.dim() == dim;
  const auto sizes = tensor.sizes();
  for (int64_t d = 0; same && d < dim; ++d) same = t.size(d) == sizes[d];
  check(same, op, argument, " must have the shape of x, ", shape_of(tensor), ", got ", shape_of(t));
  if (is_dense(sizes.data(), t.strides().data(), dim, channels_last)) return t;
  Tensor dense = empty_like();
  copy(dense, t);
  return dense;
}

ChannelArrays::ChannelArrays(const char* op, const char* first_argument, const OptionalTensor& first,
                             const char* second_argument, const OptionalTensor& second, const Input& input,
                             bool may_be_narrow) {
  const auto is_narrow = [&](const OptionalTensor& t) { return !t || t->scalar_type() == input.scalar_type; };
  narrow_ = may_be_narrow && device::kNarrowChannels && input.scalar_type != input.statistics_type() &&
            (first || second) && is_narrow(first) && is_narrow(second);
  first_ = array(op, first_argument, first, input);
  second_ = array(op, second_argument, second, input);
}

ChannelArrays::Array ChannelArrays::array(const char* op, const char* argument, const OptionalTensor& t,
                                          const Input& input) const {
  if (!t) return {};
  const int64_t channels = input.extent.C;
  check_device(op, argument, *t, input.tensor);
  check(t->dim() == 1 && t->size(0) == channels, op, argument, " must have shape (", channels,
        "), one value for each "
        "channel of x, got ",
        shape_of(*t));
  const ScalarType scalar_type = t->scalar_type();
  const ScalarType statistics_type = input.statistics_type();
  check(scalar_type == statistics_type || scalar_type == input.scalar_type, op, argument, " must be ",
        torch::headeronly::toString(statistics_type), " or have the dtype of x, ",
        torch::headeronly::toString(input.scalar_type), ", got ", torch::headeronly::toString(scalar_type));
  const ScalarType wanted = narrow_ ? input.scalar_type : statistics_type;
  if (scalar_type == wanted && (t->stride(0) == 1 || channels <= 1)) return {t, std::nullopt, t->mutable_data_ptr()};
  Tensor dense = empty_vector(channels, wanted, *t);
  copy(dense, *t);
  return {t, dense, dense.mutable_data_ptr()};
}

void ChannelArrays::write_back() const {
  for (const Array* array : {&first_, &second_}) {
    if (array->copy) copy(*array->tensor, *array->copy);
  }
}

}  // namespace normfused::binding
