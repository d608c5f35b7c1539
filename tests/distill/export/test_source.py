"""The source of a class that stands alone: the same output, and nothing of this package needed."""

import subprocess
import sys

import pytest
import torch

from distill.config import ImageSpec
from distill.export.source import standalone
from distill.testing import NETWORKS, random_network

USE = """
import sys
from types import SimpleNamespace

network = {name}(SimpleNamespace(**{settings}), ImageSpec(1, 8, 3))
network.load_state_dict(torch.load("state.pt"))
given = torch.load("given.pt")
torch.save(network(*given), "found.pt")
assert not {{"distill", "jaxtyping", "omegaconf"}} & sys.modules.keys()
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_runs_alone_from_its_source(name, tmp_path):
    image = ImageSpec(1, 8, 3)
    network = random_network(name, image).float()
    source = standalone(ImageSpec, type(network))
    settings = vars(NETWORKS[name])
    text = "\n".join(
        [
            "from __future__ import annotations",
            source.imports,
            source.body,
            USE.format(name=type(network).__name__, settings=settings),
        ]
    )
    (tmp_path / "alone.py").write_text(text)
    given = (torch.randn(3, 1, 8, 8), torch.rand(3), torch.ones(3), torch.tensor([0, 2, -1]))
    torch.save(given, tmp_path / "given.pt")
    torch.save(network.state_dict(), tmp_path / "state.pt")
    subprocess.run([sys.executable, "-I", "alone.py"], cwd=tmp_path, check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "found.pt"), network(*given))
    defined = [line for line in source.body.splitlines() if line.startswith(("class ", "def "))]
    assert len(defined) == len(set(defined))
