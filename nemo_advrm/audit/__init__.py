"""The audit of reward models: attacks within a budget, judged finds, named weaknesses, a page."""

import nemo_advrm.engine  # noqa: F401  (before Megatron-Core or NeMo is imported)
