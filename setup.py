"""Which packages there are; everything else stands in pyproject.toml.

The YAML files and the Slurm scripts are data under names of our own: `configs` and `slurm` would
be anybody's.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["bowstring", "distill", "distill.*", "cluster", "cluster.*"]),
        "bowstring_configs",
        "bowstring_slurm",
    ]
)
