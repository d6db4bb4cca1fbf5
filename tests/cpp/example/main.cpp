#include <cstdio>
#include <lanenorm/lanenorm.hpp>
#include <vector>

int main() {
  std::vector<float> x(2 * 8), y(x.size()), mean(2), rstd(2);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = i % 2 == 0 ? 1e6f : 1e6f + 2;
  lanenorm::layer_norm_forward({x.data(), {2, 8}}, {}, {}, {y.data(), {2, 8}}, {mean.data(), {2, 1}},
                               {rstd.data(), {2, 1}});
  std::printf("lanenorm %s on %s: mean %g, y %g %g ...\n", lanenorm::version(), lanenorm::current_isa().c_str(),
              mean[0], y[0], y[1]);
}
