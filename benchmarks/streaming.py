"""How fast a stream tokenises and packs, how soon its first batch is there, and what memory it takes.

    python -m benchmarks.streaming [--megabytes 200] [--num_workers 0] [--consumed 1500]

Writes a temporary file of JSON lines (the standard library's sources, over and over) and reads it once, in rows of 256
tokens of the embedded tokenizer. CPU seconds are those of this process; with workers only wall-clock time counts.
`--consumed` is what a training consumes in a second: the six-minute run has 4 x 256 tokens in 0.8 s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import cycle
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace

import psutil

from ptp_lightning.data import JsonLines, StandardLibrary, StreamingCorpus, StreamPart

BYTES_PER_MEGABYTE = 1_000_000
TRAINING_BUCKETS = 90  # of 100 documents
SETTLED = 0.1  # of the stream; memory is compared with what it was then


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--consumed", type=float, default=1300.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        size, num_documents = write_documents(path, options.megabytes * BYTES_PER_MEGABYTE)
        data = StreamingCorpus([StreamPart(JsonLines([str(path)]))], batch_size=4, num_workers=options.num_workers)
        begin = perf_counter(), process_time()
        data.setup("fit")
        process = psutil.Process()
        tokens = real = 0
        settled = largest = 0
        trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, global_rank=0, world_size=1)
        data.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
        for step, batch in enumerate(data.train_dataloader()):
            trainer.global_step = step  # as in a training: the places of batches that are behind it are forgotten
            if not tokens:
                print(f"first batch after {perf_counter() - begin[0]:.1f} s")
            tokens += batch.input_ids.numel()
            real += int((batch.document_ids >= 0).sum())
            share = data.statistics.documents / num_documents
            memory = process.memory_info().rss
            if share < SETTLED:
                settled = max(settled, memory)
            largest = max(largest, memory)
            if share > 1 - SETTLED:
                break
        seconds, cpu = perf_counter() - begin[0], process_time() - begin[1]
    print(f"{size / BYTES_PER_MEGABYTE:.0f} MB, {tokens / 1e6:.1f} M tokens in rows, {100 * real / tokens:.2f} % real")
    print(f"{tokens / seconds:,.0f} tokens/s ({tokens / cpu:,.0f} per CPU second of this process)")
    print(
        f"{tokens / seconds / options.consumed:.0f} times what a training consumes at {options.consumed:.0f} tokens/s"
    )
    print(f"memory grew by {(largest - settled) / BYTES_PER_MEGABYTE:.1f} MB behind the first {100 * SETTLED:.0f} %")


def write_documents(path: Path, num_bytes: int) -> tuple[int, int]:
    """At least so many bytes; returns how many, and how many documents of them train."""
    texts = [document.text for document in StandardLibrary().documents("train")]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(cycle(texts)):
            written += file.write(json.dumps({"text": f"# {number}\n{text}"}) + "\n")
            if written >= num_bytes:
                break
    return path.stat().st_size, (number + 1) * TRAINING_BUCKETS // 100


if __name__ == "__main__":
    main()
