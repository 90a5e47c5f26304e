"""CIFAR-100's files: read in all their forms, downloaded with care, and refused in one line when they are not right."""

import hashlib
import io
import pickle
import struct
import tarfile
import tracemalloc
import urllib.request
from http.client import IncompleteRead
from typing import ClassVar
from urllib.error import URLError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cilnorm.images import DatasetError
from cilnorm_datasets import _files, cifar100

PER_CLASS = {"train": 2, "test": 1}  # in place of 500 and 100


class Python2(pickle._Pickler):
    """Writes what Python 2 wrote: its strings, and numpy's old module names."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, text):
        raw = text.encode() if isinstance(text, str) else text
        self.write(b"T" + struct.pack("<i", len(raw)) + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def python2(record):
    file = io.BytesIO()
    Python2(file, protocol=2).dump(record)
    return file.getvalue().replace(b"numpy._core", b"numpy.core")


def python3(record):
    return pickle.dumps(record, protocol=2)


def python3_now(record):
    return pickle.dumps(record, protocol=4)


def split(per_class):
    count = 100 * per_class
    random = np.random.default_rng(per_class)
    labels = random.permutation(np.repeat(np.arange(100), per_class)).tolist()
    data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    names = [b"%d.png" % i for i in range(count)]
    return {b"filenames": names, b"data": data, b"fine_labels": labels, b"coarse_labels": [0] * count}


RECORDS = {name: split(per_class) for name, per_class in PER_CLASS.items()}
RECORDS["meta"] = {b"fine_label_names": [b"class %d" % i for i in range(100)]}


def write(folder, dumps=python2, **records):
    folder.mkdir(parents=True)
    for name, record in {**RECORDS, **records}.items():
        (folder / name).write_bytes(dumps(record))
    return folder


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(cifar100, "PER_CLASS", PER_CLASS)
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(cifar100, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("CILNORM_DATA", raising=False)


@pytest.fixture
def official(monkeypatch):
    """Makes the files in Python 2's form the official ones."""
    md5s = {name: hashlib.md5(python2(record)).hexdigest() for name, record in RECORDS.items()}
    monkeypatch.setattr(cifar100, "MD5", md5s)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dumps", [python2, python3, python3_now])
def test_reads_every_form_to_the_same_set(tmp_path, dumps):
    write(tmp_path / cifar100.FOLDER, dumps)
    images = cifar100.build(tmp_path)
    assert images.train_images.shape == (200, 3, 32, 32)
    assert np.array_equal(images.train_images.numpy().reshape(200, 3072), RECORDS["train"][b"data"])
    assert images.train_labels.tolist() == RECORDS["train"][b"fine_labels"]
    assert np.array_equal(images.test_images.numpy().reshape(100, 3072), RECORDS["test"][b"data"])
    assert images.test_labels.tolist() == RECORDS["test"][b"fine_labels"]
    assert images.class_names[:2] == ("class 0", "class 1")
    parts = (images.train_images, images.train_labels, images.test_images, images.test_labels)
    assert images.digest == hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("size", [1, 8, 16])
