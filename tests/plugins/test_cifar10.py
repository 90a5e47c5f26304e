"""CIFAR-10's seven files: read in their order, and refused in one line when they are not right."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cilnorm.images import DatasetError
from cilnorm_datasets import cifar10

PER_FILE = 20  # in place of 10,000


def records() -> dict[str, dict[bytes, Any]]:
    """Batches of which none has as many images of every class, though the five together have."""
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat(np.arange(10), 5 * PER_FILE // 10)).tolist()
    made: dict[str, dict[bytes, Any]] = {}
    for number, name in enumerate((*cifar10.TRAIN, "test_batch")):
        data = random.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8)
        own = labels[number * PER_FILE :][:PER_FILE] or [label for label in range(10) for _ in range(2)]
        made[name] = {b"data": data, b"labels": own}
    made["batches.meta"] = {b"label_names": [b"kind %d" % label for label in range(10)]}
    return made


RECORDS = records()


def write(folder: Path, **changed: dict[bytes, Any]) -> Path:
    folder.mkdir(parents=True)
    for name, record in {**RECORDS, **changed}.items():
        (folder / name).write_bytes(pickle.dumps(record, protocol=2))
    return folder


@pytest.fixture(autouse=True)
def _small_and_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(cifar10, "PER_FILE", PER_FILE)
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(cifar10, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("CILNORM_DATA", raising=False)


def test_the_files_are_read_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / cifar10.FOLDER)
    images = cifar10.build(tmp_path)
    data = np.concatenate([RECORDS[name][b"data"] for name in cifar10.TRAIN])
    assert np.array_equal(images.train_images.numpy().reshape(-1, 3072), data)
    assert images.train_labels.tolist() == [label for name in cifar10.TRAIN for label in RECORDS[name][b"labels"]]
    assert np.array_equal(images.test_images.numpy().reshape(-1, 3072), RECORDS["test_batch"][b"data"])
    assert images.class_names == tuple(f"kind {label}" for label in range(10))
    assert images.notice.startswith("data_batch_1 and data_batch_2 and ")
    assert len(images.digest) == 64


def test_official_files_need_no_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = {name: hashlib.md5(pickle.dumps(RECORDS[name], protocol=2)).hexdigest() for name in cifar10.MD5}
    monkeypatch.setattr(cifar10, "MD5", md5)
    assert cifar10.build(write(tmp_path / cifar10.FOLDER)).notice == ""


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("data_batch_3", {b"data": [1]}, "data_batch_3: data is not an array of uint8"),
        ("data_batch_3", {b"data": np.zeros((9, 3072), np.uint8)}, r"data is not of shape \(20, 3072\)"),
        ("test_batch", {b"labels": [10] * PER_FILE}, "test_batch: labels holds labels outside 0 to 9"),
        ("test_batch", {b"labels": [0] * PER_FILE}, "test_batch: not every class has 2 images"),
        ("data_batch_5", {b"labels": [0] * PER_FILE}, r"data_batch_\*: not every class has 10 images"),
        ("batches.meta", {b"label_names": []}, "label_names is not a list of 10 names"),
    ],
)
def test_what_is_not_right_is_named(tmp_path: Path, name: str, change: dict[bytes, Any], words: str) -> None:
    folder = write(tmp_path / cifar10.FOLDER, **{name: {**RECORDS[name], **change}})
    with pytest.raises(DatasetError, match=words):
        cifar10.build(folder)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / cifar10.FOLDER)
    (folder / "data_batch_2").unlink()
    with pytest.raises(DatasetError, match="data_batch_2: missing"):
        cifar10.build(tmp_path)


def test_it_is_downloaded_where_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"CIFAR-10 is not in .*no route to host.* test_batch and batches\.meta of"):
        cifar10.build(tmp_path)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, record in RECORDS.items():
            raw = pickle.dumps(record, protocol=2)
            member = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(file.getvalue()))
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(file.getvalue()).hexdigest())
    assert len(cifar10.build(tmp_path / "data").train_images) == 5 * PER_FILE
    assert not cifar10._found(tmp_path)
    assert cifar10._found(tmp_path / "data")
