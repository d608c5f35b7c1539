"""The cost of every network by formula is what torch counts."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.config import ConfigError, ImageSpec
from distill.networks.build import build_network
from distill.networks.config import (
    DiTConfig,
    EdmUNetConfig,
    LightningDiTConfig,
    NetworkConfig,
    UNetConfig,
)
from distill.networks.cost import network_cost
from distill.testing import NETWORKS

DIT = DiTConfig(patch_size=4, width=32, depth=2, num_heads=2, mlp_ratio=2.5)
DEEP_UNET = UNetConfig(
    width=16, channel_mults=[1, 2, 3, 4], blocks_per_level=1, attention_sizes=[8, 4]
)
NCSNPP = EdmUNetConfig(width=8, channel_mults=[1, 2, 2], filter=[1.0, 3.0, 3.0, 1.0], time="flow")
CASES = {
    **{name: (config, ImageSpec(2, 8, 3)) for name, config in NETWORKS.items()},
    "dit-deep": (DiTConfig(patch_size=2, width=64, depth=4, num_heads=4), ImageSpec(1, 8, 10)),
    "dit-unconditional": (DIT, ImageSpec(3, 16, 0)),
    "unet-rgb": (UNetConfig(width=32), ImageSpec(3, 32, 10)),
    "unet-deep": (DEEP_UNET, ImageSpec(1, 32, 0)),
    "ncsnpp": (replace(NCSNPP, encoder="residual"), ImageSpec(3, 16, 0)),
    "ncsnpp-skip": (replace(NCSNPP, encoder="skip", decoder="skip"), ImageSpec(3, 16, 0)),
    "adm": (EdmUNetConfig(family="adm", width=64, channel_mults=[1, 2]), ImageSpec(3, 32, 10)),
    "lightningdit": (LightningDiTConfig(width=48, depth=2, qk_norm=True), ImageSpec(3, 16, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_flops_equal_those_that_torch_counts(case):
    config, image = CASES[case]
    network, cost = build_network(config, image), network_cost(config, image)
    assert cost.parameters == sum(parameter.numel() for parameter in network.parameters())
    x, t = torch.zeros(2, *image.shape), torch.zeros(2)
    with FlopCounterMode(display=False) as counter:
        network(x, t, t, torch.zeros(2, dtype=torch.int64))
    assert 2 * cost.flops == counter.get_total_flops()


@pytest.mark.parametrize("of", [build_network, network_cost])
def test_a_network_without_a_class_or_a_cost_is_refused(of):
    with pytest.raises(ConfigError, match="student=NetworkConfig is not a known network"):
        of(NetworkConfig(name="new"), ImageSpec(1, 8, 0))
