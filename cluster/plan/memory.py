"""Memory of a trainer rank at rest, by formula. No torch."""

from distill.config import TrainConfig

# Gradients that a rank reduces at once, elements. DeepSpeed's own is ten times that, and stage 3
# keeps room for all of it.
REDUCE_BUCKET = 50_000_000


def state_bytes(weights: int, train: TrainConfig, ranks: int) -> tuple[int, int]:
    """Bytes of a trainer rank at rest on its device, and offloaded to host memory, for `weights`
    trained weights on `ranks` ranks.

    In float32 and per weight: master 4, two moments 8, two averages 8. In the working precision,
    of w bytes: the network, and one more that averages are called on. P ranks share

        stage 0: nothing        2 w + 20
        stage 1, 2: the 20      2 w + 20 / P
        stage 3: all            (2 w + 20) / P + w min(1, REDUCE_BUCKET / weights)

    A step adds activations, and at stages 0 to 2 gradients of w bytes per weight, shared at stage
    2. Stage 3 needs no network for averages; DeepSpeed keeps its part of the gradients there.

    Offloading the optimizer moves the 20 to the host, with 4 for gradients in float32 and w for
    what is on its way: at stages 1 and 2 new weights, at stage 3 the rank's part of the gradients.
    Offloading the parameters moves the rank's w of weights too.
    """
    width = 4 if train.precision == "fp32" else 2
    whole, shared, bucket = 2 * width, 0, 0
    if train.zero_stage == 3:
        whole, shared, bucket = 0, 2 * width, width * min(weights, REDUCE_BUCKET)
    match train.offload:
        case "none":
            shared, host = shared + 20, 0
        case "optimizer":
            shared, host = shared // 2, 24 + width
        case _:
            shared, host = 0, 24 + 2 * width
    sharers = ranks if train.zero_stage else 1
    parts = [-(-weights * each // sharers) for each in (shared, host)]
    return weights * whole + bucket + parts[0], parts[1]


CHECKPOINT_BYTES = 20  # a trained weight: master, two moments, two averages, in float32
SAVE_S = 2.6e-9  # a byte that a rank writes, flushes and verifies (docs/benchmarks/trainer.md)


def save_seconds(weights: int, ranks: int) -> float:
    """Seconds that a save takes, as measured on one local disk; a shared one may be slower."""
    return CHECKPOINT_BYTES * weights * SAVE_S / ranks
