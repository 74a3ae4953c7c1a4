// Every op of torch.ops.sq. M: tokens, K: input features, N: output features. Shapes, dtypes and numerics are documented
// in smoothquant_ext/ops/, on the declarations in Python; implementations are in cpu/ops/ and cuda/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sq, m) {
  // Quantize activations.
  m.def("quantize_per_token(Tensor x, ScalarType dtype, Tensor? smooth=None) -> (Tensor, Tensor)");
  m.def("quantize_static(Tensor x, Tensor scale, ScalarType dtype) -> Tensor");

  // Norms and activations that quantize what they compute, in one pass. The third result is x + residual.
  m.def(
      "rms_norm_quantize(Tensor x, Tensor weight, float eps, ScalarType dtype, Tensor? residual=None, "
      "Tensor? scale=None, float offset=0.0) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_quantize(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype, Tensor? residual=None, "
      "Tensor? scale=None) -> (Tensor, Tensor, Tensor)");
  m.def("silu_mul_quantize(Tensor gate, Tensor up, ScalarType dtype, Tensor? scale=None) -> (Tensor, Tensor)");
  m.def(
      "gelu_mul_quantize(Tensor gate, Tensor up, ScalarType dtype, Tensor? scale=None, str approximate=\"none\") -> "
      "(Tensor, Tensor)");
  m.def("gelu_quantize(Tensor x, ScalarType dtype, Tensor? scale=None, str approximate=\"none\") -> (Tensor, Tensor)");
  m.def("relu_quantize(Tensor x, ScalarType dtype, Tensor? scale=None) -> (Tensor, Tensor)");

  // 8-bit matrix products.
  m.def("prepack_weight(Tensor weight) -> Tensor");
  m.def(
      "w8a8_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias=None, "
      "ScalarType out_dtype=bfloat16) -> Tensor");
  m.def(
      "w8a8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? input_scale=None, "
      "Tensor? smooth=None, ScalarType? out_dtype=None) -> Tensor");

  // Several layers at once, as lists of an element a layer. An MLP has (gate, up, down), or (first, down) where there is
  // no gate; its input_scale is of x and of what down reads. A list of optional tensors may be None or empty: none of all.
  m.def(
      "w8a8_linear_group(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor?[]? bias=None, "
      "Tensor? input_scale=None, ScalarType? out_dtype=None) -> Tensor[]");
  m.def(
      "w8a8_mlp(Tensor x, Tensor[] weight, Tensor[] weight_scale, Tensor?[]? bias=None, Tensor?[]? input_scale=None, "
      "str activation=\"silu\") -> Tensor");

  // The experts of a mixture, an MLP each: weights [E, N, K], tokens [..., K], and for every token its experts and their
  // weights.
  m.def(
      "w8a8_experts(Tensor x, Tensor top_k_index, Tensor top_k_weights, Tensor[] weight, Tensor[] weight_scale, "
      "Tensor?[]? bias=None, str activation=\"silu\") -> Tensor");

  // A whole layer of a Llama-like decoder: q, k, v, o, gate, up, down; input_scale of what q, o, gate and down read.
  // Writes to keys and values [B, H, room, D], quantized where these have scales [B, H, room], behind `past` or at
  // `positions`.
  m.def(
      "w8a8_decoder_layer_(Tensor x, Tensor norm, Tensor post_norm, float eps, float post_eps, float offset, "
      "Tensor[] weight, Tensor[] weight_scale, Tensor?[]? bias, Tensor?[]? input_scale, Tensor cos, Tensor sin, "
      "Tensor(a!) keys, Tensor(b!) values, int past, Tensor? mask, float scale, bool causal, "
      "str activation=\"silu\", Tensor(c!)? keys_scale=None, Tensor(d!)? values_scale=None, Tensor? q_norm=None, "
      "Tensor? k_norm=None, float head_eps=0.0, Tensor? positions=None) -> Tensor");

  // What stays in floating point between the products.
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset=0.0) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, *, float scale, bool causal=False, "
      "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor");

  // Which CPU instruction set and kernels run. cpu_isas: those compiled for this architecture, "amx,...,portable", the
  // fastest first; cpu_isa_why_not is empty for one that can run; the families of cpu_kernel are quantize, pack, gemm_int8,
  // gemm_fp8, norm_activation, linear and attention; _set_cpu_isa is for tests and benchmarks.
  m.def("cpu_isa() -> str");
  m.def("cpu_isas() -> str");
  m.def("cpu_kernel(str family) -> str");
  m.def("cpu_isa_why_not(str isa) -> str");
  m.def("_set_cpu_isa(str isa) -> ()");

  // Of the CUDA library, for smoothquant_ext/cuda_kernels.py: what it was built for, and which families of kernels need
  // no environment variable on which architecture (90 for sm_90).
  m.def("_cuda_archs() -> str");
  m.def("_set_cuda_validated(str family, int arch) -> ()");
}
