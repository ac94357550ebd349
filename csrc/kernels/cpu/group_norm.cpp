// GroupNorm + activation on the CPU. Compiled once per instruction set, into a namespace of its own.
#include "../group_norm.h"

#include "drivers.h"
#include "group_norm_rows.h"
#include "instruction_set.h"
#include "partition.h"

namespace normfused {
namespace {

// What forward and backward have in common: the partition, the workspace, and the parameters of planes and columns.
//
// Contiguous: a group is D * S adjacent elements. channels_last: a sample is S rows of C columns, in `splits` ranges.
template <class T>
class GroupNormDriver {
 protected:
  using A = arithmetic_t<T>;

  template <class Args>
  GroupNormDriver(const Args& args, ParallelFor parallel_for, A* mean, A* rstd, int64_t tensors)
      : parallel_for_(parallel_for),
        e_(args.extent),
        G_(args.groups),
        D_(e_.C / args.groups),
        partition_(group_norm_partition(e_, args.groups)),
        functions_(args.activation, false),
        second_pass_(second_pass<T>(partition_, e_, tensors)),
        rows_(args.activation),
        x_(static_cast<const T*>(args.x)),
        weight_(static_cast<const A*>(args.weight)),
        bias_(static_cast<const A*>(args.bias)),
        mean_(mean),
        rstd_(rstd) {
    double* memory = static_cast<double*>(args.workspace);
    partial_ = memory;
    sums_ = partial_ + partition_.partials;
    arrays_ = reinterpret_cast<A*>(sums_ + partition_.sums);
  }

  template <class F>
  void for_each(int64_t tasks, F f) {
    for_each_task<false>(parallel_for_, tasks, e_.numel(), f);
  }
  template <class F>
  void for_each_backwards(int64_t tasks, F f) {
    for_each_task<true>(parallel_for_, tasks, e_.numel(), f);
  }

  A bias(int64_t c) const { return bias_ ? bias_[c] : A(0); }

  PlaneParameters<A> plane_parameters(int64_t n, int64_t c) const {
    const int64_t unit = n * G_ + c / D_;
    return {mean_[unit], weight_ ? rstd_[unit] * weight_[c] : rstd_[unit], bias(c), rstd_[unit], 0, 0};
  }

  // Column arrays of one sample in the workspace: mean, scale, outer, offset, slope of each channel; bias is shared.
  A* sample_array(int64_t n, int64_t which) const { return arrays_ + (5 * n + which) * e_.C; }
  A* bias_array() const { return arrays_ + 5 * e_.N * e_.C; }
  ColumnParameters<A> column_parameters(int64_t n) const {
    return {sample_array(n, 0), sample_array(n, 1), bias_array(),
            sample_array(n, 2), sample_array(n, 3), sample_array(n, 4)};
  }

  void fill_bias_array() {
    for (int64_t c = 0; c < e_.C; ++c) bias_array()[c] = bias(c);
  }

  void fill_sample_arrays(int64_t n) {
    for (int64_t c = 0; c < e_.C; ++c) {
      const PlaneParameters<A> p = plane_parameters(n, c);
      sample_array(n, 0)[c] = p.mean;
      sample_array(n, 1)[c] = p.scale;
      sample_array(n, 2)[c] = p.outer;
    }
  }

  // channels_last: the rows of a task, whose sample is task / splits.
  int64_t first_row(int64_t task) const { return first_row_of(task % partition_.splits, partition_.splits, e_.S); }
  int64_t row_count(int64_t task) const {
    return first_row_of(task % partition_.splits + 1, partition_.splits, e_.S) - first_row(task);
  }
  int64_t offset_of(int64_t task) const { return (task / partition_.splits * e_.S + first_row(task)) * e_.C; }

  // Rows: weight and bias of every channel, in the workspace.
  void fill_row_arrays() {
    for (int64_t c = 0; c < e_.C; ++c) {
      arrays_[c] = weight_ ? weight_[c] : A(1);
      arrays_[e_.C + c] = bias(c);
    }
  }
  RowParameters<A> row_parameters(int64_t n, int64_t g) const {
    return {mean_[n * G_ + g], rstd_[n * G_ + g], 0, 0, arrays_ + g * D_, arrays_ + e_.C + g * D_};
  }
  // Rows: f(sample, group) for the groups of a task.
  template <class F>
  void for_each_row(int64_t begin, int64_t end, F f) const {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t g = 0; g < G_; ++g) f(n, g);
    }
  }

