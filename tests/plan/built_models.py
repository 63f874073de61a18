"""Builds models on fake process groups and prints, as JSON, their parameters per stage: a child process of the tests.

Argument: a JSON list of [model keys, head, padded vocabulary, world size].
"""

from __future__ import annotations

import json
import sys

from nemo_advrm.config.schema import ModelConfig, OptimConfig
from nemo_advrm.logging_setup import quiet_libraries
from nemo_advrm.plan.shards import build_stages


def main() -> None:
    quiet_libraries()
    answers = []
    for keys, head, vocabulary, world in json.loads(sys.argv[1]):
        model = ModelConfig(**{**keys, "optim": OptimConfig()})
        stages, whole = build_stages(model, head, vocabulary, world)
        answers.append({"stages": stages, "whole": whole})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
