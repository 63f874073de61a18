"""An installation over an environment that has versions of its own replaces nothing: pip alone, and docker/install.sh.

The environments are real ones, with a real pip, but their packages are empty: a folder of wheels without content stands
in for the package index, and offers a newer version of everything.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from wheels import build_wheel, empty_wheel, install_by_hand

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"

# What NVIDIA's image of PyTorch has: builds between two releases, below the bounds of setup.py, and no Megatron-Core.
NVIDIA = {
    "torch": "2.9.0a0+145a3a7bda.nv25.10",
    "transformer-engine": "2.99.0+40c69e75",
    "apex": "0.1",
    "flash-attn": "2.7.4.post1",
    "nvidia-dali-cuda130": "1.52.0",
    "numpy": "1.26.4",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -c`` imports from the current folder, where ``pip install -e`` leaves nemo_advrm.egg-info."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77")
    return build_wheel(tmp_path_factory.mktemp("build"))


def asked_for(wheel: Path, *extras: str, python: str = "") -> dict[str, Requirement]:
    """What the wheel asks for with these extras, on this Python or another 3.x."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    found = [Requirement(line) for line in lines]
    here = {"python_version": python} if python else {}
    valid = [
        one
        for one in found
        if one.marker is None or any(one.marker.evaluate({"extra": e, **here}) for e in ("", *extras))
    ]
    by_name = {one.name.replace("_", "-"): one for one in valid}
    assert len(by_name) == len(valid)  # one range for each package
    return by_name


@pytest.fixture(scope="module")
def wanted(wheel: Path) -> dict[str, Requirement]:
    """What the wheel asks for on this Python, with the extra ``serve``."""
    return asked_for(wheel, "serve")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, wanted: Mapping[str, Requirement]) -> Path:
    """The newest version of everything that is allowed, and of what is compiled against CUDA."""
    folder = tmp_path_factory.mktemp("index")
    for name, one in wanted.items():
        empty_wheel(folder, name, newest(one), extras=sorted(one.extras))
    for name in set(NVIDIA) - set(wanted):
        empty_wheel(folder, name, "99.0")
    return folder


def oldest(one: Requirement) -> str:
    return next(s.version for s in one.specifier if s.operator == ">=")


def newest(one: Requirement) -> str:
    """A version in the range that is above every real one."""
    release = [*Version(oldest(one)).release, 0, 0]
    candidates = [f"{release[0]}.{release[1]}.999", f"{release[0]}.999.0", "99.0.0"]
    return [version for version in candidates if version in one.specifier][-1]


def in_between(one: Requirement) -> str:
    """A version in the range that was never tried, below the newest."""
    release = [*Version(oldest(one)).release, 0, 0][:3]
    return f"{release[0]}.{release[1]}.{release[2] + 7}"


def environment(
    folder: Path, packages: Mapping[str, str], modules: Mapping[str, str] = {}, base: str = sys.executable
) -> Path:
    """A virtual environment of ``base`` with this pip and these packages; returns its Python."""
    subprocess.run([base, "-m", "venv", "--symlinks", "--without-pip", folder], check=True)
    site_packages = next((folder / "lib").glob("python*/site-packages"))
    import pip

    (site_packages / "pip").symlink_to(Path(pip.__file__).parent)
    for name, version in packages.items():
        install_by_hand(site_packages, name, version, modules.get(name, ""))
    return folder / "bin" / "python"


