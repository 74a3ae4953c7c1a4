// Every op of torch.ops.sq. M: tokens, K: input features, N: output features. Shapes, dtypes and numerics are documented
// in smoothquant_ext/ops/, on the declarations in Python; implementations are in cpu/ops/ and cuda/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sq, m) {
  // Quantize activations. `rotate`, here and below: blocks of so many values are multiplied by a Hadamard matrix first; in
  // ops with several inputs a number for each, as their static scales have, or none at all.
  m.def("quantize_per_token(Tensor x, ScalarType dtype, Tensor? smooth=None, int rotate=0) -> (Tensor, Tensor)");
  m.def("quantize_static(Tensor x, Tensor scale, ScalarType dtype, int rotate=0) -> Tensor");

  // Norms and activations that quantize what they compute, in one pass. The third result is x + residual.
  m.def(
      "rms_norm_quantize(Tensor x, Tensor weight, float eps, ScalarType dtype, Tensor? residual=None, "
      "Tensor? scale=None, float offset=0.0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_quantize(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype, Tensor? residual=None, "
      "Tensor? scale=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "silu_mul_quantize(Tensor gate, Tensor up, ScalarType dtype, Tensor? scale=None, int rotate=0) -> "
      "(Tensor, Tensor)");
  m.def(
      "gelu_mul_quantize(Tensor gate, Tensor up, ScalarType dtype, Tensor? scale=None, str approximate=\"none\", "
      "int rotate=0) -> (Tensor, Tensor)");
  m.def(
      "gelu_quantize(Tensor x, ScalarType dtype, Tensor? scale=None, str approximate=\"none\", int rotate=0) -> "
      "(Tensor, Tensor)");
  m.def("relu_quantize(Tensor x, ScalarType dtype, Tensor? scale=None, int rotate=0) -> (Tensor, Tensor)");

  // 8-bit matrix products.
  m.def("prepack_weight(Tensor weight) -> Tensor");
  m.def(
      "w8a8_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias=None, "
      "ScalarType out_dtype=bfloat16) -> Tensor");
  m.def(
      "w8a8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? input_scale=None, "
      "Tensor? smooth=None, ScalarType? out_dtype=None, int rotate=0) -> Tensor");

  // Several layers at once, as lists of an element a layer. An MLP has (gate, up, down), or (first, down) where there is
  // no gate; its input_scale is of x and of what down reads. A list of optional tensors may be None or empty: none of all.
  m.def(
      "w8a8_linear_group(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor?[]? bias=None, "
      "Tensor? input_scale=None, ScalarType? out_dtype=None, int rotate=0) -> Tensor[]");
  m.def(
      "w8a8_mlp(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor?[]? bias=None, Tensor?[]? input_scale=None, "
      "str activation=\"silu\", int[] rotate=[]) -> Tensor");

  // The experts of a mixture, an MLP each: weights [E, N, K], tokens [..., K], and for every token its experts and their
  // weights.
  m.def(
      "w8a8_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor[] weight, Tensor[] weight_scale, "
      "Tensor?[]? bias=None, str activation=\"silu\", int[] rotate=[]) -> Tensor");

  // A whole layer of a Llama-like decoder: q, k, v, o, gate, up, down; input_scale of what q, o, gate and down read.
  // Writes to keys and values [B, H, room, D], quantized where these have scales [B, H, room], behind `past` or at
  // `positions`.
  m.def(
      "w8a8_decoder_layer_(Tensor x, Tensor norm, Tensor post_norm, float eps, float post_eps, float offset, "
      "Tensor[] weight, Tensor[] weight_scale, Tensor?[]? bias, Tensor?[]? input_scale, Tensor cos, Tensor sin, "
      "Tensor(a!) keys, Tensor(b!) values, int past, Tensor? mask, float scale, bool causal, "
      "str activation=\"silu\", Tensor(c!)? keys_scale=None, Tensor(d!)? values_scale=None, Tensor? q_norm=None, "
      "Tensor? k_norm=None, float head_eps=0.0, Tensor? positions=None, int[] rotate=[]) -> Tensor");

  // What stays in floating point between the products.
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset=0.0) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, float scale, bool causal=False, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor");

  // The checks of arguments alone, for implementations in Python (smoothquant_ext/ops/cuda/): of each op, or of all those
  // of a family, whose name comes first. They look at no value on a device.
  m.def("_check_quantize(str op, Tensor x, ScalarType dtype, Tensor? smooth, Tensor? scale, int rotate) -> ()");
  m.def(
      "_check_norm_quantize(str op, Tensor x, Tensor weight, Tensor? bias, ScalarType dtype, Tensor? residual, "
      "Tensor? scale) -> ()");
  m.def(
      "_check_activate_quantize(str op, Tensor gate, Tensor? up, ScalarType dtype, Tensor? scale, str approximate, "
      "int rotate) -> ()");
  m.def("_check_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, ScalarType out_dtype) -> ()");
  m.def(
      "_check_w8a8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_scale, "
      "Tensor? smooth, ScalarType? out_dtype, int rotate) -> ()");
  m.def(
      "_check_linear_group(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor?[]? bias, Tensor? input_scale, "
      "ScalarType? out_dtype, int rotate) -> ()");
  m.def(
      "_check_mlp(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor?[]? bias, Tensor?[]? input_scale, "
      "str activation, int[] rotate) -> ()");
  m.def(
      "_check_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor[] weight, Tensor[] weight_scale, "
      "Tensor?[]? bias, str activation, int[] rotate) -> ()");
  m.def(
      "_check_decoder_layer(Tensor x, Tensor norm, Tensor post_norm, Tensor[] weight, Tensor[] weight_scale, "
      "Tensor?[]? bias, Tensor?[]? input_scale, Tensor cos, Tensor sin, Tensor keys, Tensor values, int past, "
      "Tensor? mask, float scale, bool causal, str activation, Tensor? keys_scale, Tensor? values_scale, "
      "Tensor? q_norm, Tensor? k_norm, Tensor? positions, int[] rotate) -> ()");
  m.def("_check_norm(str op, Tensor x, Tensor weight) -> ()");
  m.def("_check_linear(Tensor x, Tensor weight, Tensor? bias) -> ()");
  m.def(
      "_check_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, Tensor? k_scale, Tensor? v_scale) -> "
      "()");

  // Which CPU instruction set and kernels run. cpu_isas: those compiled for this architecture, "amx,...,portable", the
  // fastest first; cpu_isa_why_not is empty for one that can run; the families of cpu_kernel are quantize, pack, gemm_int8,
  // gemm_fp8, norm_activation, linear and attention; _set_cpu_isa is for tests and benchmarks.
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("cpu_kernel(str family) -> str");
  m.def("cpu_isa_why_not(str isa) -> str");
  m.def("_set_cpu_isa(str isa) -> ()");

  // Of the CUDA library, for smoothquant_ext/ops. _cuda_archs: what it was built for, such as "80+PTX 90a".
  m.def("_cuda_archs() -> str");
  // Which ways to multiply to try, by dtype ("int8" or "fp8"), for how many rows, in which order:
  // "8=skinny,library,torch;=library,torch" (csrc/cuda/compute/way_table.h); and those for so many rows, "skinny,library".
  m.def("_set_cuda_ways(str dtype, str table) -> ()");
  m.def("_cuda_way(str dtype, int rows) -> str");
  // Makes what the first product on a device needs and what no CUDA graph can capture.
  m.def("_cuda_warm_up(int device) -> ()");
  // The way "torch": as w8a8_gemm, implemented in Python.
  m.def(
      "_gemm_by_torch(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, ScalarType out_dtype) -> "
      "Tensor");
}
