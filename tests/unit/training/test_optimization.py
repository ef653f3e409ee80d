"""Optimisers and schedules: which parameter is trained how, and state that survives a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ptp_lightning.training.optimization import JointOptimizer, OptimizerSettings, configure, decay_start


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 3)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.second(self.norm(self.frozen(self.first(self.embed_tokens(token_ids)))))


MATRICES = {"first.weight", "second.weight"}
OTHERS = {"embed_tokens.weight", "first.bias", "norm.weight", "norm.bias", "second.bias"}


def build(name: str = "adamw", total_steps: float = 10, **settings: Any) -> tuple[Network, Any, Any]:
    """The same network on every call, its optimiser, and the schedule."""
    torch.manual_seed(0)
    network = Network()
    chosen: Any = configure(OptimizerSettings(name, **settings), network.named_parameters(), total_steps)  # pyright: ignore
    return network, chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]


def train(network: Network, optimizer: Any, schedule: Any, steps: range) -> None:
    """Steps that depend on their number alone."""
    for step in steps:
        optimizer.zero_grad()
        target = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        (network(torch.arange(5)) - target).square().mean().backward()
        optimizer.step()
        schedule.step()


def weights(network: Network) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def names_of(network: Network, parameters: list[Tensor]) -> set[str]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


class TestGroups:
    def test_adamw_decays_matrices_only(self) -> None:
        network, optimizer, _ = build(weight_decay=0.1)
        groups = {group["weight_decay"]: names_of(network, group["params"]) for group in optimizer.param_groups}
        assert groups == {0.1: MATRICES, 0.0: OTHERS}

    def test_muon_takes_matrices_and_adamw_the_rest(self) -> None:
        network, optimizer, _ = build("muon", weight_decay=0.1)
        assert isinstance(optimizer, JointOptimizer)
        found = [
            (type(member).__name__, group["weight_decay"], names_of(network, group["params"]))
            for member in optimizer.optimizers
            for group in member.param_groups
        ]
        assert found == [("Muon", 0.1, MATRICES), ("AdamW", 0.0, OTHERS)]

    def test_what_muon_leaves_may_have_a_rate_of_its_own(self) -> None:
        _, optimizer, _ = build("muon", learning_rate=0.008, adamw_learning_rate=0.002, warmup_steps=0)
        assert [group["lr"] for group in optimizer.param_groups] == [0.008, 0.002]
        _, optimizer, _ = build("muon", learning_rate=0.008, warmup_steps=0)
        assert [group["lr"] for group in optimizer.param_groups] == [0.008, 0.008]

    @pytest.mark.parametrize("name", ["embed_tokens", "gpt_neox.embed_in", "transformer.wte", "transformer.wpe"])
    def test_token_and_position_tables_are_no_matrices(self, name: str) -> None:
        parameters = [(f"{name}.weight", nn.Parameter(torch.ones(2, 2))), ("w", nn.Parameter(torch.ones(2, 2)))]
        chosen: Any = configure(OptimizerSettings(weight_decay=0.1), parameters, 10)
        assert [len(group["params"]) for group in chosen["optimizer"].param_groups] == [1, 1]
        assert chosen["optimizer"].param_groups[0]["params"][0] is parameters[1][1]

    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_every_parameter_that_requires_a_gradient_moves(self, name: str) -> None:
        network, optimizer, schedule = build(name)
        before = weights(network)
        train(network, optimizer, schedule, range(2))
        changed = {key for key, value in network.named_parameters() if not torch.equal(value, before[key])}
        assert changed == MATRICES | OTHERS


class TestSchedule:
    def rates(self, steps: int, **settings: Any) -> list[float]:
        network, optimizer, schedule = build(total_steps=steps, learning_rate=1.0, **settings)
        rates: list[float] = []
        for step in range(steps):
            rates.append(round(optimizer.param_groups[0]["lr"], 6))
            train(network, optimizer, schedule, range(step, step + 1))
        return rates

    def test_rises_stays_and_falls(self) -> None:
        rates = self.rates(10, warmup_steps=4, decay_fraction=0.4)
        assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]

    def test_is_that_of_longer_trainings_until_it_falls(self) -> None:
        settings: dict[str, Any] = {"warmup_steps": 4, "decay_fraction": 0.4}
        shared = int(decay_start(OptimizerSettings(**settings), 10))
        short, long = self.rates(10, **settings), self.rates(40, **settings)
        assert shared == 6
        assert short[: shared + 1] == long[: shared + 1]
        assert short[shared + 1] < long[shared + 1]

    def test_constant(self) -> None:
        assert self.rates(4, warmup_steps=0, decay_fraction=0.0) == [1.0] * 4

    def test_falls_from_the_start(self) -> None:
        assert self.rates(4, warmup_steps=0, decay_fraction=1.0) == [1.0, 0.75, 0.5, 0.25]

    def test_reaches_every_member_of_a_joint_optimizer(self) -> None:
        network, optimizer, schedule = build("muon", learning_rate=1.0, warmup_steps=4, decay_fraction=0.0)
        train(network, optimizer, schedule, range(1))
        rates = [group["lr"] for member in optimizer.optimizers for group in member.param_groups]
        assert rates == [0.5, 0.5]

    @pytest.mark.parametrize("total_steps", [-1, 0, math.inf])
    def test_without_an_end_is_refused(self, total_steps: float) -> None:
        with pytest.raises(ValueError, match="trainer.max_steps"):
            build(total_steps=total_steps)


class TestState:
    @pytest.mark.parametrize("name", ["adamw", "muon"])
    def test_restored_run_is_the_uninterrupted_one(self, name: str) -> None:
        whole = build(name, warmup_steps=3)
        train(*whole, range(8))

        first = build(name, warmup_steps=3)
        train(*first, range(4))
        saved = [part.state_dict() for part in first]
        second = build(name, warmup_steps=3)
        for part, state in zip(second, saved, strict=True):
            part.load_state_dict(state)
        train(*second, range(4, 8))

        expected, found = weights(whole[0]), weights(second[0])
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_the_schedule_still_reaches_the_members_after_loading(self) -> None:
        network, optimizer, schedule = build("muon", learning_rate=1.0, warmup_steps=4, decay_fraction=0.0)
        optimizer.load_state_dict(optimizer.state_dict())
        train(network, optimizer, schedule, range(1))
        assert [group["lr"] for member in optimizer.optimizers for group in member.param_groups] == [0.5, 0.5]

    def test_closure_runs_once_before_the_members_step(self) -> None:
        network, optimizer, _ = build("muon")
        before, calls = weights(network), []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            assert all(torch.equal(value, before[key]) for key, value in network.named_parameters())
            loss = network(torch.arange(5)).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        assert calls == [True] and float(loss.detach()) > 0
        assert not torch.equal(network.first.weight, before["first.weight"])
        assert not torch.equal(network.first.bias, before["first.bias"])

    def test_zero_grad_reaches_all(self) -> None:
        network, optimizer, _ = build("muon")
        network(torch.arange(5)).sum().backward()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("key", "value"), [("learning_rate", 0.0), ("decay_fraction", 1.5), ("weight_decay", -0.1), ("warmup_steps", -1)]
)
def test_refuses_settings_that_cannot_train(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"optimizer.{key}.*{value}"):
        OptimizerSettings(**{key: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.1), ("muon", 0.0), ("muon", -0.1)])
def test_refuses_another_rate_that_nothing_could_use(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"optimizer.adamw_learning_rate.*{rate}"):
        OptimizerSettings(name, adamw_learning_rate=rate)  # pyright: ignore[reportArgumentType]
