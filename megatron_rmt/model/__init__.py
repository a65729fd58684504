"""Megatron's GPTModel under a visibility: who sees whom, the passes, the language-model head.

Forward and backward arithmetic only; what is drawn, rewarded or trained is decided above.
"""
