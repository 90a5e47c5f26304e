"""The weights of a run and a card that says what they are, for those who have torch or timm and nothing of this."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cilnorm.files import open_plain, read_text, write_atomically
from cilnorm.registry import Registry
from cilnorm.spec import to_mapping
from cilnorm.storage.checkpoint import Checkpoints
from cilnorm.storage.environment import version
from cilnorm.storage.resumed_files import read_environment
from cilnorm.storage.run_folder import FolderError, RunFolder

__all__ = ["WEIGHTS", "check_place", "export", "exported", "is_card", "is_weights", "write"]

MAKER, WEIGHTS, CARD = "cilnorm", "model.safetensors", "card.json"
HEADER_LIMIT = 16 << 20  # bytes; a ResNet-50 takes 0.04 MB
LOGITS = {
    "Linear": "embedding @ weight.T + bias, the blocks head.blocks.0, 1, ... one below the other",
    "Expanding": "embedding @ head.blocks.0.weight.T + head.blocks.0.bias",
    "Cosine": "head.scale * cos(embedding, weight), the rows of all blocks one below the other",
    "Proxies": "head.scale * sum_k softmax_k(s_k) s_k, s_k = 2 cos(embedding, weight_k) - 2, class by class",
}


def export(run: Path, out: Path, registry: Registry) -> list[Path]:
    """Writes ``model.safetensors`` and ``card.json`` into a folder; returns their paths.

    Names of weights are those of the backbone behind ``backbone.``, and of the classifier behind ``head.``. In
    evaluation every norm that is a batch norm at heart is one, so the weights load into ``BatchNorm2d``. Where a
    network grew, ``backbone.extractors.0.``, ``1.`` and so on are backbones, whose embeddings stand side by side.

    The run is left as it is.

    Raises:
        SpecError, CheckpointError: the run can't be read, or has no checkpoint yet, or its newest one is damaged.
        FolderError: there is no run, or ``out`` can't be written, or holds files of these names by somebody else.
    """
    weights, card = exported(run, registry)
    check_place(out, {WEIGHTS: is_weights, CARD: is_card})
    return write(out, {WEIGHTS: weights, CARD: json.dumps(card, indent=2) + "\n"})


def exported(run: Path, registry: Registry) -> tuple[bytes, dict[str, Any]]:
    """A run's weights as a safetensors file, and the card that goes with them.

    Raises:
        SpecError, CheckpointError, FolderError: as ``export``.
    """
    from safetensors.torch import save

    spec = RunFolder(run).read_spec(registry)
    content = Checkpoints(run / "checkpoints", {}).newest()
    weights: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in content["net"].items()}
    dim = next(tensor.shape[1] for name, tensor in weights.items() if name.startswith("head.blocks.0."))
    head = type(registry.methods[spec.method].build(**spec.method_options).head(dim)).__name__
    extractors = {name.split(".")[2] for name in weights if name.startswith("backbone.extractors.")}
    data = save(weights, {"format": "pt", MAKER: str(version(MAKER))})
    card: dict[str, Any] = {
        MAKER: version(MAKER),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(data).hexdigest()},
        "backbone": {"name": spec.backbone, "prefix": "backbone.", "norm": spec.norm, "embedding": dim}
        | ({"extractors": len(extractors)} if extractors else {}),
        "head": {"kind": head, "prefix": "head.", "logits": LOGITS.get(head, f"see cilnorm's {head}")},
        "input": "RGB scaled to [0, 1], minus mean, by std",
        **read_environment(run).get("images", {}),
        "tasks_learned": content["position"][0],
        "accuracy": content["matrix"],
        "spec": to_mapping(spec),
    }
    return data, card


def write(out: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Writes files into a folder; returns their paths.

    Raises:
        FolderError: it can't be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            write_atomically(out / name, content)
    except OSError as error:
        raise FolderError(f"can't write {out}: {error.strerror or error}") from error
    return [out / name for name in contents]


def check_place(out: Path, files: Mapping[str, Callable[[Path], bool]]) -> None:
    """Raises FolderError where a file of ours would take the place of somebody else's.

    Args:
        files: what says of each name whether a file of it was made here.
    """
    if RunFolder.holds_a_run(out):
        raise FolderError(f"{out} is the folder of a run, which stays as it is; give --out another folder")
    for name, made_here in files.items():
        path = out / name
        try:
            ours = not os.path.lexists(path) or made_here(path)
        except (OSError, ValueError, RecursionError):
            ours = False
        if not ours:
            raise FolderError(f"{path} is no export of a run, and stays as it is; give --out another folder")


def is_weights(path: Path) -> bool:
    """Whether a file holds weights that were exported."""
    with os.fdopen(open_plain(path), "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, HEADER_LIMIT)))
    return isinstance(header, dict) and MAKER in header.get("__metadata__", {})


def is_card(path: Path) -> bool:
    """Whether a file is such a card."""
    card = json.loads(read_text(path))
    return isinstance(card, dict) and {MAKER, "weights", "backbone"} <= set(card)
