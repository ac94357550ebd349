// BatchNorm + activation on the CPU. Compiled once per instruction set, into a namespace of its own.
#include "../batch_norm.h"

#include "drivers.h"
#include "instruction_set.h"
#include "partition.h"

namespace normfused {
namespace {

// Per-channel arrays and partial sums, laid out in the caller's workspace.
template <class A>
struct BatchNormWorkspace {
  double* partial;  // [tasks][2][C] or [C * segments][3], by path
  A *scale, *bias, *offset, *slope;

  BatchNormWorkspace(void* memory, const Extent& e) {
    scale = static_cast<A*>(memory);
    bias = scale + e.C;
    offset = bias + e.C;
    slope = offset + e.C;
    // A[4 C] ends on a multiple of 16 bytes.
    partial = reinterpret_cast<double*>(slope + e.C);
  }
};

template <class T>
class BatchNormForwardDriver {
  using A = arithmetic_t<T>;

 public:
  BatchNormForwardDriver(const BatchNormForward& args, ParallelFor parallel_for)
      : args_(args),
        parallel_for_(parallel_for),
        e_(args.extent),
        partition_(batch_norm_partition(e_)),
        workspace_(args.workspace, e_),
        planes_(args.activation, args.residual != nullptr),
        columns_(args.activation, args.residual != nullptr),
        x_(static_cast<const T*>(args.x)),
        residual_(static_cast<const T*>(args.residual)),
        y_(static_cast<T*>(args.y)),
        weight_(static_cast<const A*>(args.weight)),
        bias_(static_cast<const A*>(args.bias)),
        mean_(static_cast<A*>(args.mean)),
        invstd_(static_cast<A*>(args.invstd)) {}

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
    for_each_task(parallel_for_, tasks, e_.numel(), f);
  }

  void use_running_statistics() {
    const A* running_mean = static_cast<const A*>(args_.running_mean);
    const A* running_var = static_cast<const A*>(args_.running_var);
    for (int64_t c = 0; c < e_.C; ++c) {
      mean_[c] = running_mean[c];
      invstd_[c] = static_cast<A>(1 / __builtin_sqrt(running_var[c] + args_.eps));
    }
  }

  // Save a channel's statistics and move its running statistics.
  void finish_statistics(int64_t c, double mean, double m2) {
    const double n = static_cast<double>(e_.N * e_.S);
    mean_[c] = static_cast<A>(mean);
    invstd_[c] = static_cast<A>(1 / __builtin_sqrt(m2 / n + args_.eps));
    if (args_.running_mean) {
      A& running = static_cast<A*>(args_.running_mean)[c];
      running = static_cast<A>((1 - args_.momentum) * running + args_.momentum * mean);
    }
    if (args_.running_var) {
      A& running = static_cast<A*>(args_.running_var)[c];
      running = static_cast<A>((1 - args_.momentum) * running + args_.momentum * (m2 / (n - 1)));
    }
  }

  A scale(int64_t c) const { return weight_ ? invstd_[c] * weight_[c] : invstd_[c]; }
  A bias(int64_t c) const { return bias_ ? bias_[c] : A(0); }
  PlaneParameters<A> plane_parameters(int64_t c) const { return {mean_[c], scale(c), bias(c), 0, 0}; }

  void apply_plane(int64_t c, int64_t at, int64_t n) {
    planes_.apply(x_ + at, residual_ ? residual_ + at : nullptr, y_ + at, 1, n, n, plane_parameters(c));
  }

  void planes() {
    for_each(e_.C, [this](int64_t c) {
      if (args_.training) {
        WelfordData data;
        for (int64_t n = 0; n < e_.N; ++n) data.combine(plane_moments(x_ + (n * e_.C + c) * e_.S, e_.S));
        finish_statistics(c, data.mean, data.m2);
      }
      for (int64_t n = e_.N - 1; n >= 0; --n) apply_plane(c, (n * e_.C + c) * e_.S, e_.S);
    });
  }

