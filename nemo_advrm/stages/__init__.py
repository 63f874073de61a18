import nemo_advrm.megatron  # noqa: F401  (before Megatron-Core or NeMo is imported)
