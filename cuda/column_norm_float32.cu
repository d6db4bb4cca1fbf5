// The column kernels of float32.
#include "cuda/column_launch.cuh"

namespace lanenorm::cuda {

template void column_forward<float>(ColumnForward, const ColumnChoice&, const Context&);
template void column_backward<float>(ColumnBackward, const ColumnChoice&, const Context&);
template void column_channels_forward<float>(ColumnForward, ColumnChannels, const ColumnChoice&, const Context&);
template void column_channels_backward<float>(ColumnBackward, Channels, const ColumnChoice&, const Context&);
template void column_pointwise<float>(ColumnForward, const ColumnChannels&, Pointwise, const ColumnChoice&,
                                      const Context&);

}  // namespace lanenorm::cuda
