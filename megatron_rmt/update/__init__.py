"""From responses to Megatron's forward step: scores, trees, packing, losses.

What one optimizer step trains on; what starts it, logs it or checks flags is in ``job``.
"""
