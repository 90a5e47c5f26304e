"""What could make the same spec give other numbers elsewhere, and the switch that rules out what can be ruled out."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch

from cilnorm.registry import Registry

__all__ = ["be_deterministic", "describe", "differences"]

PACKAGES = ("cilnorm", "torch", "torchvision", "timm", "numpy", "pluggy", "triton")
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"),  # instructions not to be used
)


def be_deterministic() -> None:
    """From now on this process takes only operations that repeat to the bit on a GPU, and refuses those that can't.

    To be called before anything runs on the GPU, because cuBLAS reads its setting when it is first used. The CPU
    repeats to the bit as it is, for the same number of threads.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for in its notes on repeatability
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def describe(registry: Registry, device: torch.device) -> dict[str, Any]:
    """Versions, device, threads, libraries and switches, as plain values."""
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "blas": _blas(),
        "onednn": torch.backends.mkldnn.is_available(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "plugins": sorted({plugin.distribution for plugin in registry.plugins if not plugin.error}),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, a short text each; what only the earlier one has is left out."""
    found = []
    for name, value in now.items():
        then = before.get(name)
        if isinstance(value, dict):
            both = {**then, **value} if isinstance(then, dict) else value
            inner = {key: value.get(key) for key in both}
            found += [f"{name}.{text}" for text in differences(then if isinstance(then, dict) else {}, inner)]
        elif value != then:
            found.append(f"{name} {_shown(value)}, was {_shown(then)}")
    return found


def _shown(value: Any) -> str:
    return "none" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def version(package: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The CPU's own name for itself, where it is told."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _blas() -> str | None:
    """The library of matrix products that torch was built with."""
    for setting in torch.__config__.show().replace("\n", " ").split(","):
        name, _, value = setting.strip().rpartition(" ")[2].partition("=")
        if name == "BLAS_INFO":
            return value
    return None
