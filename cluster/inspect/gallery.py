"""`bowstring gallery`: a page on this machine that shows students beside their teachers.

It listens on loopback alone, and answers who has the token of its address. Every picture of a
column starts from the same noise; what is drawn stands in the address, so a view can be kept.
"""

import errno
import secrets
import threading
import time
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch

from distill import sample
from distill.config import ConfigError, check
from distill.datasets import decode
from distill.datasets.config import DataConfig
from distill.evaluation import evaluate, sampling
from distill.flow.noise import sample_noise
from distill.flow.times import NFE_PER_STEP
from distill.report import figures, sections
from distill.run.files import RunDir
from distill.teachers.build import build_teacher
from distill.teachers.config import TeacherConfig

HOST = "127.0.0.1"
MAX_NFE, PICTURES = 8, 8


@dataclass(frozen=True)
class Wish:
    """What the page was asked for. Pictures i of a seed are those of `Student.sample`."""

    seed: int = 0
    label: int | None = None  # None: drawn from the seed
    nfe: int = 1

    @staticmethod
    def read(query: dict[str, list[str]]) -> "Wish":
        """The wish in an address. Raises ConfigError for what is none."""
        given = {}
        for name in ("seed", "label", "nfe"):
            (text,) = query.get(name, [""])[:1]
            check(text.lstrip("-").isdecimal() or not text, f"{name}={text} must be a whole number")
            if text:
                given[name] = int(text)
        wish = Wish(**given)
        check(1 <= wish.nfe <= MAX_NFE, f"nfe={wish.nfe} must be between 1 and {MAX_NFE}")
        check(0 <= wish.seed < 2**63, f"seed={wish.seed} must be at least 0")
        return wish


@dataclass(frozen=True)
class Row:
    """Pictures of one sampler, PNG as data: URIs, and what one took, seconds."""

    label: str
    images: list[str]
    seconds: float


class Exhibit:
    """A run's student and its best teacher."""

    def __init__(self, run: RunDir, data: DataConfig, settings: TeacherConfig) -> None:
        """`data` and the best teacher's `settings` are the run's.

        Raises:
            ConfigError: no checkpoint yet, no teacher any more, or latents that nothing decodes.
        """
        self.name = run.root.name
        self.student = sample.load_student(run.root)
        device, image = self.student.device, self.student.image
        to_pictures = decode.to_pictures(data, device)
        check(
            image.is_picture or to_pictures is not None,
            f"{run.root} works in latents, and nothing decodes them: its data.autoencoder is empty",
        )
        self.to_pictures = to_pictures or sample.to_uint8
        self.settings = settings
        teacher = build_teacher(settings, device)
        self.teacher = evaluate.teacher_samplers(teacher, settings, sampling.Interrupt())
        self._lock = threading.Lock()

    def rows(self, wish: Wish) -> list[Row]:
        """The teacher, the student, and the teacher stopped as early as the student.

        Raises:
            ConfigError: a class that the student has not.
        """
        ids, image = np.arange(PICTURES), self.student.image
        noise = torch.from_numpy(sample_noise(wish.seed, ids, image.shape))
        labels = sample.choose_labels(wish.label, image, wish.seed, ids)
        solver, nfe = self.settings.solver, wish.nfe
        fine = self.settings.steps * NFE_PER_STEP[solver]
        coarse = "jumps" if solver == "jumps" else "euler"
        network, middle = self.student.network, self.student.middle
        samplers = {
            f"teacher, {solver}, {counted(fine)}": self.teacher(solver, fine),
            f"student, {counted(nfe)}": sampling.student_sampler(network, nfe, middle),
        }
        if coarse == "euler" or nfe <= fine:
            samplers[f"teacher, {coarse}, {counted(nfe)}"] = self.teacher(coarse, nfe)
        with self._lock:  # one drawing at a time: seconds are those of a drawing alone
            return [self._row(name, drawn, noise, labels) for name, drawn in samplers.items()]

    def _row(
        self, name: str, sampler: sampling.Sampler, noise: torch.Tensor, labels: torch.Tensor
    ) -> Row:
        device = self.student.device
        noise, labels = noise.to(device), labels.to(device)
        sampler(noise, labels)  # what only a first call costs
        start = time.perf_counter()
        x = sampler(noise, labels).float().cpu()
        seconds = (time.perf_counter() - start) / len(x)
        pictures = self.to_pictures(x.to(device)).cpu().numpy()
        return Row(name, [figures.png_uri(picture) for picture in pictures], seconds)


def counted(nfe: int) -> str:
    """Evaluations in words."""
    return f"{nfe} evaluation{'s' if nfe > 1 else ''}"


def page(exhibits: list[Exhibit], wish: Wish, token: str) -> str:
    """The page for a wish; a run that cannot grant it has a sentence in the place of pictures."""
    shown: list[dict[str, Any]] = []
    for one in exhibits:
        try:
            shown.append({"name": one.name, "rows": one.rows(wish), "refusal": ""})
        except ConfigError as error:
            shown.append({"name": one.name, "rows": [], "refusal": str(error)})
    classes = max(one.student.image.num_classes for one in exhibits)
    template = sections.environment().get_template("gallery.html")
    return template.render(shown=shown, wish=wish, token=token, classes=classes, max_nfe=MAX_NFE)


class Handler(BaseHTTPRequestHandler):
    """Answers GET / with the token."""

    def __init__(self, exhibits: list[Exhibit], token: str, *args: Any) -> None:
        self.exhibits, self.token = exhibits, token
        super().__init__(*args)

    def do_GET(self) -> None:
        """The page, or why not."""
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        if not secrets.compare_digest(query.get("token", [""])[0].encode(), self.token.encode()):
            self._answer(HTTPStatus.FORBIDDEN, "the address needs the token that was printed")
        elif address.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, "there is one page, /")
        else:
            try:
                content = page(self.exhibits, Wish.read(query), self.token)
            except ConfigError as error:
                self._answer(HTTPStatus.BAD_REQUEST, str(error))
            else:
                self._answer(HTTPStatus.OK, content, "text/html")

    def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses have the token."""


def server(exhibits: list[Exhibit], port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server that is bound and does not serve yet, and the page's address; port 0 is a free one.

    Raises:
        ConfigError: the port is taken, or not this user's.
    """
    token = secrets.token_urlsafe(16)
    try:
        bound = ThreadingHTTPServer((HOST, port), partial(Handler, exhibits, token))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "is taken by another program" if taken else f"cannot be had ({error.strerror})"
        raise ConfigError(
            f"--port {port} {why}; name another, or leave --port out and a free one is found"
        ) from error
    return bound, f"http://{HOST}:{bound.server_port}/?token={token}"
