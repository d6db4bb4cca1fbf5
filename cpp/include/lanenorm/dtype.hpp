// In the source tree only: core/dtype.hpp, the one list of element types, is what is installed under this name.
#pragma once

#include "../../core/dtype.hpp"
