"""The weights of Inception behind published Fréchet distances: a file of the user's."""

from pathlib import Path
from pickle import UnpicklingError

import torch

from distill.config import ConfigError, check
from distill.run.files import sha256_file

INCEPTION_SHA256 = "6726825d"  # start of the sha256 of weights-inception-2015-12-05-6726825d.pth


def check_inception(weights: str) -> str:
    """sha256 of the file.

    Raises:
        ConfigError: it is not there, or does not hold the published weights.
    """
    wanted = f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth"
    check(
        weights != "",
        "eval.extractor.name=inception needs eval.extractor.weights: the file "
        f"{wanted} of torch-fidelity's release v0.2.0; or set eval.extractor.name=pixels",
    )
    path = Path(weights)
    check(path.is_file(), f"eval.extractor.weights={path} is not there; it must be {wanted}")
    digest = sha256_file(path)
    check(
        digest.startswith(INCEPTION_SHA256),
        f"eval.extractor.weights={path} has sha256 {digest[:8]}.., not {INCEPTION_SHA256}..; "
        f"only {wanted} gives comparable numbers",
    )
    try:  # torch-fidelity unpickles it freely; a file that torch opens safely holds tensors only
        torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ConfigError(f"eval.extractor.weights={path} holds more than tensors") from error
    return digest