  template <class F>
  void for_each_panel(F f) const {
    for (int64_t c = 0; c < e_.C; c += kPanel) f(c, minimum(kPanel, e_.C - c));
  }

  // Contiguous, small planes: channels side by side, so that a loop is long enough to vectorise. Calls
  // f(first channel, channels, columns' parameters) for stretches of at most kPanel columns.
  template <class Parameters, class F>
  void for_each_stretch(int64_t begin, int64_t end, Parameters parameters, F f) const {
    PanelParameters<A> panel;
    const int64_t most = kPanel / e_.S;
    for (int64_t first = begin; first < end; first += most) {
      const int64_t channels = minimum(most, end - first);
      for (int64_t i = 0; i < channels; ++i) {
        panel.columns().fill(i * e_.S, e_.S, parameters(first + i));
      }
      f(first, channels, panel.columns());
    }
  }

  bool small_planes() const { return e_.S < 64; }

  // Writes n elements from `at` on: f(begin, count, destination) those of a tile.
  template <class F>
  void write_plane(T* to, int64_t at, int64_t n, F f) const {
    for (int64_t i = at; i < at + n; i += kTile) {
      const int64_t count = minimum(kTile, at + n - i);
      write(to + i, count, second_pass_.streams, [&](T* destination) { f(i, count, destination); });
    }
  }

  // Contiguous: what comes after n elements is next to them, where it is asked for.
  int64_t ahead_after(int64_t n) const { return second_pass_.reading.asks ? n : 0; }

  // channels_last: writes the rows of a task; f(begin, rows, columns, destination, parameters) some of them.
  template <class F>
  void write_rows(T* to, int64_t task, F f) const {
    const ColumnParameters<A> p = column_parameters(task / partition_.splits);
    for (int64_t c = 0; c < e_.C; c += kTile) {
      const int64_t cols = minimum(kTile, e_.C - c);
      for_each_strip(row_count(task), second_pass_.strip(cols, e_.C), [&](int64_t row, int64_t count) {
        const int64_t at = offset_of(task) + row * e_.C + c;
        write(to + at, count * cols, second_pass_.streams,
              [&](T* destination) { f(at, count, cols, destination, p.from(c)); });
      });
    }
  }

  const ParallelFor parallel_for_;
  const Extent e_;
  const int64_t G_, D_;
  const GroupPartition partition_;
  const TileFunctions<T, false> functions_;
  const SecondPass second_pass_;
  const RowFunctions<T> rows_;
  const T* x_;
  const A *weight_, *bias_;
  A *mean_, *rstd_;
  double *partial_, *sums_;
  A* arrays_;
};

template <class T>
class GroupNormForwardDriver : GroupNormDriver<T> {
  using Base = GroupNormDriver<T>;
  using Base::D_, Base::G_, Base::e_, Base::for_each, Base::for_each_backwards, Base::partial_, Base::partition_,
      Base::second_pass_, Base::x_;
  using typename Base::A;

 public:
  GroupNormForwardDriver(const GroupNormForward& args, ParallelFor parallel_for)
      : Base(args, parallel_for, static_cast<A*>(args.mean), static_cast<A*>(args.rstd), 2),
        y_(static_cast<T*>(args.y)),
        eps_(args.eps) {}

  void run() {
    if (e_.numel() == 0) {
      for (int64_t unit = 0; unit < e_.N * G_; ++unit) this->mean_[unit] = this->rstd_[unit] = 0;
    } else if (partition_.channels_last) {
      channels_last();
    } else if (partition_.split) {
      split_groups();
    } else if (partition_.rows) {
      rows();
    } else {
      for_each(e_.N * G_, [this](int64_t unit) {
        finish_statistics(unit, plane_moments(x_ + unit * D_ * e_.S, D_ * e_.S, this->ahead_after(D_ * e_.S)));
        apply_channels(unit / G_, unit % G_ * D_, (unit % G_ + 1) * D_);
      });
    }
  }

