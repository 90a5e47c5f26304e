"""A sealed file gives back what was put in; damage and malice are refused before anything is run or allocated."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cilnorm.storage.tensor_file import COMMENT_BYTES, DamagedFile, _comment, read_tensor_file, tensor_file

CONTENT: dict[str, Any] = {
    "format": 2,
    "weights": {"a.b": torch.arange(12.0).view(3, 4), "half": torch.ones(5, dtype=torch.bfloat16)},
    "indices": [torch.tensor([3, 1]), torch.empty(0, dtype=torch.long)],
    "plain": [1, 2.5, -(2**70), True, None, "text", float("inf")],
    "by number": {0: {"momentum": torch.ones(2)}},
}


def reseal(archive: bytes) -> bytes:
    """The seal of somebody who knows how it is made, on an archive without comment."""
    archive = archive[:-2] + struct.pack("<H", COMMENT_BYTES)
    return archive + _comment(archive)


def archive_of(pickled: bytes, storages: tuple[bytes, ...] = (b"\0" * 16,), compression: int = 0) -> bytes:
    """What torch.save would write had it made this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        for number, storage in enumerate(storages):
            file.writestr(f"archive/data/{number}", storage)
        file.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def tensor(elements: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of {"a": a float tensor} that claims a storage of so many elements and these strides on it."""

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(elements) + b"tQ"
    body = storage + number(offset) + numbers(size) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + body + b"tRs."


def read(path: Path, raw: bytes) -> Any:
    path.write_bytes(raw)
    return read_tensor_file(path)


def refused(path: Path, raw: bytes) -> str:
    """The message, one line, of a refusal that took little memory."""
    before = resident()
    with pytest.raises(DamagedFile) as caught:
        read(path, raw)
    assert resident() - before < 256 << 20
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def test_what_was_sealed_comes_back(tmp_path: Path) -> None:
    assert same(read(tmp_path / "file", tensor_file(CONTENT)), CONTENT)
    assert same(torch.load(tmp_path / "file", weights_only=True), CONTENT)


def test_layouts_views_and_tied_tensors(tmp_path: Path) -> None:
    """A view of a large storage is stored alone, tied tensors twice, or the second would be a claim beyond the file."""
    large = torch.rand(1000, 1000)
    images = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    raw = tensor_file({"view": large[0], "images": images, "tied": [large[1], large[1]] * 3})
    assert len(raw) < 40_000
    found = read(tmp_path / "file", raw)
    assert torch.equal(found["view"], large[0])
    assert found["images"].stride() == images.stride()
    assert torch.equal(found["tied"][5], large[1])


def test_the_file_may_change_once_it_was_read(tmp_path: Path) -> None:
    found = read(tmp_path / "file", tensor_file(CONTENT))
    (tmp_path / "file").write_bytes(b"\xff" * 10_000)
    assert same(found, CONTENT)


@pytest.mark.parametrize("value", [object(), {1.5: 1}, {(1,): 1}, b"bytes", torch.eye(2).to_sparse(), {"a": {1j}}])
def test_other_things_can_not_be_sealed(value: object) -> None:
    with pytest.raises(DamagedFile, match="it holds a "):
        tensor_file({"value": value})


@pytest.mark.parametrize("at", [0, 100, 700, -500, -100, -1])
def test_a_flipped_bit_shows(at: int, tmp_path: Path) -> None:
    raw = bytearray(tensor_file(CONTENT))
    raw[at] ^= 1
    assert refused(tmp_path / "file", bytes(raw)) == "its checksum is missing or differs"


@pytest.mark.parametrize("raw", [b"", b"x", b"PK\x05\x06", b"\0" * 5000])
def test_what_is_no_archive(raw: bytes, tmp_path: Path) -> None:
    assert refused(tmp_path / "file", raw) == "its checksum is missing or differs"
    refused(tmp_path / "file", reseal(raw + b"\0\0"))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tensor_file(tmp_path / "file")


class Malice:
    """Runs something when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_command_is_run(protocol: int, tmp_path: Path) -> None:
    target = tmp_path / "made by malice"
    pickled = pickle.dumps({"net": Malice(target)}, protocol=protocol)
    refused(tmp_path / "file", reseal(pickled + b"\0\0"))
    message = refused(tmp_path / "file", reseal(archive_of(pickled)))
    assert message == "it asks for posix.system" or protocol > 2
    buffer = io.BytesIO()
    torch.save({"net": Malice(target)}, buffer)
    assert "posix.system" in refused(tmp_path / "file", reseal(buffer.getvalue()))
    assert not target.exists()


BILLIONS = 2_500_000_000
BOMB = b"\x80\x02}N" + b"\x85" * 200_000 + b"Ns."
DOUBLING = b"\x80\x02}Nq\x00" + b"h\x00h\x00\x86q\x00" * 99 + b"Ns."
LISTS = b"\x80\x02}X\x01\0\0\0a]q\x00" + b"".join(b"]q%c(h%ch%ce" % (n + 1, n, n) for n in range(60)) + b"s."


@pytest.mark.parametrize(
    "pickled",
    [
        tensor(BILLIONS, (BILLIONS,), (1,)),
        tensor(4, (BILLIONS,), (1,)),
        tensor(4, (BILLIONS,), (0,)),
        tensor(4, (BILLIONS, BILLIONS), (0, 0)),
        tensor(4, (4,), (1,), BILLIONS),
        tensor(1000, (1000,), (1,)),
        tensor(-4, (4,), (1,)),
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",
        BOMB,
        DOUBLING,
        LISTS,
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}q\x00X\x01\0\0\0ah\x00s.",
        b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".",
        b"\x80\x02.",
        b"",
    ],
    ids=range(18),
)
def test_a_claim_is_refused_without_the_memory_it_asks_for(pickled: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "file", reseal(archive_of(pickled)))


