// The column kernels of bfloat16.
#include "cuda/column_launch.cuh"

namespace lanenorm::cuda {

template void column_forward<BFloat16>(ColumnForward, const ColumnChoice&, const Context&);
template void column_backward<BFloat16>(ColumnBackward, const ColumnChoice&, const Context&);
template void column_channels_forward<BFloat16>(ColumnForward, ColumnChannels, const ColumnChoice&, const Context&);
template void column_channels_backward<BFloat16>(ColumnBackward, Channels, const ColumnChoice&, const Context&);
template void column_pointwise<BFloat16>(ColumnForward, const ColumnChannels&, Pointwise, const ColumnChoice&,
                                         const Context&);

}  // namespace lanenorm::cuda
