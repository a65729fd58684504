"""What lets Megatron run, and run well, where there is no CUDA device.

The stand-in for ``torch.cuda`` and the loops that torch compiles; nothing of RMT itself.
"""
