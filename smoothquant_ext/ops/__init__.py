"""The 8-bit ops: ``torch.ops.sq`` under typed and documented signatures.

Letters in shapes: M tokens (any leading shape), K input features, N output features. A real value is ``q * scale``.
Arguments that do not fit raise ``RuntimeError`` with one sentence that names the op and the argument. Non-contiguous
tensors are accepted. ``reference`` holds the same functions in plain torch, which the kernels are tested against.
"""

# One line an op, module by module in the order in which ``info`` and docs/ops.md name them. The compiled ops are loaded
# first: the modules below look them up.
# isort: off
from .backends import OpInfo as OpInfo, cpu_isa as cpu_isa, cpu_isas as cpu_isas, fast_linear_rows as fast_linear_rows
from .backends import info as info
from .layer import Layer as Layer, as_lists as as_lists
from ..packing import unpack_weight as unpack_weight

from .quantize import quantize_per_token as quantize_per_token
from .quantize import quantize_static as quantize_static

from .norm_activation import rms_norm_quantize as rms_norm_quantize
from .norm_activation import layer_norm_quantize as layer_norm_quantize
from .norm_activation import silu_mul_quantize as silu_mul_quantize
from .norm_activation import gelu_mul_quantize as gelu_mul_quantize
from .norm_activation import gelu_quantize as gelu_quantize
from .norm_activation import relu_quantize as relu_quantize

from .gemm import prepack_weight as prepack_weight
from .gemm import w8a8_gemm as w8a8_gemm
from .gemm import w8a8_linear as w8a8_linear
from .gemm import w8a8_linear_group as w8a8_linear_group
from .gemm import w8a8_mlp as w8a8_mlp

from .experts import w8a8_experts as w8a8_experts
from .decoder_layer import w8a8_decoder_layer_ as w8a8_decoder_layer_

from .floating import rms_norm as rms_norm
from .floating import linear as linear
from .floating import attention as attention
