"""Values of options that several commands take; importing them costs nothing, so that `--help` is quick."""

from typing import Literal, get_args

DecoderName = Literal["autoregressive", "speculative", "speculative_lookup", "lookup", "partial_quadratic"]
DEFAULT_DECODER: DecoderName = "speculative_lookup"
DtypeName = Literal["auto", "float32", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(DtypeName)
TRUST_OPTION = "trust_custom_classes"
