#include "checks.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "block_cache.h"

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

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType scalar_type,
                     const Tensor& like) {
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(scalar_type),
                                                         device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

// Not torch::stable::copy_, which looks the operator up by its name on every call (5 us).
void copy(const Tensor& to, const Tensor& from) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

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
  return empty_cached(sizes.data(), strides, dim, scalar_type, like,
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

// Calls f(T{}) with the C++ type of a floating dtype.
template <class F>
void with_type(ScalarType scalar_type, F f) {
  switch (scalar_type) {
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: return f(float{});
  }
}

}  // namespace

Input::Input(const char* op, const char* argument, const Tensor& x, Ambiguous ambiguous)
    : tensor(x), scalar_type(x.scalar_type()) {
  check(x.is_cpu(), op, argument, " must be a CPU tensor");
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

Tensor Input::empty_output() const {
  const int64_t size = 0, stride = 1;
  return empty_strided(&size, &stride, 1, scalar_type, tensor);
}

Tensor Input::empty_statistics(int64_t n) const {
  const int64_t stride = 1;
  return empty_strided(&n, &stride, 1, statistics_type(), tensor);
}

Tensor Input::empty_statistics(int64_t n, int64_t m) const {
  const int64_t sizes[] = {n, m}, strides[] = {m > 0 ? m : 1, 1};
  return empty_strided(sizes, strides, 2, statistics_type(), tensor);
}

Tensor Input::match(const char* op, const char* argument, const Tensor& t) const {
  check(t.is_cpu(), op, argument, " must be a CPU tensor");
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

ChannelArray::ChannelArray(const char* op, const char* argument, const OptionalTensor& t, const Input& input)
    : tensor_(t), wide_(input.dtype == Dtype::float64) {
  if (!t) return;
  const int64_t channels = input.extent.C;
  check(t->is_cpu(), op, argument, " must be a CPU tensor");
  check(t->dim() == 1 && t->size(0) == channels, op, argument, " must have shape (", channels,
        "), one value for each "
        "channel of x, got ",
        shape_of(*t));
  const ScalarType scalar_type = t->scalar_type();
  const ScalarType statistics_type = input.statistics_type();
  check(scalar_type == statistics_type || scalar_type == input.scalar_type, op, argument, " must be ",
        torch::headeronly::toString(statistics_type), " or have the dtype of x, ",
        torch::headeronly::toString(input.scalar_type), ", got ", torch::headeronly::toString(scalar_type));
  const int64_t stride = t->stride(0);
  if (scalar_type == statistics_type && (stride == 1 || channels <= 1)) {
    data_ = t->mutable_data_ptr();
    return;
  }
  copy_.resize(channels);
  data_ = copy_.data();
  with_type(scalar_type, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(t->const_data_ptr());
    for (int64_t c = 0; c < channels; ++c) {
      if (wide_) {
        static_cast<double*>(data_)[c] = static_cast<double>(from[c * stride]);
      } else {
        static_cast<float*>(data_)[c] = static_cast<float>(from[c * stride]);
      }
    }
  });
}

void ChannelArray::write_back() const {
  if (copy_.empty()) return;
  const int64_t stride = tensor_->stride(0);
  with_type(tensor_->scalar_type(), [&](auto type) {
    using T = decltype(type);
    auto* to = static_cast<T*>(tensor_->mutable_data_ptr());
    for (int64_t c = 0; c < static_cast<int64_t>(copy_.size()); ++c) {
      to[c * stride] = wide_ ? static_cast<T>(static_cast<const double*>(data_)[c])
                             : static_cast<T>(static_cast<const float*>(data_)[c]);
    }
  });
}

void parallel_for(int64_t tasks, ParallelBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, body, context));
}

}  // namespace normfused::binding
