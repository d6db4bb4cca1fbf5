// The plane kernels of bfloat16, and what all batch norms of it share.
#include "cuda/plane_launch.cuh"

namespace lanenorm::cuda {

template void plane_forward<BFloat16>(PlaneForward, const PlaneChoice&, const Context&);
template void plane_backward<BFloat16>(PlaneBackward, const PlaneChoice&, const Context&);
template void channel_statistics<BFloat16>(const Channels&, const void*, std::int64_t, const Context&);
template void channel_gradient<BFloat16>(const Channels&, const void*, std::int64_t, const Context&);
template void plane_pointwise<BFloat16>(PlaneForward, Pointwise, const PlaneChoice&, const Context&);

}  // namespace lanenorm::cuda
