// For any CPU: plain loops over 16 partial sums a row, for compilers to vectorize.
#include "cpu/kernels/linear.h"

namespace sq {

namespace {

void linear_portable(const LinearArgs& args, Range columns) {
  constexpr int64_t kLanes = 16;
  for (int64_t n = columns.begin; n < columns.end; ++n) {
    const BFloat16* w = args.w + n * args.k;
    for (int64_t m = 0; m < args.m; ++m) {
      const BFloat16* x = args.x + m * args.k;
      float lanes[kLanes] = {};
      int64_t k = 0;
      for (; k + kLanes <= args.k; k += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += to_float(x[k + lane]) * to_float(w[k + lane]);
      }
      for (int64_t lane = 0; k + lane < args.k; ++lane) lanes[lane] += to_float(x[k + lane]) * to_float(w[k + lane]);
      float sum = 0.0f;
      for (float lane : lanes) sum += lane;
      if (args.bias != nullptr) sum += to_float(args.bias[n]);
      from_float(sum, args.y + m * args.n + n);
    }
  }
}

}  // namespace

constexpr LinearKernels kLinearPortable = {"portable", linear_portable};

}  // namespace sq
