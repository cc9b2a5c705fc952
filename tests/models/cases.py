"""Tiny random models of every family, made by transformers in torch: what ours are compared with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from jaxrft import models
from tests.models.configs import CASES, SHAPE


@dataclasses.dataclass(frozen=True)
class Case:
    """One model three times: in torch, as a folder, and ours."""

    name: str
    torch_model: PreTrainedModel
    folder: Path
    model: models.Decoder


def make_case(name: str, folder: Path) -> Case:
    fields = {**SHAPE, **CASES[name]}
    torch_model = make_torch_model(fields)
    torch_model.save_pretrained(folder)
    # transformers writes its newest spelling: put back what this case spells otherwise.
    path = folder / "config.json"
    written = json.loads(path.read_text())
    if "rope_theta" in fields:
        del written["rope_parameters"]
    path.write_text(json.dumps({**written, **fields}))
    return Case(name, torch_model, folder, models.load(folder))


def make_torch_model(fields: dict[str, Any]) -> PreTrainedModel:
    """A random model whose biases are not zero and whose norm scales are not one."""
    torch.manual_seed(len(json.dumps(fields)))
    config = CONFIG_MAPPING[fields["model_type"]].from_dict(json.loads(json.dumps(fields)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.3 if name.endswith("bias") else 0.15)
            parameter.copy_(center + spread * torch.randn_like(parameter))
    return model
