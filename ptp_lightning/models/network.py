"""PredictorNetwork: a causal LM, its student and a slot encoder; context + auxiliaries -> window logits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models.attention.choice import AttentionChoice
from ptp_lightning.models.attention.dispatch import layer_input, run_stack
from ptp_lightning.models.attention.interface import IncrementalReader, RunLayers, WindowAttention, WindowKeys
from ptp_lightning.models.attention.masks import context_mask
from ptp_lightning.models.backbone import architecture_fingerprint, fingerprint, load_backbone
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.context import Context
from ptp_lightning.models.correction.correction import CorrectionHead, CorrectionModule
from ptp_lightning.models.correction.decoder_refiner import Refiner, RefinerContext
from ptp_lightning.models.draft_head import DraftHead, as_vocabulary, require_draft_size, require_draft_vocabulary
from ptp_lightning.models.layers.packed_linear import PackedWeights
from ptp_lightning.models.output_head import apply_head, final_logits, output_head
from ptp_lightning.models.positions import max_positions
from ptp_lightning.models.slot_parts import build_slot_encoder
from ptp_lightning.models.slots.late_entry import first_slot_layer
from ptp_lightning.models.stored_state import NOT_TRAINED, require_finite_weights, require_stored_state
from ptp_lightning.models.support import require_finite, require_supported, require_text_model
from ptp_lightning.models.training_changes import prepare_for_training
from ptp_lightning.ngrams import Continuations
from ptp_lightning.sampling import Sampler, SamplingConfig
from ptp_lightning.utils.pretrained import absolute_if_local

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class PredictorNetwork(nn.Module):
    """Predicts a window of dependent tokens in one forward pass of a causal LM.

    The base model defines the distribution of texts, and the student drafts them (see `Student`). With gated LoRA both
    are one network: the adapter acts on slots only, so that context tokens have the hidden states of the base model,
    bit for bit.

    Args:
        config: see `PredictorConfig`.
        backbone: a base model that is already loaded; by default it is loaded from `config.backbone`.
        token_ranks: `[V]`, a stored order "embedding"; by default it is computed if needed.

    Attributes:
        attention: chooses the attention back-end of windows.
        backbone_path: `config.backbone.path`, which another working folder leaves valid.
        first_slot_layer: index of the first decoder layer that slots run through; the number of layers if none.
        packed_weights: copies of linear weights for decoding on a CPU, empty until then (see `prepare_for_decoding`).
        draft_head: the output head over the draft vocabulary; None without one.
        prefix_counts: of a trained predictor, the number of validation windows with 0, 1, .. L correct tokens; None if
            unknown. Decoders allocate their slots accordingly.
    """

    def __init__(
        self, config: PredictorConfig, backbone: PreTrainedModel | None = None, token_ranks: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.prefix_counts: list[int] | None = None
        self.backbone_path = absolute_if_local(config.backbone.path)
        backbone = load_backbone(config.backbone) if backbone is None else backbone
        require_text_model(backbone.config)
        # Weights that are trained cannot identify the base model.
        self.base_fingerprint = (architecture_fingerprint if config.student.trains_base else fingerprint)(backbone)
        self.packed_weights = PackedWeights()
        table: Tensor = backbone.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]
        require_finite(table)
        require_draft_size(config.draft_vocabulary, len(table))
        self.first_slot_layer = first_slot_layer(backbone, config.slot_layers)
        self.slot_encoder = build_slot_encoder(config, backbone, self.first_slot_layer, token_ranks)
        self.language_model, self.gate, self.student_copy = prepare_for_training(
            backbone, config.student, config.lora, self.first_slot_layer
        )
        self.attention = AttentionChoice(backbone)
        # PEFT changes the layers of this model in place. The tuple hides it from torch, which would register it twice.
        self._base_model = (backbone,)
        self.draft_head = None
        if config.draft_vocabulary is not None:
            self._add_draft_head(config.draft_vocabulary)
        require_supported(self.eval())
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of trained modules; the base model stays in eval mode, so that the teacher has no dropout."""
        super().train(mode)
        self.language_model.eval()
        for name, module in self.language_model.named_modules():
            if name.endswith("lora_dropout"):
                module.train(mode)
        return self

    @property
    def base_model(self) -> PreTrainedModel:
        """The causal LM whose samples are reproduced; its linear layers contain the gated adapter, if there is one."""
        return self._base_model[0]

    @property
    def student_model(self) -> PreTrainedModel:
        """The causal LM that runs the slots: the base model, unless the student is a copy."""
        return self.base_model if self.student_copy is None else self.student_copy

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the base model supports, if it has a limit."""
        return max_positions(self.base_model.config)

    def logits(self, hidden: Tensor) -> Tensor:
        """The base model's output head, for hidden states of context tokens: `[..., H]` to `[..., V]`."""
        return apply_head(self.base_model, hidden)

    def slot_logits(self, slots: Tensor) -> Tensor:
        """The student's output head, for slots `[..., H]`, or corrected ones `[..., H + F]`, see `CorrectionHead`.

        Returns:
            `[..., N]` for the tokens of the draft vocabulary; without one, N = V.
        """
        hidden_size = self.slot_encoder.placeholder.shape[0]
        if slots.shape[-1] == hidden_size:
            return self._slot_head(slots)
        assert isinstance(self.correction, CorrectionHead), "no other correction adds features"
        logits = self._slot_head(slots[..., :hidden_size])
        return logits + self.correction.logit_bias(slots[..., hidden_size:])

    def choose_draft_vocabulary(self, token_ids: Tensor) -> None:
        """Set the tokens `[N]` that slots can draft.

        Raises:
            ValueError: they are not N ascending token ids.
        """
        own = self.slot_encoder.draft_token_ids
        assert own is not None, "the predictor has a draft vocabulary"
        require_draft_vocabulary(token_ids, len(own), self.base_model.config.vocab_size)
        own.copy_(token_ids)
        self._gather_draft_head()

    @property
    def continuations(self) -> Continuations:
        """The n-grams that decoders draft from; none if none are stored."""
        return {} if self.slot_encoder.ngrams is None else self.slot_encoder.ngrams.continuations

    def _slot_head(self, hidden: Tensor) -> Tensor:
        if self.draft_head is None:
            return apply_head(self.student_model, hidden)
        ids = self.slot_encoder.draft_token_ids
        assert ids is not None, "set with draft_head"
        return final_logits(self.student_model.config, self.draft_head(hidden, output_head(self.student_model), ids))

    def _add_draft_head(self, size: int) -> None:
        self.draft_head = DraftHead(output_head(self.student_model), size)
        self.slot_encoder.draft_token_ids = torch.arange(size, dtype=torch.int32)
        self._gather_draft_head()
        self.draft_head.is_chosen = False
        self.register_load_state_dict_post_hook(PredictorNetwork._gather_draft_head)

    def _gather_draft_head(self, *_: object) -> None:
        ids = self.slot_encoder.draft_token_ids
        assert self.draft_head is not None and ids is not None, "the predictor has a draft vocabulary"
        self.draft_head.gather(output_head(self.student_model), ids)
        self.draft_head.is_chosen = True

    def embed(self, token_ids: Tensor) -> Tensor:
        """The base model's token embeddings: `[...]` to `[..., H]`."""
        return self.base_model.get_input_embeddings()(token_ids)

    def run_decoder(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        *,
        window_keys: WindowKeys | None = None,
    ) -> Tensor:
        """Run the base model's stack on input embeddings; the gate is as the caller left it.

        Args:
            embeddings: `[B, T, H]`, cast to the model's dtype.
            position_ids: `[B, T]`.
            mask: `[B, 1, T, P + T]` bool, P cached keys; always explicit, so that the model infers no mask itself.
                None with `window_keys`.
            cache: gets the keys and values of these T tokens appended.
            window_keys: what the positions see in a call that reads windows.

        Returns:
            Last hidden states `[B, T, H]`.
        """
        return run_stack(self.base_model, embeddings, position_ids, mask, cache, window_keys)

    def student_embed(self, token_ids: Tensor) -> Tensor:
        """The student's embeddings of context tokens: `[...]` to `[..., H]`."""
        return self.student_model.get_input_embeddings()(token_ids)

    def run_student_decoder(
        self,
        embeddings: Tensor,
        position_ids: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        *,
        window_keys: WindowKeys | None = None,
    ) -> Tensor:
        """Run the student's stack, the adapter's gate as the caller left it; arguments as in `run_decoder`."""
        return run_stack(self.student_model, embeddings, position_ids, mask, cache, window_keys)

    def sampler(self, sampling: SamplingConfig | None = None) -> Sampler:
        """These settings, by default the predictor's own, with its token order and draft vocabulary.

        Raises:
            ValueError: the predictor was not trained in the order "embedding", so it has no such order.
        """
        sampling = self.config.sampling if sampling is None else sampling
        if sampling.order == "embedding" and self.slot_encoder.token_ranks is None:
            raise ValueError(
                f"expected the order of predictor.sampling, {self.config.sampling.order!r}, found 'embedding', which "
                "only predictors trained in it store: set sampling.order"
            )
        ranks = self.slot_encoder.token_ranks if sampling.order == "embedding" else None
        return Sampler(sampling, ranks, as_vocabulary(self.slot_encoder.draft_token_ids))

    def embed_slots(self, auxiliaries: Tensor, sampling: SamplingConfig) -> Tensor:
        """Input embeddings of slots: `[..., L]` float64 in [0, 1) to `[..., L - 1, H]`."""
        slots = self.slot_encoder(sampling.slot_auxiliaries(auxiliaries))
        encoder = self.slot_encoder.sampling_encoder
        return slots if encoder is None else slots + encoder(sampling)

    def encode(
        self, batch: PackedBatch, sampling: SamplingConfig | None = None, end_of_text: int | None = None
    ) -> Context:
        """Run the base model over packed rows; without gradients if it is frozen.

        Args:
            batch: the rows.
            sampling: settings of the windows, by default the predictor's own. They do not affect this pass.
            end_of_text: the token id that ends a sampled window, if there is one.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.student.trains_base), self.gate.closed():
            mask = context_mask(batch.document_ids)
            with self.recorded_entry() as entry:
                hidden = self.run_decoder(self.embed(batch.input_ids), batch.position_ids, mask, cache)
        entry_hidden = entry[0] if entry else None
        return Context(batch, hidden, cache, self.sampler(sampling), end_of_text, entry_hidden)

    def recorded_entry(self) -> AbstractContextManager[list[Tensor]]:
        """Collects what the layer reads at which late slots enter, in each call inside the block; else nothing."""
        has_entry = self.slot_encoder.late_entry is not None
        return layer_input(self.base_model, self.first_slot_layer) if has_entry else nullcontext([])

    def slot_hidden(self, context: Context, auxiliaries: Tensor, first_token_ids: Tensor | None = None) -> Tensor:
        """Hidden states that predict the tokens 1 .. L - 1 of each window.

        Args:
            context: of `encode`.
            auxiliaries: `[B, N, L]` float64 in [0, 1).
            first_token_ids: `[B, N]`, token 0 of each window; needed unless slots run through all layers.

        Returns:
            `[B, N, L - 1, H]`, for `slot_logits`, with gradients for all trained weights.
        """
        slots = self.embed_slots(auxiliaries, context.sampling.settings)
        if self.slot_encoder.layerless is not None:
            assert first_token_ids is not None, "such slots read the first token"
            return self.layerless_slots(slots, context.first_hidden, first_token_ids)
        if context.entry_hidden is not None:
            assert first_token_ids is not None, "such slots read the first token"
            entry_hidden = context.before_windows(context.entry_hidden)
            slots = self.enter_late(slots, entry_hidden, context.first_hidden, first_token_ids)
            with self.gate.open():
                attention = self._window_attention(self.base_model)
                return attention.read_windows(self.run_slot_layers, context.batch, context.cache, slots)
        if self.student_copy is not None:
            tokens = self.student_embed(context.batch.input_ids)
            attention = self._window_attention(self.student_copy)
            return attention.read_jointly(self.run_student_decoder, context.batch, tokens, slots)
        with self.gate.open():
            return self.read_windows(context, slots)

    def enter_late(self, slots: Tensor, entry_hidden: Tensor, last_hidden: Tensor, first_token_ids: Tensor) -> Tensor:
        """What slots read at their first layer, see `LateEntry`: `[..., J, H]` to the same, of windows `[...]`."""
        assert self.slot_encoder.late_entry is not None, "slots enter at the first layer"
        return self.slot_encoder.late_entry(slots, entry_hidden, last_hidden, self.embed(first_token_ids))

    def layerless_slots(self, slots: Tensor, last_hidden: Tensor, first_token_ids: Tensor) -> Tensor:
        """Last hidden states of slots that run through no layer, see `LayerlessSlots`; otherwise as `enter_late`."""
        assert self.slot_encoder.layerless is not None, "slots run through layers"
        return self.slot_encoder.layerless(slots, last_hidden, self.embed(first_token_ids))

    @property
    def run_slot_layers(self) -> RunLayers:
        """Runs the layers of the base model that slots run through, the adapter's gate as the caller left it."""
        return partial(run_stack, self.base_model, first_layer=self.first_slot_layer)

    def read_windows(self, context: Context, embeddings: Tensor) -> Tensor:
        """Run the base model's stack on the first J positions of each window, after its context.

        Args:
            context: of `encode`.
            embeddings: `[B, N, J, H]`; the gate is as the caller left it.

        Returns:
            Last hidden states `[B, N, J, H]`.
        """
        attention = self._window_attention(self.base_model)
        return attention.read_windows(self.run_decoder, context.batch, context.cache, embeddings)

    def incremental_reader(self, context: Context) -> IncrementalReader:
        """As `read_windows`, a few positions of each window at a time."""
        attention = self._window_attention(self.base_model)
        return attention.incremental_reader(self.run_decoder, context.batch, context.cache)

    def _window_attention(self, model: PreTrainedModel) -> WindowAttention:
        return self.attention.choose(model.device, model.dtype)

    @property
    def correction(self) -> CorrectionModule | None:
        """What predicts drafts again, if there is one."""
        return self.slot_encoder.correction

    @property
    def refiner(self) -> Refiner | None:
        """The correction, if it reads the context."""
        return self.correction if isinstance(self.correction, Refiner) else None

    def correction_context(self, context: Context) -> RefinerContext | None:
        """What `correct` reads of the context: the pairs of a `Refiner`, with gradients for its keys and values."""
        if self.refiner is None:
            return None
        pairs = RefinerContext(self.refiner)
        tokens = self.embed(context.batch.input_ids)
        pairs.read(context.hidden, tokens, context.batch.position_ids, context_mask(context.batch.document_ids))
        return pairs

    def correct(self, context: Context, pairs: RefinerContext | None, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Correct the slots of packed windows, all in parallel.

        Args:
            context: of `encode`.
            pairs: its `correction_context`.
            hidden: `[B, N, L - 1, H]`, of `slot_hidden`.
            token_ids: `[B, N, L - 1]`, the tokens at the slots' positions.

        Returns:
            `[B, N, L - 1, H]` or `[B, N, L - 1, H + F]`, for `slot_logits`.
        """
        tokens = self.embed_draft(token_ids)
        if pairs is None:
            assert isinstance(self.correction, CorrectionHead), "checked by the caller"
            return self.correction(hidden, tokens)
        conditioning = self.refiner_conditioning(context.sampling.settings)
        return pairs.refine_windows(context.batch, hidden, tokens, conditioning, self.attention)

    def refiner_conditioning(self, sampling: SamplingConfig) -> Tensor | None:
        """Embedding `[H]` of the sampling settings for a `Refiner`; None if it is trained for one setting alone."""
        encoder = self.slot_encoder.correction_sampling_encoder
        return None if encoder is None else encoder(sampling)

    def embed_draft(self, token_ids: Tensor) -> Tensor:
        """The correction's input for drafted tokens, `[...]` to `[..., H]`; zeros if it is not conditioned on them."""
        embeddings = self.embed(token_ids)
        return embeddings if self.config.objective.conditions_on_draft else torch.zeros_like(embeddings)

    @property
    def corrects_left_to_right(self) -> bool:
        """Whether drafts are corrected slot after slot."""
        return self.config.correction is not None and self.config.correction.is_left_to_right

    @property
    def num_refinement_steps(self) -> int:
        """How often a draft is corrected in parallel; once if the correction is not conditioned on it."""
        if self.config.correction is None or self.corrects_left_to_right:
            return 0
        return self.config.correction.num_refinement_steps if self.config.objective.conditions_on_draft else 1

    def trainable_state(self) -> dict[str, Tensor]:
        """Names and values of all trained weights: the student and the slot encoder, no frozen weight.

        Token order, draft vocabulary and n-grams are included if there are any.
        """
        kept = NOT_TRAINED | {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in self.state_dict().items() if name in kept}

    def require_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Refuse weights that are not those of this predictor, see `require_stored_state`."""
        require_stored_state(state, self.trainable_state(), self.base_model.config.vocab_size)

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trainable_state`; raises as `require_trainable_state`, and for weights that are not finite."""
        self.require_trainable_state(state)
        require_finite_weights(state)
        self.load_state_dict(state, strict=False)
