// Passes over rows of floating-point tensors: what stands between the products of a transformer, each in one pass.
//   norm_rows      h = x, or x + residual rounded to its dtype;  mean = 0 (RMS) or sum(h) / K (layer norm)
//                  y = (h - mean) * (1 / sqrt(sum((h - mean)^2) / K + eps)) * weight, + bias
//   activate_rows  v = act(gate), or act(gate) * up, in fp32 for the quantizer, see activation.h
//   rotate_rows    y = x cos + rotate_half(x) sin, where rotate_half is (-x2, x1) of the halves (x1, x2) of a head; each
//                  product and the sum are rounded to the dtype, as torch's single operators do
//   hadamard_rows  v = x, or x / smooth, in fp32, each block of B values (B a power of two) times Sylvester's Hadamard matrix:
//                  for h = 1, 2, 4, ... B / 2 the pairs (a, b) of values h apart become (a + b, a - b); then v * (1 / sqrt(B))
//   add_rows       y = x + residual, rounded
//   combine_rows   y = the weighted sum of a few rows of fp32, in the order in which they are named; 0 of none
// Otherwise every step is one fp32 operation. A sum has kSumLanes partial sums, lane k % kSumLanes taking element k, which
// are added pairwise at the end, and exp is a polynomial of plain multiplications and additions: every instruction set and
// every GPU give the same bits. Bytes moved: each input once, the output once.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/norm.h"
#include "common/row_scale.h"
#include "cpu/kernels/gemm.h"

namespace sq {

struct NormArgs {
  Norm norm;
  int64_t k;
  const void* x;         // contiguous rows of k elements
  const void* residual;  // the same, or null
  DType x_dtype;
  const float* weight;  // [k], an offset already added
  const float* bias;    // [k], or null
  float eps;
  void* sum;      // x + residual, where there is one
  void* y;        // rows.begin is its first row
  DType y_dtype;  // x_dtype, or fp32 for the quantizer
};

struct ActivateArgs {
  Activation activation;
  int64_t k;
  const void* gate;  // contiguous rows of k elements
  const void* up;    // the same, or null
  DType dtype;
  float* v;  // rows.begin is its first row
};

// Rotary position embedding (Su et al., arXiv:2104.09864) of rows [batch, time] of heads.
struct RotateArgs {
  DType dtype;
  int64_t time, heads, d;
  const void* x;          // [batch, time, heads, d], contiguous
  const void *cos, *sin;  // [time, d], contiguous; of the first batch
  int64_t angle_batch;    // elements from the angles of a batch to the next; 0: the same for all
  void* y;
  int64_t y_batch, y_head, y_time;  // strides of y, in elements; the d of a head are contiguous
};

struct HadamardArgs {
  int64_t k, block;  // block divides k
  const void* x;     // contiguous rows of k elements
  DType dtype;
  const float* smooth;  // [k], or null
  float* v;             // rows.begin is its first row; x itself, if rows begin at 0
};

struct AddArgs {
  DType dtype;
  int64_t k;
  const void *x, *residual;  // contiguous rows of k elements
  void* y;
};

struct CombineArgs {
  int64_t k, count;      // `count` rows of x make one of y
  const float* x;        // contiguous rows of k elements
  const int64_t* rows;   // [.., count], which rows of x; -1: none
  const float* weights;  // [.., count]
  void* y;
  DType dtype;
};

using NormRows = void (*)(const NormArgs& args, Range rows);
using ActivateRows = void (*)(const ActivateArgs& args, Range rows);
using RotateRows = void (*)(const RotateArgs& args, Range rows);
using HadamardRows = void (*)(const HadamardArgs& args, Range rows);
using AddRows = void (*)(const AddArgs& args, Range rows);
using CombineRows = void (*)(const CombineArgs& args, Range rows);

struct NormActivationKernels {
  const char* name;
  NormRows norm;
  ActivateRows activate;
  RotateRows rotate;
  HadamardRows hadamard;
  AddRows add;
  CombineRows combine;
};

extern const NormActivationKernels kNormActivationPortable, kNormActivationAvx2, kNormActivationAvx512;

}  // namespace sq
