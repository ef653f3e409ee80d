"""`python -m ptp_lightning pregenerate`: the same files for any number of processes, and training from them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from ptp_lightning.pregeneration import command as pregenerate
from ptp_lightning.utils.atomic_files import temporary_path
from ptp_lightning.utils.pretrained import load_tokenizer
from tests.helpers.command_output import CONTROL_CHARACTERS, Run, run_in_process
from tests.helpers.forked_process import ForkedProcess, run_command
from tests.helpers.tiny_configs import CORPUS_LINE, shrink

CONFIG = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"
TIMEOUT_SECONDS = 120.0
NUM_PROMPTS, SHARD_PROMPTS, NUM_SHARDS = 20, 3, 7
TASKS = {"prompt": "# A sum\n", "completion": "{text}"}
OPTIONS = {
    "num_prompts": NUM_PROMPTS,
    "num_completions": 2,
    "max_new_tokens": 24,
    "prompt_tokens": 6,
    "shard_prompts": SHARD_PROMPTS,
    "batch_size": 4,
    "seed": 7,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process and in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return partial(run_in_process, monkeypatch, capsys)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """configs/gated_lora.yaml with a tiny network and a corpus of several files."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(NUM_PROMPTS + 5):
        (corpus / f"{number:02d}.txt").write_text(f"number_{number} = {number}\n" + CORPUS_LINE * 20)
    return shrink(CONFIG, corpus, tmp_path)


@pytest.fixture
def streamed(config: Path) -> Path:
    """The same with a stream of tasks with prompts and of texts without."""
    parts: list[dict[str, Any]] = [
        {"rendering": {"class_path": "ptp_lightning.data.PromptAndCompletion", "init_args": TASKS}, "weight": 2.0},
        {"rendering": {"class_path": "ptp_lightning.data.PlainText"}},
    ]
    for number, part in enumerate(parts):
        rows = config.parent / f"rows{number}.jsonl"
        texts = ({"text": f"number_{k} = {k}\n" + CORPUS_LINE} for k in range(15))
        rows.write_text("".join(json.dumps(text) + "\n" for text in texts))
        part["source"] = {"class_path": "ptp_lightning.data.JsonLines", "init_args": {"paths": [str(rows)]}}
    plain = yaml.safe_load(config.read_text())
    arguments = {"tokenizer": "embedded", "row_length": 64, "parts": parts, "eval_parts": parts}
    plain["data"] = {"class_path": "ptp_lightning.data.StreamingCorpus", "init_args": arguments}
    path = config.with_name("streamed.yaml")
    path.write_text(yaml.safe_dump(plain))
    return path


def arguments(config: Path, output: Path, **changes: Any) -> list[str]:
    options = [f"--{name}={value}" for name, value in (OPTIONS | changes).items()]
    return ["pregenerate", "--config", str(config), "--output", str(output), *options]


def start(config: Path, output: Path, **changes: Any) -> ForkedProcess:
    return ForkedProcess(run_command, *arguments(config, output, **changes), folder=config.parent)


