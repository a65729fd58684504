"""From the user's samples to responses: the trunk's pass, then budgeted generation.

Everything up to the drawn tokens; rewards and gradients come later.
"""