 private:
  void finish_statistics(int64_t unit, const WelfordData& data) {
    this->mean_[unit] = static_cast<A>(data.mean);
    this->rstd_[unit] = static_cast<A>(1 / __builtin_sqrt(data.m2 / data.count + eps_));
  }

  void apply_channels(int64_t n, int64_t begin, int64_t end) {
    const int64_t sample = n * e_.C;
    const auto parameters = [&](int64_t c) { return this->plane_parameters(n, c); };
    if (this->small_planes()) {
      this->for_each_stretch(begin, end, parameters, [&](int64_t c, int64_t channels, const auto& p) {
        const int64_t at = (sample + c) * e_.S, cols = channels * e_.S;
        write(y_ + at, cols, second_pass_.streams,
              [&](T* y) { this->functions_.columns.apply(x_ + at, nullptr, y, 1, cols, cols, second_pass_.ahead, p); });
      });
      return;
    }
    for (int64_t c = begin; c < end; ++c) {
      const PlaneParameters<A> p = parameters(c);
      this->write_plane(y_, (sample + c) * e_.S, e_.S, [&](int64_t at, int64_t count, T* y) {
        this->functions_.plane.apply(x_ + at, nullptr, y, 1, count, count, second_pass_.ahead, p);
      });
    }
  }

  void rows() {
    this->fill_row_arrays();
    for_each(partition_.splits, [this](int64_t task) {
      const int64_t begin = task * partition_.task_rows;
      this->for_each_row(begin, minimum(begin + partition_.task_rows, e_.N), [this](int64_t n, int64_t g) {
        const int64_t at = (n * G_ + g) * D_;
        finish_statistics(n * G_ + g, plane_moments(x_ + at, D_, 0));
        const RowParameters<A> p = this->row_parameters(n, g);
        for_each_strip(D_, kTile, [&](int64_t i, int64_t count) {
          write(y_ + at + i, count, second_pass_.streams, [&](T* y) {
            this->rows_.apply(x_ + at + i, nullptr, y, 1, count, count, second_pass_.ahead, p.from(i));
          });
        });
      });
    });
  }

  void split_groups() {
    const int64_t size = D_ * e_.S, segments = divide_up(size, kSegment);
    auto* partial = reinterpret_cast<WelfordData*>(partial_);
    for_each(e_.N * G_ * segments, [&](int64_t task) {
      const int64_t unit = task / segments, begin = task % segments * kSegment;
      const int64_t count = minimum(kSegment, size - begin);
      partial[task] = plane_moments(x_ + unit * size + begin, count, this->ahead_after(count));
    });
    for (int64_t unit = 0; unit < e_.N * G_; ++unit) {
      WelfordData data;
      for (int64_t s = 0; s < segments; ++s) data.combine(partial[unit * segments + s]);
      finish_statistics(unit, data);
    }
    const int64_t channels = maximum(kTaskWork / e_.S, 1), stretches = divide_up(e_.C, channels);
    for_each(e_.N * stretches, [&](int64_t task) {
      const int64_t begin = task % stretches * channels;
      apply_channels(task / stretches, begin, minimum(begin + channels, e_.C));
    });
  }

