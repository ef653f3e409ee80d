"""On a GPU: training computes what it computes on a CPU, and a run can be stopped, resumed and moved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from ptp_lightning.batch import PackedBatch
from ptp_lightning.models import PredictorNetwork
from ptp_lightning.models.attention.blocks import Blocks
from ptp_lightning.models.attention.choice import FASTEST_FIRST, AttentionChoice
from ptp_lightning.models.attention.flex import Flex
from ptp_lightning.models.layers.compile import compile_layers
from ptp_lightning.models.layers.decoder_layers import decoder_layers
from ptp_lightning.training.windows.dataset_windows import DatasetWindows
from ptp_lightning.training.windows.student_windows import StudentWindows
from ptp_lightning.training.windows.teacher_windows import TeacherWindows
from ptp_lightning.training.windows.window_source import WindowSource
from ptp_lightning.utils.randomness import keyed_generator
from tests.helpers.tiny_distillation import make_module
from tests.helpers.tiny_models import cast_weights
from tests.helpers.tiny_windows import make_batch
from tests.numerics.test_window_attention import inputs, make_predictor

CONFIG = Path(__file__).parents[2] / "configs" / "gated_lora.yaml"

pytestmark = pytest.mark.gpu


def a_batch(device: str) -> PackedBatch:
    """Two rows of 16 tokens, each of two documents, with two windows."""
    tokens = torch.arange(3, 35).view(2, 16) % 32
    documents = (torch.arange(16) >= 9).long().expand(2, 16)
    positions = torch.cat([torch.arange(9), torch.arange(7)]).expand(2, 16)
    starts = torch.tensor([[2, 11], [4, 12]])
    fields = (tokens, documents, positions, starts, torch.ones_like(tokens, dtype=torch.bool))
    return PackedBatch(*(field.contiguous().to(device) for field in fields))


@pytest.mark.parametrize(
    "source", [TeacherWindows(), DatasetWindows(), StudentWindows()], ids=lambda source: type(source).__name__
)
def test_loss_and_gradients_are_those_of_the_cpu(source: WindowSource) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        module = make_module(source=source).to(device)
        batch = a_batch(device)
        context = module._encode(batch)
        generator = keyed_generator(0, "train")
        sample = source.sample(module.predictor, context, generator)
        hidden = module.predictor.slot_hidden(context, sample.auxiliaries)
        loss = (
            module._corrected_loss(context, hidden, sample).total
            + module._first_pass_loss(context, hidden, sample).total
        )
        loss.backward()
        gradients = {
            name: parameter.grad.cpu()
            for name, parameter in module.predictor.named_parameters()
            if parameter.grad is not None
        }
        found[device] = (sample.token_ids.cpu(), loss.detach().cpu(), gradients)
    (tokens, loss, gradients), (gpu_tokens, gpu_loss, gpu_gradients) = found["cpu"], found["cuda"]
    assert torch.equal(gpu_tokens, tokens)
    torch.testing.assert_close(gpu_loss, loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == gpu_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gpu_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def fit(folder: Path, *options: str) -> Path:
    """`fit` of the six-minute run, cut to 8 steps; returns the folder of the checkpoints of steps 4 and 8."""
    config = yaml.safe_load(CONFIG.read_text())
    config["data"]["init_args"]["eval_rows"] = 4
    config["trainer"] |= {"accelerator": "gpu", "max_steps": 8, "val_check_interval": 4}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    config["checkpoint"] = {"save_top_k": -1}
    folder.mkdir()
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ptp_lightning", "fit", "--config", str(path)]
    subprocess.run([*command, *options], check=True, timeout=280)
    (last,) = folder.rglob("last.ckpt")
    return last.parent


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Eight steps at once, and the last four of them again: the same weights, up to the order of sums on a GPU."""
    whole = fit(tmp_path / "whole")
    (middle,) = whole.glob("*step=4.ckpt")
    rest = fit(tmp_path / "rest", "--ckpt_path", str(middle))
    expected, found, before = (
        torch.load(path, map_location="cpu", weights_only=True)
        for path in (whole / "last.ckpt", rest / "last.ckpt", middle)
    )
    assert found["global_step"] == expected["global_step"] == 8
    for name, weight in expected["state_dict"].items():
        moved = (weight - before["state_dict"][name]).abs().max()
        assert (found["state_dict"][name] - weight).abs().max() <= 0.1 * moved, name


