"""verl: a reward manager (``reward_manager``) that scores responses by a server of ``nemo-advrm serve``."""