  void split_planes() {
    const int64_t segments = divide_up(e_.S, kSegment);
    const auto segment_size = [&](int64_t s) { return minimum(kSegment, e_.S - s * kSegment); };
    auto* partial = reinterpret_cast<WelfordData*>(workspace_.partial);
    if (args_.training) {
      for_each(partition_.tasks, [&](int64_t task) {
        const int64_t plane = task / segments, s = task % segments;
        partial[task] = plane_moments(x_ + plane * e_.S + s * kSegment, segment_size(s));
      });
      for (int64_t c = 0; c < e_.C; ++c) {
        WelfordData data;
        for (int64_t n = 0; n < e_.N; ++n) {
          for (int64_t s = 0; s < segments; ++s) data.combine(partial[(n * e_.C + c) * segments + s]);
        }
        finish_statistics(c, data.mean, data.m2);
      }
    }
    for_each(partition_.tasks, [&](int64_t task) {
      const int64_t plane = task / segments, s = task % segments;
      apply_plane(plane % e_.C, plane * e_.S + s * kSegment, segment_size(s));
    });
  }

  // Normalise rows of a panel that starts at column `at`; parameters are those of its columns.
  void apply_columns(int64_t at, int64_t rows, int64_t cols, const ColumnParameters<A>& p) {
    // Backwards: the last rows are still in the cache.
    const int64_t strip = kTile / cols;
    for (int64_t left = rows; left > 0;) {
      const int64_t count = minimum(strip, left);
      left -= count;
      const int64_t i = at + left * partition_.cols;
      columns_.apply(x_ + i, residual_ ? residual_ + i : nullptr, y_ + i, count, cols, partition_.cols, p);
    }
  }

  void columns() {
    for_each(partition_.tasks, [this](int64_t task) {
      const int64_t begin = task * partition_.panel;
      const int64_t cols = minimum(partition_.panel, partition_.cols - begin);
      const int64_t group = partition_.group;
      if (args_.training) {
        double mean[kPanel], m2[kPanel];
        column_moments(x_ + begin, partition_.rows, cols, partition_.cols, mean, m2);
        for (int64_t first = 0; first < cols; first += group) {
          WelfordData data;
          for (int64_t i = first; i < first + group; ++i) {
            data.combine({static_cast<double>(partition_.rows), mean[i], m2[i]});
          }
          finish_statistics((begin + first) / group, data.mean, data.m2);
        }
      }
      alignas(64) A mean[kPanel], scales[kPanel], biases[kPanel];
      for (int64_t first = 0; first < cols; first += group) {
        const PlaneParameters<A> p = plane_parameters((begin + first) / group);
        for (int64_t i = first; i < first + group; ++i) {
          mean[i] = p.mean;
          scales[i] = p.scale;
          biases[i] = p.bias;
        }
      }
      apply_columns(begin, partition_.rows, cols, {mean, scales, biases, nullptr, nullptr});
    });
  }

  void split_columns() {
    const int64_t cols = partition_.cols, panel = partition_.panel;
    const auto task_rows = [&](int64_t task) {
      return minimum(partition_.task_rows, partition_.rows - task * partition_.task_rows);
    };
    if (args_.training) {
      for_each(partition_.tasks, [&](int64_t task) {
        double* mean = workspace_.partial + task * 2 * cols;
        for (int64_t c = 0; c < cols; c += panel) {
          column_moments(x_ + task * partition_.task_rows * cols + c, task_rows(task), minimum(panel, cols - c), cols,
                         mean + c, mean + cols + c);
        }
      });
      for (int64_t c = 0; c < cols; ++c) {
        WelfordData data;
        for (int64_t task = 0; task < partition_.tasks; ++task) {
          const double* mean = workspace_.partial + task * 2 * cols;
          data.combine({static_cast<double>(task_rows(task)), mean[c], mean[cols + c]});
        }
        finish_statistics(c, data.mean, data.m2);
      }
    }
    for (int64_t c = 0; c < cols; ++c) {
      workspace_.scale[c] = scale(c);
      workspace_.bias[c] = bias(c);
    }
    const ColumnParameters<A> p{mean_, workspace_.scale, workspace_.bias, nullptr, nullptr};
    for_each(partition_.tasks, [&](int64_t task) {
      // From the last task to the first: the end of the input is what the cache still holds.
      const int64_t t = partition_.tasks - 1 - task;
      for (int64_t c = 0; c < cols; c += panel) {
        apply_columns(t * partition_.task_rows * cols + c, task_rows(t), minimum(panel, cols - c), p.shifted(c));
      }
    });
  }

