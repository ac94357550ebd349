// BatchNorm's backward + activation on the CPU. Compiled once per instruction set, into a namespace of its own.
#include "batch_norm_parameters.h"
#include "instruction_set.h"

namespace normfused {
namespace {

template <class T>
class BatchNormBackwardDriver {
  using A = arithmetic_t<T>;

 public:
  BatchNormBackwardDriver(const BatchNormBackward& args, ParallelFor parallel_for)
      : args_(args),
        parallel_for_(parallel_for),
        e_(args.extent),
        partition_(batch_norm_partition(e_)),
        workspace_(args.workspace, partition_, e_),
        functions_(args.activation, args.residual != nullptr, args.pre_activation),
        identity_(Activation::identity, false),
        second_pass_(second_pass<T>(partition_, e_, args.residual ? 3 : 2, args.residual ? 5 : 3)),
        dy_(static_cast<const T*>(args.dy)),
        x_(static_cast<const T*>(args.x)),
        residual_(static_cast<const T*>(args.residual)),
        affine_{static_cast<const A*>(args.mean), static_cast<const A*>(args.invstd),
                static_cast<const A*>(args.weight), static_cast<const A*>(args.bias)},
        dx_(static_cast<T*>(args.dx)),
        dresidual_(static_cast<T*>(args.dresidual)),
        dweight_(static_cast<A*>(args.dweight)),
        dbias_(static_cast<A*>(args.dbias)) {
    applies_ = dx_ || dresidual_;
    reduces_ = dweight_ || dbias_ || (args.training && dx_);
  }

