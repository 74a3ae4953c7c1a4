"""``python -m smoothquant_ext.cli``, as torchrun wants it: the same as ``smoothquant``."""

from . import main

main()
