"""The device of a command that decodes, from its option `--device`."""

import torch


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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"expected a CUDA device for --device {name}, found none: use --device cpu")
    return device
