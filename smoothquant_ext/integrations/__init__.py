"""Other people's programs on 8-bit kernels: transformers' from_pretrained, PEFT, its server and chat."""
