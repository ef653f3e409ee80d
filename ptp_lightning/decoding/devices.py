"""Where the commands that decode run: what `--device` says."""

import torch


def chosen_device(name: str) -> torch.device:
    """The device of `--device`: auto takes a GPU where there is one.

    Raises:
        ValueError: it is not a device, or there is none of this kind.
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
