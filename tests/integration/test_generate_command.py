"""`python -m ptp_lightning generate` as a user meets it: text, JSON, and one message for what can be mended."""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ptp_lightning import cli
from ptp_lightning.decoding import CorrectLengths, GenerationSettings, generate, slot_budget
from ptp_lightning.decoding.slot_budget import CallCosts
from ptp_lightning.export import packaged_adapters
from ptp_lightning.export.checkpoint import save_network
from ptp_lightning.generation import command
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.hub_stand_in import running_hub
from tests.helpers.stored_predictors import trained
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_predictors import sharpen, tiny_predictor

JSON_KEYS = ["prompt", "text", "token_ids", "num_calls", "num_tokens", "accepted_per_call", "seconds"]
PREDICTOR = tiny_predictor(vocab_size=257, sampling=SamplingConfig(temperature=0.7, top_k=50, top_p=0.9))
TOKENIZER = byte_tokenizer()


class Output(NamedTuple):
    status: int
    out: str
    err: str


class Shell:
    """Runs the command in this process with an in-memory predictor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.loaded: list[str | None] = []

    def __call__(self, *args: str) -> Output:
        self.monkeypatch.setattr(sys, "argv", ["ptp_lightning", "generate", *args])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = self.capsys.readouterr()
        return Output(status, printed.out, printed.err)

    def records(self, *args: str) -> list[dict[str, object]]:
        output = self(*args, "--json")
        assert output.status == 0, output.err
        return [json.loads(line) for line in output.out.splitlines()]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    shell = Shell(monkeypatch, capsys)

    def load_network(path: str | None, **_: object) -> object:
        shell.loaded.append(path)
        return PREDICTOR

    monkeypatch.setattr(command, "load_network", load_network)
    monkeypatch.setattr(command, "tokenizer_of", lambda predictor: TOKENIZER)
    monkeypatch.delenv("PTP_TRACEBACK", raising=False)
    return shell


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_bytes("def \r\n  ünï\nclass A:\n".encode())
    return file


class TestText:
    def test_streams_prompt_and_text_and_ends_with_the_cost(self, shell: Shell) -> None:
        output = shell("--prompt", "def ", "--max_new_tokens", "12", "--seed", "4")
        expected = generate(PREDICTOR, "def ", tokenizer=TOKENIZER, max_new_tokens=12, seed=4)
        text, _, summary = output.out.removesuffix("\n").rpartition("\n\n")
        assert text == "def " + expected.text
        start = f"[12 tokens in {expected.num_calls} calls: {expected.accepted_per_call:.2f} tokens per call, "
        assert summary.startswith(start)
        assert (output.status, output.err) == (0, "")

    def test_the_checkpoint_is_the_one_named(self, shell: Shell) -> None:
        shell("--prompt", "x", "--max_new_tokens", "1")
        shell("--prompt", "x", "--max_new_tokens", "1", "--ckpt_path", "runs/last.ckpt")
        assert shell.loaded == [None, "runs/last.ckpt"]

    @pytest.mark.parametrize("prompt", ["null", "12", "a: b", "[1, 2", "{x}", "${x}", "'q'", " x\n", "--x", "%d"])
    def test_prompts_are_taken_literally(self, shell: Shell, prompt: str) -> None:
        (record,) = shell.records(f"--prompt={prompt}", "--max_new_tokens", "1")
        assert record["prompt"] == prompt

    def test_a_batch_shows_each_prompt_with_its_text(self, shell: Shell, prompts: Path) -> None:
        common = ["--prompts", str(prompts), "--max_new_tokens", "9"]
        alone, together = (shell(*common, "--batch_size", size).out for size in ("1", "2"))
        # All but the costs, where calls are those of one text or of both.
        lines = [[line for line in out.splitlines() if "tokens per second]" not in line] for out in (alone, together)]
        assert lines[0] == lines[1]

    def test_the_number_of_draft_tokens_reaches_the_decoder(self, shell: Shell) -> None:
        common = ["--prompt", "def ", "--max_new_tokens", "24", "--window_length", "5"]
        few, many = (shell.records(*common, "--num_draft_tokens", number)[0] for number in ("0", "16"))
        assert few["token_ids"] == many["token_ids"]
        expected = [
            generate(
                PREDICTOR, "def ", tokenizer=TOKENIZER, max_new_tokens=24, window_length=5, num_draft_tokens=number
            )
            for number in (0, 16)
        ]
        assert [few["num_calls"], many["num_calls"]] == [text.num_calls for text in expected]

    def test_the_slot_budget_is_measured_once_and_told(
        self, shell: Shell, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured: list[int] = []

        def measure(predictor: object, settings: GenerationSettings, lengths: CorrectLengths) -> CallCosts:
            measured.append(settings.window_length)
            return CallCosts((1, 20), (0.004, 0.004))

        monkeypatch.setattr(slot_budget, "measure_costs", measure)
        output = shell("--prompts", str(prompts), "--decoder", "partial_quadratic", "--window_length", "5")
        assert output.status == 0 and measured == [5]
        assert "--slot_budget 20: 4.0 ms a call for" in output.err


class TestCalls:
    @pytest.mark.parametrize("decoder", ["speculative", "partial_quadratic"])
    def test_tokens_of_each_call_and_wrong_drafts(self, shell: Shell, decoder: str, tmp_path: Path) -> None:
        common = ["--prompt", "def ", "--max_new_tokens", "12", "--decoder", decoder, "--slot_budget", "8"]
        page = tmp_path / "page.html"
        output = shell(*common, "--show_calls", "--html", str(page))
        assert (output.status, output.err) == (0, "")
        marked, _, footer = output.out.rpartition("\n\n")
        assert marked.startswith("def |") and marked.endswith("|")
        (record,) = shell.records(*common)
        text = re.sub("~~.*?~~", "", marked).replace("|", "")
        assert text == f"def {record['text']}".replace("|", "").replace("~~", "")
        assert f"[12 tokens in {record['num_calls']} calls" in footer and f"[page: {page}]" in footer
        assert page.read_text(encoding="utf-8").count('<span class="cycle') == marked.count("|") - 1
        assert [file.name for file in tmp_path.iterdir()] == ["page.html"]

    def test_a_batch_shows_the_cycles_of_each_text(self, shell: Shell, prompts: Path, tmp_path: Path) -> None:
        page = tmp_path / "page.html"
        options = ["--max_new_tokens", "9", "--batch_size", "3", "--show_calls", "--html", str(page)]
        output = shell("--prompts", str(prompts), *options)
        assert output.out.count("tokens per second]") == 3
        assert output.out.count("struck out") == 1
        assert page.read_text(encoding="utf-8").count("<pre>") == 3

    def test_the_measured_decoder_has_warmed_up(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        lengths: list[int] = []
        original = command.generate

        def record(*arguments: object, **options: Any) -> object:
            lengths.append(options["max_new_tokens"])
            return original(*arguments, **options)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(command, "generate", record)
        output = shell("--prompt", "def ", "--max_new_tokens", "12")
        assert lengths == [command.WARM_UP_TOKENS]
        assert output.out.endswith(
            "[after a warm-up; the base model alone writes one token per call, and --compare "
            "measures its speed on the same prompt]\n"
        )

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--show_calls", "--json"], "expected one of --show_calls"),
            (["--html", "."], "expected --html to be a file"),
            (["--html", "nowhere/page.html"], "expected --html to be a file in a folder that exists"),
        ],
    )
    def test_refused_before_a_model_is_loaded(self, shell: Shell, args: list[str], message: str) -> None:
        output = shell("--prompt", "x", *args)
        assert (output.status, output.out, shell.loaded) == (2, "", [])
        assert message in output.err


class TestJson:
    def test_one_object_per_prompt_and_nothing_else(self, shell: Shell, prompts: Path) -> None:
        records = shell.records("--prompts", str(prompts), "--max_new_tokens", "9", "--seed", "1")  # no text ends early
        assert [record["prompt"] for record in records] == ["def ", "  ünï", "class A:"]
        for record in records:
            assert list(record) == JSON_KEYS
            assert record["num_tokens"] == len(record["token_ids"]) == 9  # pyright: ignore[reportArgumentType]
            assert record["accepted_per_call"] == 9 / record["num_calls"]  # pyright: ignore[reportOperatorIssue]

    @pytest.mark.parametrize("sampling", [[], ["--temperature", "0"], ["--temperature", "1.5", "--top_k", "9999"]])
    def test_decoders_agree(self, shell: Shell, prompts: Path, sampling: list[str]) -> None:
        common = ["--prompts", str(prompts), "--max_new_tokens", "15", "--seed", "3", *sampling]
        slow = shell.records(*common, "--decoder", "autoregressive")
        assert {record["accepted_per_call"] for record in slow} == {1.0}
        for options in (
            ["--window_length", "5"],
            ["--decoder", "partial_quadratic", "--slot_budget", "7"],
            ["--batch_size", "2"],
            ["--decoder", "partial_quadratic", "--slot_budget", "20", "--batch_size", "9"],
        ):
            fast = shell.records(*common, *options)
            assert [record["token_ids"] for record in fast] == [record["token_ids"] for record in slow], options

    def test_sampling_options_change_the_text_and_say_so(self, shell: Shell) -> None:
        common = ["--prompt", "def ", "--json"]
        own, same, other = (shell(*common, *more) for more in ([], ["--top_p", "0.9"], ["--temperature", "0"]))
        texts = [json.loads(output.out)["text"] for output in (own, same, other)]
        assert texts[0] == texts[1] != texts[2]
        assert own.err == same.err == ""
        assert "trained for temperature 0.7, top_k 50, top_p 0.9; with temperature 0.0, top_k 50" in other.err


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([], "expected one of --prompt and --prompts, found neither"),
            (["--prompt", "x", "--prompts", "y"], "found both"),
            (["--prompts", "missing.txt"], "missing.txt, found no file: set --prompts"),
            (["--prompt", ""], "--prompt: expected a prompt of at least one token"),
            (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens >= 1, found 0"),
            (["--prompt", "x", "--max_new_tokens", "256"], "lower max_new_tokens"),
            (["--prompt", "x", "--window_length", "1"], "window_length >= 2"),
            (["--prompt", "x", "--temperature", "-1"], "temperature must be 0 (greedy)"),
            (["--prompt", "x", "--temperature", "nan"], "--temperature: Expected"),
            (["--prompt", "x", "--top_k", "many"], "--top_k: Expected"),
            (["--prompt", "x", "--top_p", "0"], "top_p must satisfy"),
            (["--prompt", "x", "--decoder", "magic"], "--decoder: Expected"),
            (["--prompt", "x", "--max_tokens", "5"], "unrecognized arguments: --max_tokens 5"),
            (["--prompt"], "expected one argument"),
        ],
    )
    def test_one_message_and_status_2(self, shell: Shell, args: list[str], message: str) -> None:
        output = shell(*args)
        assert (output.status, output.out) == (2, "")
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        assert message in output.err

    def test_a_prompt_that_is_too_long_is_found_before_anything_is_printed(self, shell: Shell, tmp_path: Path) -> None:
        file = tmp_path / "prompts.txt"
        file.write_text("def \n\n" + "class " * 5000)
        output = shell("--prompts", str(file))
        assert (output.status, output.out) == (2, "")
        assert "prompts.txt, prompt 2: expected" in output.err

    @pytest.mark.parametrize(("content", "message"), [(b"", "no lines"), (b"\n", "no lines"), (b"\xff\n", "UTF-8")])
    def test_unusable_files_of_prompts(self, shell: Shell, tmp_path: Path, content: bytes, message: str) -> None:
        file = tmp_path / "prompts.txt"
        file.write_bytes(content)
        output = shell("--prompts", str(file))
        assert (output.status, output.out) == (2, "")
        assert message in output.err and output.err.count("\n") == 1

    def test_what_needs_no_model_is_checked_before_it_is_loaded(self, shell: Shell) -> None:
        for args in ([], ["--prompt", "x", "--top_p", "2"], ["--prompt", "x", "--max_new_tokens", "0"]):
            shell(*args)
        assert shell.loaded == []


class TestHelp:
    def test_help_names_every_option(self, shell: Shell) -> None:
        output = shell("--help")
        assert output.status == 0
        for option in ("ckpt_path", "prompt", "prompts", "max_new_tokens", "temperature", "top_k", "top_p", "seed"):
            assert f"--{option} " in output.out
        for option in ("decoder", "window_length", "json"):
            assert f"--{option}" in output.out

    def test_the_list_of_commands_names_generate(self) -> None:
        assert "\n  generate " in cli.HELP


class TestPredictor:
    """Which adapter, on which base model, in which dtype."""

    def test_a_stored_adapter_in_another_dtype_on_another_base(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for name in ("base", "moved"):
            tiny_llama(vocab_size=257).save_pretrained(tmp_path / name)
            TOKENIZER.save_pretrained(tmp_path / name)
        save_network(trained(tmp_path / "base"), tmp_path / "smollm2")
        monkeypatch.setattr(packaged_adapters, "embedded_folder", tmp_path.joinpath)
        shell = Shell(monkeypatch, capsys)
        common = ["--prompt", "def ", "--max_new_tokens", "20"]
        for dtype in ("float32", "bfloat16", "auto"):
            (expected,) = shell.records("--model", "smollm2", "--dtype", dtype, *common)
            for options in (
                ["--ckpt_path", str(tmp_path / "smollm2")],
                ["--model", "smollm2", "--base", str(tmp_path / "moved")],
            ):
                (record,) = shell.records(*options, "--dtype", dtype, *common)
                assert record["token_ids"] == expected["token_ids"]

    def test_an_adapter_of_the_hub(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        tiny_llama(vocab_size=257).save_pretrained(tmp_path / "base")
        TOKENIZER.save_pretrained(tmp_path / "base")
        save_network(trained(tmp_path / "base"), tmp_path / "adapter")
        shell, options = Shell(monkeypatch, capsys), ["--prompt", "def ", "--max_new_tokens", "20"]
        (expected,) = shell.records("--ckpt_path", str(tmp_path / "adapter"), *options)
        with running_hub(monkeypatch, tmp_path / "cache") as hub:
            commit = hub.add_folder("user/mine", tmp_path / "adapter")
            for source in ("user/mine", f"user/mine@{commit}"):
                (record,) = shell.records("--ckpt_path", source, *options)
                assert record["token_ids"] == expected["token_ids"]
            output = shell("--ckpt_path", "user/other", *options)
        assert output.status == 2 and output.err.count("\n") == 1
        assert output.err.startswith("error: expected a file, a folder or a repository of the hub at user/other")

    def test_another_base_model_is_one_note(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        for name, scale in (("base", 1.0), ("fine_tune", 1.5)):
            model = tiny_llama(vocab_size=257)
            sharpen(model, scale)
            model.save_pretrained(tmp_path / name)
            TOKENIZER.save_pretrained(tmp_path / name)
        save_network(trained(tmp_path / "base"), tmp_path / "adapter")
        options = ["--ckpt_path", str(tmp_path / "adapter"), "--base", str(tmp_path / "fine_tune")]
        capsys.readouterr()
        output = Shell(monkeypatch, capsys)(*options, "--prompt", "x", "--max_new_tokens", "3")
        assert output.status == 0
        assert output.err.startswith(f"note: {tmp_path / 'fine_tune'} (fingerprint ") and output.err.count("\n") == 1

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--dtype", "float16"], "'float32'"),
            (["--model", "llama"], "'smollm2'"),
            (["--model", "code", "--ckpt_path", "x"], "one of --model and --ckpt_path, found both (code, x)"),
        ],
    )
    def test_refused_options_name_what_is_allowed(self, shell: Shell, args: list[str], message: str) -> None:
        output = shell("--prompt", "x", *args)
        assert (output.status, output.out, shell.loaded) == (2, "", [])
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        assert message in output.err
