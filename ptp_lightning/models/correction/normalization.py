"""RMS normalisation without weights, of what corrections read."""

from torch import Tensor, nn

RMS_EPSILON = 1e-6


def normalized(states: Tensor, reader: nn.Linear) -> Tensor:
    """States `[..., H]` with a root mean square of one, in the dtype of the layer that reads them."""
    return nn.functional.rms_norm(states.to(reader.weight.dtype), states.shape[-1:], eps=RMS_EPSILON)
