"""`generate --chat` and `--compare`: the chat template's prompt, the end of a turn, and speeds that can be compared."""

import re

import pytest

from ptp_lightning.decoding import generate
from ptp_lightning.generation import command, comparison
from ptp_lightning.generation.comparison import Measurement, comparison_lines
from ptp_lightning.sampling import SamplingConfig
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.chat_tokenizer import CHAT_VOCABULARY, END_OF_TURN_ID, chat, chat_tokenizer
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_predictors import sharpen, tiny_predictor
from tests.integration.test_generate_command import Shell

PREDICTOR = tiny_predictor(vocab_size=CHAT_VOCABULARY, sampling=SamplingConfig(temperature=0.7, top_k=50))
TOKENIZER = chat_tokenizer()
SHORT = ["--prompt", "Hi!", "--max_new_tokens", "20"]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    def load_backbone(_: object) -> object:
        model = tiny_llama(vocab_size=CHAT_VOCABULARY)
        sharpen(model, 2.0)
        return model

    monkeypatch.setattr(command, "load_network", lambda path, **_: PREDICTOR)
    monkeypatch.setattr(command, "tokenizer_of", lambda predictor: TOKENIZER)
    monkeypatch.setattr(command, "load_backbone", load_backbone)
    monkeypatch.delenv("PTP_TRACEBACK", raising=False)
    return Shell(monkeypatch, capsys)


class TestChat:
    @pytest.mark.parametrize("system", [None, "Count."])
    def test_the_prompt_is_a_user_turn(self, shell: Shell, system: str | None) -> None:
        (record,) = shell.records(*SHORT, "--chat", *([] if system is None else ["--system", system]))
        rendered = chat("Hi!") if system is None else chat("Hi!", system)
        token_ids = TOKENIZER.encode(rendered, add_special_tokens=False)
        expected = generate(PREDICTOR, token_ids, max_new_tokens=20, tokenizer=TOKENIZER)
        assert record["token_ids"] == expected.token_ids
        assert record["prompt"] == "Hi!"
        in_python = generate(PREDICTOR, "Hi!", max_new_tokens=20, tokenizer=TOKENIZER, chat=True, system=system)
        assert in_python.token_ids == expected.token_ids

    def test_shows_the_turn_and_the_answer(self, shell: Shell) -> None:
        (record,) = shell.records(*SHORT, "--chat")
        output = shell(*SHORT, "--chat")
        assert output.out.startswith(f"Hi!\n\n{record['text']}\n\n[20 tokens in")

    def test_a_turn_ends_the_text(self, shell: Shell) -> None:
        ended = 0
        for seed in range(12):
            options = ["--prompt", "Hi!", "--max_new_tokens", "150", "--temperature", "3", "--top_k", "300"]
            (record,) = shell.records(*options, "--seed", str(seed), "--chat")
            (slow,) = shell.records(*options, "--seed", str(seed), "--chat", "--decoder", "autoregressive")
            token_ids: list[int] = record["token_ids"]  # pyright: ignore[reportAssignmentType]
            assert token_ids == slow["token_ids"]
            assert END_OF_TURN_ID not in token_ids[:-1]
            ended += token_ids[-1] == END_OF_TURN_ID
            if ended:
                break
        assert ended > 0

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--system", "x"], "expected --system with --chat, found it alone"),
            (["--chat", "--prompt", ""], "--prompt: expected a prompt of at least one token"),
        ],
    )
    def test_one_message_and_status_2(self, shell: Shell, args: list[str], message: str) -> None:
        output = shell(*SHORT, *args)
        assert (output.status, output.out) == (2, "")
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        assert message in output.err

    def test_without_a_template(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(command, "tokenizer_of", lambda predictor: byte_tokenizer())
        output = shell(*SHORT, "--chat")
        assert (output.status, output.out) == (2, "")
        assert output.err.startswith("error: expected a tokenizer with a chat template for --chat, found")
        assert output.err.count("\n") == 1


class TestCompare:
    @pytest.mark.parametrize("chat", [[], ["--chat"]])
    def test_greedy_texts_of_all_three_agree(self, shell: Shell, chat: list[str]) -> None:
        output = shell(*SHORT, *chat, "--compare", "--temperature", "0")
        assert output.status == 0, output.err
        ours, loop, transformers = output.out.splitlines()[-3:]
        number = r"\d+\.\d+"
        assert re.fullmatch(rf"\[speculative_lookup: {number} tokens per second, {number} tokens per call\]", ours)
        for line, name in ((loop, "this package's loop"), (transformers, "transformers.generate")):
            speeds = rf"{number} tokens per second, 1\.00 tokens per call; speculative_lookup is {number} times as fast"
            assert re.fullmatch(rf"\[one token per call, {re.escape(name)}: {speeds}, the texts agree\]", line)

    def test_json(self, shell: Shell) -> None:
        (record,) = shell.records(*SHORT, "--compare")
        rows: list[dict[str, object]] = record["comparison"]  # pyright: ignore[reportAssignmentType]
        assert [row["decoder"] for row in rows] == ["speculative_lookup", "autoregressive", "transformers.generate"]
        assert [row["num_tokens"] for row in rows][:2] == [20, 20]
        assert rows[1]["same_text"] is True
        assert rows[0]["tokens_per_call"] == record["accepted_per_call"]

    def test_a_stop_string_ends_both_texts_of_this_package(self, shell: Shell) -> None:
        (plain,) = shell.records(*SHORT)
        stop = str(plain["text"])[4:6]
        (record,) = shell.records(*SHORT, "--compare", f"--stop={stop}")
        rows: list[dict[str, object]] = record["comparison"]  # pyright: ignore[reportAssignmentType]
        assert [row["num_tokens"] for row in rows[:2]] == [record["num_tokens"]] * 2

    def test_every_decoder_warms_up_before_it_is_measured(self, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[tuple[str, int]] = []
        for name in ("_measure_own", "_measure_transformers"):
            measure = getattr(comparison, name)

            def counted(*args: object, measure: object = measure) -> Measurement:
                measured: Measurement = measure(*args)  # pyright: ignore[reportCallIssue]
                calls.append((measured.decoder, len(measured.token_ids)))
                return measured

            monkeypatch.setattr(comparison, name, counted)
        shell(*SHORT, "--compare", "--temperature", "0")
        names = ["speculative_lookup", "autoregressive", "transformers.generate"]
        assert calls == [(name, length) for length in (16, 20) for name in names]

    def test_differing_texts_are_named(self) -> None:
        ours = Measurement("speculative_lookup", [1, 2, 3], 2, 1.0)
        other = Measurement("autoregressive", [1, 9, 3], 3, 1.0)
        sample = Measurement("transformers.generate", [4, 5], 2, 1.0, is_sampled=True)
        _, loop, sampled = comparison_lines([ours, other, sample])
        assert loop.endswith("1.00 times as fast, the texts differ from token 1 on]")
        assert sampled.endswith("1.50 times as fast, which draws a sample of its own]")

    def test_side_by_side_texts_are_not_compared(self, shell: Shell) -> None:
        output = shell(*SHORT, "--compare", "--batch_size", "2")
        assert output.status == 2 and "expected --batch_size 1 with --compare" in output.err
