"""Decoding: text from a predictor, with one or several tokens per call, always the base model's own sample.

Auxiliaries u are drawn from the seed before the first token, and each token is a function of the tokens before it and
of its u. So the same prompt, seed and sampling settings give the same text with every decoder.
"""

from ptp_lightning.decoding.autoregressive import decode_autoregressively
from ptp_lightning.decoding.drafting import Drafter, StudentDrafter
from ptp_lightning.decoding.generation import Cycle, Decoded, Generation, GenerationSettings
from ptp_lightning.decoding.partial_quadratic import decode_partially_quadratically
from ptp_lightning.decoding.slot_allocation import CorrectLengths
from ptp_lightning.decoding.speculative import decode_by_lookup, decode_speculatively
from ptp_lightning.decoding.text import DECODERS, generate, generate_batch
from ptp_lightning.decoding.transformers_generate import CustomGenerate, generate_with_predictor

__all__ = [
    "DECODERS",
    "CorrectLengths",
    "CustomGenerate",
    "Cycle",
    "Decoded",
    "Drafter",
    "Generation",
    "GenerationSettings",
    "StudentDrafter",
    "decode_autoregressively",
    "decode_by_lookup",
    "decode_partially_quadratically",
    "decode_speculatively",
    "generate",
    "generate_batch",
    "generate_with_predictor",
]
