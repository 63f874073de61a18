"""Hostile and damaged .nemo files: one clear error each, nothing runs, nothing is written."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run

from nemo_advrm.convert import nemo_archive
from nemo_advrm.convert.nemo_archive import NemoArchive
from nemo_advrm.convert.nemo_file import NemoSource
from nemo_advrm.engine.weights_metadata import read_metadata
from nemo_advrm.errors import CheckpointError

REAL = Path(__file__).parent / "nemo_aligner" / "reward_model.nemo"


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


HOSTILE = {
    "absolute": (member("/etc/cron.d/evil"), "points outside"),
    "parent": (member("./model_weights/../../evil"), "points outside"),
    "backslash": (member("..\\evil"), "points outside"),
    "symlink": (member("./model_weights", type=tarfile.SYMTYPE, linkname="/etc"), "is a link"),
    "hardlink": (member("./common.pt", type=tarfile.LNKTYPE, linkname="../../etc/passwd"), "is a link"),
    "device": (member("./tok", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "is a special file"),
    "fifo": (member("./tok", type=tarfile.FIFOTYPE), "is a special file"),
    "twice": (member("./model_config.yaml"), "twice"),
}


def repacked(target: Path, change: Callable[[str, bytes], bytes | None], extra: tarfile.TarInfo | None = None) -> Path:
    """The real file with members changed (None leaves one out) and one more at its end."""
    with tarfile.open(REAL) as there, tarfile.open(target, "w") as here:
        for info in there.getmembers():
            stream = there.extractfile(info)
            if stream is None:
                here.addfile(info)
            elif (data := change(info.name.removeprefix("./"), stream.read())) is not None:
                info.size = len(data)
                here.addfile(info, io.BytesIO(data))
        if extra is not None:
            here.addfile(extra)
    return target


def refuses(path: Path, message: str) -> None:
    before = set(path.parent.iterdir())
    with pytest.raises(CheckpointError, match=message) as caught:
        run("nemo", path, "megatron", path.parent / "out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert set(path.parent.iterdir()) == before


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_member_is_refused_before_anything_is_read(kind: str, tmp_path: Path) -> None:
    extra, message = HOSTILE[kind]
    refuses(repacked(tmp_path / "evil.nemo", lambda name, data: data, extra), message)


def test_a_sparse_file_of_any_claimed_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.nemo"
    info = member("./model_weights/__0_0.distcp", size=0)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 60)}
    info.pax_headers["GNU.sparse.map"] = "0,0"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info)
    refuses(path, "bomb.nemo")


def test_more_members_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_archive, "MAX_MEMBERS", 20)
    path = tmp_path / "bomb.nemo"
    with tarfile.open(path, "w") as archive:
        for i in range(21):
            archive.addfile(member(f"./{i}"))
    refuses(path, "more than 20 members")


def test_a_large_configuration_is_not_read(tmp_path: Path) -> None:
    def bloat(name: str, data: bytes) -> bytes:
        return b"#" * (17 << 20) if name == "model_config.yaml" else data

    refuses(repacked(tmp_path / "big.nemo", bloat), "more than the limit of")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.05, 0.3, 0.6, 0.9, 0.95])
def test_a_truncated_file_is_one_clear_error(part: float, tmp_path: Path) -> None:
    whole = REAL.read_bytes()
    with tarfile.open(REAL) as archive:
        end = archive.getmembers()[-1].offset_data + archive.getmembers()[-1].size
    path = tmp_path / "cut.nemo"
    path.write_bytes(whole[: int(end * part)])
    refuses(path, "tar|truncated")


def test_a_file_cut_between_members_or_after_the_last_is_truncated(tmp_path: Path) -> None:
    with tarfile.open(REAL) as archive:
        starts = [info.offset for info in archive.getmembers()[1:]] + [archive.offset]
    for number, start in enumerate(starts):
        path = tmp_path / str(number) / "cut.nemo"
        path.parent.mkdir()
        path.write_bytes(REAL.read_bytes()[:start])
        refuses(path, "truncated")


def test_a_damaged_header_in_the_middle_is_noticed(tmp_path: Path) -> None:
    data = bytearray(REAL.read_bytes())
    with tarfile.open(REAL) as archive:
        start = archive.getmembers()[3].offset
    data[start : start + 100] = b"x" * 100
    path = tmp_path / "damaged.nemo"
    path.write_bytes(data)
    refuses(path, "damaged")


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\x1f\x8b\x08" + bytes(50), bytes(2000)])
def test_what_is_no_tar_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.nemo"
    path.write_bytes(content)
    refuses(path, "not a")


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "absent.nemo", "no such"), (tmp_path, "is a directory")):
        with pytest.raises(CheckpointError, match=message):
            NemoArchive(path)


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights/.metadata", "model_weights/metadata.json"])
def test_an_archive_that_lacks_a_part_is_refused(name: str, tmp_path: Path) -> None:
    refuses(repacked(tmp_path / "part.nemo", lambda n, data: None if n == name else data), Path(name).name)


def test_lacking_weights_are_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    refuses(repacked(tmp_path / "part.nemo", lambda n, data: None if n.endswith(".distcp") else data), "distcp|smaller")


def test_older_formats_are_named(tmp_path: Path) -> None:
    def without(name: str, data: bytes) -> bytes | None:
        return None if name.startswith("model_weights") else data

    zarr = repacked(tmp_path / "zarr.nemo", without, member("./model_weights/model.decoder/.zarray"))
    refuses(zarr, "zarr")
    (tmp_path / "b").mkdir()
    old = repacked(tmp_path / "b" / "old.nemo", without, member("./mp_rank_00/model_weights.ckpt"))
    refuses(old, "a pickle")


class _Evil:
    """Its unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def _with(name: str, data: bytes, target: Path) -> Path:
    return repacked(target, lambda n, old: data if n == name else old)


