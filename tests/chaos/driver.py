"""The command line in a process of its own, for tests to kill: `python driver.py VERB RUN`.

`run` ends after the training; an evaluation would add nothing but time.

Its teacher workers are the real ones and more: they count their velocity evaluations in
`beats/PID`, one byte each, and one that finds its shard in `doom/SHARD` ends itself by kill -9 at
the point that the file names. `struck/SHARD` then says that, and when, it did. The points "no room"
and "little memory" do not end it: its files, or its addresses, are limited from then on.
"""

import os
import resource
import signal
from pathlib import Path

import ray

from cluster.cli import main as cli
from cluster.pool import pool
from cluster.pool.worker import TeacherWorker
from cluster.supervisor import runner, stages
from distill.data import shards

LITTLE_MEMORY = 100_000_000  # bytes more than it has


class DoomedWorker(TeacherWorker):
    """A teacher worker that dies where it is told. Of a GPU it takes Ray's word, and no use."""

    def __init__(self, config, run, spec, device):
        assert len(ray.get_gpu_ids()) == (device == "cuda")
        super().__init__(config, run, spec, "cpu")

    def produce(self, shard):
        """As the worker does, up to the point of its death."""
        folder = self._run.root.parent
        self._beats = os.open(folder / f"beats/{os.getpid()}", os.O_CREAT | os.O_APPEND | os.O_RDWR)
        self._point, self._left = "", 3
        self._struck = folder / f"struck/{shard:08d}"
        try:
            doom = folder / f"doom/{shard:08d}"
            self._point = doom.read_text()
            doom.rename(self._struck)  # once: the next worker lives
        except FileNotFoundError:
            pass
        match self._point:
            case "writing":
                self._die_in_the_middle_of_the_tar()
            case "named" | "published":
                self._die_after_the_name(".tar" if self._point == "named" else ".json")
            case "no room":
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
                os.utime(self._struck)
            case "little memory":
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + LITTLE_MEMORY
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        result = super().produce(shard)
        if self._point == "reporting":
            self._die()
        return result

    def _beat(self):
        super()._beat()
        os.write(self._beats, b".")
        self._left -= 1
        if self._point == "generating" and self._left == 0:
            self._die()

    def _die(self):
        os.utime(self._struck)
        os.kill(os.getpid(), signal.SIGKILL)

    def _die_in_the_middle_of_the_tar(self):
        die = self._die

        class Writer(shards.TarWriter):
            num_written = 0

            def write(self, sample):
                size = super().write(sample)
                self.num_written += 1
                if self.num_written == 8:
                    die()
                return size

        shards.TarWriter = Writer

    def _die_after_the_name(self, ending):
        link = os.link

        def link_and_die(source, name, **options):
            link(source, name, **options)
            if str(name).endswith(ending):
                self._die()

        os.link = link_and_die


if __name__ == "__main__":
    pool.TeacherWorker = DoomedWorker
    runner.run = lambda config: runner.supervise(config, stages.distil)
    cli.main()
