"""metrics.jsonl: lines of this version, of older and of newer ones."""

import json

from distill.run.files import RunDir
from distill.run.measured import TAIL_BYTES, Metrics, append_metrics, last_step, read_metrics

LINE = (
    '{"time": 5.0, "step": 10, "loss": 0.5, "terms": {"output": 0.25}, "lr": 0.001, '
    '"grad_norm": 1.5, "samples_per_s": 50.0, "step_s": 0.25, "phases_s": {"data": 0.125}, '
    '"data_wait_fraction": 0.1, "flops_per_s": 4000000000.0, "mfu": 0.125, '
    '"peak_memory_bytes": 3000, "world_size": 2}\n'
)


def test_a_line_is_written_as_ever(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.write_text(LINE)
    (line,) = read_metrics(run)
    assert (line.step, line.terms, line.mfu, line.world_size) == (10, {"output": 0.25}, 0.125, 2)
    append_metrics(run, line)
    assert run.metrics.read_text() == 2 * LINE
    append_metrics(run, Metrics(1, time=0.0))
    assert "mfu" not in json.loads(run.metrics.read_text().splitlines()[2])


def test_what_older_versions_did_not_note_is_none_and_what_callbacks_note_is_kept(tmp_path):
    run = RunDir(tmp_path)
    lines = ['{"time": 1, "step": 2}', '{"time": 2, "step": 4, "colour": "red"}']
    run.metrics.write_text("\n".join([*lines, '{"time": 3}', '{"time": 4, "st']))
    assert list(read_metrics(run)) == [
        Metrics(2, time=1.0),
        Metrics(4, more={"colour": "red"}, time=2.0),
    ]
    assert last_step(run.metrics) == 4


def test_the_last_step_is_that_of_the_last_line_however_long_the_file(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.write_text(3 * TAIL_BYTES * " " + "\n" + LINE)
    assert last_step(run.metrics) == 10
