"""Teachers' arrays end with the production; `tests/slurm` has the tasks that obey."""

import threading

from cluster.slurm import jobs
from cluster.supervisor import arrays
from distill.run.files import RunDir


def test_arrays_are_released_when_shards_are_lost_even_where_slurm_forgot_one(
    tmp_path, monkeypatch
):
    run, told = RunDir(tmp_path), []

    def ask(*command):
        told.append(command)
        if command[-1] == "12":
            raise jobs.SlurmError("scontrol: Invalid job id specified")

    monkeypatch.setattr(jobs, "ask", ask)
    monkeypatch.setattr(arrays, "AGAIN_S", 0.01)
    followed = arrays.Arrays(run)
    followed.follow(True)
    assert not run.slurm.exists()  # a run without Slurm
    (run.slurm / "held").mkdir(parents=True)
    for name in ("12", "34"):
        (run.slurm / "held" / name).touch()
    followed.follow(True)
    assert (run.slurm / "made").exists() and told == []
    followed.follow(False)
    for thread in [t for t in threading.enumerate() if t.name == "release"]:
        thread.join()
    assert not (run.slurm / "made").exists()
    assert told == [("scontrol", "release", name) for name in ("12", "34", "12", "34")]
    assert [path.name for path in (run.slurm / "held").iterdir()] == ["12"]
