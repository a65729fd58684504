"""Reading and writing checkpoints of Hugging Face and of Megatron."""
