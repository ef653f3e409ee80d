"""`python -m ptp_lightning evaluate`: exact counts, a report, and continuation after a kill."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from ptp_lightning import cli
from ptp_lightning.decoding import Decoded, decode_speculatively
from ptp_lightning.evaluation import command, decoders, runner
from ptp_lightning.sampling import SamplingConfig
from ptp_lightning.utils.user_errors import INTERRUPTED
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.command_output import CONTROL_CHARACTERS
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_predictors import CORRECTIONS, sharpen, tiny_predictor

VOCABULARY = 257
PREDICTOR = tiny_predictor(
    vocab_size=VOCABULARY,
    sampling=SamplingConfig(temperature=0.7, top_k=50),
    window_length=4,
    correction=CORRECTIONS["token_conditioned"],  # drafts trees of tokens
)
TOKENIZER = byte_tokenizer()
QUESTIONS = [
    {"question_id": 1, "category": "code", "turns": ["def f", "shorter"]},
    {"question_id": 2, "category": "math", "turns": ["1 + 1"]},
]
EXACT = ("autoregressive", "lookup", "speculative", "speculative_lookup", "partial_quadratic_5")


def plain_model(_: object) -> PreTrainedModel:
    """The base model of `PREDICTOR`, without an adapter."""
    model = tiny_llama(vocab_size=VOCABULARY)
    sharpen(model, 2.0)
    return model


class Evaluation:
    """Runs the command in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.output = folder / "report"
        self.questions = folder / "questions.jsonl"
        self.questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def __call__(self, *args: str) -> tuple[int, str, str]:
        given = ["--benchmark", "spec_bench", "--questions", str(self.questions), "--output", str(self.output)]
        defaults = ["--max_new_tokens", "9", "--slot_budget", "5"]
        self.monkeypatch.setattr(sys, "argv", ["ptp_lightning", "evaluate", *given, *defaults, *args])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = self.capsys.readouterr()
        return status, printed.out, printed.err

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "report.json").read_text())

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / "records.jsonl").read_text().splitlines()]


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Evaluation:
    monkeypatch.setattr(command, "build_network", lambda stored, **_: PREDICTOR)
    monkeypatch.setattr(command, "tokenizer_of", lambda predictor: TOKENIZER)
    monkeypatch.setattr(command, "load_backbone", plain_model)
    monkeypatch.delenv("PTP_TRACEBACK", raising=False)
    return Evaluation(monkeypatch, capsys, tmp_path)


def test_reports_every_decoder_and_exact_texts(evaluation: Evaluation) -> None:
    status, out, err = evaluation("--seeds", "2", "--temperatures", "0.7", "0")
    assert status == 0, err
    report = evaluation.report
    overall = {
        (score["temperature"], score["decoder"]): score for score in report["scores"] if score["category"] == "overall"
    }
    assert {name for _, name in overall} == {*EXACT, "transformers", "prompt_lookup"}
    for (_, name), score in overall.items():
        assert score["num_answers"] == 6  # three turns, two seeds
        assert score["num_identical"] == (6 if name in EXACT else None)
    assert report["deviations"] == []
    assert {score["category"] for score in report["scores"]} == {"overall", "code", "math"}
    assert [gap["temperature"] for gap in report["gaps"]] == [0.0, 0.7]
    assert {path.name for path in evaluation.output.iterdir()} == {
        *("records.jsonl", "run.json", "report.json", "report.md", "acceptance.png", "speed.png", "gap.png")
    }
    markdown = (evaluation.output / "report.md").read_text()
    assert "| speculative |" in markdown and "6 of 6" in markdown and "None: all answers" in markdown
    assert "T 0.7 speculative" in out and str(evaluation.output / "report.md") in out


def test_progress_without_a_terminal(evaluation: Evaluation) -> None:
    status, _, err = evaluation("--decoders", "speculative")
    assert status == 0, err
    assert not CONTROL_CHARACTERS & set(err)
    lines = [line for line in err.splitlines() if line.startswith("answers ") and line.endswith(" left")]
    assert len(lines) == 9  # three turns by three decoders, two of which are references
    assert re.fullmatch(r"answers 3/9 \(33%\), code 1: \w+, \d+ s left", lines[2])
    assert re.fullmatch(r"answers 9/9 \(100%\), math 2: \w+, 0 s left", lines[-1])


