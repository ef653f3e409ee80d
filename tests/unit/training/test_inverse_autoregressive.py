"""Teacher-free training: what a step costs and changes, what validation says, and what a checkpoint holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ptp_lightning.auxiliary_strategies import UniformInInterval
from ptp_lightning.decoding import GenerationSettings, decode_speculatively
from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.losses import AcceptedLengthWeights, BinaryCrossEntropy, GeometricWeights, KullbackLeibler
from ptp_lightning.models import (
    BackboneSettings,
    CategoricalObjective,
    CosineFeatures,
    DecoderRefiner,
    FullCopyStudent,
    IndependentObjective,
    MarkovHead,
    OneHotObjective,
    PredictorConfig,
    SharedStudent,
)
from ptp_lightning.models.attention.masks import context_mask, slot_mask
from ptp_lightning.models.slots.sampling_range import SamplingRange
from ptp_lightning.predictor import ParallelTokenPredictor
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.training import InverseAutoregressiveModule, OptimizerSettings
from ptp_lightning.training.modules.inversion import invert
from ptp_lightning.training.windows.dataset_windows import window_tokens
from ptp_lightning.utils.randomness import keyed_generator
from tests.helpers.tiny_data import tiny_data, tiny_tokenizer
from tests.helpers.tiny_decoding import decode_one, reference
from tests.helpers.tiny_distillation import GPT2, LLAMA, make_trainer, record_losses, weights
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_shared_students import (
    FULL,
    LENGTH,
    count_calls,
    make_batch,
    make_predictor,
)


def make_module(
    backbone: dict[str, Any] | None = LLAMA, path: str = "embedded", **options: Any
) -> InverseAutoregressiveModule:
    """The same weights on every call."""
    fields = ("objective", "student", "correction", "draft_vocabulary", "sampling", "sampling_range", "window_length")
    predictor = {key: options.pop(key) for key in fields if key in options}
    defaults = {"features": CosineFeatures(4), "window_length": 4, "student": SharedStudent()}
    torch.manual_seed(0)
    return InverseAutoregressiveModule(
        PredictorConfig(BackboneSettings(path=path, from_config=backbone), **(defaults | predictor)),
        optimizer=OptimizerSettings(learning_rate=0.01, warmup_steps=2),
        **options,
    )


class TestTraining:
    @pytest.mark.parametrize("backbone", [LLAMA, GPT2], ids=["llama", "gpt2"])
    def test_from_scratch_everything_is_trained(self, tmp_path: Path, backbone: dict[str, Any]) -> None:
        module = make_module(backbone)
        before = weights(module)
        make_trainer(tmp_path).fit(module, datamodule=tiny_data())
        unchanged = {name for name, value in weights(module).items() if torch.equal(value, before[name])}
        assert not unchanged

    def test_from_a_pretrained_model(self, tmp_path: Path) -> None:
        base = tiny_llama()
        base.save_pretrained(tmp_path / "base")
        module = make_module(None, str(tmp_path / "base"))
        found = module.predictor.base_model.state_dict()
        assert all(torch.equal(found[name], value) for name, value in base.state_dict().items())
        losses = record_losses(module)
        make_trainer(tmp_path).fit(module, datamodule=tiny_data())
        assert len(losses) == 2

    def test_cost_of_a_step(self, tmp_path: Path) -> None:
        """The context once, L - 2 calls of a slot per window, all L - 1 slots of all windows once."""
        module = make_module(window_length=6)
        calls = count_calls(module.predictor)
        make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, datamodule=tiny_data())
        row_length, num_windows = 12, 3
        assert calls() == [row_length] + [num_windows] * 4 + [num_windows * 5]

    @pytest.mark.parametrize("slot_loss", [None, KullbackLeibler()], ids=["data", "own"])
    @pytest.mark.parametrize(("rest", "growth"), [(1, 1.0), (3, 1.0), (1, 1.5)])
    def test_gradient_is_that_of_fixed_auxiliaries(
        self, rest: int, growth: float, slot_loss: KullbackLeibler | None
    ) -> None:
        """Written out: one joint pass over context and slots, its auxiliaries constants, two cross entropies.

        Or, of the slots, the divergence from the network's own predictions, which are constants too.

        Where the mean count over ranks is `rest` times this rank's, its share of the loss is that much smaller. With
        weights by position the mean over slots is a weighted one.
        """
        predictor, batch = make_predictor(), make_batch()
        module = make_module()
        module.predictor = predictor
        reduced: Any = type("Strategy", (), {"reduce": staticmethod(lambda tensor, reduce_op: tensor * rest)})
        trainer = {"strategy": reduced, "global_rank": 0, "global_step": 0, "accumulate_grad_batches": 1}
        module._trainer = type("Trainer", (), trainer)()  # pyright: ignore
        module.log = lambda *args, **named: None  # pyright: ignore
        module.autoregressive_loss_weight = 0.3
        module.slot_loss = slot_loss or module.loss
        module.position_weights = GeometricWeights(growth)
        predictor.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        found = {name: weight.grad for name, weight in predictor.named_parameters()}

        predictor.zero_grad()
        token_ids, mask = window_tokens(batch, LENGTH)
        generator = keyed_generator(0, "train", 0, 0, 0)
        values = invert(predictor, predictor.encode(batch), token_ids, UniformInInterval(), generator).values
        window, offset = torch.arange(3).repeat_interleave(LENGTH - 1), torch.arange(LENGTH - 1).repeat(3)
        of_slots = slot_mask(
            batch.document_ids,
            batch.window_starts,
            query_window=window,
            query_offset=offset,
            key_window=window,
            key_offset=offset,
        )
        positions = batch.window_positions[:, window] + offset
        slots = predictor.slot_encoder(F.pad(values, (0, 1))).flatten(1, 2)
        of_context = F.pad(context_mask(batch.document_ids), (0, slots.shape[1]))
        hidden = predictor.run_decoder(
            torch.cat([predictor.embed(batch.input_ids), slots], dim=1),
            torch.cat([batch.position_ids, positions], dim=1),
            torch.cat([of_context, of_slots], dim=2),
            cache=None,
        )
        log_p = predictor.logits(hidden).log_softmax(-1)
        of_slots = log_p[:, 14:].unflatten(1, (3, LENGTH - 1))
        if slot_loss is None:
            of_slots = of_slots.gather(-1, token_ids[..., 1:, None]).squeeze(-1)
        else:
            positions = (batch.window_starts[..., None] + torch.arange(LENGTH - 1)).clamp_max(13)
            own = torch.stack([row[at] for row, at in zip(log_p[:, :14].detach(), positions, strict=True)])
            of_slots = (own.exp() * (of_slots - own)).sum(-1)
        follows = (batch.document_ids[:, 1:] == batch.document_ids[:, :-1]) & (batch.document_ids[:, 1:] >= 0)
        of_tokens = log_p[:, :13].gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
        weights = growth ** torch.arange(LENGTH - 1) * mask[..., 1:]
        expected = (-(of_slots * weights).sum() / weights.sum() - 0.3 * of_tokens[follows].mean()) / rest
        expected.backward()
        torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        for name, weight in predictor.named_parameters():
            torch.testing.assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-4, msg=name)
            assert weight.grad is not None and weight.grad.any()

    def test_reproducible_from_the_seed(self, tmp_path: Path) -> None:
        runs = []
        for seed in (0, 0, 1):
            module = make_module(seed=seed)
            runs.append(record_losses(module))
            make_trainer(tmp_path).fit(module, datamodule=tiny_data())
        assert runs[0] == runs[1] != runs[2]

    def test_windows_without_a_likely_token_give_no_gradient_to_slots(self, tmp_path: Path) -> None:
        """With one token a slot can pick, most windows end after their first token; the loss stays finite."""
        module = make_module(sampling=SamplingConfig(top_k=1))
        losses = record_losses(module)
        make_trainer(tmp_path).fit(module, datamodule=tiny_data())
        assert all(loss == loss and loss < 100 for loss in losses)


class TestValidation:
    def test_tags(self, tmp_path: Path) -> None:
        module = make_module()
        metrics = make_trainer(tmp_path, limit_val_batches=1.0).validate(
            module, datamodule=tiny_data(eval_rows=8), verbose=False
        )[0]
        assert {f"val/perplexity/position_{position:02d}" for position in range(4)} <= metrics.keys()
        assert 1 <= metrics["val/correct_tokens"] <= 4 and metrics["val/accuracy/position_00"] == 1
        assert metrics["val/autoregressive_perplexity"] > 1
        assert module.val_summary is not None

    @torch.no_grad()
    def test_perplexities_are_those_of_the_data(self, tmp_path: Path) -> None:
        """Position 0 is the network's own next-token likelihood at window starts, whatever the slots say."""
        module = make_module()
        data = tiny_data(eval_rows=2)
        metrics = make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]
        batch = next(iter(data.val_dataloader()))
        context = module.predictor.encode(batch)
        log_p = module.predictor.logits(context.first_hidden).log_softmax(-1)
        nll = -log_p.gather(-1, batch.input_ids.gather(1, batch.window_starts)[..., None]).double()
        assert metrics["val/perplexity/position_00"] == pytest.approx(float(nll.mean().exp()), rel=1e-5)

        labels = batch.input_ids.roll(-1, 1)
        follows = (batch.document_ids == batch.document_ids.roll(-1, 1)) & (batch.document_ids >= 0)
        follows[:, -1] = False
        nll = -module.predictor.logits(context.hidden).log_softmax(-1).gather(-1, labels[..., None])[follows]
        assert metrics["val/autoregressive_perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-5)

    @torch.no_grad()
    def test_the_reference_reads_the_very_same_tokens(self, tmp_path: Path) -> None:
        """By position, what the network says of a window's token when it knows all tokens before it; a plain loop."""
        module = make_module()
        data = tiny_data(eval_rows=2)
        metrics = make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]
        batch = next(iter(data.val_dataloader()))
        log_p = module.predictor.logits(module.predictor.encode(batch).hidden).log_softmax(-1).double()
        nats: dict[int, list[float]] = {}
        for row, starts in enumerate(batch.window_starts.tolist()):
            for start in starts:
                for offset in range(4):
                    position = start + offset
                    if position == 12 or batch.document_ids[row, position] != batch.document_ids[row, start]:
                        break
                    token = int(batch.input_ids[row, position])
                    nats.setdefault(offset, []).append(-float(log_p[row, position - 1, token]))
        for offset, values in nats.items():
            expected = math.exp(sum(values) / len(values))
            assert metrics[f"val/autoregressive_perplexity/position_{offset:02d}"] == pytest.approx(expected, rel=1e-5)

    def test_a_token_that_no_auxiliary_names_counts(self, tmp_path: Path) -> None:
        """It ends its window; leaving it out would flatter the likelihood, most of all at position 0."""
        full, truncated = (make_module(sampling=sampling) for sampling in (FULL, SamplingConfig(top_k=1)))
        found = [
            make_trainer(tmp_path).validate(each, datamodule=tiny_data(), verbose=False)[0][
                "val/perplexity/position_00"
            ]
            for each in (full, truncated)
        ]
        assert found[0] == found[1]


