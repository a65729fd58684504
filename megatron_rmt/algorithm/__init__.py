"""The paper's equations, one module each: pure functions of numbers and tensors.

torch alone is imported here: no Megatron, no process group, no prompt, no model.
"""
