"""nemo_advrm: adversarial training of reward models (arXiv 2504.06141) on NeMo and Megatron-Core."""

from nemo_advrm.config.moved import serve_moved_modules

__version__ = "0.2.0"

serve_moved_modules()