  const BatchNormForward& args_;
  const ParallelFor parallel_for_;
  const Extent e_;
  const Partition partition_;
  const BatchNormWorkspace<A> workspace_;
  const TileFunctions<T, PlaneParameters<A>> planes_;
  const TileFunctions<T, ColumnParameters<A>> columns_;
  const T *x_, *residual_;
  T* y_;
  const A *weight_, *bias_;
  A *mean_, *invstd_;
};

template <class T>
class BatchNormBackwardDriver {
  using A = arithmetic_t<T>;

 public:
  BatchNormBackwardDriver(const BatchNormBackward& args, ParallelFor parallel_for)
      : args_(args),
        parallel_for_(parallel_for),
        e_(args.extent),
        partition_(batch_norm_partition(e_)),
        workspace_(args.workspace, e_),
        planes_(args.activation, args.residual != nullptr),
        columns_(args.activation, args.residual != nullptr),
        dy_(static_cast<const T*>(args.dy)),
        x_(static_cast<const T*>(args.x)),
        residual_(static_cast<const T*>(args.residual)),
        weight_(static_cast<const A*>(args.weight)),
        bias_(static_cast<const A*>(args.bias)),
        mean_(static_cast<const A*>(args.mean)),
        invstd_(static_cast<const A*>(args.invstd)),
        dx_(static_cast<T*>(args.dx)),
        dresidual_(static_cast<T*>(args.dresidual)),
        dweight_(static_cast<A*>(args.dweight)),
        dbias_(static_cast<A*>(args.dbias)) {
    applies_ = dx_ || dresidual_;
    reduces_ = dweight_ || dbias_ || (args.training && dx_);
  }

