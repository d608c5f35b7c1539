"""Settings of the evaluation. No torch."""

from dataclasses import dataclass, field

from distill.config import check, check_choice, check_positive


@dataclass
class ExtractorConfig:
    """The features behind the Fréchet and kernel distances."""

    name: str = "pixels"  # pixels | inception
    weights: str = ""  # file, for inception

    def __post_init__(self) -> None:
        check_choice("eval.extractor.name", self.name, ("pixels", "inception"))


@dataclass
class EvalConfig:
    """Evaluation of a finished student."""

    num_samples: int = 2000  # drawn by each sampler that is measured
    seed: int = 12345  # of their noise; not the run's
    labels: str = "data"  # as often as in the real images: data; or each as often: uniform
    batch_size: int = 500  # drawn at once
    # Network evaluations a picture at which the student is measured
    nfe: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 8])
    # At which the teacher is, by its own solver
    teacher_nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    # At which it is by Euler's method
    euler_nfe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    reference_steps: int = 32  # Heun steps of the teacher's fine solution, the truth
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)

    def __post_init__(self) -> None:
        check_positive(
            "eval",
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            reference_steps=self.reference_steps,
        )
        check_choice("eval.labels", self.labels, ("data", "uniform"))
        check(
            all(n > 0 for n in [*self.nfe, *self.teacher_nfe, *self.euler_nfe]),
            "eval.nfe, eval.teacher_nfe and eval.euler_nfe must be above 0",
        )
