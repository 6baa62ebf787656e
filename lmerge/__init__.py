"""Compress Llama-style language models by merging redundant layers."""

__version__ = "0.1.0"