  void run() {
    if (e_.numel() == 0) {
      for (int64_t c = 0; c < e_.C; ++c) finish_sums(c, 0, 0);
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
    for_each_task(parallel_for_, tasks, e_.numel(), f);
  }

  PlaneParameters<A> parameters(int64_t c) const {
    return {mean_[c], weight_ ? invstd_[c] * weight_[c] : invstd_[c], bias_ ? bias_[c] : A(0), 0, 0};
  }

  // From a channel's sums over dz and dz (x - mean): its parameter gradients, and the part of dx that comes through the
  // statistics, dx = scale (dz - sum(dz) / n - (x - mean) invstd^2 sum(dz (x - mean)) / n).
  PlaneParameters<A> finish_sums(int64_t c, double sum_dz, double sum_dz_deviation) {
    const double invstd = invstd_[c];
    if (dbias_) dbias_[c] = static_cast<A>(sum_dz);
    if (dweight_) dweight_[c] = static_cast<A>(sum_dz_deviation * invstd);
    PlaneParameters<A> p = parameters(c);
    const double per_count = p.scale / static_cast<double>(e_.N * e_.S);
    p.offset = static_cast<A>(sum_dz * per_count);
    p.slope = static_cast<A>(sum_dz_deviation * invstd * invstd * per_count);
    return p;
  }

  const T* residual(int64_t at) const { return residual_ ? residual_ + at : nullptr; }

  void sum_plane(int64_t c, int64_t at, int64_t n, double& sum_dz, double& sum_dz_deviation) {
    plane_gradient_moments(x_ + at, dy_ + at, residual(at), n, parameters(c), planes_.gradient, sum_dz,
                           sum_dz_deviation);
  }

  void apply_plane(int64_t at, int64_t n, const PlaneParameters<A>& p) {
    backward_apply_plane(x_ + at, dy_ + at, residual(at), dx_ ? dx_ + at : nullptr,
                         dresidual_ ? dresidual_ + at : nullptr, n, args_.training, p, planes_.gradient);
  }

  void planes() {
    for_each(e_.C, [this](int64_t c) {
      PlaneParameters<A> p = parameters(c);
      if (reduces_) {
        double total = 0, total_deviation = 0;
        for (int64_t n = 0; n < e_.N; ++n) {
          double s, d;
          sum_plane(c, (n * e_.C + c) * e_.S, e_.S, s, d);
          total += s;
          total_deviation += d;
        }
        p = finish_sums(c, total, total_deviation);
      }
      if (!applies_) return;
      for (int64_t n = e_.N - 1; n >= 0; --n) apply_plane((n * e_.C + c) * e_.S, e_.S, p);
    });
  }

  void split_planes() {
    const int64_t segments = divide_up(e_.S, kSegment);
    const auto segment_size = [&](int64_t s) { return minimum(kSegment, e_.S - s * kSegment); };
    double* partial = workspace_.partial;
    if (reduces_) {
      for_each(partition_.tasks, [&](int64_t task) {
        const int64_t plane = task / segments, s = task % segments;
        sum_plane(plane % e_.C, plane * e_.S + s * kSegment, segment_size(s), partial[2 * task], partial[2 * task + 1]);
      });
    }
    for (int64_t c = 0; c < e_.C; ++c) {
      PlaneParameters<A> p = parameters(c);
      if (reduces_) {
        double total = 0, total_deviation = 0;
        for (int64_t n = 0; n < e_.N; ++n) {
          for (int64_t s = 0; s < segments; ++s) {
            const int64_t task = (n * e_.C + c) * segments + s;
            total += partial[2 * task];
            total_deviation += partial[2 * task + 1];
          }
        }
        p = finish_sums(c, total, total_deviation);
      }
      workspace_.offset[c] = p.offset;
      workspace_.slope[c] = p.slope;
    }
    if (!applies_) return;
    for_each(partition_.tasks, [&](int64_t task) {
      const int64_t plane = task / segments, s = task % segments, c = plane % e_.C;
      PlaneParameters<A> p = parameters(c);
      p.offset = workspace_.offset[c];
      p.slope = workspace_.slope[c];
      apply_plane(plane * e_.S + s * kSegment, segment_size(s), p);
    });
  }

  void sum_columns(int64_t at, int64_t rows, int64_t cols, const ColumnParameters<A>& p, double* sum_dz,
                   double* sum_dz_deviation) {
    column_gradient_moments(x_ + at, dy_ + at, residual(at), rows, cols, partition_.cols, p, columns_.gradient, sum_dz,
                            sum_dz_deviation);
  }

  void apply_columns(int64_t at, int64_t rows, int64_t cols, const ColumnParameters<A>& p) {
    backward_apply(x_ + at, dy_ + at, residual(at), dx_ ? dx_ + at : nullptr, dresidual_ ? dresidual_ + at : nullptr,
                   rows, cols, partition_.cols, args_.training, p, columns_.gradient);
  }

  void columns() {
    for_each(partition_.tasks, [this](int64_t task) {
      const int64_t begin = task * partition_.panel;
      const int64_t cols = minimum(partition_.panel, partition_.cols - begin);
      const int64_t group = partition_.group;
      alignas(64) A mean[kPanel], scale[kPanel], bias[kPanel], offset[kPanel], slope[kPanel];
      const ColumnParameters<A> columns{mean, scale, bias, offset, slope};
      const auto expand = [&](int64_t first, const PlaneParameters<A>& p) {
        for (int64_t i = first; i < first + group; ++i) {
          mean[i] = p.mean;
          scale[i] = p.scale;
          bias[i] = p.bias;
          offset[i] = p.offset;
          slope[i] = p.slope;
        }
      };
      for (int64_t first = 0; first < cols; first += group) expand(first, parameters((begin + first) / group));
      if (reduces_) {
        double sum_dz[kPanel], sum_dz_deviation[kPanel];
        sum_columns(begin, partition_.rows, cols, columns, sum_dz, sum_dz_deviation);
        for (int64_t first = 0; first < cols; first += group) {
          double total = 0, total_deviation = 0;
          for (int64_t i = first; i < first + group; ++i) {
            total += sum_dz[i];
            total_deviation += sum_dz_deviation[i];
          }
          expand(first, finish_sums((begin + first) / group, total, total_deviation));
        }
      }
      if (applies_) apply_columns(begin, partition_.rows, cols, columns);
    });
  }

  void split_columns() {
    const int64_t cols = partition_.cols, panel = partition_.panel;
    const auto task_rows = [&](int64_t task) {
      return minimum(partition_.task_rows, partition_.rows - task * partition_.task_rows);
    };
    for (int64_t c = 0; c < cols; ++c) {
      const PlaneParameters<A> p = parameters(c);
      workspace_.scale[c] = p.scale;
      workspace_.bias[c] = p.bias;
    }
    const ColumnParameters<A> p{mean_, workspace_.scale, workspace_.bias, workspace_.offset, workspace_.slope};
    if (reduces_) {
      for_each(partition_.tasks, [&](int64_t task) {
        double* sums = workspace_.partial + task * 2 * cols;
        for (int64_t c = 0; c < cols; c += panel) {
          sum_columns(task * partition_.task_rows * cols + c, task_rows(task), minimum(panel, cols - c), p.shifted(c),
                      sums + c, sums + cols + c);
        }
      });
      for (int64_t c = 0; c < cols; ++c) {
        double total = 0, total_deviation = 0;
        for (int64_t task = 0; task < partition_.tasks; ++task) {
          total += workspace_.partial[task * 2 * cols + c];
          total_deviation += workspace_.partial[task * 2 * cols + cols + c];
        }
        const PlaneParameters<A> finished = finish_sums(c, total, total_deviation);
        workspace_.offset[c] = finished.offset;
        workspace_.slope[c] = finished.slope;
      }
    }
    if (!applies_) return;
    for_each(partition_.tasks, [&](int64_t task) {
      const int64_t t = partition_.tasks - 1 - task;
      for (int64_t c = 0; c < cols; c += panel) {
        apply_columns(t * partition_.task_rows * cols + c, task_rows(t), minimum(panel, cols - c), p.shifted(c));
      }
    });
  }

  const BatchNormBackward& args_;
  const ParallelFor parallel_for_;
  const Extent e_;
  const Partition partition_;
  const BatchNormWorkspace<A> workspace_;
  const TileFunctions<T, PlaneParameters<A>> planes_;
  const TileFunctions<T, ColumnParameters<A>> columns_;
  const T *dy_, *x_, *residual_;
  const A *weight_, *bias_, *mean_, *invstd_;
  T *dx_, *dresidual_;
  A *dweight_, *dbias_;
  bool applies_, reduces_;
};

}  // namespace

namespace cpu::NORMFUSED_INSTRUCTION_SET {

void batch_norm_forward(const BatchNormForward& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto t) { BatchNormForwardDriver<decltype(t)>(args, parallel_for).run(); });
}

void batch_norm_backward(const BatchNormBackward& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto t) { BatchNormBackwardDriver<decltype(t)>(args, parallel_for).run(); });
}

}  // namespace cpu::NORMFUSED_INSTRUCTION_SET
}  // namespace normfused