def test_another_base_model_is_another_evaluation(evaluation: Evaluation) -> None:
    assert evaluation("--decoders", "autoregressive")[0] == 0
    assert json.loads((evaluation.output / "run.json").read_text())["base"] is None
    status, _, err = evaluation("--decoders", "autoregressive", "--base", "fine_tune")
    assert status == 2 and "base None, found 'fine_tune': choose another --output" in err


def test_greedy_texts_of_transformers_are_identical(evaluation: Evaluation) -> None:
    """The baselines run the same model with the same settings."""
    assert evaluation("--temperatures", "0")[0] == 0
    texts: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for record in evaluation.records:
        if record["decoder"] != runner.ALL_POSITIONS:
            texts.setdefault((record["question_id"], record["turn"]), set()).add(tuple(record["token_ids"]))
    assert [len(found) for found in texts.values()] == [1, 1, 1]


def test_a_later_turn_follows_the_base_models_answer(evaluation: Evaluation) -> None:
    assert evaluation()[0] == 0
    by_key = {(record["question_id"], record["turn"], record["decoder"]): record for record in evaluation.records}
    answer = TOKENIZER.decode(by_key["1", 0, "autoregressive"]["token_ids"], skip_special_tokens=True)
    expected = len(TOKENIZER.encode(f"def f\n\n{answer}\n\nshorter"))
    assert {by_key["1", 1, name]["num_prompt_tokens"] for name in (*EXACT, "transformers")} == {expected}


@pytest.mark.parametrize("finished", [4, *(pytest.param(count, marks=pytest.mark.slow) for count in (0, 11))])
def test_continues_after_a_kill(finished: int, evaluation: Evaluation) -> None:
    append, answered = runner.RecordFile.append, []

    def killed(file: runner.RecordFile, record: runner.Record) -> None:
        if len(file.records) == finished:
            raise KeyboardInterrupt
        append(file, record)

    with evaluation.monkeypatch.context() as patch:
        patch.setattr(runner.RecordFile, "append", killed)
        assert evaluation()[0] == INTERRUPTED
    before = evaluation.records if finished else []
    assert len(before) == finished
    assert not (evaluation.output / "report.md").exists()

    def counted(file: runner.RecordFile, record: runner.Record) -> None:
        answered.append(record.key)
        append(file, record)

    evaluation.monkeypatch.setattr(runner.RecordFile, "append", counted)
    assert evaluation()[0] == 0
    assert evaluation.records[:finished] == before
    assert len(answered) == 3 * 8 - finished  # seven decoders and all positions, three turns
    keys = [tuple(record[name] for name in ("question_id", "turn", "decoder")) for record in evaluation.records]
    assert len(set(keys)) == len(keys) == 24
    answered.clear()
    assert evaluation()[0] == 0
    assert answered == []


def test_a_wrong_text_is_listed_as_not_explained(evaluation: Evaluation) -> None:
    def off_by_one(*args: Any, **options: Any) -> list[Decoded]:
        (decoded,) = decode_speculatively(*args, **options)
        decoded.token_ids[0] = (decoded.token_ids[0] + 100) % VOCABULARY
        return [decoded]

    evaluation.monkeypatch.setitem(decoders.DECODERS, "speculative", off_by_one)
    assert evaluation("--decoders", "speculative")[0] == 0
    report = evaluation.report
    assert len(report["deviations"]) == 3
    for deviation in report["deviations"]:
        assert (deviation["decoder"], deviation["position"], deviation["near_tie"]) == ("speculative", 0, False)
    assert "**not explained**" in (evaluation.output / "report.md").read_text()
    identical = {score["num_identical"] for score in report["scores"] if score["decoder"] == "speculative"}
    assert identical == {0}


