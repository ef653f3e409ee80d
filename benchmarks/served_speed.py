"""Tokens per second of `transformers serve`, with a folder that holds an adapter and with the plain base model in turn.

    python -m benchmarks.served_speed [--adapter smollm2] [--temperature 0] [--max_tokens 96] [--repetitions 2]

Needs the extra `serving`. One server on loopback has both folders, one client asks the same questions, folder after
folder. Beside the wall-clock time it prints the processor time of the server, which others on the machine change less.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from ptp_lightning.export.checkpoint import load_network
from ptp_lightning.export.model_folder import save_with_base_model

QUESTIONS = (
    "Write a Python function that adds two numbers.",
    "What is a prime number?",
    "Name three animals that live in the sea, and say what each of them eats.",
    "A shop sells 3 apples for 2 dollars. How much do 12 apples cost? Explain.",
)
START_SECONDS = 180


@dataclass
class Cost:
    """What all answers of a folder took.

    Attributes:
        tokens: of the answers.
        seconds: wall-clock time of the client.
        cpu_seconds: processor time of the server.
    """

    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def main() -> None:
    """Measure and print a row for each folder, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="smollm2", help="what from_pretrained opens; needs a chat template")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max_tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        folders = write_folders(options.adapter, Path(folder))
        with running_server(Path(folder)) as (address, server):
            costs = measure(folders, address, psutil.Process(server.pid), options)
    for name, cost in costs.items():
        print(
            f"{name:>8}  {cost.tokens} tokens, {cost.tokens / cost.seconds:6.1f} tokens per second, "
            f"{cost.tokens / cost.cpu_seconds:6.1f} per second of processor time",
            flush=True,
        )
    ours, plain = costs["parallel"], costs["plain"]
    faster = (ours.tokens / ours.seconds) / (plain.tokens / plain.seconds)
    cheaper = (ours.tokens / ours.cpu_seconds) / (plain.tokens / plain.cpu_seconds)
    print(f"parallel is {faster:.2f} times as fast, {cheaper:.2f} times by processor time")


def write_folders(adapter: str, root: Path) -> dict[str, Path]:
    """By name: a folder with adapter and base model, and the same without the adapter's files."""
    save_with_base_model(load_network(adapter), root / "parallel")
    (root / "plain").mkdir()
    for file in (root / "parallel").iterdir():
        if file.is_file():  # the adapter's are in folders
            (root / "plain" / file.name).symlink_to(file)
    return {name: root / name for name in ("parallel", "plain")}


@contextmanager
def running_server(root: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on loopback: its address and process.

    Raises:
        RuntimeError: it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with (root / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        try:
            for _ in range(START_SECONDS):
                if is_up(address) or server.poll() is not None:
                    break
                time.sleep(1)
            if not is_up(address):
                raise RuntimeError(f"expected a server, found:\n{(root / 'server.log').read_text()[-2000:]}")
            yield address, server
        finally:
            server.terminate()
            server.wait(timeout=30)


def is_up(address: str) -> bool:
    """Whether the server answers."""
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).read()
    except OSError:
        return False
    return True


def measure(
    folders: dict[str, Path], address: str, server: psutil.Process, options: argparse.Namespace
) -> dict[str, Cost]:
    """Ask all questions of all folders in turn; a first round is not counted."""
    client: Any = import_module("openai").OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600)
    costs = {name: Cost() for name in folders}
    for repetition in range(options.repetitions + 1):
        for question in QUESTIONS if repetition else QUESTIONS[:1]:
            for name, folder in folders.items():
                before, cpu_before = time.monotonic(), sum(server.cpu_times()[:2])
                answer = client.chat.completions.create(
                    model=str(folder),
                    messages=[{"role": "user", "content": question}],
                    max_tokens=options.max_tokens,
                    temperature=options.temperature,
                )
                if repetition:
                    costs[name].tokens += answer.usage.completion_tokens
                    costs[name].seconds += time.monotonic() - before
                    costs[name].cpu_seconds += sum(server.cpu_times()[:2]) - cpu_before
    return costs


if __name__ == "__main__":
    main()