def test_an_honest_tensor_made_the_same_way_is_read(tmp_path: Path) -> None:
    found = read(tmp_path / "file", reseal(archive_of(tensor(4, (2, 2), (2, 1)))))
    assert torch.equal(found["a"], torch.zeros(2, 2))


def test_an_archive_that_grows_is_refused(tmp_path: Path) -> None:
    squeezed = archive_of(tensor(4, (4,), (1,)), (b"\0" * (64 << 20),), zipfile.ZIP_DEFLATED)
    assert refused(tmp_path / "file", reseal(squeezed)) == "it is compressed"
    plain = bytearray(archive_of(tensor(4, (4,), (1,))))
    at = plain.rindex(b"PK\x01\x02", 0, plain.rindex(b"archive/data/0"))
    plain[at + 20 : at + 28] = struct.pack("<II", 1 << 31, 1 << 31)
    assert refused(tmp_path / "file", reseal(bytes(plain))) == "it claims to hold more than it has bytes"


# At random: nothing but a refusal or plain content, whatever stands in the file and in its pickle


EDITS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8)


@given(edits=EDITS, seal=st.booleans())
def test_mutations_are_refused_or_harmless(
    edits: list[tuple[int, int]], seal: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(tensor_file(CONTENT))
    for position, byte in edits:
        raw[position % len(raw)] = byte
    attempt(tmp_path_factory, reseal(bytes(raw[:-COMMENT_BYTES])) if seal else bytes(raw))


@given(edits=EDITS, insert=st.binary(max_size=30), at=st.integers(0, 5000))
def test_mutated_pickles_are_refused_or_harmless(
    edits: list[tuple[int, int]], insert: bytes, at: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with zipfile.ZipFile(io.BytesIO(tensor_file(CONTENT))) as file:
        pickled = bytearray(file.read("archive/data.pkl"))
        storages = tuple(file.read(name) for name in file.namelist() if "/data/" in name)
    for position, byte in edits:
        pickled[position % len(pickled)] = byte
    at %= len(pickled)
    attempt(tmp_path_factory, reseal(archive_of(bytes(pickled[:at] + insert + pickled[at:]), storages)))


def attempt(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path, before = tmp_path_factory.getbasetemp() / "sealed", resident()
    with contextlib.suppress(DamagedFile):
        assert isinstance(read(path, raw), dict)
    assert resident() - before < 1 << 30


def test_a_path_that_is_no_utf_8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xfcn"))
    path.write_bytes(tensor_file({"a": torch.ones(2)}))
    assert torch.equal(read_tensor_file(path)["a"], torch.ones(2))
