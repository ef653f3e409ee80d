"""An exported folder behind `transformers serve`, and an ordinary OpenAI client before it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.export.model_folder import save_with_base_model
from ptp_lightning.models import BackboneSettings, PredictorConfig, PredictorNetwork
from tests.helpers.chat_tokenizer import CHAT_VOCABULARY, END_OF_TURN_ID, chat_tokenizer
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_predictors import sharpen

pytestmark = pytest.mark.slow
openai = pytest.importorskip("openai", reason="needs pip install 'ptp_lightning[serving]'")
pytest.importorskip("uvicorn", reason="needs pip install 'ptp_lightning[serving]'")

TRANSFORMERS = Path(sys.executable).with_name("transformers")
CODE_TEMPLATE = "{{ messages[-1].content }}"  # the embedded code model has none
PROMPTS = ["def add(first, second):\n    return ", "import os\n", "class Stack:\n    def __init__(self"]
START_SECONDS = 120
SAMPLED = '{"do_sample": true, "max_new_tokens": 24}'
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: the whole folder, and the same without the predictor."""
    root = tmp_path_factory.mktemp("served")
    predictor = load_network("code", dtype="float32")
    save_with_base_model(predictor, root / "parallel")
    tokenizer_file = root / "parallel" / "chat_template.jinja"
    tokenizer_file.write_text(CODE_TEMPLATE)
    return with_plain_folder(root)


def with_plain_folder(root: Path) -> dict[str, Path]:
    """Write `plain` beside `parallel`: the same without the predictor."""
    (root / "plain").mkdir()
    for file in (root / "parallel").iterdir():
        if file.is_file():
            (root / "plain" / file.name).symlink_to(file)
    return {name: root / name for name in ("parallel", "plain")}


@pytest.fixture(scope="module")
def chat_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As `folders`, of a random model whose template puts turns between special tokens, as those of chat models do."""
    root = tmp_path_factory.mktemp("chat")
    model = tiny_llama(vocab_size=CHAT_VOCABULARY, max_position_embeddings=512, eos_token_id=END_OF_TURN_ID)
    sharpen(model, 2.0)
    model.get_parameter("lm_head.weight").data[END_OF_TURN_ID] *= 1.6  # ends some turns
    model.save_pretrained(root / "base")
    chat_tokenizer().save_pretrained(root / "base")
    backbone = BackboneSettings(path=str(root / "base"))
    save_with_base_model(PredictorNetwork(PredictorConfig(backbone, window_length=4)).eval(), root / "parallel")
    return with_plain_folder(root)


@pytest.fixture(scope="module")
def port(folders: dict[str, Path]) -> Iterator[int]:
    """Of a server for both folders."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [TRANSFORMERS, "serve", "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)]
    log = (folders["plain"].parent / "server.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(address: str, server: subprocess.Popen) -> None:
    for _ in range(START_SECONDS * 4):
        assert server.poll() is None, "the server has ended"
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except OSError:
            time.sleep(0.25)
    raise TimeoutError(address)


@pytest.fixture(scope="module")
def client(port: int) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60, max_retries=1)


def completion(client: Any, folder: Path, prompt: str = PROMPTS[0], **options: Any) -> Any:
    return client.completions.create(
        model=str(folder), prompt=prompt, **({"max_tokens": 32, "temperature": 0} | options)
    )


def streamed(client: Any, folder: Path, prompt: str = PROMPTS[0]) -> tuple[str, list[float]]:
    """The text, and when each piece of it came."""
    pieces, times = [], []
    for chunk in completion(client, folder, prompt, stream=True):
        if chunk.choices[0].text:
            pieces.append(chunk.choices[0].text)
            times.append(time.monotonic())
    return "".join(pieces), times


def test_greedy_text_is_the_plain_folders(client: Any, folders: dict[str, Path]) -> None:
    for prompt in PROMPTS:
        ours, plain = (completion(client, folders[name], prompt) for name in ("parallel", "plain"))
        assert ours.choices[0] == plain.choices[0]
        assert ours.usage == plain.usage
        assert streamed(client, folders["parallel"], prompt)[0] == plain.choices[0].text


