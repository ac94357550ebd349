// GroupNorm's forward + activation on the CPU. Compiled once per instruction set, into a namespace of its own.
#include "group_norm_driver.h"
#include "instruction_set.h"

namespace normfused {
namespace {

template <class T>
class GroupNormForwardDriver : GroupNormDriver<T> {
  using Base = GroupNormDriver<T>;
  using Base::D_, Base::G_, Base::e_, Base::for_each, Base::for_each_backwards, Base::partial_, Base::partition_,
      Base::second_pass_, Base::x_;
  using typename Base::A;

 public:
  GroupNormForwardDriver(const GroupNormForward& args, ParallelFor parallel_for)
      : Base(args, parallel_for, static_cast<A*>(args.mean), static_cast<A*>(args.rstd), 2),
        functions_(args.activation, false),
        apply_row_(apply_row_function<T>(args.activation)),
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
              [&](T* y) { functions_.apply_columns(x_ + at, nullptr, y, 1, cols, cols, second_pass_.ahead, p); });
      });
      return;
    }
    for (int64_t c = begin; c < end; ++c) {
      const PlaneParameters<A> p = parameters(c);
      this->write_plane(y_, (sample + c) * e_.S, e_.S, [&](int64_t at, int64_t count, T* y) {
        functions_.apply_plane(x_ + at, nullptr, y, 1, count, count, second_pass_.ahead, p);
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
          write(y_ + at + i, count, second_pass_.streams,
                [&](T* y) { apply_row_(x_ + at + i, nullptr, y, 1, count, count, second_pass_.ahead, p.from(i)); });
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
        functions_.apply_columns(x_ + at, nullptr, y, rows, cols, e_.C, second_pass_.ahead, p);
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

  const ForwardFunctions<T, false> functions_;
  const ApplyFunction<T, RowParameters<A>> apply_row_;
  T* y_;
  const double eps_;
};

}  // namespace

namespace cpu::NORMFUSED_INSTRUCTION_SET {

void group_norm_forward(const GroupNormForward& args, ParallelFor parallel_for) {
  dispatch_dtype(args.dtype, [&](auto t) { GroupNormForwardDriver<decltype(t)>(args, parallel_for).run(); });
}

}  // namespace cpu::NORMFUSED_INSTRUCTION_SET
}  // namespace normfused
