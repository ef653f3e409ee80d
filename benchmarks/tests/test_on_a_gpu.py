"""The command for a GPU: its parts on a CPU, and parts that fail."""

import json
import math
import os
import pkgutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_a_gpu import __main__ as on_a_gpu
from benchmarks.on_a_gpu.parts import PARTS
from benchmarks.on_a_gpu.process import Outcome, Part, run_part
from benchmarks.on_a_gpu.rows import Record, Row, attempt

COMMAND = "python -m benchmarks.on_a_gpu"


def passing(record: Record) -> None:
    record(Row("first", {"seconds": 2.5}))


def failing(record: Record) -> None:
    record(Row("before", {"seconds": 1.0}))
    raise RuntimeError("CUDA error: no kernel image\nis available")


def crashing(record: Record) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hanging(record: Record) -> None:
    record(Row("before", {"seconds": 1.0}))
    time.sleep(1000)


def silent(record: Record) -> None:
    """Records nothing."""


def with_a_failing_row(record: Record) -> None:
    attempt(record, "too large", lambda: {"seconds": 1 / 0})
    attempt(record, "small", lambda: {"seconds": 3})


def part(function: Any, weight: float = 1.0) -> Part:
    return Part(function.__name__, f"{__name__}:{function.__name__}", {}, weight)


def run(folder: Path, *parts: Part, minutes: float = 1.0) -> tuple[int, dict[str, Any]]:
    """Exit status and the report, with its parts by name."""
    status = on_a_gpu.run(parts, folder, minutes, COMMAND)
    report = json.loads((folder / "report.json").read_text())
    return status, report | {"parts": {one["name"]: one for one in report["parts"]}}


def run_in_this_process(part: Part, limit_seconds: float, folder: Path) -> Outcome:
    """Instead of `run_part`, whose processes would spend most of their time on imports; but pytest needs one."""
    import torch  # here, because the processes of parts import this file

    if part.name == "tests":
        return run_part(part, limit_seconds, folder)
    rows: list[Row] = []
    with torch.random.fork_rng():
        pkgutil.resolve_name(part.function)(rows.append, **part.arguments)
    return Outcome(part.name, rows, 1.0, limit_seconds, None)


