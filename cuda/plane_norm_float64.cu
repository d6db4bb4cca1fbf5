// The plane kernels of float64, and what all batch norms of it share.
#include "cuda/plane_launch.cuh"

namespace lanenorm::cuda {

template void plane_forward<double>(PlaneForward, const PlaneChoice&, const Context&);
template void plane_backward<double>(PlaneBackward, const PlaneChoice&, const Context&);
template void channel_statistics<double>(const Channels&, const void*, std::int64_t, const Context&);
template void channel_gradient<double>(const Channels&, const void*, std::int64_t, const Context&);
template void plane_pointwise<double>(PlaneForward, Pointwise, const PlaneChoice&, const Context&);

}  // namespace lanenorm::cuda
