"""Speculative decoding: the student drafts a window, the base model verifies it (Draxler et al., ICLR 2026, Alg. 1).

The committed text is the text of the reference decoder for the same auxiliaries, token for token, whatever the drafts
are. Drafts only decide how many calls it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ptp_lightning.auxiliary import pick
from ptp_lightning.decoding.cycle_choice import (
    CycleChoice,
    JoiningStudent,
    LoneStudent,
    StudentEstimate,
    cost_of_student,
)
from ptp_lightning.decoding.drafting import (
    Drafter,
    StudentDrafter,
    TreeDrafter,
    draft_trees,
    draft_windows,
    likely_tokens,
    num_tree_tokens,
)
from ptp_lightning.decoding.generation import Decoded, GenerationSettings, OnTokens
from ptp_lightning.decoding.lookahead import Lookahead
from ptp_lightning.decoding.state import Start, begin_decoding
from ptp_lightning.decoding.text_drafts import TextDraft, joined_tree
from ptp_lightning.decoding.timing import PhaseTimer
from ptp_lightning.decoding.token_tree import TokenTree, Verified, verified_paths
from ptp_lightning.models.network import PredictorNetwork


@torch.inference_mode()
def decode_speculatively(
    predictor: PredictorNetwork,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
    drafter: Drafter | None = None,
    timer: PhaseTimer | None = None,
    *,
    lookup: bool = False,
) -> list[Decoded]:
    """Cycles of two calls (three with a student's copy) that commit `accepted = correct + 1` tokens.

    1. Draft. A call reads the tokens that the cache lacks (first the prompt or its last token, later the newest token),
       then slots. The base model's logits give the first token of the window, t_1 = Pick(u_1, Q_1); slot j gives token
       j + 2. A student's copy has a call of its own for the slots, in which it also reads what was committed since its
       last.
       There may be several drafts, which share their beginnings (see `TokenTree`).
    2. Verify. A call reads the drafts with the gate closed. The longest path of tokens that are the base model's own
       picks is correct (1 .. L tokens, since t_1 always is). It is committed together with the base model's pick after
       it: the correction of a wrong token, or a bonus after the last.

    With late slots (`predictor.slot_layers`) a cycle is one call and a pass of the slots through the last layers. Its
    slots follow the newest token, which is committed and not read yet: it is the first token of the window, and the
    root of the tree that the call reads. A cycle commits `correct` tokens: the path after the root, and the pick after
    it.

    With `lookup`, a `CycleChoice` decides for each cycle. Unless the student should be asked for one of the texts, the
    cycle is a single call, which reads the newest token and a draft that needs no network, as with late slots. Where
    late slots are asked, what they draft is one of the sources of that draft.

    The draft leaves room for that last pick, so windows shrink towards the end of the longest text. If a single token
    remains, it is t_1 of a drafting call and needs no verification.

    Args:
        predictor: its base model verifies what its student drafts.
        prompts: B lists of token ids, decoded side by side; each text is the same as if it were decoded alone.
        settings: sampling settings other than the predictor's own cost correct tokens, not exactness.
        on_tokens: is called once a cycle with the committed tokens of each text.
        drafter: makes the drafts; by default the student. Trees need a `TreeDrafter`.
        timer: marks the ends of phases.
        lookup: whether to draft without the student, too: from the texts themselves, where tokens repeat, and from
            `predictor.ngrams`.

    Raises:
        ValueError: a prompt is empty, or too long for `max_new_tokens` more.
    """
    with begin_decoding(predictor, prompts, settings, on_tokens, timer) as start:
        if drafter is None:
            drafter = StudentDrafter(predictor.config.objective, start.context.sampling)
        length = settings.window_length
        if predictor.config.slot_layers == 0:  # further slots would repeat the last one of training
            length = min(length, predictor.config.window_length)
        cycles = _Cycles(start, drafter, length, num_tree_tokens(predictor, settings))
        if lookup:
            estimate = JoiningStudent if cycles.student_joins else LoneStudent
            student = partial(estimate, cost_of_student(predictor, length - 1))
            cycles.choice = _choice(predictor, prompts, settings, student)
        if predictor.first_slot_layer:
            cycles.run_after_newest()
        else:
            cycles.run()
    return start.texts.decoded()


@torch.inference_mode()
def decode_by_lookup(
    predictor: PredictorNetwork,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_tokens: OnTokens | None = None,
    timer: PhaseTimer | None = None,
) -> list[Decoded]:
    """Verify drafts that need no network (`TextDrafter`), or read one token a call; the student is not used.

    It shows what the student adds to `decode_speculatively` with `lookup`. Arguments and errors are the same.
    """
    with begin_decoding(predictor, prompts, settings, on_tokens, timer) as start:
        drafter = StudentDrafter(predictor.config.objective, start.context.sampling)
        cycles = _Cycles(start, drafter, settings.window_length, tree_size=0)
        cycles.choice = _choice(predictor, prompts, settings, student=None)
        cycles.run_after_newest()
    return start.texts.decoded()


def _choice(
    predictor: PredictorNetwork,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    student: Callable[[], StudentEstimate] | None,
) -> CycleChoice:
    # Penalties of earlier tokens are those of a chain.
    branches = not settings.sampling.depends_on_prefix
    return CycleChoice(prompts, predictor.continuations, student, branches, settings.end_of_text)


class _Cycles:
    """Drafts and verifies until all texts are finished.

    Args:
        start: contexts and texts.
        drafter: makes the drafts.
        window_length: L, tokens of a draft, one after the other.
        tree_size: see `num_tree_tokens`.

    Attributes:
        choice: whether the student drafts; None if always.
        student_joins: whether what it expects can be one source of a draft among others: of slots after the newest
            token, as a tree.
    """

    choice: CycleChoice | None = None

    def __init__(self, start: Start, drafter: Drafter, window_length: int, tree_size: int) -> None:
        self._context, self._texts, self._unread, self._counts = start
        self._drafter = drafter
        self._window_length = window_length
        self._tree_size = tree_size
        self._tree_drafter = drafter if tree_size and isinstance(drafter, TreeDrafter) else None
        self.student_joins = self._tree_drafter is not None and self._context.predictor.first_slot_layer > 0

    def run(self) -> None:
        """Cycles of two calls; the first gives an exact token and slots."""
        context, texts = self._context, self._texts
        while texts.rows:
            if self._drafted_without_student():
                continue
            starts, calls_before = texts.starts, context.num_calls
            length = max(1, min(self._window_length, max(texts.remaining) - 1))
            counts = self._counts
            _, slots = context.read(self._unread, Lookahead.single(counts, length - 1, context.device))
            first = self._pick_after(counts, starts)
            if max(texts.remaining) == 1:
                single = [1] * len(starts)
                texts.commit(first.tolist(), context.num_calls - calls_before, correct=single, drafted=single)
                break
            verified, after = self._verify(self._draft(first, slots, starts), starts, length)
            self._commit(verified, context.num_calls - calls_before, length)
            self._go_on(after)

    def run_after_newest(self) -> None:
        """After a first call that gives the first token, cycles of a single call, before which late slots may run."""
        context, texts = self._context, self._texts
        context.read(self._unread)
        first = self._pick_after(self._counts, texts.starts)
        texts.commit(first.tolist(), context.num_calls)
        self._go_on(first)
        while texts.rows:
            if self._drafted_without_student():
                continue
            length = min(self._window_length, max(texts.remaining))
            slots = context.late_slots(self._unread, length - 1) if length > 1 else None
            context.timer.mark("forward")
            if slots is None:
                self._verify_after_newest(TokenTree.chain(self._unread), length)
            elif self.choice is not None and self._tree_drafter is not None:
                self._draft_with_student(self.choice, self._tree_drafter, slots)
            else:
                starts = [start - 1 for start in texts.starts]
                self._verify_after_newest(self._draft(self._unread, slots, starts), length)

    def _drafted_without_student(self) -> bool:
        """Run a cycle without the student, if it should be asked for none of the texts."""
        texts, max_depth = self._texts, max(self._texts.remaining) - 1
        if self.choice is None or not all(texts.starts):  # a first call reads the rest of the prompts
            return False
        drafts = [self.choice.draft(row, new, max_depth) for row, new in zip(texts.rows, texts.new_tokens, strict=True)]
        alone = [draft for draft in drafts if draft is not None]
        if len(alone) < len(drafts):
            return False
        self._verify_drafts(alone, asked=False)
        return True

    def _draft_with_student(self, choice: CycleChoice, drafter: TreeDrafter, slots: Tensor) -> None:
        """Run a cycle whose draft has what the late slots `[B, J, H]` expect among its sources."""
        texts, max_depth = self._texts, max(self._texts.remaining) - 1
        starts = [start - 1 for start in texts.starts]
        likely = likely_tokens(self._context, drafter, self._unread, slots, starts)
        self._verify_drafts(
            [
                choice.draft_with_student(row, max_depth, of_student)
                for row, of_student in zip(texts.rows, likely, strict=True)
            ],
            asked=True,
        )

    def _verify_drafts(self, drafts: Sequence[TextDraft], asked: bool) -> None:
        self._context.timer.mark("drafting")
        length = 1 + max(draft.depth for draft in drafts)
        self._verify_after_newest(joined_tree(self._unread, drafts), length, asked)

    def _verify_after_newest(self, tree: TokenTree, length: int, asked: bool = True) -> None:
        """Read and commit drafts whose roots are the newest tokens."""
        calls_before = self._context.num_calls
        starts = [start - 1 for start in self._texts.starts]
        verified, after = self._verify(tree, starts, length)
        verified = verified._replace(token_ids=[token_ids[1:] for token_ids in verified.token_ids])
        self._commit(verified, self._context.num_calls - calls_before, length, asked)
        self._go_on(after)

    def _commit(self, verified: Verified, num_calls: int, length: int, asked: bool = True) -> None:
        if self.choice is not None:
            for row, token_ids in zip(self._texts.rows, verified.token_ids, strict=True):
                self.choice.learn(row, len(token_ids), asked)
        if length == 1 and not asked:  # no draft
            self._texts.commit(verified.token_ids, num_calls)
            return
        correct = [len(path) for path in verified.columns]
        self._texts.commit(verified.token_ids, num_calls, correct, [length] * len(correct), verified.rejected)

    def _pick_after(self, counts: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Keep the tokens of the latest call; the base model's pick after them, `[B, 1]`."""
        context = self._context
        context.timer.mark("forward")
        logits = context.next_logits([count - 1 for count in counts], 1)
        context.keep(counts)
        return pick(context.auxiliaries(starts, 1), context.sampling.distribution(logits))

    def _draft(self, first: Tensor, slots: Tensor, starts: Sequence[int]) -> TokenTree:
        context = self._context
        if self._tree_drafter is not None:
            tree = draft_trees(context, self._tree_drafter, first, slots, starts, self._tree_size)
        else:
            tree = TokenTree.chain(draft_windows(context, self._drafter, first, slots, starts))
        context.timer.mark("drafting")
        return tree

    def _verify(self, tree: TokenTree, starts: Sequence[int], length: int) -> tuple[Verified, Tensor]:
        """Read the drafts and keep the longest correct path of each row; waits for the device."""
        context = self._context
        context.read_tree(tree)
        context.timer.mark("forward")
        # A column of the picks is the base model's token after that column of the tree.
        distribution = context.sampling.distribution(context.next_logits([0] * len(starts), tree.token_ids.shape[1]))
        auxiliaries = context.auxiliaries([start + 1 for start in starts], length).gather(1, tree.depths)
        verified, after = verified_paths(tree, pick(auxiliaries, distribution))
        context.timer.mark("verifying")
        context.keep_path(verified.columns)
        return verified, after

    def _go_on(self, newest: Tensor) -> None:
        """Drop finished texts; the next call reads the newest token `[B, 1]` of each of the others."""
        self._unread = newest
        unfinished = self._texts.drop_finished()
        if unfinished:
            self._context.select(unfinished)
            self._unread = newest[unfinished]
        self._counts = [1] * len(self._texts.rows)
        self._context.timer.mark("bookkeeping")