def suspend_with_lock(process: ForkedProcess, output: Path, finished: int) -> Path:
    """Wait for finished shards, suspend the process while it holds a lock, and return the lock file."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"fewer than {finished} shards in {TIMEOUT_SECONDS} s"
        if len(list(output.glob("*.parquet"))) >= finished and list(output.glob("*.lock")):
            process.send_signal(signal.SIGSTOP)
            locks = [path for path in output.glob("*.lock") if not path.with_suffix(".parquet").exists()]
            if locks and locks[0].stat().st_size:
                assert len(list(output.glob("*.parquet"))) < NUM_SHARDS, "the process has finished too early"
                return locks[0]
            process.send_signal(signal.SIGCONT)
        time.sleep(0.002)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_and_output(config: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "completions"
    printed = run(*arguments(config, output))
    assert printed.status == 0, printed.err
    assert sorted(contents(output)) == [
        "completions.json",
        *(f"shard-{shard:05d}.parquet" for shard in range(NUM_SHARDS)),
    ]
    stated = json.loads((output / "completions.json").read_text())
    assert stated["sampling"] == {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "order": "vocabulary"}
    assert (stated["teacher_path"], stated["vocab_size"], stated["tokenizer"]) == ("embedded", 2048, "embedded")
    rows = [row for path in sorted(output.glob("*.parquet")) for row in pq.ParquetFile(path).read().to_pylist()]
    assert [(row["prompt"], row["completion"]) for row in rows] == [(p, c) for p in range(NUM_PROMPTS) for c in (0, 1)]
    num_tokens = sum(len(row["completion_ids"]) for row in rows)
    num_bytes = sum(path.stat().st_size for path in output.glob("*.parquet"))
    assert f"{num_tokens:,} tokens" in printed.out and "tokens per second" in printed.out
    assert f"{num_bytes:,} bytes, {num_bytes / num_tokens * 1e6:,.0f} per million tokens" in printed.out
    assert f"{NUM_SHARDS}/{NUM_SHARDS}" in printed.err and "tokens/s" in printed.err
    assert not CONTROL_CHARACTERS & set(printed.err)
    lines = [line for line in printed.err.splitlines() if line.endswith(" s left")]
    assert len(lines) > 1
    assert re.fullmatch(rf"[\w ]+ {NUM_SHARDS}\.0/{NUM_SHARDS} \(100%\), [\d,]+ tokens/s, 0 s left", lines[-1])
    assert not (tmp_path / "runs").exists()  # nothing was trained

    again = run(*arguments(config, output))
    assert again.status == 0 and "This process 0 tokens" in again.out


def test_training_with_the_printed_configuration(config: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "completions"
    plain = yaml.safe_load(config.read_text())
    plain["data"]["init_args"]["row_length"] = 20  # shorter than a completion with its prompt
    config.write_text(yaml.safe_dump(plain))
    lines = run(*arguments(config, output)).out.partition("second --config\n")[2]
    assert yaml.safe_load(lines)["data"]["init_args"] == {"folder": str(output), "row_length": 30}
    (tmp_path / "train.yaml").write_text(lines)
    for command in ("fit", "validate"):
        printed = run(command, "--config", str(config), "--config", "train.yaml")
        assert printed.status == 0, printed.err
    refused = run(
        *("fit", "--config", str(config), "--config", "train.yaml"),
        *("--model.init_args.predictor.sampling.temperature", "0.8"),
    )
    assert refused.status == 2
    assert "temperature=0.8" in refused.err and "temperature=0.7" in refused.err and "data.folder" in refused.err


def test_every_document_of_a_stream_is_completed_once(streamed: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "completions"
    printed = run(*arguments(streamed, output, num_prompts="null", num_completions=1))
    assert printed.status == 0, printed.err
    prompts = [
        row["prompt_ids"] for path in output.glob("*.parquet") for row in pq.ParquetFile(path).read().to_pylist()
    ]
    tokenizer = load_tokenizer("embedded")
    texts = [tokenizer.encode(f"number_{k} = {k}\n{CORPUS_LINE}") for k in range(15)]
    assert sorted(prompts) == sorted([tokenizer.encode("# A sum\n")] * 15 + [text[:6] for text in texts])
    (tmp_path / "train.yaml").write_text(printed.out.partition("second --config\n")[2])
    printed = run("fit", "--config", str(streamed), "--config", "train.yaml")
    assert printed.status == 0, printed.err


@pytest.mark.parametrize("kind", [pytest.param("config", marks=pytest.mark.slow), "streamed"])  # the same code writes
def test_a_killed_and_repeated_run_leaves_the_same_files(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, run: Run
) -> None:
    config: Path = request.getfixturevalue(kind)
    assert run(*arguments(config, tmp_path / "uninterrupted")).status == 0
    output = tmp_path / "killed"
    process = start(config, output)
    try:
        lock = suspend_with_lock(process, output, finished=2)
    finally:
        process.kill()
    process.communicate()
    owner = json.loads(lock.read_text())
    unfinished = temporary_path(lock.with_suffix(".parquet"), owner["host"], owner["pid"])
    unfinished.write_bytes(b"as if killed while writing")
    finished = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    assert 2 <= len(finished) < NUM_SHARDS

    printed = run(*arguments(config, output))
    assert printed.status == 0, printed.err
    assert contents(output) == contents(tmp_path / "uninterrupted")
    assert finished == {path: path.stat().st_mtime_ns for path in finished}  # no shard was written twice


def test_two_processes_divide_the_work(streamed: Path, tmp_path: Path, run: Run) -> None:
    config = streamed
    assert run(*arguments(config, tmp_path / "alone")).status == 0
    output = tmp_path / "shared"
    first, second = start(config, output), None
    try:
        lock = suspend_with_lock(first, output, finished=1)
        second = start(config, output, batch_size=5)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(list(output.glob("*.parquet"))) < NUM_SHARDS - 1:
            assert second.poll() is None, second.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lock.with_suffix(".parquet").exists() and second.poll() is None  # it waits for the first
        first.send_signal(signal.SIGCONT)
        printed = [process.communicate(timeout=TIMEOUT_SECONDS) for process in (first, second)]
    finally:
        for process in filter(None, (first, second)):
            process.kill()
    assert (first.returncode, second.returncode) == (0, 0), printed
    assert contents(output) == contents(tmp_path / "alone")
    counts = [int(re.findall(r"This process ([\d,]+) tokens", out)[0].replace(",", "")) for out, _ in printed]
    total = int(re.findall(r"prompts, ([\d,]+) tokens", printed[0][0])[0].replace(",", ""))
    assert min(counts) > 0 and sum(counts) == total


def test_ctrl_c(config: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, output = pregenerate.sample_shard, tmp_path / "completions"

    def interrupted(predictor: Any, settings: Any, prompts: Any, shard: int, *more: Any) -> Any:
        if shard == 2:
            raise KeyboardInterrupt
        return sample(predictor, settings, prompts, shard, *more)

    monkeypatch.setattr(pregenerate, "sample_shard", interrupted)
    printed = run(*arguments(config, output))
    assert printed.status == 130 and f"repeat the same command to continue in {output}" in printed.err
    assert sorted(contents(output)) == ["completions.json", "shard-00000.parquet", "shard-00001.parquet"]


def test_another_batch_size_gives_the_same_files(config: Path, tmp_path: Path, run: Run) -> None:
    for batch_size in (1, 100):
        assert run(*arguments(config, tmp_path / str(batch_size), batch_size=batch_size)).status == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "100")


def test_a_full_disk(config: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    max_bytes = NUM_PROMPTS * 2 * (6 + 24) * 4
    monkeypatch.setattr(pregenerate.shutil, "disk_usage", lambda _: usage._replace(free=max_bytes - 1))
    printed = run(*arguments(config, tmp_path / "full"))
    assert printed.status == 2 and f"at most {max_bytes:,} bytes, found {max_bytes - 1:,}" in printed.err
    assert "--output" in printed.err and sorted(contents(tmp_path / "full")) == ["completions.json"]
    monkeypatch.setattr(pregenerate.shutil, "disk_usage", lambda _: usage._replace(free=max_bytes))

    fsync, calls = os.fsync, []

    def full_after_three(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_three)
    printed = run(*arguments(config, tmp_path / "full"))
    assert printed.status == 2 and "Traceback" not in printed.err
    assert "No space left on device: free space and repeat the command" in printed.err
    names = sorted(contents(tmp_path / "full"))
    assert names == ["completions.json", *(f"shard-{shard:05d}.parquet" for shard in range(len(names) - 1))]
    assert 1 < len(names) < NUM_SHARDS
    monkeypatch.setattr(os, "fsync", fsync)
    assert run(*arguments(config, tmp_path / "full")).status == 0
    assert run(*arguments(config, tmp_path / "roomy")).status == 0
    assert contents(tmp_path / "full") == contents(tmp_path / "roomy")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--num_completions=0"], ["--num_completions >= 1", "0"]),
        (["--batch_size=-1"], ["--batch_size >= 1", "-1"]),
        (["--num_prompts=26"], ["26", "found 25", "--num_prompts"]),
        (["--max_new_tokens=2048"], ["2048", "lower max_new_tokens"]),
        (["--number=3"], ["number", "pregenerate --help"]),
        (["--data.init_args.corpus.init_args.paths=[nowhere]"], ["nowhere", "data.corpus"]),
        (["--model.init_args.predictor.backbone.from_config.vocab_size=999"], ["999", "2048", "data.tokenizer"]),
        (["--model.init_args.predictor.sampling_range={}"], ["predictor.sampling_range", "null"]),
        (
            [
                "--data=ptp_lightning.data.SeriesDataModule",
                "--data.init_args.series=ptp_lightning.data.MarkovSeries",
            ],
            ["CorpusDataModule", "SeriesDataModule", "set data"],
        ),
        (
            [
                "--model=ptp_lightning.training.AutoregressiveModule",
                "--model.init_args.backbone.path=embedded",
                "--data.init_args.tokenizer=embedded",
            ],
            ["frozen teacher", "AutoregressiveModule", "set model"],
        ),
        (
            [
                "--model=ptp_lightning.training.InverseAutoregressiveModule",
                "--model.init_args.predictor.student=ptp_lightning.models.SharedStudent",
                "--model.init_args.predictor.objective=ptp_lightning.models.CategoricalObjective",
                "--model.init_args.predictor.sampling.temperature=1.0",
                "--model.init_args.predictor.correction=null",
            ],
            ["frozen teacher", "InverseAutoregressiveModule", "set model"],
        ),
    ],
    ids=lambda value: value[0].split("=")[0].rpartition(".")[2] if value[0].startswith("--") else None,
)
def test_errors_are_raised_before_anything_is_written(
    more: list[str], expected: list[str], config: Path, tmp_path: Path, run: Run
) -> None:
    printed = run(*arguments(config, tmp_path / "completions"), *more)
    assert printed.status == 2, printed
    assert "Traceback" not in printed.err
    for part in expected:
        assert part in printed.err
    assert not (tmp_path / "completions").exists()


def test_other_settings_in_the_same_folder_are_rejected(config: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "completions"
    assert run(*arguments(config, output, num_prompts=3)).status == 0
    before = contents(output)
    for changes, expected in (
        ({"seed": 8}, "seed 7, found 8"),
        ({"max_new_tokens": 25}, "max_new_tokens 24, found 25"),
        ({"prompt_tokens": 5}, "prompts "),
        ({"model.init_args.predictor.sampling.top_k": 7}, "top_k=50"),
        ({"model.init_args.predictor.backbone.from_config.hidden_size": 16}, "teacher "),
    ):
        printed = run(*arguments(config, output, num_prompts=3, **changes))
        assert printed.status == 2 and expected in printed.err and "--output" in printed.err, printed
    assert contents(output) == before


def test_a_configuration_that_fit_has_saved(config: Path, tmp_path: Path, run: Run) -> None:
    plain = yaml.safe_load(config.read_text()) | {"ckpt_path": None, "weights_only": None}
    config.write_text(yaml.safe_dump(plain))
    printed = run(*arguments(config, tmp_path / "completions", num_prompts=2))
    assert printed.status == 0, printed.err
