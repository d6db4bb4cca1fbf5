// The row kernels of float32.
#include "cuda/row_launch.cuh"

namespace lanenorm::cuda {

template void row_forward<float>(RowForward, const RowForwardChoice&, const Context&);
template void row_backward<float>(RowBackward, const RowBackwardChoice&, const Context&);
template void fold_partials<float>(const FoldPartials&, const DeviceLimits&, const Context&);

}  // namespace lanenorm::cuda
