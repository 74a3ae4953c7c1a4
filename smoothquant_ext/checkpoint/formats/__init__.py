"""The checkpoint formats, a file each; ``registry`` lists them."""
