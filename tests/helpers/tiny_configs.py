"""The configurations of the repository with a tiny network, a tiny corpus and small batches, for tests."""

import json
from pathlib import Path
from typing import Any

import yaml

# A network of the same kind that needs no download, with the tokenizer of the embedded model.
SHRUNKEN = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
CORPUS_LINE = "def add(a, b):\n    return a + b\n"

# Nine rows with the columns of all data sets that configurations name.
ROWS: list[dict[str, Any]] = [
    {
        "text": f"# {number}\n{CORPUS_LINE}" * 4,
        "description": f"Add {number}.",
        "solutions": {"language": [3], "solution": [CORPUS_LINE, "no"]},
        "conversations": [{"from": "human", "value": f"Add {number}!"}, {"from": "gpt", "value": CORPUS_LINE}],
        "messages": [
            {"role": "user", "content": f"Add {number}!"},
            {"role": "assistant", "content": CORPUS_LINE},
        ],
    }
    for number in range(9)
]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def localize(data: dict[str, Any], folder: Path) -> None:
    """Let all components of a stream read `ROWS` in training and validation; invalid rows are errors."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for part in data["parts"]:
        part["source"] = {"class_path": "ptp_lightning.data.JsonLines", "init_args": {"paths": [str(rows)]}}
        if part.get("rendering", {}).get("class_path", "").endswith("Chat"):
            part["rendering"].setdefault("init_args", {}).setdefault("template", TEMPLATE)
    data |= {"eval_parts": data["parts"], "num_workers": 0, "on_error": "raise"}


def shrink(path: Path, corpus: Path, folder: Path) -> Path:
    """The configuration at `path` with a tiny network, a tiny corpus and small batches."""
    config = yaml.safe_load(path.read_text())
    arguments = config["model"]["init_args"]
    arguments.get("predictor", arguments)["backbone"] = {"path": "embedded", "from_config": SHRUNKEN}
    if "lora" in arguments.get("predictor", {}):
        arguments["predictor"]["lora"] |= {"rank": 2}
    if "draft_vocabulary" in arguments.get("predictor", {}):
        arguments["predictor"]["draft_vocabulary"] = 64
    if "slot_layers" in arguments.get("predictor", {}):
        arguments["predictor"]["slot_layers"] = min(1, arguments["predictor"]["slot_layers"])
    if "output" in arguments:
        arguments |= {"output": str(folder / "model"), "compile": False}
    if config["data"]["class_path"].endswith("CompletionsDataModule"):  # its folder is written by another command
        del config["data"]["init_args"]["folder"]
        config["data"]["class_path"] = "ptp_lightning.data.CorpusDataModule"
        config["data"]["init_args"] |= {"corpus": {}, "tokenizer": "embedded"}
    data = config["data"]["init_args"]
    if "corpus" in data:
        data["corpus"] = {
            "class_path": "ptp_lightning.data.TextFiles",
            "init_args": {"paths": [str(corpus)], "held_out": "lines"},
        }
    elif "parts" in data:
        localize(data, folder)
    elif "PickUps" in data["series"]["class_path"]:
        locations = folder / "locations.csv"
        locations.write_text("latitude,longitude\n" + "".join(f"{n % 7},{n % 11}\n" for n in range(4000)))
        data["series"]["init_args"] |= {"path": str(locations), "block_length": 40, "cache_dir": str(folder)}
    data |= {
        "row_length": 32,
        "batch_size": 2,
        "num_windows": 2,
        "eval_rows": 2,
    }
    config["trainer"] |= {"accelerator": "cpu", "fast_dev_run": 1}
    shrunken = folder / path.name
    shrunken.write_text(yaml.safe_dump(config))
    return shrunken
