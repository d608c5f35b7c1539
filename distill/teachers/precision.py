"""How exactly a teacher computes (`teacher.precision`), and what it is compiled to.

    fp32  every product in float32, on a GPU too
    tf32  products with 10 bits of mantissa on a GPU that has them, everything else in float32
    bf16  products of matrices and convolutions of bfloat16, added up in float32 (torch.autocast)

In bf16 the weights of these products are kept in bfloat16. What embeds a time or a class stays
float32: 8 bits of mantissa do not tell neighbouring times apart. So do norms, which reduce in
float32 whatever they are given, and all that is outside of the network: its conversion, guidance,
and the solver's state.
"""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distill.config import check
from distill.networks.layers import check_compiler
from distill.teachers.config import TeacherConfig

PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)
EMBEDS = re.compile("^map_|embed", re.IGNORECASE)  # a part, or its class, here and in public code


def prepared(network: nn.Module, config: TeacherConfig) -> Callable[..., Any]:
    """`network`, frozen and on its device, as `config` has it computed. Changes its weights.

    Raises:
        ConfigError: its device has no bfloat16, or there is no compiler.
    """
    device = next(network.parameters()).device
    if config.precision == "bf16":
        has_it = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        check(
            has_it,
            f"teacher.precision=bf16 on {device}, which has no bfloat16; set teacher.NAME.precision"
            "=fp32, or tf32",
        )
        _to_bfloat16(network)
    if config.compile:
        check_compiler("teacher.NAME.compile")
    call = torch.compile(network) if config.compile else network

    @functools.wraps(network.forward)
    def at_precision(*inputs: Any, **named: Any) -> Any:
        is_bf16 = config.precision == "bf16"
        with (
            _tf32(config.precision == "tf32"),
            torch.autocast(device.type, torch.bfloat16, enabled=is_bf16, cache_enabled=False),
        ):
            output = call(*inputs, **named)
        return output.float() if isinstance(output, Tensor) else output

    return at_precision


def _to_bfloat16(network: nn.Module) -> None:
    """Casts the weights of products to bfloat16, but for embeddings, which compute in float32."""
    kept = set[int]()
    for name, module in network.named_modules():
        own = name.rpartition(".")[2]
        if name and id(module) not in kept and EMBEDS.search(f"{own} {type(module).__name__}"):
            module.forward = _in_float32(module.forward)
            kept |= {id(part) for part in module.modules()}
    last = getattr(network, "last_layer", None)  # our networks take their input in its dtype
    for module in network.modules():
        if isinstance(module, PRODUCTS) and id(module) not in kept and module.weight is not last:
            module.to(torch.bfloat16)


def _in_float32(forward: Callable[..., Any]) -> Callable[..., Any]:
    def plain(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    @functools.wraps(forward)
    def in_float32(*inputs: Any, **named: Any) -> Any:
        first = next(v for v in (*inputs, *named.values()) if isinstance(v, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return forward(*map(plain, inputs), **{k: plain(v) for k, v in named.items()})

    return in_float32


@contextmanager
def _tf32(is_allowed: bool) -> Iterator[None]:
    """Whether products on a GPU may round what they take to TF32; torch lets convolutions."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
