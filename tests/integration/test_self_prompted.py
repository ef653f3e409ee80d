"""`pregenerate` of a chat model's own user turns and of prompts in files: the same files after any kill."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from ptp_lightning.data import CompletionsDataModule
from ptp_lightning.data.completions.completions import CompletionFolder, CompletionTable
from ptp_lightning.decoding import generate
from ptp_lightning.export.checkpoint import BackboneSettings
from ptp_lightning.models import PredictorConfig, PredictorNetwork
from ptp_lightning.pregeneration import user_turns
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.chat_tokenizer import chat, letter_chat_tokenizer
from tests.helpers.command_output import Run, run_in_process
from tests.helpers.forked_process import ForkedProcess, run_command
from tests.helpers.tiny_models import tiny_llama

TOKENIZER = letter_chat_tokenizer()
SYSTEM = "count"
TOPICS: list[dict[str, Any]] = [
    {"system": SYSTEM, "weight": 3, "openings": ["how many ", "what is"]},
    {"weight": 1},
]
SAMPLING = {"temperature": 0.7, "top_k": 20}
OPTIONS = {
    "num_prompts": 10,
    "prompt_tokens": 40,
    "max_new_tokens": 24,
    "shard_prompts": 4,
    "batch_size": 3,
    "greedy_fraction": 0.4,
    "seed": 1,
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(vocab_size=len(TOKENIZER), max_position_embeddings=1024).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def config(teacher: Path, tmp_path: Path) -> Path:
    """Its data do not exist yet: they are what the command writes."""
    predictor = {"backbone": {"path": str(teacher)}, "sampling": SAMPLING, "lora": {"rank": 2}, "window_length": 4}
    plain = {
        "data": {"class_path": "ptp_lightning.data.CompletionsDataModule", "init_args": {"folder": "not/yet"}},
        "model": {"class_path": "ptp_lightning.training.DistillationModule", "init_args": {"predictor": predictor}},
        "trainer": {"accelerator": "cpu", "fast_dev_run": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    (tmp_path / "topics.yaml").write_text(yaml.safe_dump(TOPICS))
    return tmp_path / "config.yaml"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    return partial(run_in_process, monkeypatch, capsys)


def arguments(config: Path, output: Path, *more: str, **changes: Any) -> list[str]:
    options = [f"--{name}={value}" for name, value in (OPTIONS | changes).items()]
    topics = [] if "--prompts" in more and "--self_prompted" not in more else ["--topics", "topics.yaml"]
    flags = ["--self_prompted"] if topics and "--self_prompted" not in more else []
    return ["--config", str(config), "--output", str(output), *options, *topics, *flags, *more]


def killed_at_shard(number: int, *arguments: str) -> None:
    """The program of a process that is killed when it writes this shard, counted from 1."""
    write, left = CompletionFolder.write_shard, number

    def write_or_die(*shard: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*shard)

    CompletionFolder.write_shard = write_or_die  # of this process alone
    run_command("pregenerate", *arguments)


def read(folder: Path) -> CompletionTable:
    return CompletionFolder.open(folder).read()


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_user_turns_and_answers(config: Path, teacher: Path, tmp_path: Path, run: Run) -> None:
    printed = run("pregenerate", *arguments(config, tmp_path / "out"))
    assert printed.status == 0, printed.err
    settings, table = CompletionFolder.open(tmp_path / "out").settings, read(tmp_path / "out")
    prompts = texts_of_prompts(tmp_path / "out")
    assert len(set(prompts)) == 10
    before, after = chat("@").split("@")
    before = before.replace("B", "?").replace(".", "?")  # which have no token
    turns = [prompt.removeprefix(before).removesuffix(after) for prompt in prompts]
    for prompt, turn in zip(prompts, turns, strict=True):
        assert prompt == before + turn + after  # whose system prompt is that of the template
        assert len(turn) >= user_turns.MIN_CHARACTERS and "<|" not in turn and turn == turn.strip()
    steered = [turn for turn in turns if turn.startswith(("how many", "what is"))]
    assert 4 <= len(steered) < 10
    rounds = sorted((tmp_path / "out" / user_turns.FOLDER).iterdir())
    openings = [TOKENIZER.decode(read(path).prompt_ids.of(0)) for path in rounds]
    assert any(SYSTEM in opening for path in rounds for opening in texts_of_prompts(path)), openings

    predictor = PredictorNetwork(
        PredictorConfig(BackboneSettings(path=str(teacher)), sampling=SamplingConfig(**SAMPLING), window_length=4)
    ).eval()
    greedy = [settings.is_greedy(row, 0) for row in range(10)]
    assert 1 <= sum(greedy) < 10
    for row in range(10):
        expected = generate(
            predictor,
            table.prompt_ids.of(row),
            max_new_tokens=24,
            sampling=SamplingConfig(temperature=0.0) if greedy[row] else None,
            seed=settings.seed_of(row, 0),
            decoder="autoregressive",
            end_of_text=settings.ending_ids,
            tokenizer=TOKENIZER,
        )
        assert table.completion_ids.of(row) == expected.token_ids
    assert settings.ending_ids == (0, 1, 2)  # of the tokenizer, the model, and a turn

    again = run("pregenerate", *arguments(config, tmp_path / "out"))
    assert again.status == 0 and "This process 0 tokens" in again.out
    (tmp_path / "train.yaml").write_text(printed.out.partition("second --config\n")[2])
    small = ["--data.init_args.eval_rows=1", "--data.init_args.num_windows=2", "--data.init_args.batch_size=1"]
    trained = run("fit", "--config", str(config), "--config", "train.yaml", *small, "--trainer.limit_val_batches=0")
    assert trained.status == 0, trained.err


def texts_of_prompts(path: Path) -> list[str]:
    table = read(path)
    return [str(TOKENIZER.decode(table.prompt_ids.of(row))) for row in range(len(table.prompts))]


def test_killed_at_any_point_the_result_is_the_same(config: Path, tmp_path: Path, run: Run) -> None:
    assert run("pregenerate", *arguments(config, tmp_path / "uninterrupted")).status == 0
    expected = files(tmp_path / "uninterrupted")
    num_turn_shards = sum(name.startswith(user_turns.FOLDER) and name.endswith(".parquet") for name in expected)
    assert num_turn_shards >= 3
    output = tmp_path / "killed"
    for left in (2, num_turn_shards + 1):  # the second shard of user turns; the second of answers
        process = ForkedProcess(killed_at_shard, left, *arguments(config, output), folder=config.parent)
        printed = process.communicate()
        assert process.returncode == -9, printed
        written = {name for name in files(output) if name.endswith(".parquet")}
        assert written < expected.keys()
    assert any(not name.startswith(user_turns.FOLDER) for name in written)
    assert run("pregenerate", *arguments(config, output)).status == 0
    assert files(output) == expected


def test_a_file_holds_a_batch_and_a_continued_run_keeps_the_size(config: Path, tmp_path: Path, run: Run) -> None:
    output = tmp_path / "out"
    printed = run("pregenerate", *arguments(config, output, shard_prompts="null"))
    assert printed.status == 0, printed.err
    assert CompletionFolder.open(output).settings.shard_prompts == 3
    before = files(output)
    (output / "shard-00002.parquet").unlink()
    again = run("pregenerate", *arguments(config, output, shard_prompts="null", batch_size=7))
    assert again.status == 0, again.err
    assert files(output) == before
    for name in list(before):
        if not name.startswith(user_turns.FOLDER):
            (output / name).unlink()
    again = run("pregenerate", *arguments(config, output, shard_prompts="null", batch_size=7))
    assert again.status == 0, again.err
    assert files(output) == before


def test_the_batch_size_has_no_effect(config: Path, tmp_path: Path, run: Run) -> None:
    for batch_size in (1, 64):
        assert run("pregenerate", *arguments(config, tmp_path / str(batch_size), batch_size=batch_size)).status == 0
    assert files(tmp_path / "1") == files(tmp_path / "64")


def test_prompts_of_files_come_first(config: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"is {word} odd"}) + "\n" for word in "abcab"))
    alone = ["--prompts", "rows.jsonl:q"]
    printed = run("pregenerate", *arguments(config, tmp_path / "alone", *alone, num_prompts="null"))
    assert printed.status == 0, printed.err
    both = run("pregenerate", *arguments(config, tmp_path / "both", *alone, "--self_prompted", num_prompts=5))
    assert both.status == 0, both.err
    tables = [read(tmp_path / name) for name in ("alone", "both")]
    turns = [[TOKENIZER.decode(table.prompt_ids.of(row)) for row in range(len(table.prompts))] for table in tables]
    assert [len(found) for found in turns] == [3, 5]
    assert turns[0] == turns[1][:3]
    for word, turn in zip("abc", turns[0], strict=True):
        assert f"\nis {word} odd<|im_end|>" in turn


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_prompts=null"], "expected --num_prompts with --self_prompted, found none"),
        (["--topics=nowhere.yaml"], "expected a YAML file of topics at nowhere.yaml, found none"),
        (
            ["--prompts", "rows.jsonl:q", "--num_prompts=2"],
            "above the 3 prompts of --prompts with --self_prompted, found 2",
        ),
        (["--prompts", "rows.jsonl:p"], "rows.jsonl, line 1: expected a column 'p'"),
        (["--greedy_fraction=1.5"], "expected --greedy_fraction between 0 and 1, found 1.5"),
        (["--prompt_tokens=2000"], "lower max_new_tokens or shorten the prompt"),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else None,
)
def test_errors_are_raised_before_anything_is_written(
    more: list[str], message: str, config: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"is {word} odd"}) + "\n" for word in "abc"))
    printed = run("pregenerate", *arguments(config, tmp_path / "out", "--self_prompted", *more))
    assert printed.status == 2 and message in printed.err, printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_without_a_chat_template(config: Path, teacher: Path, tmp_path: Path, run: Run) -> None:
    plain = letter_chat_tokenizer()
    plain.chat_template = None
    tiny_llama(vocab_size=len(plain)).save_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "plain")
    path = f"--model.init_args.predictor.backbone.path={tmp_path / 'plain'}"
    printed = run("pregenerate", *arguments(config, tmp_path / "out"), path)
    assert printed.status == 2 and "a tokenizer with a chat template for --self_prompted" in printed.err


def test_a_model_whose_turns_do_not_end(config: Path, tmp_path: Path, run: Run) -> None:
    printed = run("pregenerate", *arguments(config, tmp_path / "out", prompt_tokens=2, num_prompts=60))
    assert printed.status == 2
    assert "expected user turns of 12 characters to 2 tokens that end, found" in printed.err
    assert "raise --prompt_tokens" in printed.err


def test_other_topics_need_another_folder(config: Path, tmp_path: Path, run: Run) -> None:
    assert run("pregenerate", *arguments(config, tmp_path / "out")).status == 0
    before = files(tmp_path / "out")
    (tmp_path / "topics.yaml").write_text("- {openings: [why]}")
    printed = run("pregenerate", *arguments(config, tmp_path / "out"))
    assert printed.status == 2 and "choose another --output" in printed.err
    assert files(tmp_path / "out") == before


def test_rows_of_512_tokens_and_more_serve_training(config: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"is {number * 'a'} odd " * 3}) + "\n" for number in range(40, 100))
    )
    changes: dict[str, Any] = {"num_prompts": "null", "max_new_tokens": 200, "batch_size": 60, "shard_prompts": 60}
    printed = run("pregenerate", *arguments(config, tmp_path / "out", "--prompts", "rows.jsonl:q", **changes))
    assert printed.status == 0, printed.err
    data = CompletionsDataModule(str(tmp_path / "out"), row_length=640, batch_size=2, num_windows=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.input_ids.shape == (2, 640)
    assert (batch.document_ids >= 0).sum(dim=1).min() > 256
