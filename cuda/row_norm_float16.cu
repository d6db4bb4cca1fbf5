// The row kernels of float16.
#include "cuda/row_launch.cuh"

namespace lanenorm::cuda {

template void row_forward<Float16>(RowForward, const RowForwardChoice&, const Context&);
template void row_backward<Float16>(RowBackward, const RowBackwardChoice&, const Context&);
template void fold_partials<Float16>(const FoldPartials&, const DeviceLimits&, const Context&);

}  // namespace lanenorm::cuda
