// BatchNorm's forward + activation on the CPU. Compiled once per instruction set, into a namespace of its own.
#include "batch_norm_parameters.h"
#include "instruction_set.h"

namespace normfused {
namespace {

template <class T>
class BatchNormForwardDriver {
  using A = arithmetic_t<T>;

 public:
  BatchNormForwardDriver(const BatchNormForward& args, ParallelFor parallel_for)
      : args_(args),
        parallel_for_(parallel_for),
        e_(args.extent),
        partition_(batch_norm_partition(e_)),
        workspace_(args.workspace, partition_, e_),
        functions_(args.activation, args.residual != nullptr, args.pre_activation),
        second_pass_(second_pass<T>(partition_, e_, args.residual ? 2 : 1, args.residual ? 3 : 2)),
        x_(static_cast<const T*>(args.x)),
        residual_(static_cast<const T*>(args.residual)),
        y_(static_cast<T*>(args.y)),
        mean_(static_cast<A*>(args.mean)),
        invstd_(static_cast<A*>(args.invstd)),
        affine_{mean_, invstd_, static_cast<const A*>(args.weight), static_cast<const A*>(args.bias)} {}

  void run() {
    if (!args_.training) use_running_statistics();
    if (e_.numel() == 0) {
      if (args_.training) {
        for (int64_t c = 0; c < e_.C; ++c) mean_[c] = invstd_[c] = 0;
      }
      return;
    }
    switch (partition_.path) {
      case Partition::Path::planes: return planes();
      case Partition::Path::split_planes: return split_planes();
      case Partition::Path::columns: return columns();
      case Partition::Path::split_columns: return split_columns();
    }
  }

 private:
  template <class F>
  void for_each(int64_t tasks, F f) {
    for_each_task<false>(parallel_for_, tasks, e_.numel(), f);
  }
  template <class F>
  void for_each_backwards(int64_t tasks, F f) {
    for_each_task<true>(parallel_for_, tasks, e_.numel(), f);
  }

  void use_running_statistics() {
    const A* running_mean = static_cast<const A*>(args_.running_mean);
    const A* running_var = static_cast<const A*>(args_.running_var);
    for (int64_t c = 0; c < e_.C; ++c) {
      mean_[c] = running_mean[c];
      invstd_[c] = static_cast<A>(1 / __builtin_sqrt(running_var[c] + args_.eps));
    }
  }

  // Save the statistics of channels [c, c + count) and move their running statistics: in loops of one kind of result
  // each, which become vectors, for the divisions and roots of many channels are a good part of a small tensor's time.
  void finish_statistics(int64_t c, int64_t count, const double* mean, const double* m2) {
    const double n = static_cast<double>(e_.N * e_.S), eps = args_.eps, momentum = args_.momentum;
    A *to_mean = mean_ + c, *to_invstd = invstd_ + c;
    for (int64_t i = 0; i < count; ++i) to_mean[i] = static_cast<A>(mean[i]);
    for (int64_t i = 0; i < count; ++i) to_invstd[i] = static_cast<A>(1 / __builtin_sqrt(m2[i] / n + eps));
    if (args_.running_mean) {
      A* running = static_cast<A*>(args_.running_mean) + c;
      for (int64_t i = 0; i < count; ++i) {
        running[i] = static_cast<A>((1 - momentum) * running[i] + momentum * mean[i]);
      }
    }
    if (args_.running_var) {
      A* running = static_cast<A*>(args_.running_var) + c;
      for (int64_t i = 0; i < count; ++i) {
        running[i] = static_cast<A>((1 - momentum) * running[i] + momentum * (m2[i] / (n - 1)));
      }
    }
  }

  void apply_plane(int64_t c, int64_t at, int64_t n) {
    const PlaneParameters<A> p = affine_.of(c);
    second_pass_.template for_each_tile<T>(n, [&](int64_t i, int64_t count, int64_t ahead) {
      i += at;
      write(y_ + i, count, second_pass_.streams, [&](T* y) {
        functions_.apply_plane(x_ + i, residual_ ? residual_ + i : nullptr, y, 1, count, count, ahead, p);
      });
    });
  }

  WelfordData channel_moments(int64_t c) const {
    WelfordData data = functions_.plane_moments(x_ + c * e_.S, e_.S, second_pass_.next_plane(e_, 0));
    for (int64_t n = 1; n < e_.N; ++n) {
      data.combine(functions_.plane_moments(x_ + (n * e_.C + c) * e_.S, e_.S, second_pass_.next_plane(e_, n)));
    }
    return data;
  }

  void planes() {
    for_each(partition_.tasks, [this](int64_t task) {
      const int64_t begin = task * partition_.panel, count = minimum(partition_.panel, e_.C - begin);
      if (args_.training) {
        WelfordData data[kChannels];
        for (int64_t i = 0; i < count; ++i) data[i] = channel_moments(begin + i);
        for (int64_t i = 0; i < count; ++i) finish_statistics(begin + i, 1, &data[i].mean, &data[i].m2);
      }
      for (int64_t n = e_.N - 1; n >= 0; --n) {
        for (int64_t c = begin; c < begin + count; ++c) apply_plane(c, (n * e_.C + c) * e_.S, e_.S);
      }
    });
  }

