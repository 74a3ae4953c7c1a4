"""8-bit kernels in other programs: transformers' from_pretrained, its server and chat, and PEFT."""