def test_long_prompts_are_truncated(evaluation: Evaluation) -> None:
    limit = PREDICTOR.max_positions
    assert limit is not None
    row = {"question_id": 1, "category": "code", "turns": ["x" * limit]}
    evaluation.questions.write_text(json.dumps(row) + "\n")
    assert evaluation("--decoders", "autoregressive")[0] == 0
    assert {record["num_prompt_tokens"] for record in evaluation.records} == {limit - 9}
    assert {record["num_truncated"] for record in evaluation.records} == {9}
    assert "1 prompts were too long" in (evaluation.output / "report.md").read_text()


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--limit", "0"], "expected --limit >= 1, found 0"),
        (["--seeds", "0"], "expected --seeds >= 1, found 0"),
        (["--max_new_tokens", "0"], "expected max_new_tokens >= 1, found 0"),
        (
            ["--max_new_tokens", "256"],
            "expected max_new_tokens < 256, found 256: set max_new_tokens",
        ),
        (["--decoders", "fast"], "--decoders"),
        (["--temperatures", "-1"], "temperature"),
        (["--slot_budget", "0"], "expected slot_budget >= 1, found 0"),
        (["--questions", "none.jsonl"], "set --questions"),
        (["--benchmark", "mmlu"], "--benchmark"),
        (["--dtype", "half"], "'bfloat16'"),
        (["--model", "llama"], "'smollm2'"),
        (["--model", "code", "--ckpt_path", "x"], "expected one of --model and --ckpt_path, found both (code, x)"),
    ],
)
def test_errors_are_raised_before_the_first_answer(args: list[str], reason: str, evaluation: Evaluation) -> None:
    status, _, err = evaluation(*args)
    assert status == 2
    assert reason in err
    assert not evaluation.output.exists()


def test_answers_without_room_are_refused_before_the_model_is_loaded(evaluation: Evaluation) -> None:
    evaluation.monkeypatch.setattr(command, "build_network", lambda *_, **__: pytest.fail("loaded"))
    status, _, err = evaluation("--model", "code", "--max_new_tokens", "2000")
    assert status == 2 and not evaluation.output.exists()
    assert (
        err.startswith("error: expected max_new_tokens < 1024, found 2000: set max_new_tokens ")
        and err.count("\n") == 1
    )


@pytest.mark.parametrize("inside", ["", "/report"])
def test_a_file_in_place_of_the_folder_is_refused_before_the_model_is_loaded(
    inside: str, evaluation: Evaluation
) -> None:
    evaluation.monkeypatch.setattr(command, "build_network", lambda *_, **__: pytest.fail("loaded"))
    evaluation.output.write_text("")
    status, _, err = evaluation("--output", f"{evaluation.output}{inside}")
    assert status == 2
    assert err == f"error: expected a folder, found the file {evaluation.output}: set --output\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "expected a JSON object, found list: remove the file, or choose another --output"),
        *(
            (content, "slot_budgets .*, found \\['auto'\\]: choose another --output")
            for content in ("{}", '{"slot_budgets": 5}', '{"slot_budgets": ["5"]}')
        ),
    ],
)
def test_a_damaged_description_is_refused(content: str, reason: str, evaluation: Evaluation) -> None:
    evaluation.output.mkdir()
    (evaluation.output / "run.json").write_text(content)
    status, _, err = evaluation("--slot_budget", "auto")
    assert status == 2
    assert re.fullmatch(f"error: [^\n]*{reason}\n", err), err


def test_a_folder_of_another_evaluation_is_rejected(evaluation: Evaluation) -> None:
    assert evaluation("--decoders", "autoregressive")[0] == 0
    before = evaluation.records
    status, _, err = evaluation("--decoders", "autoregressive", "--max_new_tokens", "8")
    assert status == 2 and "max_new_tokens 9, found 8: choose another --output" in err
    status, _, err = evaluation("--decoders", "autoregressive", "--num_draft_tokens", "3")
    assert status == 2 and "num_draft_tokens 8, found 3: choose another --output" in err
    evaluation.questions.write_text(json.dumps(QUESTIONS[1]) + "\n")
    status, _, err = evaluation("--decoders", "autoregressive")
    assert status == 2 and "num_questions 2, found 1" in err
    assert evaluation.records == before
