from __future__ import annotations

import torch
from support.tiny_models import ARCHITECTURES, tiny_model
from torch import nn

from step_floor import Linears


def test_each_form_multiplies_by_every_weight_once() -> None:
    model = tiny_model(ARCHITECTURES["llama"]()).to(torch.bfloat16)
    multiplications = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    linears = Linears(model)
    for form in linears.forms:
        assert linears.multiplications(form) == multiplications
        assert linears.seconds(form, rows=3) > 0
    assert linears.best_form(3) in linears.forms
