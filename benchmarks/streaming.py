"""Throughput, latency of the first batch, and memory of a stream that tokenises and packs.

    python -m benchmarks.streaming [--megabytes 200] [--num_workers 0] [--training_rate 1300]

Writes a temporary file of JSON lines (the sources of Python's standard library, repeated), and reads it once in rows of
256 tokens of the embedded tokenizer. CPU seconds are those of this process, so with workers only wall-clock time is
meaningful. `--training_rate` is the number of tokens that a training consumes per second: the six-minute run has
4 x 256 tokens in 0.8 s.
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
WARM_UP_FRACTION = 0.1  # of the stream; memory growth is measured after it


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--training_rate", type=float, default=1300.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        size, num_documents = write_documents(path, options.megabytes * BYTES_PER_MEGABYTE)
        data = StreamingCorpus([StreamPart(JsonLines([str(path)]))], batch_size=4, num_workers=options.num_workers)
        begin = perf_counter(), process_time()
        data.setup("fit")
        process = psutil.Process()
        tokens = non_padding = 0
        warm_up_peak = peak = 0
        trainer = SimpleNamespace(global_step=0, accumulate_grad_batches=1, global_rank=0, world_size=1)
        data.trainer = trainer  # pyright: ignore[reportAttributeAccessIssue]
        for step, batch in enumerate(data.train_dataloader()):
            trainer.global_step = step  # as in a training, so that positions of consumed batches are discarded
            if not tokens:
                print(f"first batch after {perf_counter() - begin[0]:.1f} s")
            tokens += batch.input_ids.numel()
            non_padding += int((batch.document_ids >= 0).sum())
            fraction = data.statistics.documents / num_documents
            memory = process.memory_info().rss
            if fraction < WARM_UP_FRACTION:
                warm_up_peak = max(warm_up_peak, memory)
            peak = max(peak, memory)
            if fraction > 1 - WARM_UP_FRACTION:
                break
        seconds, cpu = perf_counter() - begin[0], process_time() - begin[1]
    megabytes, filled = size / BYTES_PER_MEGABYTE, 100 * non_padding / tokens
    growth = (peak - warm_up_peak) / BYTES_PER_MEGABYTE
    print(f"{megabytes:.0f} MB, {tokens / 1e6:.1f} M tokens in rows, {filled:.2f} % not padding")
    print(f"{tokens / seconds:,.0f} tokens/s ({tokens / cpu:,.0f} per CPU second of this process)")
    ratio = tokens / seconds / options.training_rate
    print(f"{ratio:.0f} times the rate of a training at {options.training_rate:.0f} tokens/s")
    print(f"memory grew by {growth:.1f} MB after the first {100 * WARM_UP_FRACTION:.0f} %")


def write_documents(path: Path, num_bytes: int) -> tuple[int, int]:
    """Write at least `num_bytes`; returns the size in bytes and the expected number of training documents."""
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
