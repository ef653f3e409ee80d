"""The baselines of an evaluation are those of `transformers`, as people run them."""

from torch import nn

from ptp_lightning.decoding import GenerationSettings
from ptp_lightning.evaluation.decoder_names import AUTOREGRESSIVE, LOOKUP, PROMPT_LOOKUP, TRANSFORMERS
from ptp_lightning.evaluation.decoders import make_decoders
from ptp_lightning.models.backbone import load_backbone
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.testing.tiny import tiny_predictor

GREEDY = GenerationSettings(max_new_tokens=5, sampling=SamplingConfig(temperature=0.0), seed=0, window_length=4)


def test_the_baselines_of_transformers_run_plain_layers() -> None:
    """Whatever this package's decoders did to the layers of theirs before."""
    predictor = tiny_predictor().eval()
    model = load_backbone(predictor.config.backbone).eval()
    changed: list[str] = []

    def note_changes(*_: object) -> None:
        changed.extend(
            name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "forward" in vars(layer)
        )

    model.register_forward_pre_hook(note_changes)
    decoders = make_decoders([TRANSFORMERS, PROMPT_LOOKUP, LOOKUP], predictor, model, budgets=[])
    assert [decoder.name for decoder in decoders] == [AUTOREGRESSIVE, TRANSFORMERS, PROMPT_LOOKUP, LOOKUP]
    answers = [decoder.answer([1, 2, 3, 1, 2], GREEDY) for decoder in decoders]
    assert [answer.num_calls for answer in answers[:2]] == [5, 5] and not changed
