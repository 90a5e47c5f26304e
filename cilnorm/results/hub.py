"""A run as a folder for the Hugging Face Hub: a model card, its weights, and what is needed to load them.

The layout is what ``huggingface_hub.upload_folder`` takes: ``README.md``, ``model.safetensors`` and ``config.json``,
which is the card of ``cilnorm export``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from cilnorm.experiment.assembly import backbone_builder
from cilnorm.files import open_plain, read_text
from cilnorm.metrics import TABULATED
from cilnorm.network import Network
from cilnorm.registry import Registry, load
from cilnorm.results.export import WEIGHTS, check_place, exported, is_card, is_weights, write
from cilnorm.results.reading import read_result
from cilnorm.spec import Spec, from_mapping
from cilnorm.storage.run_folder import FolderError
from cilnorm.text import half_up, markdown, markdown_code

__all__ = ["export_for_hub", "load_network"]

CARD, CONFIG = "README.md", "config.json"
MARK = "<!-- Made by cilnorm export --hub. Remove this line, and the file is yours: it is not written again. -->"
SIDE = 64  # of the images on which a network of timm is compared
WITH_TIMM = """import json

import timm
import torch
from safetensors.torch import load_file

config, weights = json.load(open("config.json")), load_file("model.safetensors")
net = timm.create_model("{timm}", num_classes=0)
prefix = "backbone.net."
net.load_state_dict({{name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}})
net.eval()


def embed(pixels):
    \"\"\"uint8 images (N, 3, H, W) to embeddings (N, {dim}).\"\"\"
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return net((pixels / 255 - mean) / std)
"""
LINEAR_HEAD = """

blocks = [f"head.blocks.{task}" for task in range(config["tasks_learned"])]
weight = torch.cat([weights[f"{block}.weight"] for block in blocks])
bias = torch.cat([weights[f"{block}.bias"] for block in blocks])


def classify(pixels):
    \"\"\"Names of the classes.\"\"\"
    return [config["classes"][at] for at in (embed(pixels) @ weight.T + bias).argmax(1)]
"""
WITH_CILNORM = """import json

import torch
from cilnorm.results.hub import load_network

config, net = json.load(open("config.json")), load_network(".")


def classify(pixels):
    \"\"\"uint8 images (N, 3, H, W) to names of classes.\"\"\"
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return [config["classes"][at] for at in net((pixels / 255 - mean) / std).logits.argmax(1)]
"""
BY_HAND = """Names of weights begin with `backbone.` and `head.`; `config.json` says how logits come of them. This
network can't be put together by one call: `cilnorm probe` and `cilnorm resume` do it from the run itself."""


def export_for_hub(run: Path, out: Path, registry: Registry) -> list[Path]:
    """Writes ``README.md``, ``model.safetensors`` and ``config.json`` into a folder; returns what it wrote.

    A card from which its first comment was removed is its author's, and stays as it is. The run is left as it is.

    Raises:
        SpecError, CheckpointError: the run can't be read, or has no checkpoint yet, or its newest one is damaged.
        FolderError: there is no run, or ``out`` can't be written, or holds files of these names by somebody else.
    """
    weights, config = exported(run, registry)
    summary = read_result(run).summary
    check_place(out, {WEIGHTS: is_weights, CONFIG: is_card})
    contents: dict[str, str | bytes] = {WEIGHTS: weights, CONFIG: json.dumps(config, indent=2) + "\n"}
    if not (out / CARD).exists() or MARK in read_text(out / CARD):
        contents[CARD] = _card(config, summary, weights, registry)
    return write(out, contents)


def load_network(folder: Path | str, registry: Registry | None = None) -> Network:
    """The network of an exported folder, in evaluation mode.

    Raises:
        FolderError: the folder holds no such export, or a network that can't be put together without its run.
        SpecError: a part of it is not installed.
    """
    from safetensors.torch import load as read_weights

    folder = Path(folder)
    try:
        config = json.loads(read_text(folder / CONFIG))
        with open(open_plain(folder / WEIGHTS), "rb") as file:
            weights = file.read()
        return _network(config, read_weights(weights), registry or load())
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise FolderError(f"{folder}: no network can be made of it: {error}") from error


def _network(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], registry: Registry) -> Network:
    """The network that a card describes."""
    spec = from_mapping(config["spec"], registry, None, {})
    method = registry.methods[spec.method].build(**spec.method_options)
    net: Network = method.network(backbone_builder(spec, registry, method.signed_embedding))
    for size in spec.sizes(len(config["classes"]))[: config["tasks_learned"]]:
        net.grow(size)
    net.load_state_dict(dict(weights), strict=True)
    return net.eval()


