// The body of attention.h for one instruction set. The file that includes it names the set in SQ_ATTENTION_TARGET (a
// function's attribute), and has a class Simd that calculates in fp32 and a class Packed, perhaps the same, for packed products:
//   Vec           kLanes floats: a GCC vector, with arithmetic operators
//   exp2(Vec)     of t <= 0, exp2_by_bits or better
//   widen(x)      Vec of fp32, bf16, fp16 or int8;  sum(Vec) and most(Vec), which may ignore NaN, of its lanes,
//                 sums(Vec[4], float*) of four;  transpose(words, stride, count, target, target_stride): kLanes x kLanes
//                 of 32 bits, the first `count` rows of the result, strides in bytes: Simd only
//   Operand       what products multiply: float, or the bits of a bf16. kPair of them along the depth make one Factor
//   kRows, kVecs  rows and vectors of the block of sums that stays in registers
//   kKeys, kStripe  keys that are packed at a time, and rows whose scores for them wait in L1
//   kDepth, kHeight  the multiples to which the depth of products is padded with 0, and their rows with anything
//   load(operands), broadcast(operands), multiply_add(Factor, Factor, Vec), store(Vec, operands) (Simd too)
//   interleave(even, odd, target)  32 operands of each, alternating: Packed with kPair of 2 only
#include "cpu/kernels/attention_direct.h"
#include "cpu/kernels/attention_packed.h"

namespace sq {
namespace {

// E: the elements of k and v.
template <class Simd, class Packed, class T, class E>
SQ_ATTENTION_TARGET void attend_elements(const AttentionArgs& args, const AttentionTask& task) {
  if (is_direct(args, (task.queries.end - task.queries.begin) * args.group)) {
    attend_direct<Simd, T, E>(args, task);
  } else {
    attend_packed<Simd, Packed, T, E>(args, task);
  }
}

template <class Simd, class Packed, class T>
SQ_ATTENTION_TARGET void attend(const AttentionArgs& args, const AttentionTask& task) {
  if (args.k_scale == nullptr) {
    attend_elements<Simd, Packed, T, T>(args, task);
  } else {
    attend_elements<Simd, Packed, T, int8_t>(args, task);
  }
}

// Of q, and of k and v unless they have scales, in the dtype that the arguments name.
template <class Simd, class Packed>
SQ_ATTENTION_TARGET void attend_in_dtype(const AttentionArgs& args, const AttentionTask& task) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return attend<Simd, Packed, BFloat16>(args, task);
    case DType::kFloat16:
      return attend<Simd, Packed, Float16>(args, task);
    default:
      return attend<Simd, Packed, float>(args, task);
  }
}

}  // namespace
}  // namespace sq
