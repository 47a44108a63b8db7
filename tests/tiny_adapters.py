"""LoRA adapters with random weights on tiny models, as PEFT writes them, and PEFT's own answers to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

TARGETS = {"gpt2": ["c_attn", "c_proj"]}  # of families whose projections have other names
SMALL = {"target_modules": ["q_proj", "v_proj"]}
LARGE = {
    "r": 6,
    "lora_alpha": 9,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "use_rslora": True,
    "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.k_proj": 5},
    "alpha_pattern": {"up_proj": 16},
}


def tiny_adapter(base: Path, folder: Path, seed: int = 0, size: float = 0.3, **settings: Any) -> Path:
    """Save an adapter on the model in `base`; returns `folder`. size: of B, as a share of PEFT's usual numbers."""
    chosen = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": False, **SMALL} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**chosen)
        )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= size
    model.save_pretrained(folder)
    rewrite(folder, init_lora_weights=True)  # as training leaves it
    return folder


def rewrite(folder: Path, **settings: Any) -> None:
    """Change what an adapter's configuration says."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def reweigh(folder: Path, change: Any) -> None:
    """Change an adapter's weights."""
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def peft_logprobs(base: Path, adapter: Path | None, ids: list[int], merge: bool = False) -> Tensor:
    """(N, V) of PEFT's own float32 forward; adapter: None is the model's own."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
        model = model.merge_and_unload() if merge else model
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(dim=1)  # type: ignore[no-any-return]
