"""Decoding: text from a predictor, one token per call or several, always the base model's own sample.

Every decoder is a function of the prompt, the sampling settings and the auxiliaries u, which are drawn from the seed
before the first token: the same prompt, seed and settings give the same text whichever decoder is used.
"""

from ptp_lightning.decoding.autoregressive import decode_autoregressively
from ptp_lightning.decoding.generation import Decoded, Generation, GenerationSettings
from ptp_lightning.decoding.speculative import Proposer, StudentProposer, decode_speculatively
from ptp_lightning.decoding.text import DECODERS, generate

__all__ = [
    "DECODERS",
    "Decoded",
    "Generation",
    "GenerationSettings",
    "Proposer",
    "StudentProposer",
    "decode_autoregressively",
    "decode_speculatively",
    "generate",
]
