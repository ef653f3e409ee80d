"""Warm start: before any training, a slot carries the embedding of the token that its u picks most often.

Training then begins with a network that reads tokens, if not always the right ones, as it is used to, instead of one
that has to learn first that u stands for a token at all. The most frequent token is a better start than the mean over
all of them: near the end of an interval the mean is no token's embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick_each
from ptp_lightning.data.batch import PackedBatch
from ptp_lightning.models.predictor import ParallelTokenPredictor
from ptp_lightning.randomness import keyed_generator
from ptp_lightning.training.windows import TeacherWindows

NUM_TEXTS = 256
TEXT_LENGTH = 32
GRID = 2048  # auxiliaries at which expectations are taken, evenly spaced


def start_warm(predictor: ParallelTokenPredictor) -> None:
    """Fit the embedding of each slot's own auxiliary to `usual_tokens`.

    Raises:
        ValueError: slots carry no auxiliary, or its head is not linear; names the key.
    """
    objective = predictor.config.objective
    if objective.num_inputs == 0:
        raise ValueError(
            f"expected slots that carry auxiliaries, found the {objective.name} objective: set "
            "model.init_args.warm_start to false"
        )
    auxiliaries, token_ids = usual_tokens(predictor)
    predictor.slot_encoder.start_at(auxiliaries, predictor.student_embed(token_ids))


@torch.no_grad()
def usual_tokens(predictor: ParallelTokenPredictor) -> tuple[Tensor, Tensor]:
    """The token that each of some auxiliaries picks most often in texts that the base model writes itself.

    Returns:
        (auxiliaries `[G]` float64, token ids `[G]`), of ties the lowest id; the same on every call.
    """
    config = predictor.base_model.config
    generator = keyed_generator("warm start")
    first, vocabulary = config.bos_token_id, config.vocab_size
    if first is not None and first < vocabulary:  # models without a beginning may name that of another vocabulary
        texts = torch.full((NUM_TEXTS, 1), first)
    else:
        texts = torch.randint(vocabulary, (NUM_TEXTS, 1), generator=generator)
    texts = texts.to(predictor.base_model.device)
    auxiliaries = ((torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID).to(texts.device)
    picked: list[Tensor] = []
    length = predictor.config.window_length
    while not picked or texts.shape[1] + length <= min(TEXT_LENGTH, predictor.max_positions or TEXT_LENGTH):
        batch = _goes_on(texts)
        context = predictor.encode(batch.input_ids, batch.document_ids, batch.position_ids, batch.window_starts)
        sample = TeacherWindows().sample(predictor, batch, context, generator, None)
        picked.append(pick_each(auxiliaries, sample.teacher).flatten(0, -2))
        texts = torch.cat([texts, sample.token_ids[:, 0]], dim=1)
    return auxiliaries, torch.cat(picked).mode(dim=0).values


def _goes_on(texts: Tensor) -> PackedBatch:
    """Texts `[R, T]`, each a row of its own with one window, which follows it."""
    num_texts, length = texts.shape
    return PackedBatch(
        input_ids=texts,
        document_ids=torch.zeros_like(texts),
        position_ids=torch.arange(length, device=texts.device).expand(num_texts, -1),
        window_starts=torch.full((num_texts, 1), length, device=texts.device),
        completion_mask=torch.ones_like(texts, dtype=torch.bool),
    )
