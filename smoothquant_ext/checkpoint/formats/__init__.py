"""The checkpoint formats, a file each."""