def test_smaller_images_are_means_of_squares(tmp_path, size):
    write(tmp_path / cifar100.FOLDER)
    whole, small = cifar100.build(tmp_path), cifar100.build(tmp_path, size=size)
    side = 32 // size
    for n, channel, row, column in ((0, 0, 0, 0), (7, 2, size - 1, 0), (99, 1, size // 2, size - 1)):
        square = whole.test_images[n, channel, row * side : (row + 1) * side, column * side : (column + 1) * side]
        mean = square.double().mean().item()
        assert small.test_images[n, channel, row, column].item() == int(mean + 0.5)
    assert small.train_images.shape == (200, 3, size, size)
    assert small.digest != whole.digest
    assert (small.mean, small.std) == (whole.mean, whole.std)


@pytest.mark.parametrize("size", [0, -16, 5, 64])
def test_a_size_that_does_not_divide_the_side_is_refused(tmp_path, size):
    write(tmp_path / cifar100.FOLDER)
    with pytest.raises(DatasetError, match="must divide"):
        cifar100.build(tmp_path, size=size)


def test_the_official_files_need_no_notice(tmp_path, official):
    assert cifar100.build(write(tmp_path / cifar100.FOLDER)).notice == ""


def test_other_files_of_the_right_content_are_noticed(tmp_path, official):
    write(tmp_path / cifar100.FOLDER)
    (tmp_path / cifar100.FOLDER / "test").write_bytes(python3(RECORDS["test"]))
    notice = cifar100.build(tmp_path).notice
    assert notice.startswith(f"test in {tmp_path / cifar100.FOLDER}: ")
    assert "md5" in notice


@pytest.mark.parametrize("given_root", ["parent", "parent/cifar-100-python", "renamed"])
def test_takes_the_folder_or_its_parent(tmp_path, given_root):
    write(tmp_path / ("renamed" if given_root == "renamed" else "parent/cifar-100-python"))
    assert len(cifar100.build(tmp_path / given_root).train_images) == 200


def test_root_goes_before_the_environment_and_that_before_the_cache(tmp_path, monkeypatch):
    def shifted(by):
        return {b"fine_label_names": RECORDS["meta"][b"fine_label_names"][by:] + [b"new"] * by}

    write(tmp_path / "cache" / cifar100.FOLDER, meta=shifted(1))
    assert cifar100.build().class_names[0] == "class 1"
    write(tmp_path / "env" / cifar100.FOLDER, meta=shifted(2))
    monkeypatch.setenv("CILNORM_DATA", str(tmp_path / "env"))
    assert cifar100.build().class_names[0] == "class 2"
    write(tmp_path / "root" / cifar100.FOLDER, meta=shifted(3))
    assert cifar100.build(tmp_path / "root").class_names[0] == "class 3"


# --- what is refused -------------------------------------------------------------------------------------------------


def relabelled(change):
    labels = list(RECORDS["train"][b"fine_labels"])
    change(labels)
    return {**RECORDS["train"], b"fine_labels": labels}


def with_data(data):
    return {**RECORDS["train"], b"data": data}


DATA = RECORDS["train"][b"data"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (with_data(DATA[:-1]), "not of shape"),
        (with_data(DATA.reshape(200, 3, 32, 32)), "not of shape"),
        (with_data(np.asfortranarray(DATA)), "not of shape"),
        (with_data(DATA.astype(np.int64)), "not an array of uint8"),
        (with_data(np.array([None, {}])), "not an array of uint8"),
        (with_data(DATA.tolist()), "not an array of uint8"),
        (relabelled(lambda labels: labels.__setitem__(0, 100)), "outside 0 to 99"),
        (relabelled(lambda labels: labels.__setitem__(0, -1)), "outside 0 to 99"),
        (relabelled(lambda labels: labels.__setitem__(0, 1 << 99)), "outside 0 to 99"),
        (relabelled(lambda labels: labels.__setitem__(0, (labels[0] + 1) % 100)), "not every class"),
        (relabelled(lambda labels: labels.pop()), "list of 200 integers"),
        (relabelled(lambda labels: labels.__setitem__(0, [labels] * 9)), "list of 200 integers"),
        ({}, "data"),
        ([], "not a dictionary"),
    ],
)
def test_wrong_content_is_named(tmp_path, record, words):
    folder = write(tmp_path / cifar100.FOLDER, python3, train=record)
    with pytest.raises(DatasetError, match=words) as caught:
        cifar100.build(tmp_path)
    assert str(caught.value).startswith(str(folder / "train"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [None, [b"one"], [b"x"] * 99 + ["text"]])
def test_wrong_names_are_refused(tmp_path, names):
    write(tmp_path / cifar100.FOLDER, python3_now, meta={b"fine_label_names": names})
    with pytest.raises(DatasetError, match="meta: fine_label_names"):
        cifar100.build(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 100, 300_000])
def test_a_truncated_file_is_named(tmp_path, size):
    folder = write(tmp_path / cifar100.FOLDER)
    (folder / "train").write_bytes((folder / "train").read_bytes()[:size])
    with pytest.raises(DatasetError, match="train: truncated"):
        cifar100.build(tmp_path)


def test_one_missing_file_is_named_and_nothing_is_downloaded(tmp_path):
    folder = write(tmp_path / cifar100.FOLDER)
    (folder / "test").unlink()
    with pytest.raises(DatasetError, match="test: missing"):
        cifar100.build(tmp_path)


def test_a_file_too_large_is_not_read(tmp_path):
    folder = write(tmp_path / cifar100.FOLDER)
    with (folder / "meta").open("r+b") as file:
        file.truncate(cifar100.BYTES_LIMIT + 1)
    with pytest.raises(DatasetError, match="meta: larger than"):
        cifar100.build(tmp_path)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return __import__("os").system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_no_command_is_run(tmp_path, protocol):
    marker = tmp_path / "marker"
    folder = write(tmp_path / cifar100.FOLDER)
    (folder / "train").write_bytes(pickle.dumps({b"data": Evil(marker)}, protocol=protocol))
    with pytest.raises(DatasetError, match="train: "):
        cifar100.build(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"cbuiltins\neval\n(U\x03all\x85R.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"P1\n.",
        b"\x82\x01.",
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
        b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01btR.",
        b"Nr\xff\xff\xff\x7f.",
        b"Np2000000000\n.",
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b".",
        b"T\xff\xff\xff\x7f.",
        b"}N" + b"\x85" * 200_000 + b"Ns.",
        b"}Nq\x00" + b"h\x00h\x00\x86q\x00" * 99 + b"Ns.",
    ],
)
def test_hostile_instructions_are_refused_without_the_memory_they_ask_for(tmp_path, raw):
    folder = write(tmp_path / cifar100.FOLDER)
    (folder / "train").write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(DatasetError, match="train: "):
        cifar100.build(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 << 20


def test_more_instructions_than_any_file_has_are_refused(monkeypatch):
    monkeypatch.setattr(_files, "OPCODES_LIMIT", 100)
    assert _files.load_pickle(b"]" * 100 + b".") == []
    with pytest.raises(pickle.UnpicklingError, match="instruction 101"):
        _files.load_pickle(b"]" * 102 + b".")


def test_a_pickle_leaves_no_trace_on_what_it_was_given():
    _files.load_pickle(b"c_codecs\nencode\n}U\x05stain" + b"Nsb.")
    assert not vars(_files._encode)
    found = _files.load_pickle(b"c_codecs\nencode\n.")
    assert not vars(found)


@given(
    cut=st.none() | st.integers(0, 1000),
    edits=st.lists(st.tuples(st.integers(0, 1400) | st.integers(-1500, -1), st.integers(0, 255)), max_size=8),
)
def test_mutations_give_a_set_or_one_kind_of_error(tmp_path_factory, cut, edits):
    raw = bytearray(python2(RECORDS["test"]))
    for position, byte in edits:
        raw[position] = byte
    read_or_refuse(tmp_path_factory, bytes(raw[: cut and -cut]))


@given(st.binary(max_size=200))
def test_random_bytes_give_one_kind_of_error(tmp_path_factory, raw):
    assert not read_or_refuse(tmp_path_factory, raw)


def read_or_refuse(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "test"
    path.write_bytes(raw)
    try:
        images, labels, _ = cifar100._split(path)
    except DatasetError:
        return False
    assert images.shape == (100, 3, 32, 32)
    assert sorted(labels) == list(range(100))
    return True


# --- the download ----------------------------------------------------------------------------------------------------


def archive(monkeypatch, *extra):
    """What the network answers: an archive of the three files, with further members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, raw in [*((f"{cifar100.FOLDER}/{n}", python2(r)) for n, r in RECORDS.items()), *extra]:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    raw = file.getvalue()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(raw))
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", hashlib.md5(raw).hexdigest())


@pytest.mark.parametrize("given_root", ["", "cifar-100-python"])
def test_downloads_what_is_absent_and_only_the_three_files(tmp_path, monkeypatch, official, given_root):
    archive(monkeypatch, (f"{cifar100.FOLDER}/file.txt~", b"left over"))
    images = cifar100.build(tmp_path / "data" / given_root)
    assert images.notice == ""
    assert len(images.train_images) == 200
    assert [path.name for path in (tmp_path / "data").iterdir()] == [cifar100.FOLDER]
    assert {path.name for path in (tmp_path / "data" / cifar100.FOLDER).iterdir()} == set(RECORDS)


def refused(tmp_path):
    with pytest.raises(DatasetError) as caught:
        cifar100.build(tmp_path / "data")
    message = str(caught.value)
    for words in (str(tmp_path / "data" / cifar100.FOLDER), "--data-root", "CILNORM_DATA", "network"):
        assert words in message
    assert "\n" not in message
    assert list((tmp_path / "data").iterdir()) == []
    return message


def test_without_a_network_says_where_it_looked_and_what_to_do(tmp_path):
    assert "no route to host" in refused(tmp_path)


@pytest.mark.parametrize("error", [TimeoutError("timed out"), IncompleteRead(b"", 9), ConnectionResetError("reset")])
def test_a_broken_connection_is_told_the_same_way(tmp_path, monkeypatch, error):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise error

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Broken())
    assert type(error).__name__ in refused(tmp_path)


def test_a_download_of_another_md5_is_thrown_away(tmp_path, monkeypatch):
    archive(monkeypatch)
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", "0" * 32)
    assert "md5" in refused(tmp_path)


@pytest.mark.parametrize("name", ["../escaped", "cifar-100-python/../../escaped"])
def test_an_archive_that_would_leave_its_folder_is_refused(tmp_path, monkeypatch, name):
    archive(monkeypatch, (name, b"out"))
    assert "OutsideDestinationError" in refused(tmp_path)
    assert not list(tmp_path.rglob("escaped"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    archive(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DatasetError, match="--data-root"):
        cifar100.build(tmp_path / "file" / "data")


def test_a_run_that_was_quicker_wins(tmp_path, monkeypatch, official):
    archive(monkeypatch)
    answer = urllib.request.urlopen

    def meanwhile(*arguments, **keywords):
        write(tmp_path / cifar100.FOLDER)
        return answer(*arguments, **keywords)

    monkeypatch.setattr(urllib.request, "urlopen", meanwhile)
    assert cifar100.build(tmp_path).notice == ""
    assert [path.name for path in tmp_path.iterdir()] == [cifar100.FOLDER]
