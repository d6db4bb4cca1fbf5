// The plane kernels of float32, and what all batch norms of it share.
#include "cuda/plane_launch.cuh"

namespace lanenorm::cuda {

template void plane_forward<float>(PlaneForward, const PlaneChoice&, const Context&);
template void plane_backward<float>(PlaneBackward, const PlaneChoice&, const Context&);
template void channel_statistics<float>(const Channels&, const void*, std::int64_t, const Context&);
template void channel_gradient<float>(const Channels&, const void*, std::int64_t, const Context&);
template void plane_pointwise<float>(PlaneForward, Pointwise, const PlaneChoice&, const Context&);

}  // namespace lanenorm::cuda
