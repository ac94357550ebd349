// GroupNorm's backward + activation on the CPU. Compiled once per instruction set, into a namespace of its own.
#include "group_norm_driver.h"
#include "instruction_set.h"

namespace normfused {
namespace {

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
        functions_(args.activation, false),
        rows_(args.activation),
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
      rows_.sums(x_ + at + i, dy_ + at + i, count, p.from(i), s + c + i, d + c + i, total, total_deviation);
    });
    if (!dx_) return;
    set_through_statistics(n, g, total, total_deviation, p.offset, p.slope);
    for_each_strip(D_, kTile, [&](int64_t i, int64_t count) {
      write(dx_ + at + i, count, second_pass_.streams, [&](T* dx) {
        rows_.backward(x_ + at + i, dy_ + at + i, nullptr, dx, 1, count, count, second_pass_.ahead, p.from(i));
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
        sum_columns<T>(functions_, x_ + at, dy_ + at, nullptr, 1, cols, cols, RowReading{}, p, dz, deviation);
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
      sum_plane<T>(functions_, x_ + at, dy_ + at, nullptr, e_.S, this->ahead_after(e_.S), parameters(c), sum_dz(n, c),
                   sum_dz_deviation(n, c));
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
          functions_.columns.backward(x_ + at, dy_ + at, nullptr, dx, 1, cols, cols, second_pass_.ahead, p);
        });
      });
      return;
    }
    for (int64_t c = begin; c < end; ++c) {
      const PlaneParameters<A> p = parameters(c);
      this->write_plane(dx_, (n * e_.C + c) * e_.S, e_.S, [&](int64_t at, int64_t count, T* dx) {
        functions_.plane.backward(x_ + at, dy_ + at, nullptr, dx, 1, count, count, second_pass_.ahead, p);
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
        sum_columns<T>(functions_, x_ + at, dy_ + at, nullptr, this->row_count(task), cols, e_.C, second_pass_.reading,
                       this->column_parameters(task / partition_.splits).from(c), partial + c, partial + e_.C + c);
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
        functions_.columns.backward(x_ + at, dy_ + at, nullptr, dx, rows, cols, e_.C, second_pass_.ahead, p);
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

  const BackwardFunctions<T, false> functions_;
  const RowBackwardFunctions<T> rows_;
  const T* dy_;
  T* dx_;
  A *dweight_, *dbias_;
};

}  // namespace

namespace cpu::NORMFUSED_INSTRUCTION_SET {

void group_norm_backward(const GroupNormBackward& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto t) { GroupNormBackwardDriver<decltype(t)>(args, parallel_for).run(); });
}

}  // namespace cpu::NORMFUSED_INSTRUCTION_SET
}  // namespace normfused