def test_a_checkpoint_of_the_gpu_decodes_on_the_cpu(tmp_path: Path) -> None:
    checkpoint = fit(tmp_path / "run") / "last.ckpt"
    command = [sys.executable, "-m", "ptp_lightning", "generate", "--ckpt_path", str(checkpoint)]
    texts = []
    for device in ("cpu", "cuda"):
        options = ["--prompt", "def f(", "--json", "--device", device]
        finished = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
        texts.append(json.loads(finished.stdout)["text"])
    assert texts[0] == texts[1]


def states_and_gradients(predictor: PredictorNetwork) -> list[Tensor]:
    """States of slots, then gradients by everything that is trained."""
    input_ids, auxiliaries = inputs()
    hidden = predictor.slot_hidden(predictor.encode(make_batch(input_ids).to("cuda")), auxiliaries.cuda())
    # A sum that has gradients; that of normalised states' squares has none.
    directions = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (hidden.double() * directions.cuda()).sum().backward()
    gradients = [parameter.grad for parameter in predictor.parameters() if parameter.grad is not None]
    return [tensor.double() for tensor in (hidden.detach(), *gradients)]


def assert_as_near(exact: list[Tensor], plain: list[Tensor], other: list[Tensor]) -> None:
    """The other's errors are at most twice the plain ones."""
    for right, *found in zip(exact, plain, other, strict=True):
        errors = [float((one - right).norm() / right.norm()) for one in found]
        assert errors[1] < max(2 * errors[0], 0.02), errors


@pytest.mark.parametrize(("family", "head_size"), [("llama", 16), ("qwen3", 16), ("llama", 8)])
def test_flex_attention_is_attention_by_blocks(family: str, head_size: int) -> None:
    """In bfloat16, states and gradients; both are as near to float64 as numbers of 8 bits can be.

    Heads of 8 are too small for FlexAttention.
    """
    results = []
    blocks = [Blocks()]
    for dtype, candidates in ((torch.float64, blocks), (torch.bfloat16, blocks), (torch.bfloat16, FASTEST_FIRST)):
        predictor = make_predictor.__wrapped__(family, hidden_size=4 * head_size)
        predictor = predictor.double() if dtype == torch.float64 else cast_weights(predictor, dtype)
        predictor.attention = AttentionChoice(predictor.base_model, candidates)
        if candidates is FASTEST_FIRST:
            chosen = predictor.attention.choose(torch.device("cuda"), dtype)
            assert isinstance(chosen, Flex) == (head_size >= 16)
        results.append(states_and_gradients(predictor.cuda()))
    assert_as_near(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_layers_are_those_that_are_not(dtype: torch.dtype) -> None:
    """States and gradients; both are as near to float64 as such numbers can be."""
    results = []
    for used, compiles in ((torch.float64, False), (dtype, False), (dtype, True)):
        predictor = make_predictor.__wrapped__("llama", hidden_size=64)
        # float64 with the weights that are rounded
        predictor = cast_weights(predictor, dtype).to(used) if used == torch.float64 else cast_weights(predictor, used)
        predictor = predictor.cuda()
        if compiles:
            compile_layers(decoder_layers([predictor.base_model], ""))
        results.append(states_and_gradients(predictor))
    assert_as_near(*results)


@pytest.mark.parametrize(
    "source", [TeacherWindows(), DatasetWindows(), StudentWindows()], ids=lambda source: type(source).__name__
)
def test_no_step_waits_for_the_device(source: WindowSource) -> None:
    module = make_module(source=source).to("cuda")
    batch = a_batch("cuda")

    def step(number: int) -> None:
        context = module._encode(batch)
        sample = source.sample(module.predictor, context, keyed_generator(number))
        hidden = module.predictor.slot_hidden(context, sample.auxiliaries)
        loss = module._first_pass_loss(context, hidden, sample)
        (loss.total / loss.count + module._corrected_loss(context, hidden, sample).total).backward()

    step(0)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
