"""ParallelTokenPredictor: open a trained predictor, continue text with it, and save it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from ptp_lightning.decoding.generation import Generation
from ptp_lightning.decoding.text import generate, tokenizer_of
from ptp_lightning.export.checkpoint import build_network, save_network
from ptp_lightning.export.hub import upload, warn_of_local_base
from ptp_lightning.export.stored_predictor import read_predictor
from ptp_lightning.models.config import PredictorConfig
from ptp_lightning.models.network import PredictorNetwork
from ptp_lightning.option_names import DEFAULT_DECODER, DecoderName, DtypeName
from ptp_lightning.sampling import SamplingConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ParallelTokenPredictor:
    """A causal LM and its adapter, which together write several tokens per forward pass.

    The text is, token for token, what the base model alone would have sampled for the same seed.

    Args:
        network: the base model with its student and slot encoder.
        training: facts about its training that are saved with it, see `StoredPredictor`.

    >>> predictor = ParallelTokenPredictor.from_pretrained()  # the code model that ships with the package
    >>> predictor.generate("import ", max_new_tokens=8, seed=0).num_calls < 8
    True
    """

    def __init__(self, network: PredictorNetwork, training: dict[str, Any] | None = None) -> None:
        self.network = network
        self.training = training or {}

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        dtype: DtypeName | torch.dtype = "auto",
        base: str | Path | None = None,
        trust_custom_classes: bool = False,
    ) -> Self:
        """A predictor in eval mode, on the CPU; further errors as in `load_network`.

        Args:
            name_or_path: an exported folder, a checkpoint, a repository of the Hugging Face hub ("user/name" or
                "user/name@revision"), or the name of an adapter that ships with the package: "code", the default, or
                "smollm2".
            dtype: of the base model, "float32" or "bfloat16"; "auto" is that of the training.
            base: a folder or hub id of a sibling of the base model, a fine-tune for instance, to use instead of it.
            trust_custom_classes: let the stored configuration name classes outside of this package, which are imported.

        Raises:
            ValueError: `dtype` is none of these, or the adapter does not fit `base`; names what differs.
            FileNotFoundError: there is no such folder, checkpoint, repository or base model; says what was tried.
        """
        stored = read_predictor(name_or_path)
        network = build_network(stored, dtype=dtype, base=base, trust_custom_classes=trust_custom_classes)
        return cls(network, stored.training)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
        license: str | None = None,
    ) -> None:
        """Write a folder for `from_pretrained`, which PEFT opens too; arguments and errors as in `save_network`."""
        save_network(self.network, folder, dtype=dtype, overwrite=overwrite, training=self.training, license=license)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        dtype: torch.dtype | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload predictor",
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, without the base model.

        Args:
            repo_id: "user/name"; created if there is no such repository.
            license: of the adapter for its model card, as the hub names it, "apache-2.0" for instance.
            dtype: of the uploaded weights, by default their own.
            private: visibility of a new repository; by default that of the user's settings.
            token: of the user; by default that of `hf auth login`.
            revision: branch; by default "main".
            create_pr: open a pull request instead.
            commit_message: of the commit.

        Returns:
            The address of the commit.

        Raises:
            ValueError: `repo_id` is no id of the hub, or the student has no adapter.
            ConnectionError: the hub refuses, or cannot be reached; says what was tried.
        """
        warn_of_local_base(self.config.backbone.path)
        with TemporaryDirectory() as scratch:
            folder = Path(scratch) / "predictor"
            save_network(self.network, folder, dtype=dtype, training=self.training, license=license, name=repo_id)
            return upload(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    @property
    def config(self) -> PredictorConfig:
        """How the predictor was built and trained."""
        return self.network.config

    @property
    def base_model(self) -> PreTrainedModel:
        """The causal LM whose samples are reproduced."""
        return self.network.base_model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's, loaded when it is first needed; errors as in `load_tokenizer`."""
        return tokenizer_of(self.network)

    def to(self, device: str | torch.device) -> Self:
        """Move all weights to a device."""
        self.network.to(device)
        return self

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        decoder: DecoderName = DEFAULT_DECODER,
        window_length: int | None = None,
        num_draft_tokens: int | None = None,
        slot_budget: int = 16,
        end_of_text: Iterable[int] | None = None,
        stop: str | Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat: bool = False,
        system: str | None = None,
        on_tokens: Callable[[list[int]], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Continue a prompt.

        Args:
            prompt: text, or at least one token id.
            max_new_tokens: the most tokens to add.
            sampling: temperature, top-k, top-p, penalties; by default those that the adapter was trained for. Others
                may lower the acceptance, never the exactness. Penalties and min-p that they leave open (None) are those
                of `generation_config.json` in the base model's folder.
            seed: of the auxiliaries. The same seed gives the same text with every decoder.
            decoder: "speculative_lookup" (the default), "speculative", "lookup" and "partial_quadratic" write several
                tokens per call, "autoregressive" one.
            window_length: tokens drafted per cycle, one after the other; by default as in training.
            num_draft_tokens: drafted tokens that a cycle verifies, alternatives included; 0 for a single draft. By
                default 8 for a predictor that corrects from left to right, on a CPU.
            slot_budget: slots per call of partial quadratic decoding.
            end_of_text: token ids that end the text; by default those of the model and of the tokenizer.
            stop: one or several strings before which the text ends.
            tokenizer: by default that of the base model.
            chat: make a prompt of the text with the tokenizer's chat template; the answer ends with its turn.
            system: the system prompt of a chat; by default that of the template, if it has one.
            on_tokens: is called with new token ids as soon as they are verified.
            on_text: the same with their text, in whole characters.

        Raises:
            ValueError: a value is out of range, or the prompt is empty, too long, or has unknown token ids; with
                `chat`, there is no chat template.
        """
        return generate(
            self.network,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            decoder=decoder,
            window_length=window_length,
            num_draft_tokens=num_draft_tokens,
            slot_budget=slot_budget,
            end_of_text=end_of_text,
            stop=stop,
            tokenizer=self.tokenizer if tokenizer is None else tokenizer,
            chat=chat,
            system=system,
            on_tokens=on_tokens,
            on_text=on_text,
        )
