"""Models with a gated adapter whose weights are not zero, for tests."""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ptp_lightning.models.lora.gate import Gate
from ptp_lightning.models.lora.gated_lora import LoraSettings, add_gated_lora

CONTEXT, SLOTS = 7, 4
INPUT_IDS = torch.arange(2 * (CONTEXT + SLOTS)).reshape(2, -1) % 64
SLOT_MASK = (torch.arange(CONTEXT + SLOTS) >= CONTEXT).expand(2, -1)


def fill_adapter(peft_model: torch.nn.Module) -> None:
    """Set all LoRA weights to random numbers far from zero, instead of training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def gated(model: PreTrainedModel, **settings: Any) -> tuple[PeftModel, Gate]:
    peft_model, gate = add_gated_lora(model, LoraSettings(**{"rank": 4, **settings}))
    fill_adapter(peft_model)
    return peft_model, gate


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: Tensor = INPUT_IDS) -> Tensor:
    return model(input_ids).logits
