"""The times that few-step sampling visits. No torch."""

# Where the second of two jumps begins, for a student that was drilled on few jumps: early errors
# are stretched where the teacher's paths part, and a second jump from 1/2 is as steep as one from
# 0. From 3/4 it is easy, and it is the last jump of the sampler of four too (docs/log.md). A
# student of any jump needs it not, and takes 1/2 (docs/method.md). It stands in model.json; that of
# version 0.1 has none, and its students were drilled.
DRILLED, EVEN = 0.75, 0.5


def sampler_times(nfe: int, middle: float = EVEN) -> list[float]:
    """Times 0 = t_0 < .. < t_N = 1 of a sampler of N = `nfe` jumps: n / N, but 0, `middle`, 1 for
    two.
    """
    return [0.0, middle, 1.0] if nfe == 2 else [n / nfe for n in range(nfe + 1)]


# Network evaluations of one step of a solver; "jumps" are those of a student's own map G.
NFE_PER_STEP = {"euler": 1, "heun": 2, "rk4": 4, "jumps": 1}
