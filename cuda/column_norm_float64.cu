// The column kernels of float64.
#include "cuda/column_launch.cuh"

namespace lanenorm::cuda {

template void column_forward<double>(ColumnForward, const ColumnChoice&, const Context&);
template void column_backward<double>(ColumnBackward, const ColumnChoice&, const Context&);
template void column_channels_forward<double>(ColumnForward, ColumnChannels, const ColumnChoice&, const Context&);
template void column_channels_backward<double>(ColumnBackward, Channels, const ColumnChoice&, const Context&);
template void column_pointwise<double>(ColumnForward, const ColumnChannels&, Pointwise, const ColumnChoice&,
                                       const Context&);

}  // namespace lanenorm::cuda