  void channels_last() {
    this->fill_bias_array();
    const auto moments = [this](int64_t task) {
      double* mean = partial_ + task * 2 * e_.C;
      this->for_each_panel([&](int64_t c, int64_t cols) {
        column_moments(x_ + this->offset_of(task) + c, this->row_count(task), cols, e_.C, second_pass_.reading,
                       mean + c, mean + e_.C + c);
      });
    };
    const auto finish_sample = [this](int64_t n) {
      // Into the first task's columns, then into groups: all channels have the same count.
      const int64_t first = n * partition_.splits;
      double *mean = partial_ + first * 2 * e_.C, *m2 = mean + e_.C;
      int64_t count = this->row_count(first);
      for (int64_t task = first + 1; task < first + partition_.splits; ++task) {
        const double* other = partial_ + task * 2 * e_.C;
        combine_columns(e_.C, count, mean, m2, this->row_count(task), other, other + e_.C);
        count += this->row_count(task);
      }
      for (int64_t g = 0; g < G_; ++g) {
        double average = 0, total = 0;
        for (int64_t c = g * D_; c < (g + 1) * D_; ++c) average += mean[c];
        average /= D_;
        for (int64_t c = g * D_; c < (g + 1) * D_; ++c) {
          const double deviation = mean[c] - average;
          total += m2[c] + deviation * deviation * count;
        }
        finish_statistics(n * G_ + g, {static_cast<double>(count * D_), average, total});
      }
      this->fill_sample_arrays(n);
    };
    const auto apply = [this](int64_t task) {
      this->write_rows(y_, task, [&](int64_t at, int64_t rows, int64_t cols, T* y, const ColumnParameters<A>& p) {
        this->functions_.columns.apply(x_ + at, nullptr, y, rows, cols, e_.C, second_pass_.ahead, p);
      });
    };
    if (partition_.splits == 1) {
      for_each(e_.N, [&](int64_t n) {
        moments(n);
        finish_sample(n);
        apply(n);
      });
      return;
    }
    const int64_t tasks = e_.N * partition_.splits;
    for_each(tasks, moments);
    for_each(e_.N, finish_sample);
    for_each_backwards(tasks, apply);
  }

  T* y_;
  const double eps_;
};

template <class T>
class GroupNormBackwardDriver : GroupNormDriver<T> {
  using Base = GroupNormDriver<T>;
  using Base::D_, Base::G_, Base::e_, Base::for_each, Base::for_each_backwards, Base::partial_, Base::partition_,
      Base::rstd_, Base::second_pass_, Base::sums_, Base::x_;
  using typename Base::A;

 public:
  GroupNormBackwardDriver(const GroupNormBackward& args, ParallelFor parallel_for)
      : Base(args, parallel_for, const_cast<A*>(static_cast<const A*>(args.mean)),
             const_cast<A*>(static_cast<const A*>(args.rstd)), 3),
        dy_(static_cast<const T*>(args.dy)),
        dx_(static_cast<T*>(args.dx)),
        dweight_(static_cast<A*>(args.dweight)),
        dbias_(static_cast<A*>(args.dbias)) {}

  void run() {
    if (e_.numel() == 0) {
      for (int64_t c = 0; c < e_.C; ++c) {
        if (dweight_) dweight_[c] = 0;
        if (dbias_) dbias_[c] = 0;
      }
      return;
    }
    if (partition_.rows) return rows();
    if (partition_.channels_last) {
      channels_last();
    } else if (partition_.split) {
      const int64_t channels = maximum(kTaskWork / e_.S, 1), stretches = divide_up(e_.C, channels);
      const auto over_stretches = [&](auto f) {
        for_each(e_.N * stretches, [&](int64_t task) {
          const int64_t begin = task % stretches * channels;
          f(task / stretches, begin, minimum(begin + channels, e_.C));
        });
      };
      over_stretches([this](int64_t n, int64_t begin, int64_t end) { sum_channels(n, begin, end); });
      if (dx_) over_stretches([this](int64_t n, int64_t begin, int64_t end) { apply_channels(n, begin, end); });
    } else {
      for_each(e_.N * G_, [this](int64_t unit) {
        const int64_t n = unit / G_, begin = unit % G_ * D_;
        sum_channels(n, begin, begin + D_);
        if (dx_) apply_channels(n, begin, begin + D_);
      });
    }
    parameter_gradients();
  }

 private:
  // Sums over the S elements of channel c in sample n: of dz, and of dz (x - mean).
  double& sum_dz(int64_t n, int64_t c) { return sums_[2 * n * e_.C + c]; }
  double& sum_dz_deviation(int64_t n, int64_t c) { return sums_[(2 * n + 1) * e_.C + c]; }

  // dx = scale dz - rstd (offset + (x - mean) slope): the part that comes through the statistics of group g.
  void through_statistics(int64_t n, int64_t g, A& offset, A& slope) {
    double total = 0, total_deviation = 0;
    for (int64_t c = g * D_; c < (g + 1) * D_; ++c) {
      const double w = this->weight_ ? this->weight_[c] : 1;
      total += w * sum_dz(n, c);
      total_deviation += w * sum_dz_deviation(n, c);
    }
    set_through_statistics(n, g, total, total_deviation, offset, slope);
  }