def _recipe(config: Mapping[str, Any], weights: bytes, registry: Registry) -> str:
    """Markdown that says how to load the weights; code in it was tried with them."""
    from safetensors.torch import load as read_weights

    try:
        net = _network(config, read_weights(weights), registry)
    except (ValueError, LookupError, TypeError, RuntimeError):
        return BY_HAND
    name = registry.backbones[config["backbone"]["name"]].timm
    if name and _same_in_timm(name, net):
        code = WITH_TIMM.format(timm=name, dim=config["backbone"]["embedding"])
        code += LINEAR_HEAD if config["head"]["kind"] == "Linear" and net.head.blocks[0].bias is not None else ""
        return f"With [timm](https://github.com/huggingface/pytorch-image-models) alone:\n\n```python\n{code}```"
    return f"With cilnorm (`pip install cilnorm`):\n\n```python\n{WITH_CILNORM}```"


def _same_in_timm(name: str, net: Network) -> bool:
    """Whether timm's own network computes the same embedding with these weights."""
    import timm

    plain = timm.create_model(name, num_classes=0).eval()
    try:
        plain.load_state_dict(net.backbone.net.state_dict())  # type: ignore[union-attr]
    except (RuntimeError, AttributeError):  # another norm, whose parameters have other names
        return False
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.allclose(plain(images), net(images).embedding, rtol=1e-4, atol=1e-5)


def _card(config: Mapping[str, Any], summary: Mapping[str, Any], weights: bytes, registry: Registry) -> str:
    spec = from_mapping(config["spec"], registry, None, {})
    parts = {part: getattr(spec, part) for part in ("method", "norm", "backbone", "dataset")}
    what = " x ".join(parts.values())
    values = {name: summary[name] for name in TABULATED if name in summary}
    front = yaml.safe_dump(_front(spec, what, values), sort_keys=False, allow_unicode=True)
    learned = config["tasks_learned"]
    shelves = {shelf.kind: shelf for shelf in registry.shelves}
    rows = [(part, name, shelves[part][name].paper) for part, name in parts.items()]
    made = f"made with cilnorm {config['cilnorm']}"
    lines = [
        "---",
        "# license: which one is yours to say; the Hub asks for a line `license: ...` here",
        *(front.rstrip(), "---", MARK, "", f"# {markdown(what)}", ""),
        f"A network that learned {learned} tasks of {markdown(spec.dataset)} one after the other, {made}.",
        *("", "| part | name | paper |", "|---|---|---|"),
        *(f"| {part} | {markdown_code(name)} | {paper} |" for part, name, paper in rows),
        *("", "## Accuracy", "", *_accuracy(values, config["accuracy"])),
        *("## How to load it", "", _recipe(config, weights, registry), ""),
        f"Input: {config['input']}. `config.json` has `mean`, `std`, the size of images and the order of classes.",
        *("", "## How it was trained", ""),
        "`spec` in `config.json` has every value. In a file of its own it repeats the run: `cilnorm run --spec FILE`.",
        "",
    ]
    return "\n".join(lines)


def _front(spec: Spec, what: str, values: Mapping[str, float]) -> dict[str, Any]:
    """What the Hub reads."""
    tags = ["continual-learning", "class-incremental-learning", "image-classification"]
    kinds = {"F": "forgetting"}
    metrics = [{"type": kinds.get(name, "accuracy"), "name": name, "value": value} for name, value in values.items()]
    task = {"type": "image-classification", "name": "class-incremental learning"}
    result = {"task": task, "dataset": {"type": spec.dataset, "name": spec.dataset}, "metrics": metrics}
    return {
        "library_name": "cilnorm",
        "pipeline_tag": "image-classification",
        "tags": [*tags, spec.method, spec.norm, spec.backbone],
        "datasets": [spec.dataset],
        "metrics": ["accuracy"],
        **({"model-index": [{"name": what, "results": [result]}]} if metrics else {}),
    }


def _accuracy(values: Mapping[str, float], matrix: list[list[float]]) -> list[str]:
    """The metrics and the matrix, in Markdown."""
    said = "In percent: A_f after the last task, A_a the mean over all tasks, F forgetting, A_l just after each task."
    table = [f"| {' | '.join(values)} |", "|" + "---|" * len(values)]
    table += [f"| {' | '.join(half_up(value, 2) for value in values.values())} |"]
    head = ["", "Row t: accuracy on each task after learning task t, among all classes seen.", ""]
    head += [
        f"| after | {' | '.join(f't{task}' for task in range(1, len(matrix) + 1))} |",
        "|" + "---|" * (len(matrix) + 1),
    ]
    rows = []
    for task, row in enumerate(matrix, 1):
        cells = [half_up(value) for value in row] + [""] * (len(matrix) - len(row))
        rows.append(f"| task {task} | {' | '.join(cells)} |")
    return [*([said, "", *table] if values else ["The run is not finished."]), *head, *rows, ""]
