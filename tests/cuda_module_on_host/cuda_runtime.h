// What cuda/launch.cu includes; for the host compiler there is no difference.
#pragma once

#include "cuda_runtime_api.h"
