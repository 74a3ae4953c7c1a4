"""The 8-bit ops: ``torch.ops.sq`` under typed and documented signatures.

Letters in shapes: M tokens (any leading shape), K input features, N output features. A real value is ``q * scale``.
Arguments that do not fit raise ``RuntimeError`` with one sentence that names the op and the argument. Non-contiguous
tensors are accepted. ``reference`` holds the same functions in plain torch, which the kernels are tested against.
"""

# backends first: it loads the compiled ops, which the other modules look up. These come in the order in which ``info``
# and docs/ops.md name the ops; what a module makes public is its ``__all__``.
# isort: off
from .backends import *
from .layer import *
from ..packing import unpack_weight as unpack_weight
from .quantize import *
from .norm_activation import *
from .gemm import *
from .experts import *
from .decoder_layer import *
from .floating import *
from .cuda.settle import settle as settle
from .cuda.settle import start as _start

_start()
