// Which kernels run: the instruction sets compiled in, best first, and the choice among those this machine has.
#pragma once

#include <string>
#include <vector>

#include "core/dtype.hpp"

namespace lanenorm {

struct KernelTable;

// The table of the current ISA. The first call reads LANENORM_ISA: std::invalid_argument where it names none of
// available_isas().
const KernelTable& kernels(DType dtype);

std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();  // usable on this machine, best first
std::string current_isa();

// Process-wide; returns the previous one. std::invalid_argument as above. Calls that are running finish as they began.
std::string use_isa(const std::string& name);

}  // namespace lanenorm
