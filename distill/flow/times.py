"""The times that few-step sampling visits. No torch."""


def sampler_times(nfe: int) -> list[float]:
    """Times 0 = t_0 < .. < t_N = 1 of a sampler of N = `nfe` jumps: n / N, but 0, 3/4, 1 for two.

    Early errors are stretched where the teacher's paths part, and a second jump from 1/2 is as
    steep as one from 0. From 3/4 it is easy, and it is the last jump of the sampler of four too.
    Measured on three teachers: docs/log.md.
    """
    return [0.0, 0.75, 1.0] if nfe == 2 else [n / nfe for n in range(nfe + 1)]


# Network evaluations of one step of a solver; "jumps" are those of a student's own map G.
NFE_PER_STEP = {"euler": 1, "heun": 2, "rk4": 4, "jumps": 1}
