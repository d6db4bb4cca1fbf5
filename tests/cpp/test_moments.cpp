// Moments: a case by hand, merges against exact sums, the tree's order, no digit lost far from zero.
#include "core/moments.hpp"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.hpp"

namespace {

using lanenorm::merge;
using lanenorm::Moments;
using lanenorm::MomentsTree;
using lanenorm::two_sum;

Moments<double> value(double x) { return {x, 0.0, 0.0, 0.0}; }

double mean(const Moments<double>& m, double count) { return m.pivot + (m.sum + m.low) / count; }

void by_hand() {
  // 1 and 3: mean 2, m2 = 1 + 1; with 8: mean 4, m2 = 9 + 1 + 16
  const Moments<double> two = merge(value(1), 1.0, value(3), 1.0);
  CHECK_EQ(mean(two, 2), 2.0);
  CHECK_EQ(two.m2, 2.0);
  const Moments<double> three = merge(two, 2.0, value(8), 1.0);
  CHECK_EQ(mean(three, 3), 4.0);
  CHECK(std::fabs(three.m2 - 26.0) < 1e-14);
}

void two_sum_loses_nothing() {
  const auto p = two_sum(1e16, 1.0);
  CHECK_EQ(p.high, 1e16);
  CHECK_EQ(p.low, 1.0);
  const auto q = two_sum(1.0, 1e16);
  CHECK_EQ(q.low, 1.0);
}

void constants_have_no_variance() {
  Moments<double> m = value(0.1);
  for (int i = 1; i < 1000; ++i) m = merge(m, static_cast<double>(i), value(0.1), 1.0);
  CHECK_EQ(m.m2, 0.0);
  CHECK_EQ(mean(m, 1000), 0.1);
}

// Integers: sums and so the mean are exact, for every number of pieces and any split.
void integers_are_exact() {
  std::mt19937_64 random(1);
  for (int n : {1, 2, 3, 7, 8, 9, 64, 100, 1000}) {
    MomentsTree<12> tree;
    std::int64_t sum = 0, squares = 0;
    for (int i = 0; i < n; ++i) {
      const auto x = static_cast<std::int64_t>(random() % 2001) - 1000;
      sum += x;
      squares += x * x;
      tree.push(value(static_cast<double>(x)), 1.0);
    }
    double count;
    const Moments<double> m = tree.total(&count);
    CHECK_EQ(count, n);
    CHECK_EQ(m.pivot * n + m.sum + m.low, static_cast<double>(sum));
    const double exact = static_cast<double>(squares) - static_cast<double>(sum) * static_cast<double>(sum) / n;
    CHECK(std::fabs(m.m2 - exact) <= 1e-12 * (1 + exact));
  }
}

// The same data 1e8 away from zero: m2 must not notice.
void far_from_zero() {
  MomentsTree<12> near, far;
  std::mt19937 random(2);
  for (int i = 0; i < 777; ++i) {
    const double x = static_cast<double>(random() % 4096) / 4096;  // exact also with 1e8 added
    near.push(value(x), 1.0);
    far.push(value(x + 1e8), 1.0);
  }
  double count;
  const Moments<double> a = near.total(&count), b = far.total(&count);
  CHECK(std::fabs(a.m2 - b.m2) <= 1e-13 * a.m2);
}

// A tree of pieces equals the merge of the trees of aligned halves: what lets threads take pieces of it.
void tree_is_made_of_subtrees() {
  std::vector<double> data;
  for (int i = 0; i < 24; ++i) data.push_back(std::sin(i));
  MomentsTree<8> whole, left, right;
  for (int i = 0; i < 24; ++i) {
    whole.push(value(data[static_cast<std::size_t>(i)]), 1.0);
    (i < 16 ? left : right).push(value(data[static_cast<std::size_t>(i)]), 1.0);
  }
  double n, n_left, n_right;
  const Moments<double> a = whole.total(&n), l = left.total(&n_left), r = right.total(&n_right);
  const Moments<double> b = merge(l, n_left, r, n_right);
  CHECK_EQ(a.sum, b.sum);
  CHECK_EQ(a.m2, b.m2);
}

}  // namespace

int main() {
  by_hand();
  two_sum_loses_nothing();
  constants_have_no_variance();
  integers_are_exact();
  far_from_zero();
  tree_is_made_of_subtrees();
  return finish();
}