  // From a group's sums of weight dz and weight dz (x - mean).
  void set_through_statistics(int64_t n, int64_t g, double total, double total_deviation, A& offset, A& slope) const {
    const double rstd = rstd_[n * G_ + g], count = static_cast<double>(D_ * e_.S);
    offset = static_cast<A>(total / count);
    slope = static_cast<A>(total_deviation * rstd * rstd / count);
  }

  void rows() {
    this->fill_row_arrays();
    const int64_t C = e_.C;
    for_each(partition_.splits, [this, C](int64_t task) {
      double* partial = partial_ + task * 2 * C;
      A* s = this->arrays_ + (2 + 2 * task) * C;
      A* d = s + C;
      for (int64_t i = 0; i < 2 * C; ++i) partial[i] = 0;
      const int64_t first = task * partition_.task_rows, end = minimum(first + partition_.task_rows, e_.N);
      for_each_strip(end - first, kRowBlock, [&](int64_t from, int64_t count) {
        for (int64_t i = 0; i < 2 * C; ++i) s[i] = 0;
        this->for_each_row(first + from, first + from + count, [&](int64_t n, int64_t g) { row(n, g, s, d); });
        for (int64_t i = 0; i < 2 * C; ++i) partial[i] += s[i];
      });
    });
    add_partials(partial_, partition_.splits, 2 * C);
    for (int64_t c = 0; c < C; ++c) {
      if (dbias_) dbias_[c] = static_cast<A>(partial_[c]);
      if (dweight_) dweight_[c] = static_cast<A>(partial_[C + c]);
    }
  }

  // Group g of row n: adds dz and dz x_hat to s and d, and writes dx.
  void row(int64_t n, int64_t g, A* s, A* d) {
    const int64_t at = (n * G_ + g) * D_, c = g * D_;
    RowParameters<A> p = this->row_parameters(n, g);
    double total = 0, total_deviation = 0;
    for_each_strip(D_, kTile, [&](int64_t i, int64_t count) {
      this->rows_.sums(x_ + at + i, dy_ + at + i, count, p.from(i), s + c + i, d + c + i, total, total_deviation);
    });
    if (!dx_) return;
    set_through_statistics(n, g, total, total_deviation, p.offset, p.slope);
    for_each_strip(D_, kTile, [&](int64_t i, int64_t count) {
      write(dx_ + at + i, count, second_pass_.streams, [&](T* dx) {
        this->rows_.backward(x_ + at + i, dy_ + at + i, nullptr, dx, 1, count, count, second_pass_.ahead, p.from(i));
      });
    });
  }

  void parameter_gradients() {
    for (int64_t c = 0; c < e_.C && (dweight_ || dbias_); ++c) {
      double dweight = 0, dbias = 0;
      for (int64_t n = 0; n < e_.N; ++n) {
        dweight += sum_dz_deviation(n, c) * rstd_[n * G_ + c / D_];
        dbias += sum_dz(n, c);
      }
      if (dweight_) dweight_[c] = static_cast<A>(dweight);
      if (dbias_) dbias_[c] = static_cast<A>(dbias);
    }
  }

  void sum_channels(int64_t n, int64_t begin, int64_t end) {
    const auto parameters = [&](int64_t c) { return this->plane_parameters(n, c); };
    if (this->small_planes()) {
      this->for_each_stretch(begin, end, parameters, [&](int64_t first, int64_t channels, const auto& p) {
        const int64_t at = (n * e_.C + first) * e_.S, cols = channels * e_.S;
        double dz[kPanel], deviation[kPanel];
        sum_columns<T>(this->functions_, x_ + at, dy_ + at, nullptr, 1, cols, cols, RowReading{}, p, dz, deviation);
        for (int64_t i = 0; i < channels; ++i) {
          double total = 0, total_deviation = 0;
          for (int64_t j = i * e_.S; j < (i + 1) * e_.S; ++j) {
            total += dz[j];
            total_deviation += deviation[j];
          }
          sum_dz(n, first + i) = total;
          sum_dz_deviation(n, first + i) = total_deviation;
        }
      });
      return;
    }
    for (int64_t c = begin; c < end; ++c) {
      const int64_t at = (n * e_.C + c) * e_.S;
      sum_plane<T>(this->functions_, x_ + at, dy_ + at, nullptr, e_.S, this->ahead_after(e_.S), parameters(c),
                   sum_dz(n, c), sum_dz_deviation(n, c));
    }
  }

