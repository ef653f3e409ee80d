"""Names of decoders that `evaluate` compares."""

AUTOREGRESSIVE, SPECULATIVE, PARTIAL_QUADRATIC = "autoregressive", "speculative", "partial_quadratic"
TRANSFORMERS, PROMPT_LOOKUP = "transformers", "prompt_lookup"
DECODER_NAMES = (AUTOREGRESSIVE, TRANSFORMERS, PROMPT_LOOKUP, SPECULATIVE, PARTIAL_QUADRATIC)
