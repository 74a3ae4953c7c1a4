// Which norm: what the kernels and the checks of every device call it.
#pragma once

namespace sq {

enum class Norm { kRms, kLayer };

}  // namespace sq
