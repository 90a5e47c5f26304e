"""The weights of a run and a card that says what they are, for those who have torch or timm and nothing of this."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from cilnorm.checkpoint import Checkpoints
from cilnorm.environment import version
from cilnorm.files import write_atomically
from cilnorm.folder import FolderError
from cilnorm.registry import Registry
from cilnorm.spec import read_spec, to_mapping

__all__ = ["export"]

WEIGHTS, CARD = "model.safetensors", "card.json"
LOGITS = {
    "Linear": "embedding @ weight.T + bias, the blocks head.blocks.0, 1, ... one below the other",
    "Cosine": "head.scale * cos(embedding, weight), the rows of all blocks one below the other",
    "Proxies": "head.scale * sum_k softmax_k(s_k) s_k, s_k = 2 cos(embedding, weight_k) - 2, class by class",
}


def export(run: Path, out: Path, registry: Registry) -> tuple[Path, Path]:
    """Writes ``model.safetensors`` and ``card.json`` into a folder; returns their paths.

    Names of weights are those of the backbone behind ``backbone.``, and of the classifier behind ``head.``. In
    evaluation every norm that is a batch norm at heart is one, so the weights load into ``BatchNorm2d``.

    Raises:
        SpecError, CheckpointError: the run can't be read, or has no checkpoint yet.
        FolderError: the folder can't be written.
    """
    from safetensors.torch import save

    spec = read_spec(run / "spec.yaml", registry)
    content, _ = Checkpoints(run / "checkpoints", {}).newest()
    weights: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in content["net"].items()}
    dim = next(tensor.shape[1] for name, tensor in weights.items() if name.startswith("head.blocks.0."))
    head = type(registry.methods[spec.method].build(**spec.method_options).head(dim)).__name__
    data = save(weights)
    card: dict[str, Any] = {
        "cilnorm": version("cilnorm"),
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(data).hexdigest()},
        "backbone": {"name": spec.backbone, "prefix": "backbone.", "norm": spec.norm, "embedding": dim},
        "head": {"kind": head, "prefix": "head.", "logits": LOGITS.get(head, f"see cilnorm's {head}")},
        "input": "RGB scaled to [0, 1], minus mean, by std",
        **json.loads((run / "environment.json").read_text(encoding="utf-8")).get("images", {}),
        "tasks_learned": content["position"][0],
        "accuracy": content["matrix"],
        "spec": to_mapping(spec),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / WEIGHTS, data)
        write_atomically(out / CARD, json.dumps(card, indent=2) + "\n")
    except OSError as error:
        raise FolderError(f"can't write {out}: {error.strerror or error}") from error
    return out / WEIGHTS, out / CARD