def packages_of(python: Path, **variables: str) -> dict[str, str]:
    """All packages that a Python imports, with their versions."""
    code = (
        "import importlib.metadata as m; found = {}\n"
        "for d in m.distributions(): found.setdefault(d.metadata['Name'].replace('_', '-').lower(), d.version)\n"
        "print(*(f'{name} {version}' for name, version in found.items()), sep='\\n')"
    )
    run = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, env=offline(None, **variables)
    )
    return dict(line.split() for line in run.stdout.splitlines())


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of all files that are not Python's cache."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def offline(index: Path | None, **more: str) -> dict[str, str]:
    """An environment in which pip knows this index only, whatever the machine's settings say."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))}
    found = {"PIP_FIND_LINKS": str(index)} if index else {}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", **found, **more}


@pytest.mark.parametrize("options", [["--no-deps"], []], ids=["no-deps", "with-dependencies"])
def test_pip_replaces_nothing_that_is_in_the_ranges(
    tmp_path: Path, wheel: Path, wanted: dict[str, Requirement], index: Path, options: list[str]
) -> None:
    versions = {name: in_between(one) for name, one in wanted.items()}
    python = environment(tmp_path / "environment", versions)
    before = packages_of(python)
    assert versions.items() <= before.items()
    pip = [python, "-m", "pip", "install", *options, f"{wheel}[serve]"]
    run = subprocess.run(pip, capture_output=True, text=True, env=offline(index))
    assert run.returncode == 0, run.stderr
    after = packages_of(python)
    assert after.pop("nemo-advrm")
    assert after == before


@pytest.mark.parametrize(
    ("python", "inside", "outside"),
    [
        ("3.11", ["2.9.0", "2.13.0", "2.14.1"], ["2.8.0", "2.15.0", "2.17.1", "2.20.2"]),
        ("3.12", ["2.9.0", "2.13.0", "2.17.1", "2.20.2"], ["2.8.0", "2.21.0"]),
        ("3.13", ["2.9.0", "2.13.0", "2.17.1", "2.20.2"], ["2.8.0", "2.21.0"]),
    ],
)
def test_the_extra_gpu_has_one_range_on_each_python(
    wheel: Path, python: str, inside: list[str], outside: list[str]
) -> None:
    asked = asked_for(wheel, "gpu", python=python)["transformer-engine"]
    assert [version for version in (*inside, *outside) if version in asked.specifier] == inside
    assert asked.extras == {"pytorch"}
    assert "transformer-engine" not in asked_for(wheel, "serve", python=python)


def another_python(version: str) -> str:
    run = subprocess.run([ROOT / ".ci" / "find_python", version], capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"this machine has no Python {version}")
    return run.stdout.strip()


@pytest.mark.parametrize(
    ("version", "engine", "after"),
    [
        ("3.11", "2.13.0", "2.13.0"),
        ("3.11", "2.17.1", "2.14.9"),  # newer than Megatron-Core 0.16 allows
        ("3.12", "2.13.0", "2.13.0"),
        ("3.12", "2.17.1", "2.17.1"),
        ("3.12", "2.20.2", "2.20.2"),
        ("3.12", "2.20.2+40c69e75", "2.20.2+40c69e75"),  # NVIDIA's build, in one package without extras
        ("3.12", "2.21.0", "2.20.9"),
    ],
)
def test_pip_replaces_no_transformer_engine_that_is_in_the_range(
    tmp_path: Path, wheel: Path, index: Path, version: str, engine: str, after: str
) -> None:
    asked = asked_for(wheel, "serve", "gpu", python=version)
    others = {name: in_between(one) for name, one in asked.items() if name != "transformer-engine"}
    python = environment(tmp_path / "environment", others, base=another_python(version))
    shutil.copytree(index, tmp_path / "index")
    for offered in ("2.14.9", "2.20.9"):
        empty_wheel(tmp_path / "index", "transformer-engine", offered, extras=["pytorch"])
    site_packages = next((tmp_path / "environment" / "lib").glob("python*/site-packages"))
    if "+" in engine:
        install_by_hand(site_packages, "transformer-engine", engine)
    else:
        compiled = f'transformer_engine_torch=={engine}; extra == "pytorch"'
        install_by_hand(site_packages, "transformer-engine", engine, requires=[compiled], extras=["pytorch"])
        install_by_hand(site_packages, "transformer-engine-torch", engine)
    before = packages_of(python)
    assert before["transformer-engine"] == engine and others.items() <= before.items()
    pip = [python, "-m", "pip", "install", f"{wheel}[serve,gpu]"]
    run = subprocess.run(pip, capture_output=True, text=True, env=offline(tmp_path / "index"))
    assert run.returncode == 0, run.stderr
    found = packages_of(python)
    assert found.pop("nemo-advrm")
    assert found == {**before, "transformer-engine": after}


def install(
    image: Path, index: Path, wheel: Path, folder: Path, *extras: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = f"{image.parent}:{os.environ['PATH']}"
    command = [ROOT / "docker" / "install.sh", wheel, folder, *extras]
    return subprocess.run(command, capture_output=True, text=True, env=offline(index, PATH=path, **variables))


def test_an_image_with_all_in_the_ranges_gets_nothing_but_this_package(
    tmp_path: Path, wheel: Path, wanted: dict[str, Requirement], index: Path
) -> None:
    image = environment(tmp_path / "image", {name: in_between(one) for name, one in wanted.items()})
    run = install(image, index, wheel, tmp_path / "new", "serve", ALSO_KEEP="*")
    assert run.returncode == 0, run.stdout + run.stderr
    after = packages_of(tmp_path / "new" / "bin" / "python")
    assert after.pop("nemo-advrm")
    assert packages_of(image).items() <= after.items()
    assert "newer here" not in run.stdout


@pytest.mark.parametrize("engine", ["2.13.0", "2.17.1", "2.20.2+40c69e75", "2.99.0"])
def test_an_image_keeps_any_transformer_engine(
    tmp_path: Path, wheel: Path, wanted: dict[str, Requirement], index: Path, engine: str
) -> None:
    """Also one that the extra ``gpu`` does not allow on this Python."""
    versions = {name: in_between(one) for name, one in wanted.items()} | {"transformer-engine": engine}
    image = environment(tmp_path / "image", versions)
    run = install(image, index, wheel, tmp_path / "new", "serve", "gpu")
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"transformer-engine=={engine}" in run.stdout
    after = packages_of(tmp_path / "new" / "bin" / "python")
    assert after.pop("nemo-advrm") and versions.items() <= after.items()


@pytest.mark.parametrize("megatron_core", ["", "0.13.0"], ids=["PyTorch image", "NeMo image"])
def test_the_dockerfile_leaves_an_image_as_it_is(
    tmp_path: Path, wheel: Path, wanted: dict[str, Requirement], index: Path, megatron_core: str
) -> None:
    """Runs the line of the Dockerfile over an image whose GPU packages, and one other, are outside the ranges."""
    versions = {**NVIDIA, "pydantic": "2.0.0", "pytorch-triton": "3.0.0", "rich": in_between(wanted["rich"])}
    if megatron_core:
        versions["megatron-core"] = megatron_core
    image = environment(tmp_path / "image", versions, {"pytorch-triton": "triton"})
    before = files_of(tmp_path / "image")
    shutil.copytree(ROOT / "docker", tmp_path / "opt" / "nemo_advrm_install")
    (tmp_path / "wheel").mkdir()
    shutil.copy(wheel, tmp_path / "wheel")
    command = run_line("install.sh").replace("/wheel/", f"{tmp_path}/wheel/").replace("/opt/", f"{tmp_path}/opt/")
    path = f"{image.parent}:{os.environ['PATH']}"
    variables = offline(index, PATH=path, EXTRAS="serve", ALSO_KEEP="", PIP_CONSTRAINT=str(constraint_file(tmp_path)))
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stdout + run.stderr

    assert files_of(tmp_path / "image") == before
    after = packages_of(tmp_path / "opt" / "nemo_advrm" / "bin" / "python")
    kept = {name: version for name, version in versions.items() if name != "pydantic"}
    assert kept.items() <= after.items()
    assert "triton" not in after  # its files would hide those of pytorch-triton
    assert after["pydantic"] in wanted["pydantic"].specifier
    assert after["megatron-core"] == (megatron_core or newest(wanted["megatron-core"]))
    assert set(wanted) - {"triton"} <= set(after)
    newer = [line for line in run.stdout.splitlines() if line.startswith("newer here")]
    assert newer == [f"newer here, the image's stays beneath: pydantic 2.0.0 -> {after['pydantic']}"]


def constraint_file(folder: Path) -> Path:
    """NVIDIA's images set PIP_CONSTRAINT to the versions of all that they hold."""
    file = folder / "constraint.txt"
    file.write_text("pydantic==2.0.0\n")
    return file