@pytest.mark.slow  # its parts are tested in this folder and in tests/numerics
def test_every_part_has_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_a_gpu, "run_part", run_in_this_process)
    status = on_a_gpu.main(["--output", str(tmp_path), "--device", "cpu", "--minutes", "4.5"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert report["command"] == f"{COMMAND} --output {tmp_path} --device cpu --minutes 4.5"
    names = [part["name"] for part in report["parts"]]
    assert names == [part.name for part in PARTS["cpu"]]
    rows = {part["name"]: {row["label"]: row["figures"] for row in part["rows"]} for part in report["parts"]}
    figures = [figure for part in rows.values() for row in part.values() for figure in row.values()]
    assert all(math.isfinite(figure) for figure in figures if isinstance(figure, float))
    assert rows["machine"]["machine"]["torch"]
    assert {row["same_tokens"] for row in rows["texts in float32"].values()} == {"12 of 12"}
    for part in ("decoding shipped", "decoding small"):
        timed = {label: row for label, row in rows[part].items() if "tokens_per_s" in row}
        assert all(row["tokens_per_s"] > 0 and row["same_tokens"] == "12 of 12" for row in timed.values())
        assert timed["partial quadratic, graphs" if part == "decoding small" else "speculative"]["tokens_per_call"] > 1
        assert timed["transformers.generate"]["x_transformers"] == 1
        assert rows[part]["square GEMM"]["tflops"] > 0
    assert rows["decoding small"]["call of 3 tokens and 4 slots, graphs"]["steps"] > 1
    assert rows["training small"]["blocks = dense"]["difference_gradients"] > 0
    variants = ("blocks", "dense", "dense / blocks")
    blocks, dense, ratio = (rows["training small"][f"1 x 32 tokens, N 2: {variant}"] for variant in variants)
    assert ratio["times_seconds"] == dense["seconds"] / blocks["seconds"]
    assert {row["outcome"] for row in rows["tests"].values()} == {"passed"}
    text = (tmp_path / "report.md").read_text()
    assert all(f"### {name}\n" in text and f"== {name}:" in printed for name in names)


def test_parts_of_both_devices_are_the_same() -> None:
    wanted = {part.function: part.arguments.keys() for part in PARTS["cpu"]}
    assert [one.function for one in PARTS["cpu"]] == list(dict.fromkeys(one.function for one in PARTS["cuda"]))
    for one in PARTS["cuda"]:
        assert one.arguments.keys() == wanted[one.function]


def test_layers_are_compiled_once_and_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """One module is used for all variants and batches, and compilation cannot be undone."""
    from benchmarks import training_step
    from benchmarks.on_a_gpu import training  # imported here, because the processes of parts import this file

    compiled: list[bool] = []
    measured: list[tuple[str, bool]] = []
    monkeypatch.setattr(training, "compile_layers", lambda _: compiled.append(True))
    monkeypatch.setattr(training_step, "gemm_rate", lambda device, dtype: 1.0)  # seconds of large matrix products
    sizes = [{"rows": 1, "row_length": 12, "windows": windows} for windows in (1, 2)]
    options = {"dtype": "float32", "vocab": 40, "window_length": 3, "rank": 1, "steps": 1}
    training.rows(
        lambda row: measured.append((row.label, bool(compiled))),
        device="cpu",
        options=options,
        sizes=sizes,
        compiled=True,
    )
    names = [f"1 x 12 tokens, N {windows}" for windows in (1, 2)]
    assert compiled == [True]
    assert measured == [
        ("blocks = dense", False),
        *((f"{name}: {variant}", False) for variant in ("blocks", "dense") for name in names),
        *((f"{name}: compiled blocks", True) for name in names),
        *((f"{name}: dense / {variant}", True) for name in names for variant in ("blocks", "compiled blocks")),
    ]


@pytest.mark.parametrize(
    ("function", "reason", "labels"),
    [
        (failing, "exit status 1: RuntimeError: CUDA error: no kernel image", ["before"]),
        (crashing, "ended by SIGSEGV", []),
        (silent, None, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failed_part_is_reported_and_the_next_one_runs(
    function: Any, reason: str | None, labels: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run(tmp_path, part(function), part(passing))
    assert status == 1
    assert not report["passed"]
    outcome = report["parts"][function.__name__]
    assert outcome["reason"] == reason
    assert [row["label"] for row in outcome["rows"]] == labels
    assert report["parts"]["passing"]["rows"] == [{"label": "first", "figures": {"seconds": 2.5}, "reason": None}]
    message = f"failed: {function.__name__}: {reason or 'nothing was recorded'}"
    assert message in capsys.readouterr().out
    assert f"* **{message}**" in (tmp_path / "report.md").read_text()


def test_no_part_runs_without_a_device(tmp_path: Path) -> None:
    machine = Part("machine", "benchmarks.on_a_gpu.machine:rows", {"device": "cuda"}, 1.0, is_required=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        status, report = run(tmp_path, machine, part(passing))
    assert status == 1
    assert list(report["parts"]) == ["machine"]
    assert "expected a CUDA device for --device cuda, found none" in report["parts"]["machine"]["reason"]


def test_a_hanging_part_is_stopped_and_its_rows_are_kept(tmp_path: Path) -> None:
    begin = time.monotonic()
    status, report = run(tmp_path, part(hanging, weight=1.0), part(passing, weight=4.0), minutes=0.25)
    assert time.monotonic() - begin < 15
    assert status == 1
    assert report["parts"]["hanging"]["reason"] == "stopped after its 3 s"
    assert report["parts"]["hanging"]["rows"][0]["label"] == "before"
    assert report["parts"]["passing"]["reason"] is None


def test_a_part_continues_after_a_failed_row(tmp_path: Path) -> None:
    status, report = run(tmp_path, part(with_a_failing_row))
    assert status == 1
    failed, after = report["parts"]["with_a_failing_row"]["rows"]
    assert failed == {"label": "too large", "figures": {}, "reason": "ZeroDivisionError: division by zero"}
    assert after["figures"] == {"seconds": 3}


def test_finished_parts_are_written_before_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(part: Part, limit_seconds: float, folder: Path) -> Outcome:
        if part.name == "second":
            raise KeyboardInterrupt
        return Outcome(part.name, [Row("row", {"seconds": 1.5})], 1.0, limit_seconds, None)

    monkeypatch.setattr(on_a_gpu, "run_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        on_a_gpu.run([Part("first", "", {}, 1.0), Part("second", "", {}, 1.0)], tmp_path, 1.0, COMMAND)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [part["name"] for part in report["parts"]] == ["first"]


def test_failing_tests_are_rows(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_correct():\n    print('none of 5 texts deviates')\n    assert 1 + 1 == 2\n"
        "def test_wrong():\n    assert 1 + 1 == 3\n"
        "@pytest.fixture\ndef missing():\n    pytest.skip('no device')\n"
        "def test_skipped(missing):\n    pass\n"
    )
    options = {"options": [str(tmp_path / "test_three.py"), "-m", "not gpu"]}
    status, report = run(tmp_path, Part("tests", "benchmarks.on_a_gpu.marked_tests:rows", options, 1.0))
    assert status == 1
    outcome = report["parts"]["tests"]
    assert outcome["reason"] is None
    assert outcome["rows"][0]["figures"]["printed"] == "none of 5 texts deviates"
    found = {row["label"].partition("::")[2]: (row["figures"]["outcome"], row["reason"]) for row in outcome["rows"]}
    assert found == {
        "test_correct": ("passed", None),
        "test_wrong": ("failed", "assert (1 + 1) == 3"),
        "test_skipped": ("skipped", None),
    }
