"""The machine and the versions of libraries."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version

import torch

from benchmarks.on_a_gpu.rows import Figure, Record, attempt

GIGABYTE = 1e9


def rows(record: Record, *, device: str) -> None:
    """Record the machine.

    Raises:
        RuntimeError: the device does not exist.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("expected a CUDA device for --device cuda, found none: use --device cpu")
    attempt(record, "machine", lambda: description(torch.device(device)))


def description(device: torch.device) -> dict[str, Figure]:
    """Device, driver and versions."""
    found: dict[str, Figure] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "one CPU thread",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / GIGABYTE,
        }
    return found


def _driver() -> str:
    """Version of the NVIDIA driver, if nvidia-smi is installed."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
