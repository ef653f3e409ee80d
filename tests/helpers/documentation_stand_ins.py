"""What a reader of the documentation has, in small: a model, texts, files of benchmarks, a hub, short studies."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.chat_tokenizer import letter_chat_tokenizer
from tests.helpers.documentation import ROOT
from tests.helpers.hub_stand_in import HubStandIn
from tests.helpers.tiny_configs import CORPUS_LINE
from tests.helpers.tiny_models import tiny_llama

CHECKPOINT = "runs/gated_lora/version_0/checkpoints/last.ckpt"
NUM_TEXTS = 400  # a twentieth of them is for validation
NUM_PICK_UPS = 110_000  # 53 blocks, the last of which is the first one for validation
STUDIES = ("losses", "crossing_losses", "what_u_is_worth")
FEW_STEPS = 4  # as many as validations of a study

GSM8K = {
    "question": "A shop sells 3 apples for 2 dollars. How much do 12 apples cost?",
    "answer": "It sells 4 times 3 apples.\n#### 8",
}
MBPP = {
    "task_id": 601,
    "text": "Write a function to find the shared elements of two lists.",
    "code": "def shared(a, b):\n    return set(a) & set(b)",
    "test_list": ["assert shared([1, 2], [2, 3]) == {2}"],
}
SPEC_BENCH = {"question_id": 81, "category": "writing", "turns": ["Describe a journey.", "And now in one sentence."]}


def text_of(number: int) -> str:
    """Some code, which differs from that of other numbers."""
    return f"# Example {number}\n{CORPUS_LINE}" * 12


def write_belongings(folder: Path) -> None:
    """The files that commands of the documentation name."""
    write_model(folder / "path" / "to" / "model")
    (folder / "my_texts").mkdir()
    for number in range(NUM_TEXTS):
        (folder / "my_texts" / f"{number}.txt").write_text(text_of(number))
    write_lines(folder / "my_chats.jsonl", [{"messages": chat_of(number)} for number in range(NUM_TEXTS)])
    write_lines(folder / "gsm8k_train.jsonl", [GSM8K])
    write_lines(folder / "mbpp.jsonl", [MBPP])
    write_lines(folder / "question.jsonl", [SPEC_BENCH])
    for name in ("PICKUPS.csv.gz", "pickups.csv.gz"):
        write_pick_ups(folder / name)
    for name in STUDIES:
        write_short_study(name, folder)


def write_model(folder: Path) -> None:
    """A model as `save_pretrained` leaves it, of random weights, whose tokens are bytes."""
    tokenizer = byte_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chat_of(number: int) -> list[dict[str, str]]:
    """A question and its answer."""
    return [{"role": "user", "content": f"Add {number}!"}, {"role": "assistant", "content": text_of(number)}]


def write_pick_ups(path: Path) -> None:
    """Places in the order of time, as the published pick-ups of a city are."""
    draw = random.Random(0)
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["Date/Time", "Latitude", "Longitude"])
    for number in range(NUM_PICK_UPS):
        angle = number / 100
        latitude, longitude = 40.75 + 0.05 * math.sin(angle), -73.98 + 0.05 * math.cos(angle)
        writer.writerow([number, f"{draw.gauss(latitude, 0.02):.4f}", f"{draw.gauss(longitude, 0.02):.4f}"])
    path.write_bytes(gzip.compress(rows.getvalue().encode(), mtime=0))


def write_short_study(name: str, folder: Path) -> None:
    """The study of that name with a few steps; a file of this name comes before the one that ships."""
    study = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    for version in (study, study.get("quick", {})):
        budget = version["budget"]
        several = isinstance(budget["steps"], list)
        largest = max(budget["steps"]) if several else budget["steps"]
        steps = [FEW_STEPS * 2**k for k in range(len(budget["steps"]))] if several else FEW_STEPS
        budget |= {
            "steps": steps,
            "tokens": budget["tokens"] * (max(steps) if isinstance(steps, list) else steps) // largest,
        }
    # Paths are relative to the file.
    (folder / name).write_text(yaml.safe_dump(study, sort_keys=False).replace("../configs/", "configs/"))


def fill_hub(hub: HubStandIn, folder: Path) -> None:
    """The models and datasets of the hub that configurations name, in small.

    Args:
        hub: takes them.
        folder: is written to.
    """
    # With a token per letter whatever a random model writes is text, turns of a user too.
    tokenizer = letter_chat_tokenizer()
    chat_model = tiny_llama(vocab_size=len(tokenizer), num_layers=22, max_position_embeddings=2048)
    chat_model.save_pretrained(folder / "chat")
    tokenizer.save_pretrained(folder / "chat")
    hub.add_folder("TinyLlama/TinyLlama-1.1B-Chat-v1.0", folder / "chat")

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    hub.add_folder("lmsys/vicuna-7b-v1.3", folder / "plain")

    numbers = range(NUM_TEXTS)
    add_dataset(hub, "HuggingFaceFW/fineweb-edu", "sample-10BT", "train", [{"text": text_of(n)} for n in numbers])
    chats = [{"prompt": f"Add {n}!", "messages": chat_of(n)} for n in numbers]
    add_dataset(hub, "HuggingFaceH4/ultrachat_200k", "default", "train_sft", chats)
    problems = [{"description": f"Add {n}.", "solutions": {"language": [3], "solution": [text_of(n)]}} for n in numbers]
    add_dataset(hub, "deepmind/code_contests", "default", "train", problems)


def add_dataset(hub: HubStandIn, name: str, configuration: str, split: str, rows: list[dict[str, Any]]) -> None:
    """A dataset of one file, in the format and with the card of most datasets of the hub."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    path = f"data/{split}-00000-of-00001.parquet"
    configs = [{"config_name": configuration, "data_files": [{"split": split, "path": path}]}]
    card = f"---\n{yaml.safe_dump({'configs': configs})}---\n"
    hub.commit(f"datasets/{name}", {"README.md": card.encode(), path: file.getvalue()})