def run_line(word: str) -> str:
    """The command of the RUN line of the Dockerfile that holds ``word``, without its mounts."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("RUN ") and word in line]
    return re.sub(r"--mount=\S+", "", line.removeprefix("RUN "))


def test_a_package_that_asks_for_another_torch_is_not_installed(
    tmp_path: Path, wheel: Path, index: Path, wanted: dict[str, Requirement]
) -> None:
    image = environment(tmp_path / "image", NVIDIA)
    before = files_of(tmp_path / "image")
    shutil.copytree(index, tmp_path / "index")
    for old in (tmp_path / "index").glob("lightning-*"):
        old.unlink()
    empty_wheel(tmp_path / "index", "lightning", newest(wanted["lightning"]), "torch>=2.9")
    run = install(image, tmp_path / "index", wheel, tmp_path / "new")
    assert run.returncode != 0
    assert "requested (constraint) torch==2.9.0a0+145a3a7bda.nv25.10" in run.stdout + run.stderr  # pip's own words
    assert run.stderr.splitlines()[-1] == "error: nemo_advrm was not installed; nothing of the image was changed"
    assert not (tmp_path / "new").exists() and files_of(tmp_path / "image") == before


def test_a_package_that_would_hide_one_of_the_image_is_refused(
    tmp_path: Path, wheel: Path, index: Path, wanted: dict[str, Requirement]
) -> None:
    """Under another name than the image's, so that no constraint holds it."""
    image = environment(tmp_path / "image", NVIDIA)
    shutil.copytree(index, tmp_path / "index")
    for old in (tmp_path / "index").glob("datasets-*"):
        old.unlink()
    empty_wheel(tmp_path / "index", "datasets", newest(wanted["datasets"]), "nvidia-cublas")
    empty_wheel(tmp_path / "index", "nvidia-cublas", "13.0.0")
    run = install(image, tmp_path / "index", wheel, tmp_path / "new")
    assert run.returncode != 0 and not (tmp_path / "new").exists()
    assert "error: packages of the image would be replaced: nvidia-cublas 13.0.0 was added" in run.stderr


