"""A real Slurm of four nodes on this machine, and runs submitted to it, both of which are in
benchmarks/slurm/cluster.py.

Missing packages are installed where that needs no password (MINISLURM_INSTALL=0: never). Without
them the tests are skipped, and say what was not tested.
"""

import subprocess

import pytest

from benchmarks.slurm.cluster import MINI, Case, Cluster


def pytest_addoption(parser):
    words = "every case meets a Slurm that often does not answer, or oddly; which calls, SEED says"
    parser.addoption("--moody", metavar="SEED", default="", help=words)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A cluster of four nodes with four pretended cores each."""
    install = subprocess.run([MINI, "install"], stderr=subprocess.PIPE, text=True)
    if install.returncode:
        pytest.skip(f"NOT TESTED, the Slurm jobs of a run: {install.stderr.strip()}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    with cluster.started():
        yield cluster


@pytest.fixture
def submitted(slurm, tmp_path, request):
    """Makes runs on the cluster; their jobs end with the test."""
    made, seed = [], request.config.getoption("--moody", default="")

    def make(*settings):
        folder = tmp_path / str(len(made))
        folder.mkdir()
        mood = f"{seed} {request.node.name} {len(made)}" if seed else ""
        made.append(Case(slurm, folder, *settings, mood=mood))
        return made[-1]

    yield make
    for case in made:
        case.close()
