"""The benchmark of calls measures every row for a trained predictor."""

import sys

import pytest
import torch

from benchmarks import decoding_calls


def test_rows_of_a_trained_predictor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--adapter code --budgets 0 4 --prompts 50 --trees --context 16 --repetitions 1"
    monkeypatch.setattr(sys, "argv", ["decoding_calls", *options.split()])
    num_threads = torch.get_num_threads()
    try:
        decoding_calls.main()
    finally:
        torch.set_num_threads(num_threads)
    rows = {line[:32].strip(): line[32:].split() for line in capsys.readouterr().out.splitlines()}
    for name in (
        "transformers.generate, a step",
        "own loop, a step",
        "prompt of 50, transformers",
        "prompt of 50, own",
        "speculative cycle, two calls",
        "call of 4 slots",
        *decoding_calls.TREES,
    ):
        assert all(float(number) > 0 for number in rows[name])
