"""The layout recipes under test, each with the model it is for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_advrm.config import conf_dir, load_config
from nemo_advrm.config.schema import Config

_NAME = re.compile(
    r"(?P<model>.+)_(?P<gpus>\d+)x(?P<gpu>[a-z0-9]+?)"
    r"(?:_tp(?P<tp>\d+))?(?:_pp(?P<pp>\d+))?(?:_cp(?P<cp>\d+))?(?:_(?P<thousands>\d+)k)?$"
)
_TITLES = {"h100": "h100", "a100": "a100_80", "rtx4090": "rtx4090"}


@dataclass(frozen=True)
class Recipe:
    """What a recipe's name says."""

    name: str
    model: str
    gpus: int
    gpu: str
    tensor: int
    pipeline: int
    context: int
    length: int  # of a sequence; 0 where the name does not say

    def config(self, *overrides: str) -> Config:
        return load_config([f"model={self.model}", f"parallel={self.name}", *overrides])


def _recipe(name: str) -> Recipe | None:
    found = _NAME.match(name)
    if found is None:
        return None
    gpu = _TITLES[found["gpu"]]
    sizes = (int(found[key] or 1) for key in ("tp", "pp", "cp"))
    return Recipe(name, found["model"], int(found["gpus"]), gpu, *sizes, 1024 * int(found["thousands"] or 0))


RECIPES = [
    recipe for file in sorted((conf_dir() / "parallel").glob("*.yaml")) if (recipe := _recipe(file.stem)) is not None
]
