import nemo_advrm.engine  # noqa: F401  (before Megatron-Core or NeMo is imported)
