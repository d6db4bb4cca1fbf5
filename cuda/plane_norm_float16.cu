// The plane kernels of float16, and what all batch norms of it share.
#include "cuda/plane_launch.cuh"

namespace lanenorm::cuda {

template void plane_forward<Float16>(PlaneForward, const PlaneChoice&, const Context&);
template void plane_backward<Float16>(PlaneBackward, const PlaneChoice&, const Context&);
template void channel_statistics<Float16>(const Channels&, const void*, std::int64_t, const Context&);
template void channel_gradient<Float16>(const Channels&, const void*, std::int64_t, const Context&);
template void plane_pointwise<Float16>(PlaneForward, Pointwise, const PlaneChoice&, const Context&);

}  // namespace lanenorm::cuda
