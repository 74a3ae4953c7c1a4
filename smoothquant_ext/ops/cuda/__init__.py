"""The ops on a GPU: our kernels where they were proven on the device, torch's own products elsewhere."""
