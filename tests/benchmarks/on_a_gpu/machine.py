"""The machine, the libraries, and how fast products of matrices are."""

from __future__ import annotations

import platform
import subprocess

import torch
import transformers

from tests.benchmarks.on_a_gpu.rows import Figure, Record, attempt
from tests.benchmarks.training_step import gemm_rate, name_of

GIGABYTE = 1e9
GFLOPS_PER_TFLOP = 1000


def rows(record: Record, *, device: str, dtypes: list[str]) -> None:
    """What it is, then a product in each dtype.

    Raises:
        RuntimeError: the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("expected a CUDA device for --device cuda, found none: use --device cpu")
    attempt(record, "machine", lambda: description(torch.device(device)))
    for dtype in dtypes:
        attempt(record, f"square product, {dtype}", lambda dtype=dtype: product(torch.device(device), dtype))


def description(device: torch.device) -> dict[str, Figure]:
    """Device, driver and versions."""
    found: dict[str, Figure] = {
        "device": name_of(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
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


def product(device: torch.device, dtype: str) -> dict[str, Figure]:
    """Speed of a square product in this process."""
    return {"tflops": gemm_rate(device, getattr(torch, dtype)) / GFLOPS_PER_TFLOP}


def _driver() -> str:
    """Its version, if the driver's own tool is there to say it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
