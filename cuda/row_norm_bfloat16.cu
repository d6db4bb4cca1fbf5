// The row kernels of bfloat16.
#include "cuda/row_launch.cuh"

namespace lanenorm::cuda {

template void row_forward<BFloat16>(RowForward, const RowForwardChoice&, const Context&);
template void row_backward<BFloat16>(RowBackward, const RowBackwardChoice&, const Context&);
template void fold_partials<BFloat16>(const FoldPartials&, const DeviceLimits&, const Context&);

}  // namespace lanenorm::cuda
