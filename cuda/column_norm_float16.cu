// The column kernels of float16.
#include "cuda/column_launch.cuh"

namespace lanenorm::cuda {

template void column_forward<Float16>(ColumnForward, const ColumnChoice&, const Context&);
template void column_backward<Float16>(ColumnBackward, const ColumnChoice&, const Context&);
template void column_channels_forward<Float16>(ColumnForward, ColumnChannels, const ColumnChoice&, const Context&);
template void column_channels_backward<Float16>(ColumnBackward, Channels, const ColumnChoice&, const Context&);
template void column_pointwise<Float16>(ColumnForward, const ColumnChannels&, Pointwise, const ColumnChoice&,
                                        const Context&);

}  // namespace lanenorm::cuda