def test_a_pickle_in_the_table_of_contents_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for data in (pickle.dumps(_Evil(mark)), pickle.dumps({"state_dict_metadata": _Evil(mark)})):
        refuses(_with("model_weights/.metadata", data, tmp_path / "evil.nemo"), "cannot be trusted")
    # classes of packages that such a table does name are not run either
    payload = b"ctorch.distributed.run\nmain\n(lp0\nS'--help'\natR."
    refuses(_with("model_weights/.metadata", payload, tmp_path / "evil.nemo"), "cannot be trusted")
    payload = b"cpathlib\nPath.touch\n(cpathlib\nPosixPath\n(S'" + str(mark).encode() + b"'\ntRtR."
    refuses(_with("model_weights/.metadata", payload, tmp_path / "evil.nemo"), "cannot be trusted")
    assert not mark.exists()


def test_a_pickle_in_common_pt_is_never_opened(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = _with("model_weights/common.pt", pickle.dumps(_Evil(mark)), tmp_path / "evil.nemo")
    run("nemo", path, "megatron", tmp_path / "out")
    assert not mark.exists() and (tmp_path / "out" / "meta.json").exists()


def test_a_pickle_in_place_of_a_tensor_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with NemoArchive(REAL) as archive:
        table = read_metadata(archive.read("model_weights/.metadata"), "the real file")
    payload = pickle.dumps(_Evil(mark))

    def change(name: str, data: bytes) -> bytes:
        for place in table.storage_data.values():
            if name == f"model_weights/{place.relative_path}":
                start, end = place.offset, place.offset + place.length
                data = data[:start] + payload.ljust(place.length, b"\0")[: end - start] + data[end:]
        return data

    refuses(repacked(tmp_path / "evil.nemo", change), "could not be read")
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()  # so it would have shown


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_damaged_table_of_contents_is_one_clear_error(place: float, tmp_path: Path) -> None:
    def damage(name: str, data: bytes) -> bytes:
        if not name.endswith(".metadata"):
            return data
        at = int(len(data) * place)
        return data[:at] + bytes(b ^ 0xFF for b in data[at : at + 40]) + data[at + 40 :]

    path = repacked(tmp_path / "damaged.nemo", damage)
    with pytest.raises(CheckpointError, match=r"damaged\.nemo"), NemoSource(path) as source:
        for name in source.specs:
            source.read(name)


def test_the_real_file_is_whole(tmp_path: Path) -> None:
    path = Path(shutil.copy(REAL, tmp_path / "real.nemo"))
    with NemoArchive(path) as archive:
        assert {"model_config.yaml", "model_weights/.metadata", "model_weights/common.pt"} <= set(archive.names)


@pytest.mark.parametrize("size", [10**10, 10**13, 2**62, 10**20])
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_claims_more_than_the_file_has_takes_no_memory(tmp_path: Path, kind: bytes, size: int) -> None:
    path = tmp_path / "claims.nemo"
    path.write_bytes(member("name", type=kind, size=size).tobuf(tarfile.GNU_FORMAT) + b"x" * 512)
    tracemalloc.start()
    refuses(path, "not a complete .nemo file")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_thousands_of_headers_without_a_member_are_one_error(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "chain.nemo"
    path.write_bytes((member("name", type=kind, size=4).tobuf(tarfile.GNU_FORMAT) + b"abc\0" + bytes(508)) * 5_000)
    refuses(path, "not a complete .nemo file")