class TestCheckpoint:
    def test_generates_from_scratch_weights(self, tmp_path: Path) -> None:
        """The whole network is in the checkpoint: its random start is not needed again."""
        module = make_module()
        trainer = make_trainer(tmp_path)
        trainer.fit(module, datamodule=tiny_data())
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        torch.manual_seed(5)
        predictor = load_network(tmp_path / "run.ckpt")
        facade = ParallelTokenPredictor(predictor)
        settings = GenerationSettings(max_new_tokens=16, window_length=4)
        text = reference(predictor, settings)
        assert text == reference(module.predictor.eval(), settings)
        assert decode_one(decode_speculatively, predictor, settings).token_ids == text
        assert len(facade.generate([3, 1, 4], max_new_tokens=9, tokenizer=tiny_tokenizer()).token_ids) > 0

    def test_of_another_architecture_is_refused(self, tmp_path: Path) -> None:
        module = make_module()
        trainer = make_trainer(tmp_path)
        trainer.fit(module, datamodule=tiny_data())
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        other = make_module(LLAMA | {"num_hidden_layers": 3})
        with pytest.raises(ValueError, match="predictor.backbone.path"):
            make_trainer(tmp_path).fit(other, datamodule=tiny_data(), ckpt_path=str(tmp_path / "run.ckpt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": FullCopyStudent()}, "found FullCopyStudent: set predictor.student to .*SharedStudent"),
        ({"objective": OneHotObjective()}, "categorical objective, found one_hot.*set predictor.objective"),
        ({"objective": IndependentObjective()}, "found independent.*set predictor.objective"),
        ({"correction": DecoderRefiner(num_layers=1)}, "no predictor.correction, found DecoderRefiner"),
        ({"correction": MarkovHead()}, "no predictor.correction, found MarkovHead"),
        ({"draft_vocabulary": 8}, "no predictor.draft_vocabulary, found 8"),
        ({"sampling_range": SamplingRange(top_k=(None,), top_p=(1.0,))}, "no predictor.sampling_range, found"),
        ({"sampling": SamplingConfig(temperature=0.7)}, "temperature 1, found 0.7"),
        ({"autoregressive_loss_weight": -1.0}, "autoregressive_loss_weight >= 0, found -1"),
        ({"autoregressive_loss_weight": float("nan")}, "autoregressive_loss_weight >= 0, found nan"),
        ({"position_weights": AcceptedLengthWeights()}, "found AcceptedLengthWeights.*set UniformWeights"),
        ({"slot_loss": BinaryCrossEntropy()}, "not a sound loss for the categorical objective"),
        ({"autoregressive_loss_weight": 0.0, "slot_loss": KullbackLeibler()}, "slot_loss KullbackLeibler, found 0"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(**change)


def test_the_objective_is_the_default() -> None:
    assert make_module().predictor.config.objective == CategoricalObjective()
