"""The checks of ``accept_gpu.py``, by what they run."""
