// The only place where partial variances are combined.
#pragma once

#include <cstdint>

namespace normfused {
namespace {

// Count, mean and sum of squared deviations from the mean (m2) of some values, as in Welford (1962).
struct WelfordData {
  double count = 0;
  double mean = 0;
  double m2 = 0;

  // Take in the data of other values: Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm".
  void combine(const WelfordData& other) {
    const double total = count + other.count;
    if (total == 0) return;
    const double delta = other.mean - mean;
    const double share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * (count * share);
    count = total;
  }
};

}  // namespace
}  // namespace normfused
