// The row kernels of float64.
#include "cuda/row_launch.cuh"

namespace lanenorm::cuda {

template void row_forward<double>(RowForward, const RowForwardChoice&, const Context&);
template void row_backward<double>(RowBackward, const RowBackwardChoice&, const Context&);
template void fold_partials<double>(const FoldPartials&, const DeviceLimits&, const Context&);

}  // namespace lanenorm::cuda
