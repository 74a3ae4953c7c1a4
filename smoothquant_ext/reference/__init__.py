"""The oracles: every op in plain torch, written for reading, which the kernels are tested against."""

from .decoder_layer import *
from .experts import *
from .floating import *
from .gemm import *
from .norm_activation import *
from .quantize import *