def test_pieces_come_in_bursts(client: Any, folders: dict[str, Path]) -> None:
    """Gaps between pieces of a call are short beside the time of a call."""
    text, times = streamed(client, folders["parallel"])
    assert text == completion(client, folders["parallel"]).choices[0].text
    gaps = [after - before for before, after in pairwise(times)]
    assert sum(gap < max(gaps) / 4 for gap in gaps) > len(gaps) / 3


def test_chat(client: Any, folders: dict[str, Path]) -> None:
    messages = [{"role": "user", "content": PROMPTS[1]}]
    options = {"messages": messages, "max_tokens": 24, "temperature": 0}
    plain, ours = (
        client.chat.completions.create(model=str(folders[name]), **options) for name in ("plain", "parallel")
    )
    assert ours.choices[0].message.content == plain.choices[0].message.content
    chunks = client.chat.completions.create(model=str(folders["parallel"]), stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content


def test_turns_of_a_chat_model(client: Any, chat_folders: dict[str, Path]) -> None:
    """A system prompt and earlier turns; the text ends where the template's turn does."""
    ended = 0
    for number in range(8):
        turns = [("system", "Count."), ("user", f"{number}?"), ("assistant", "Yes."), ("user", "And now?")]
        messages = [{"role": role, "content": content} for role, content in turns]
        options = {"messages": messages, "max_tokens": 48, "temperature": 0}
        plain, ours = (
            client.chat.completions.create(model=str(chat_folders[name]), **options) for name in ("plain", "parallel")
        )
        assert ours.choices[0] == plain.choices[0]
        assert ours.usage == plain.usage
        assert ours.usage.prompt_tokens > sum(
            len(content) for _, content in turns
        )  # a token a byte, and those of turns
        ended += ours.choices[0].finish_reason == "stop" and ours.usage.completion_tokens > 1
    assert 0 < ended < 8


def test_several_requests_at_once(client: Any, folders: dict[str, Path]) -> None:
    alone = [completion(client, folders["plain"], prompt).choices[0].text for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS) * 2) as pool:
        jobs = [pool.submit(streamed, client, folders["parallel"], prompt) for prompt in PROMPTS * 2]
        assert [job.result()[0] for job in jobs] == alone * 2


def test_stop_strings_and_seeds(client: Any, folders: dict[str, Path]) -> None:
    stopped = [completion(client, folders[name], stop=["\n"]).choices[0] for name in ("parallel", "plain")]
    assert stopped[0] == stopped[1]
    samples = [
        completion(client, folders["parallel"], seed=seed, temperature=1, extra_body={"generation_config": SAMPLED})
        .choices[0]
        .text
        for seed in (1, 2, 1)
    ]
    assert samples[0] == samples[2] != samples[1]


def test_a_setting_that_is_refused_is_named(client: Any, folders: dict[str, Path]) -> None:
    settings = {"generation_config": '{"suppress_tokens": [7], "max_new_tokens": 8}'}
    with pytest.raises(openai.APIError) as refused:
        list(completion(client, folders["parallel"], stream=True, extra_body=settings))
    assert "found SuppressTokensLogitsProcessor" in str(refused.value.body)
    with pytest.raises(openai.InternalServerError):
        completion(client, folders["parallel"], extra_body=settings)


def test_transformers_chat(port: int, folders: dict[str, Path], client: Any) -> None:
    answer = completion(client, folders["plain"], PROMPTS[1], max_tokens=8).choices[0].text
    program = [TRANSFORMERS, "chat", folders["parallel"], f"http://127.0.0.1:{port}/v1"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "HF_HUB_OFFLINE"}
    run = subprocess.run(
        [*program, "do_sample=false", "max_new_tokens=8", "repetition_penalty=1.0"],
        input=f"{PROMPTS[1]}n\n!exit\n",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "8 tokens" in run.stdout and answer.split()[0] in run.stdout