@pytest.fixture
def module(tmp_path: Path) -> dict[str, str]:
    """The variables of a cluster's module of PyTorch: a Python that is no virtual environment, and PYTHONPATH."""
    python = Path(sys.base_prefix) / "bin" / "python3"
    if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, env=offline(None)).returncode:
        pytest.skip(f"{python} has no pip")
    for name, version in NVIDIA.items():
        install_by_hand(tmp_path / "module", name, version)
    return {"PYTHON": str(python), "PYTHONPATH": str(tmp_path / "module")}


def test_a_module_of_a_cluster_is_left_as_it_is(
    tmp_path: Path, wheel: Path, index: Path, wanted: dict[str, Requirement], module: dict[str, str]
) -> None:
    run = install(tmp_path / "none", index, wheel, tmp_path / "new", "serve", **module)
    assert run.returncode == 0, run.stdout + run.stderr
    after = packages_of(tmp_path / "new" / "bin" / "python", PYTHONPATH=module["PYTHONPATH"])
    assert NVIDIA.items() <= after.items()
    assert after["megatron-core"] == newest(wanted["megatron-core"])


def test_a_needed_package_that_the_path_hides_is_an_error(
    tmp_path: Path, wheel: Path, index: Path, wanted: dict[str, Requirement], module: dict[str, str]
) -> None:
    install_by_hand(tmp_path / "module", "pydantic", "2.0.0")
    run = install(tmp_path / "none", index, wheel, tmp_path / "new", **module)
    hidden = (
        f"error: needed packages are hidden by older ones of PYTHONPATH: pydantic {newest(wanted['pydantic'])} by 2.0.0"
    )
    assert run.returncode != 0 and hidden in run.stderr and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "usage: "),
        (["no.whl", "new"], "error: no wheel no.whl"),
        (["WHEEL", "image"], "error: image exists"),
        (["WHEEL", "new", "sevre"], "error: nemo_advrm-0.2.0-py3-none-any.whl has no extra sevre"),
    ],
)
def test_a_wrong_call_is_one_error(tmp_path: Path, wheel: Path, arguments: list[str], said: str) -> None:
    image = environment(tmp_path / "image", {})
    command = [ROOT / "docker" / "install.sh", *(str(wheel) if one == "WHEEL" else one for one in arguments)]
    variables = offline(None, PATH=f"{image.parent}:{os.environ['PATH']}")
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert run.returncode != 0 and said in run.stderr
    assert not (tmp_path / "new").exists()


def test_the_dockerfile_copies_what_the_wheel_is_built_from() -> None:
    text = DOCKERFILE.read_text()
    copied = {word for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.M) for word in line.split()}
    allowed = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line.removeprefix("!") for line in allowed if line.startswith("!")}
    assert {"setup.py", "pyproject.toml", "LICENSE", "conf", "nemo_advrm"} <= copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "hadolint").exists(), reason="hadolint has no build for this system"
)
def test_hadolint_finds_nothing() -> None:
    run = subprocess.run([Path(sys.executable).parent / "hadolint", DOCKERFILE], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
