"""nemo_advrm: adversarial training of reward models (arXiv 2504.06141) on NeMo and Megatron-Core."""

__version__ = "0.1.0"
