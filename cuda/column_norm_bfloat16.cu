// The column kernels of bfloat16.
#include "cuda/column_launch.cuh"

namespace lanenorm::cuda {

template void column_forward<BFloat16>(ColumnForward, const ColumnChoice&, const Context&);
template void column_backward<BFloat16>(ColumnBackward, const ColumnChoice&, const Context&);

}  // namespace lanenorm::cuda
