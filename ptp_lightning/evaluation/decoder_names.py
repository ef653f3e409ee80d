"""Names of decoders that `evaluate` compares."""

AUTOREGRESSIVE, SPECULATIVE, PARTIAL_QUADRATIC = "autoregressive", "speculative", "partial_quadratic"
LOOKUP, SPECULATIVE_LOOKUP = "lookup", "speculative_lookup"
TRANSFORMERS, PROMPT_LOOKUP = "transformers", "prompt_lookup"
DECODER_NAMES = (
    AUTOREGRESSIVE,
    TRANSFORMERS,
    PROMPT_LOOKUP,
    LOOKUP,
    SPECULATIVE,
    SPECULATIVE_LOOKUP,
    PARTIAL_QUADRATIC,
)
