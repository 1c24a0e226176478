"""LaVIN: a frozen LLaMA that learns to see through Mixture-of-Modality Adapters, trained with DeepSpeed."""

__version__ = "0.1.0"
