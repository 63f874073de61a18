"""NeMo-RL: an environment (``environment``) whose rewards come from a server of ``nemo-advrm serve``."""
