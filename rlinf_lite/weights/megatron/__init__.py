"""Hugging Face weights as Megatron-core's tensor-parallel ranks hold them, and the flat order of its optimizer state.

Pure functions of the architecture: nothing here imports megatron-core, and no model is needed.
"""
