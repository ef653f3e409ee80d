"""Decoding: text from a predictor, one token per call or several, always the base model's own sample.

Every decoder is a function of the prompt, the sampling settings and the auxiliaries u, which are drawn from the seed
before the first token: the same prompt, seed and settings give the same text whichever decoder is used.
"""

from ptp_lightning.decoding.autoregressive import decode_autoregressively
from ptp_lightning.decoding.drafting import Drafter, StudentDrafter
from ptp_lightning.decoding.generation import Decoded, Generation, GenerationSettings
from ptp_lightning.decoding.partial_quadratic import decode_partially_quadratically
from ptp_lightning.decoding.slot_allocation import CorrectLengths
from ptp_lightning.decoding.speculative import decode_speculatively
from ptp_lightning.decoding.text import DECODERS, generate, generate_batch
from ptp_lightning.decoding.transformers_generate import CustomGenerate

__all__ = [
    "DECODERS",
    "CorrectLengths",
    "CustomGenerate",
    "Decoded",
    "Drafter",
    "Generation",
    "GenerationSettings",
    "StudentDrafter",
    "decode_autoregressively",
    "decode_partially_quadratically",
    "decode_speculatively",
    "generate",
    "generate_batch",
]
