"""The device of a command that decodes, from its option `--device`."""

import torch

DEVICE_TYPES = ("cpu", "cuda", "mps")


def select_device(name: str) -> torch.device:
    """The device of `--device`; "auto" is a GPU if there is one.

    Raises:
        ValueError: there is no such device.

    >>> select_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"expected --device auto, cpu or cuda, found {name!r}") from error
    if device.type not in DEVICE_TYPES:
        raise ValueError(f"expected --device auto, cpu or cuda, found {name!r}")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ValueError(f"expected a CUDA device for --device {name}, found {num_gpus or 'none'}: use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"expected a device of Apple silicon for --device {name}, found none: use --device cpu")
    return device