  void run() {
    if (e_.numel() == 0) {
      for (int64_t c = 0; c < e_.C; ++c) {
        double none[2] = {};
        finish_sums(c, 1, &none[0], &none[1]);
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

  // From n channels' sums over dz and dz (x - mean): the gradients of their parameters; and the sums become offset and
  // slope of the part of dx that comes through the statistics,
  // dx = scale (dz - sum(dz) / n - (x - mean) invstd^2 sum(dz (x - mean)) / n).
  void finish_sums(int64_t first, int64_t n, double* sum_dz, double* sum_dz_deviation) {
    const A* invstd = affine_.invstd + first;
    if (dbias_) {
      for (int64_t i = 0; i < n; ++i) dbias_[first + i] = static_cast<A>(sum_dz[i]);
    }
    if (dweight_) {
      for (int64_t i = 0; i < n; ++i) dweight_[first + i] = static_cast<A>(sum_dz_deviation[i] * invstd[i]);
    }
    const double values = static_cast<double>(e_.N * e_.S);
    for (int64_t i = 0; i < n; ++i) sum_dz[i] /= values;
    for (int64_t i = 0; i < n; ++i) {
      const double scale = invstd[i];
      sum_dz_deviation[i] = sum_dz_deviation[i] * scale * scale / values;
    }
  }

  // Of a channel, with what finish_sums left.
  PlaneParameters<A> parameters(int64_t c, double offset, double slope) const {
    PlaneParameters<A> p = affine_.of(c);
    p.offset = static_cast<A>(offset);
    p.slope = static_cast<A>(slope);
    return p;
  }
  // Of n columns that are a channel each, which have the rest already.
  static void set_through(int64_t n, const double* offset, const double* slope, const ColumnParameters<A>& p) {
    for (int64_t i = 0; i < n; ++i) p.offset[i] = static_cast<A>(offset[i]);
    for (int64_t i = 0; i < n; ++i) p.slope[i] = static_cast<A>(slope[i]);
  }

  const T* residual(int64_t at) const { return residual_ ? residual_ + at : nullptr; }

  void sum_plane(int64_t c, int64_t at, int64_t n, int64_t next, double& sum_dz, double& sum_dz_deviation) {
    normfused::sum_plane(functions_, x_ + at, dy_ + at, residual(at), n, next, affine_.of(c), sum_dz, sum_dz_deviation);
  }

  // dx and dresidual of rows x cols elements from `at` on: adjacent ones where they are streamed.
  template <class Functions, class P>
  void apply(const Functions& functions, int64_t at, int64_t rows, int64_t cols, int64_t stride, int64_t ahead,
             const P& p) {
    const auto apply_to = [&](T* to, auto backward, int64_t wanted, const P& parameters) {
      write(to + at, rows * cols, second_pass_.streams,
            [&](T* tile) { backward(x_ + at, dy_ + at, residual(at), tile, rows, cols, stride, wanted, parameters); });
    };
    if (dx_) {
      if (args_.training) {
        apply_to(dx_, functions.backward, ahead, p);
      } else {
        apply_to(dx_, functions.backward_frozen, ahead, p.with_scale_as_outer());
      }
    }
    if (dresidual_) apply_to(dresidual_, functions.backward_frozen, 0, p);
  }

  void apply_plane(int64_t at, int64_t n, const PlaneParameters<A>& p) {
    second_pass_.template for_each_tile<T>(n, [&](int64_t i, int64_t count, int64_t ahead) {
      apply(functions_.plane, at + i, 1, count, count, ahead, p);
    });
  }

  // Of all samples.
  void sum_channel(int64_t c, double& sum_dz, double& sum_dz_deviation) {
    sum_dz = sum_dz_deviation = 0;
    for (int64_t n = 0; n < e_.N; ++n) {
      double s, d;
      sum_plane(c, (n * e_.C + c) * e_.S, e_.S, second_pass_.next_plane(e_, n), s, d);
      sum_dz += s;
      sum_dz_deviation += d;
    }
  }

  void planes() {
    for_each(partition_.tasks, [this](int64_t task) {
      const int64_t begin = task * partition_.panel, count = minimum(partition_.panel, e_.C - begin);
      double sum_dz[kChannels], sum_dz_deviation[kChannels];
      PlaneParameters<A> p[kChannels];
      if (reduces_) {
        for (int64_t i = 0; i < count; ++i) sum_channel(begin + i, sum_dz[i], sum_dz_deviation[i]);
        finish_sums(begin, count, sum_dz, sum_dz_deviation);
        for (int64_t i = 0; i < count; ++i) p[i] = parameters(begin + i, sum_dz[i], sum_dz_deviation[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) p[i] = affine_.of(begin + i);
      }
      if (!applies_) return;
      for (int64_t n = e_.N - 1; n >= 0; --n) {
        for (int64_t i = 0; i < count; ++i) apply_plane((n * e_.C + begin + i) * e_.S, e_.S, p[i]);
      }
    });
  }

  void split_planes() {
    const int64_t segments = divide_up(e_.S, kSegment);
    const auto segment_size = [&](int64_t s) { return minimum(kSegment, e_.S - s * kSegment); };
    double* partial = workspace_.partial;
    if (reduces_) {
      for_each(partition_.tasks, [&](int64_t task) {
        const int64_t plane = task / segments, s = task % segments;
        sum_plane(plane % e_.C, plane * e_.S + s * kSegment, segment_size(s), second_pass_.next(segment_size(s)),
                  partial[2 * task], partial[2 * task + 1]);
      });
    }
    for (int64_t c = 0; c < e_.C; ++c) {
      PlaneParameters<A> p = affine_.of(c);
      if (reduces_) {
        double total = 0, total_deviation = 0;
        for (int64_t n = 0; n < e_.N; ++n) {
          for (int64_t s = 0; s < segments; ++s) {
            const int64_t task = (n * e_.C + c) * segments + s;
            total += partial[2 * task];
            total_deviation += partial[2 * task + 1];
          }
        }
        finish_sums(c, 1, &total, &total_deviation);
        p = parameters(c, total, total_deviation);
      }
      workspace_.parameters.set(c, p);
    }
    if (!applies_) return;
    for_each(partition_.tasks, [&](int64_t task) {
      const int64_t plane = task / segments, s = task % segments, c = plane % e_.C;
      apply_plane(plane * e_.S + s * kSegment, segment_size(s), workspace_.parameters.template at<A>(c));
    });
  }

  void sum_columns(const BackwardFunctions<T, true>& functions, const T* dy, int64_t at, int64_t rows, int64_t cols,
                   const ColumnParameters<A>& p, double* sum_dz, double* sum_dz_deviation) {
    normfused::sum_columns(functions, x_ + at, dy + at, residual(at), rows, cols, partition_.cols, second_pass_.reading,
                           p, sum_dz, sum_dz_deviation);
  }

  // Whether a panel's dz goes to dx first: computed once, where it stays in L2. Vectors may not overlap then.
  bool keeps_gradient(int64_t cols) const {
    return functions_.keeps_gradient && reduces_ && args_.training && dx_ && !second_pass_.streams &&
           cols % kLanes<A> == 0;
  }

  void apply_columns(int64_t at, int64_t rows, int64_t cols, const ColumnParameters<A>& p) {
    const int64_t stride = partition_.cols;
    for_each_strip(rows, second_pass_.strip(cols, stride), [&](int64_t row, int64_t count) {
      apply(functions_.columns, at + row * stride, count, cols, stride, second_pass_.ahead, p);
    });
  }

  void columns() {
    for_each(partition_.tasks, [this](int64_t task) {
      const int64_t begin = task * partition_.panel, group = partition_.group;
      const int64_t cols = minimum(partition_.panel, partition_.cols - begin), first = begin / group;
      PanelParameters<A> panel;
      const ColumnParameters<A> p = panel.columns();
      affine_.fill(first, cols, group, p);
      // dz in dx then takes the place of dy, and what is left is the identity's.
      const bool keeps = keeps_gradient(cols);
      if (keeps) {
        functions_.columns.backward_frozen(x_ + begin, dy_ + begin, nullptr, dx_ + begin, partition_.rows, cols,
                                           partition_.cols, 0, p);
      }
      if (reduces_) {
        double sum_dz[kPanel], sum_dz_deviation[kPanel];
        sum_columns(keeps ? identity_ : functions_, keeps ? dx_ : dy_, begin, partition_.rows, cols, p, sum_dz,
                    sum_dz_deviation);
        const int64_t channels = cols / group;
        if (group > 1) {
          for (int64_t c = 0; c < channels; ++c) {
            sum_dz[c] = sum(sum_dz + c * group, group);
            sum_dz_deviation[c] = sum(sum_dz_deviation + c * group, group);
          }
        }
        finish_sums(first, channels, sum_dz, sum_dz_deviation);
        if (group == 1) {
          set_through(cols, sum_dz, sum_dz_deviation, p);
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            p.fill(c * group, group, parameters(first + c, sum_dz[c], sum_dz_deviation[c]));
          }
        }
      }
      if (keeps) {
        identity_.columns.backward(x_ + begin, dx_ + begin, nullptr, dx_ + begin, partition_.rows, cols,
                                   partition_.cols, second_pass_.ahead, p);
      } else if (applies_) {
        apply_columns(begin, partition_.rows, cols, p);
      }
    });
  }

  void split_columns() {
    const int64_t cols = partition_.cols, panel = partition_.panel;
    const ColumnParameters<A>& p = workspace_.parameters;
    affine_.fill(0, e_.C, p);
    p.repeat(e_.C, cols);
    if (reduces_) {
      for_each(partition_.tasks, [&](int64_t task) {
        double* sums = workspace_.partial + task * 2 * cols;
        for (int64_t c = 0; c < cols; c += panel) {
          sum_columns(functions_, dy_, partition_.first_row(task) * cols + c, partition_.row_count(task),
                      minimum(panel, cols - c), p.from(c), sums + c, sums + cols + c);
        }
      });
      double *sums = workspace_.partial, *deviations = sums + cols;
      add_partials(sums, partition_.tasks, 2 * cols);
      for (int64_t half = cols / 2; half >= e_.C; half /= 2) {
        add_partials(sums, 2, half);
        add_partials(deviations, 2, half);
      }
      finish_sums(0, e_.C, sums, deviations);
      set_through(e_.C, sums, deviations, p);
      p.repeat(e_.C, cols);
    }
    if (!applies_) return;
    for_each_backwards(partition_.tasks, [&](int64_t t) {
      for (int64_t c = 0; c < cols; c += kTile) {
        apply_columns(partition_.first_row(t) * cols + c, partition_.row_count(t), minimum(kTile, cols - c), p.from(c));
      }
    });
  }

  const BatchNormBackward& args_;
  const ParallelFor parallel_for_;
  const Extent e_;
  const Partition partition_;
  const BatchNormWorkspace<A> workspace_;
  const BackwardFunctions<T, true> functions_, identity_;
  const SecondPass second_pass_;
  const T *dy_, *x_, *residual_;
  const Affine<A> affine_;
  T *dx_, *dresidual_;
  A *dweight_, *dbias_;
  bool applies_, reduces_;
};

}  // namespace

namespace cpu::NORMFUSED_INSTRUCTION_SET {

void batch_norm_backward(const BatchNormBackward& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto t) { BatchNormBackwardDriver<decltype(t)>(args, parallel_for).run(); });
}

}  // namespace cpu::NORMFUSED_INSTRUCTION_SET
}  // namespace normfused
