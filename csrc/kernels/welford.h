// The only place where partial variances are combined.
#pragma once

#include <cstdint>

#include "inline.h"

namespace normfused {
namespace {

// Count, mean and sum of squared deviations from the mean (m2) of some values, as in Welford (1962).
template <class A>
struct Welford {
  A count = 0;
  A mean = 0;
  A m2 = 0;

  // Take in the data of other values: Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm".
  NORMFUSED_INLINE void combine(const Welford& other) {
    const A total = count + other.count;
    if (total == 0) return;
    const A delta = other.mean - mean;
    const A share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * (count * share);
    count = total;
  }
};

using WelfordData = Welford<double>;

}  // namespace
}  // namespace normfused