  void split_planes() {
    const int64_t segments = divide_up(e_.S, kSegment);
    const auto segment_size = [&](int64_t s) { return minimum(kSegment, e_.S - s * kSegment); };
    auto* partial = reinterpret_cast<WelfordData*>(workspace_.partial);
    if (args_.training) {
      for_each(partition_.tasks, [&](int64_t task) {
        const int64_t plane = task / segments, s = task % segments;
        partial[task] = functions_.plane_moments(x_ + plane * e_.S + s * kSegment, segment_size(s),
                                                 second_pass_.next(segment_size(s)));
      });
      for (int64_t c = 0; c < e_.C; ++c) {
        WelfordData data;
        for (int64_t n = 0; n < e_.N; ++n) {
          for (int64_t s = 0; s < segments; ++s) data.combine(partial[(n * e_.C + c) * segments + s]);
        }
        finish_statistics(c, 1, &data.mean, &data.m2);
      }
    }
    for_each(partition_.tasks, [&](int64_t task) {
      const int64_t plane = task / segments, s = task % segments;
      apply_plane(plane % e_.C, plane * e_.S + s * kSegment, segment_size(s));
    });
  }

  // Normalise rows of a panel that starts at element `at`.
  void apply_columns(int64_t at, int64_t rows, int64_t cols, const ColumnParameters<A>& p) {
    const int64_t stride = partition_.cols;
    for_each_strip(rows, second_pass_.strip(cols, stride), [&](int64_t row, int64_t count) {
      const int64_t i = at + row * stride;
      write(y_ + i, count * cols, second_pass_.streams, [&](T* y) {
        functions_.apply_columns(x_ + i, residual_ ? residual_ + i : nullptr, y, count, cols, stride,
                                 second_pass_.ahead, p);
      });
    });
  }

  void columns() {
    for_each(partition_.tasks, [this](int64_t task) {
      const int64_t begin = task * partition_.panel, group = partition_.group;
      const int64_t cols = minimum(partition_.panel, partition_.cols - begin), first = begin / group;
      PanelParameters<A> panel;
      double mean[kPanel], m2[kPanel];
      if (args_.training) {
        functions_.group_moments(x_ + begin, partition_.rows, cols, group, partition_.cols, second_pass_.reading, mean,
                                 m2);
        finish_statistics(first, cols / group, mean, m2);
      }
      affine_.fill(first, cols, group, panel.columns());
      apply_columns(begin, partition_.rows, cols, panel.columns());
    });
  }

  void split_columns() {
    const int64_t cols = partition_.cols, panel = partition_.panel;
    if (args_.training) {
      for_each(partition_.tasks, [&](int64_t task) {
        double* mean = workspace_.partial + task * 2 * cols;
        for (int64_t c = 0; c < cols; c += panel) {
          functions_.group_moments(x_ + partition_.first_row(task) * cols + c, partition_.row_count(task),
                                   minimum(panel, cols - c), 1, cols, second_pass_.reading, mean + c, mean + cols + c);
        }
      });
      // Into the first task's columns, then into channels.
      double *mean = workspace_.partial, *m2 = mean + cols;
      int64_t count = partition_.row_count(0);
      for (int64_t task = 1; task < partition_.tasks; ++task) {
        const double* other = mean + task * 2 * cols;
        combine_columns(cols, count, mean, m2, partition_.row_count(task), other, other + cols);
        count += partition_.row_count(task);
      }
      for (int64_t half = cols / 2; half >= e_.C; half /= 2) {
        combine_columns(half, count, mean, m2, count, mean + half, m2 + half);
        count *= 2;
      }
      finish_statistics(0, e_.C, mean, m2);
    }
    const ColumnParameters<A>& p = workspace_.parameters;
    affine_.fill(0, e_.C, p);
    p.repeat(e_.C, cols);
    for_each_backwards(partition_.tasks, [&](int64_t t) {
      for (int64_t c = 0; c < cols; c += kTile) {
        apply_columns(partition_.first_row(t) * cols + c, partition_.row_count(t), minimum(kTile, cols - c), p.from(c));
      }
    });
  }

  const BatchNormForward& args_;
  const ParallelFor parallel_for_;
  const Extent e_;
  const Partition partition_;
  const BatchNormWorkspace<A> workspace_;
  const ForwardFunctions<T, true> functions_;
  const SecondPass second_pass_;
  const T *x_, *residual_;
  T* y_;
  A *mean_, *invstd_;
  const Affine<A> affine_;
};

}  // namespace

namespace cpu::NORMFUSED_INSTRUCTION_SET {

void batch_norm_forward(const BatchNormForward& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto t) { BatchNormForwardDriver<decltype(t)>(args, parallel_for).run(); });
}

}  // namespace cpu::NORMFUSED_INSTRUCTION_SET
}  // namespace normfused
