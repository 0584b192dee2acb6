"""Federated fine-tuning of language models with a heterogeneous mixture of LoRA experts."""

__version__ = "0.1.0"
