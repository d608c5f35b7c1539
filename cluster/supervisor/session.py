"""What a supervisor holds while it works: the run's lock, Ray, stop signals, and a scratch folder.

Ray is started on this machine only when a stage needs it, and all of it ends with this process,
however it ends: Ray's daemons are its children and die with it, and workers die with the daemons.
A daemon that dies alone would leave the supervisor waiting for answers, so it looks after them.
"""

import hashlib
import logging
import math
import os
import resource
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.ray_constants

from cluster.plan.placement import most_workers
from cluster.settings.schema import RunConfig
from cluster.state.lock import held
from cluster.supervisor.progress import StageBars
from distill.config import ConfigError, check
from distill.run import logs
from distill.run.files import RunDir

JOIN_PERIOD_S = 0.5
LONGEST_TEMP = 27  # characters; Ray's socket paths below it must stay under 107
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # what a rank prints is in its log, once
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # Slurm's signals say it; a process less
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
}


ANSWER_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
TOKEN = secrets.token_hex(32)  # Ray reads it once in a process
START_TRIES = 3
ROOM_BYTES = 50 * 10**6  # that Ray's files take
DAEMONS = ("gcs_server", "raylet")  # Ray's processes without which none of its calls ends

# A token of the environment goes before the file; a Ray that starts asks for one by its mode
OF_LOCAL_RAY = (
    "RAY_AUTH_TOKEN_PATH",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_MODE",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """A signal asked for an end; the state is saved. No library catches it with its Exceptions."""


class Session:
    """One supervisor's hold on one run."""

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        self.config, self.run = config, run
        self.bars = StageBars()
        self.scratch = run.root / ".ray"  # Ray Train's own files; on a file system all nodes see
        self.stop_signal = 0
        self.unsaved = ""  # why the ranks of a training that was stopped have not saved
        self._stops_at_once = False
        self._daemons: dict[str, psutil.Process] = {}
        self._before: dict[str, str | None] = {}  # of the environment, while a local Ray runs
        # Short, and the same for every start of this run, so nothing piles up after kills.
        digest = hashlib.sha256(str(run.root).encode()).hexdigest()[:8]
        base = tempfile.gettempdir()
        self._ray_temp = Path(base if len(base) <= LONGEST_TEMP else "/tmp") / f"bow-{digest}"

    def start_ray(self) -> None:
        """Starts Ray, or joins the cluster at `cluster.address`, unless that is done.

        Raises:
            Stopped: a signal came meanwhile; nothing is under way yet.
            ConfigError: the cluster has less than the run asks for.
        """
        if ray.is_initialized():
            return
        logs.begin(self.run)
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Ray Train gives up a rank that does not answer for as long as a step may take: one that is
        # frozen whole cannot say so itself (`cluster.trainer.watchdog`).
        os.environ[ANSWER_TIMEOUT] = f"{self.config.cluster.trainer.step_timeout_s:g}"
        logging.getLogger("ray").setLevel(logging.ERROR)
        raise_file_limit()
        with self.stopping_at_once():
            try:
                self._initialize_ray()
            except SystemExit:  # Ray has a handler of its own from somewhere in there
                self.stop_signal = signal.SIGTERM
            finally:
                self._take_signals()
        missing = self._missing()
        check(
            not missing or self.stop_signal != 0,
            "the cluster has too little for this run: "
            + "; ".join(missing)
            + "; ask for less with "
            "cluster.teachers.* and cluster.trainer.*, or add nodes" + hidden_gpus(missing),
        )

    def _initialize_ray(self) -> None:
        """Joins the cluster that is named, or starts one here."""
        address = self.config.cluster.address
        if address:
            check(
                address != "auto" or os.environ.get("RAY_ADDRESS", "") != "",
                "cluster.address=auto is the Ray cluster that RAY_ADDRESS names, and that is not "
                "set; a Slurm job sets it (`bowstring submit`), and cluster.address= starts Ray on "
                "this machine",
            )
            mend_token()
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            self._try_local_ray()

    def _missing(self) -> list[str]:
        """What the cluster lacks. Nodes of a Slurm job join one after the other: these wait."""
        slurm = self.config.cluster.slurm
        deadline = time.monotonic() + (slurm.patience_s if slurm else 0)
        while True:
            missing = missing_resources(self.config, ray.cluster_resources())
            if not missing or self.stop_signal or time.monotonic() >= deadline:
                return missing
            time.sleep(JOIN_PERIOD_S)

    def _try_local_ray(self) -> None:
        """Starts Ray here. A raylet gives up when its agents need more than 15 s to start, as on a
        busy machine; the next try finds their files in memory.

        Raises:
            ConfigError: there is no place for its files, or no shared memory.
            ConnectionError: it did not start, nor the tries before.
        """
        if words := check_shared_memory(self.config.cluster.object_store_bytes):
            self.bars.say(words)
        for left in reversed(range(START_TRIES)):
            try:
                return self._start_local_ray()
            except ConfigError:
                raise
            except Exception as error:  # Ray raises bare ones
                ray.shutdown()
                if self.stop_signal or not left:
                    load, cores = os.getloadavg()[0], os.cpu_count()
                    raise ConnectionError(
                        f"Ray did not start on this machine in {START_TRIES - left} tries "
                        f"({str(error).strip().splitlines()[-1]:.200}); its load is {load:.1f} on "
                        f"{cores} cores. Try again when less is going on here, or ask for fewer "
                        "workers; `bowstring doctor` looks at memory, ports and shared memory"
                        + self.ray_words()
                    ) from error

    def _start_local_ray(self) -> None:
        cluster = self.config.cluster
        teachers, trainer = most_workers(cluster) or 0, cluster.trainer.max_workers
        # Room for what `bowstring scale` may ask for; the system shares out the cores.
        cpus = (
            teachers * cluster.teachers.cpus_per_worker + trainer * cluster.trainer.cpus_per_worker
        )
        gpus = cluster.teachers.gpus_per_worker + cluster.trainer.gpus_per_worker
        self._guard()
        ray.init(
            address="local",  # whatever cluster RAY_ADDRESS names
            num_cpus=max(1, math.ceil(cpus)),
            num_gpus=None if gpus > 0 else 0,
            resources={"teacher": float(teachers), "trainer": float(trainer)},
            include_dashboard=False,
            object_store_memory=cluster.object_store_bytes,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=str(self._ray_temp / "ray"),
        )
        children = psutil.Process().children()
        self._daemons = {c.name(): c for c in children if c.name() in DAEMONS}

    def _guard(self) -> None:
        """Whoever may join or look at the Ray of this machine is this user, with a token.

        Ray makes its own folders everybody's, so they lie in one that is not.

        Raises:
            ConfigError: the temporary folder takes no file.
        """
        shutil.rmtree(self._ray_temp, ignore_errors=True)
        token = self._ray_temp / "token"
        try:
            self._ray_temp.mkdir(mode=0o700)
            with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(TOKEN)
            free = shutil.disk_usage(token).free
            problem = "" if free >= ROOM_BYTES else f"{free:,} bytes left of {ROOM_BYTES:,}"
        except OSError as error:
            problem = str(error.strerror)
        check(
            not problem,
            f"cannot write to {self._ray_temp}, where Ray's files lie ({problem}); make room "
            "there, or name another folder by TMPDIR=FOLDER, with a short name",
        )
        self._before = self._before or {key: os.environ.pop(key, None) for key in OF_LOCAL_RAY}
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        # Ray's word for "this machine is the cluster": its servers listen on loopback.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False

    def _unguard(self) -> None:
        """Gives this process the environment back that it had: its children may be of a cluster."""
        before, self._before = self._before, {}
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        if before:
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = True

    def _end_daemons(self) -> None:
        """Ends what a start that was broken off has left."""
        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if child.name() in DAEMONS:
                    child.kill()
                    child.wait(JOIN_PERIOD_S)

    def nodes(self) -> list[dict[str, Any]]:
        """What Ray says of each node, dead ones too."""
        return list(ray.nodes())

    def lost_daemon(self) -> str:
        """Name of a daemon of the Ray started here that has died; "" as long as all live."""
        return next((name for name, child in self._daemons.items() if not is_alive(child)), "")

    def ray_words(self) -> str:
        """What to add to an error of the Ray started here: where the last of its own logs is kept
        from now on; "" if nowhere.
        """
        kept = logs.keep_ray(self.run, self._ray_temp / "ray" / "session_latest")
        return f"; Ray's own words are in {kept}" if kept else ""

    def stop_ray(self) -> None:
        """Ends a Ray started here; leaves a cluster."""
        if ray.is_initialized():
            ray.shutdown()
            self._daemons = {}
            self._take_signals()  # Ray leaves SIGTERM to the system, behind Python's back
        if not self.config.cluster.address:
            self._end_daemons()
            shutil.rmtree(self._ray_temp, ignore_errors=True)
            self._unguard()

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Around work in this process that can be made again: a stop signal raises Stopped in it.

        Elsewhere a signal is noted in `stop_signal`, for the loop that watches the trainer.
        """
        self._take_signals()
        self._stops_at_once = True
        try:
            yield
        finally:
            self._stops_at_once = False
        if self.stop_signal:  # it came at a moment when Python drops exceptions
            raise Stopped

    def _take_signals(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        again = number == signal.SIGINT and self.stop_signal == signal.SIGINT
        self.stop_signal = number
        if self._stops_at_once:
            raise Stopped
        if again:
            raise KeyboardInterrupt


def mend_token() -> None:
    """Makes the token of a cluster that is joined this user's alone.

    Raises:
        ConfigError: others can read it, and it is not this user's to change.
    """
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    with suppress(FileNotFoundError):
        if path.stat().st_mode & 0o077:
            try:
                path.chmod(0o600)
            except OSError as error:
                raise ConfigError(
                    f"{path} lets others join the cluster: they can read it, and its mode cannot "
                    f"be changed ({error.strerror}); name another file by RAY_AUTH_TOKEN_PATH, of "
                    "mode 600"
                ) from error


SHARED_MEMORY = Path("/dev/shm")
LARGE_STORE_BYTES = 10 * 10**9  # from here on Ray refuses a slow store


def check_shared_memory(store_bytes: int) -> str:
    """What is to be said of the memory in which Ray keeps objects; "" if there is enough.

    Raises:
        ConfigError: there is none, or much too little: Ray would fail in words of its own.
    """
    way = f"in a container start it with --shm-size, elsewhere mount a tmpfs at {SHARED_MEMORY}"
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        raise ConfigError(
            f"Ray needs {SHARED_MEMORY}, and that cannot be used ({error.strerror}); {way}"
        ) from error
    if free >= store_bytes:
        return ""
    lacks = (
        f"{SHARED_MEMORY} has {free:,} bytes free of the {store_bytes:,} of "
        f"cluster.object_store_bytes; {way}"
    )
    check(store_bytes < LARGE_STORE_BYTES, lacks)
    return f"{lacks}. Until then Ray's objects lie in {tempfile.gettempdir()}, which is slower"


FILES = 1024  # that Ray wants to have open


def raise_file_limit() -> None:
    """Lets this process and its children open as many files as the system lets them.

    Raises:
        ConfigError: that is too few for Ray, which would fail in words of its own.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    check(
        soft == resource.RLIM_INFINITY or soft >= FILES,
        f"this shell lets a process open {soft} files, and Ray needs {FILES}: raise the limit "
        f"(ulimit -Hn, /etc/security/limits.conf)",
    )


def hidden_gpus(missing: list[str]) -> str:
    """In words, why there may be fewer GPUs than the machine has."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not any(words.startswith("GPU") for words in missing):
        return ""
    return f"; CUDA_VISIBLE_DEVICES='{visible}' shows this process no more: unset it, or name them"


def is_alive(process: psutil.Process) -> bool:
    """Whether a child of this process is at work. A dead one stays as a zombie until waited for."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def open_session(config: RunConfig, run: RunDir) -> Iterator[Session]:
    """A session under the run's lock.

    A Slurm job waits for the lock: a node that was cut off goes on until it hears that Slurm has
    started the job elsewhere.

    Raises:
        ConfigError: the folder cannot be made, or another supervisor is at work on the run.
    """
    slurm = config.cluster.slurm
    with held(run, float(slurm.patience_s) if slurm else 0.0):
        session, before = Session(config, run), {n: signal.getsignal(n) for n in STOP_SIGNALS}
        shutil.rmtree(session.scratch, ignore_errors=True)
        session.scratch.mkdir()
        try:
            yield session
        finally:
            session.stop_ray()
            shutil.rmtree(session.scratch, ignore_errors=True)
            for number, handler in before.items():
                signal.signal(number, handler)


def missing_resources(config: RunConfig, available: dict[str, float]) -> list[str]:
    """What a cluster lacks for the run, in words: "GPU: 4 asked for, 2 there"."""
    trainer, teachers = config.cluster.trainer, config.cluster.teachers
    # Teachers may come later; one of them must fit now, unless they have Slurm jobs of their own.
    one = 0 if config.cluster.slurm else 1
    needed = {
        "trainer": float(trainer.min_workers),
        "CPU": trainer.min_workers * trainer.cpus_per_worker + one * teachers.cpus_per_worker,
        "GPU": trainer.min_workers * trainer.gpus_per_worker + one * teachers.gpus_per_worker,
    }
    return [
        f"{name}: {amount:g} asked for, {available.get(name, 0.0):g} there"
        for name, amount in needed.items()
        if amount > available.get(name, 0.0) + 1e-9
    ]
