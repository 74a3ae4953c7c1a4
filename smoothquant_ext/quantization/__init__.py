"""From a model in floating point to one in 8 bits: calibrate, smooth, round, measure."""