  void apply_channels(int64_t n, int64_t begin, int64_t end) {
    int64_t group = -1;
    A offset = 0, slope = 0;
    const auto parameters = [&](int64_t c) {
      if (c / D_ != group) {
        group = c / D_;
        through_statistics(n, group, offset, slope);
      }
      PlaneParameters<A> p = this->plane_parameters(n, c);
      p.offset = offset;
      p.slope = slope;
      return p;
    };
    if (this->small_planes()) {
      this->for_each_stretch(begin, end, parameters, [&](int64_t first, int64_t channels, const auto& p) {
        const int64_t at = (n * e_.C + first) * e_.S, cols = channels * e_.S;
        write(dx_ + at, cols, second_pass_.streams, [&](T* dx) {
          this->functions_.columns.backward(x_ + at, dy_ + at, nullptr, dx, 1, cols, cols, second_pass_.ahead, p);
        });
      });
      return;
    }
    for (int64_t c = begin; c < end; ++c) {
      const PlaneParameters<A> p = parameters(c);
      this->write_plane(dx_, (n * e_.C + c) * e_.S, e_.S, [&](int64_t at, int64_t count, T* dx) {
        this->functions_.plane.backward(x_ + at, dy_ + at, nullptr, dx, 1, count, count, second_pass_.ahead, p);
      });
    }
  }

  void channels_last() {
    this->fill_bias_array();
    for_each(e_.N, [this](int64_t n) { this->fill_sample_arrays(n); });
    const auto sums = [this](int64_t task) {
      double* partial = partial_ + task * 2 * e_.C;
      this->for_each_panel([&](int64_t c, int64_t cols) {
        const int64_t at = this->offset_of(task) + c;
        sum_columns<T>(this->functions_, x_ + at, dy_ + at, nullptr, this->row_count(task), cols, e_.C,
                       second_pass_.reading, this->column_parameters(task / partition_.splits).from(c), partial + c,
                       partial + e_.C + c);
      });
    };
    const auto finish_sample = [this](int64_t n) {
      double* sums = partial_ + n * partition_.splits * 2 * e_.C;
      add_partials(sums, partition_.splits, 2 * e_.C);
      for (int64_t c = 0; c < e_.C; ++c) {
        sum_dz(n, c) = sums[c];
        sum_dz_deviation(n, c) = sums[e_.C + c];
      }
      for (int64_t g = 0; g < G_; ++g) {
        A offset, slope;
        through_statistics(n, g, offset, slope);
        for (int64_t c = g * D_; c < (g + 1) * D_; ++c) {
          this->sample_array(n, 3)[c] = offset;
          this->sample_array(n, 4)[c] = slope;
        }
      }
    };
    const auto apply = [this](int64_t task) {
      if (!dx_) return;
      this->write_rows(dx_, task, [&](int64_t at, int64_t rows, int64_t cols, T* dx, const ColumnParameters<A>& p) {
        this->functions_.columns.backward(x_ + at, dy_ + at, nullptr, dx, rows, cols, e_.C, second_pass_.ahead, p);
      });
    };
    if (partition_.splits == 1) {
      for_each(e_.N, [&](int64_t n) {
        sums(n);
        finish_sample(n);
        apply(n);
      });
    } else {
      const int64_t tasks = e_.N * partition_.splits;
      for_each(tasks, sums);
      for_each(e_.N, finish_sample);
      for_each_backwards(tasks, apply);
    }
  }

  const T* dy_;
  T* dx_;
  A *dweight_, *dbias_;
};

}  // namespace

namespace cpu::NORMFUSED_INSTRUCTION_SET {

void group_norm_forward(const GroupNormForward& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto t) { GroupNormForwardDriver<decltype(t)>(args, parallel_for).run(); });
}

void group_norm_backward(const GroupNormBackward& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto t) { GroupNormBackwardDriver<decltype(t)>(args, parallel_for).run(); });
}

}  // namespace cpu::NORMFUSED_INSTRUCTION_SET
}  // namespace normfused
