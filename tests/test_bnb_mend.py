"""The switch that keeps 4-bit weights as loaded is set on every module that has it, or loading is refused."""

import pytest

from lora_kit.bnb_mend import keep_4bit_weights_intact
from lora_kit.errors import RefusedError


def make_model(repacked: bool = False):
    import torch

    class FourBit(torch.nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.support_avx512bf16_for_cpu = True

    model = torch.nn.Sequential(FourBit(), torch.nn.Linear(4, 4), torch.nn.Sequential(FourBit()))
    state = type("State", (), {"packing_format_for_cpu": repacked})()
    model[0].weight.quant_state = state
    return model


def test_every_module_with_the_switch_is_told():
    model = make_model()
    assert keep_4bit_weights_intact(model) == 2
    assert not model[0].support_avx512bf16_for_cpu and not model[2][0].support_avx512bf16_for_cpu
    assert "support_avx512bf16_for_cpu" not in vars(model[1])


def test_a_repacked_model_is_refused_by_module():
    with pytest.raises(RefusedError, match="^0: its 4-bit weights were repacked"):
        keep_4bit_weights_intact(make_model(repacked=True))
