"""What --help prints. Text only, so that it is there at once."""

from __future__ import annotations

GENERAL = """bowstring VERB [...]: distils a rectified-flow image model into a student of 1-4 steps.

  run        the main job: teacher -> trajectories -> train -> evaluate -> report; resumes
  pretrain   trains a rectified-flow teacher
  generate   one stage alone: trajectory shards
  train      one stage alone: the student
  evaluate   one stage alone: results.json and report.html
  sample     pictures from a trained student
  export     a student as safetensors + json, or trajectories for FastGen
  submit     the Slurm jobs of a run
  scale      the number of teacher workers of a live run
  stop       saves a live run and ends it, its Slurm jobs too
  status     progress, speed, backlog, leases, checkpoints
  verify     proves from files that nothing is lost, doubled or corrupt
  estimate   pairs, bytes, device-hours and cost, before anything runs
  doctor     what is installed here and what works

  bowstring VERB --help says more. First steps:
    bowstring doctor
    bowstring run experiment=digits
    bowstring status runs/digits
"""

SETTINGS = """
Settings (Hydra):
  experiment=NAME    digits, fashion, ...: an unknown one lists all; or a file of your own, found
                     by --config-dir FOLDER
  group=option       objective=bezier, student=unet; groups: data student teacher objective
                     train eval cluster
  key=value          train.max_steps=100, teacher.pretrained.guidance=2.0
  run.dir=FOLDER     where the run lives; runs/<name> otherwise
  --force-new NAME   a new run NAME instead of the one that settings or folder name
  --multirun         one run per combination: --multirun experiment=digits seed=0,1,2
  hydra/launcher=NAME  with --multirun: the runs as jobs of a launcher of Hydra, such as
                     submitit_slurm (slurm/README.md)
  --cfg job          prints the composed settings and stops
  --hydra-help       all of Hydra's flags
  -sc install=bash   completion: eval "$(bowstring run -sc install=bash)"
"""

STAGE = """
  bowstring {verb} experiment=digits
  bowstring {verb} runs/digits                      the settings that run was started with
  bowstring {verb} runs/digits {example}
"""

VERBS = {
    "run": """bowstring run experiment=NAME [settings]
bowstring run RUN [key=value ...]

Does all of a run: trains the teacher unless there is one, samples its trajectories into shards
while the student already trains on them, evaluates, and writes results.json and report.html. The
same command again goes on where the last one stopped, also after a kill; finished work is
recognised.

  --no-evaluation    leaves evaluation and report to `bowstring evaluate`

  bowstring run experiment=digits
  bowstring run experiment=digits objective=bezier train.max_steps=100
"""
    + SETTINGS,
    "pretrain": """bowstring pretrain experiment=NAME [settings]
bowstring pretrain RUN [key=value ...]

Trains the rectified-flow teacher of a run on real images, into RUN/teacher/models.
"""
    + STAGE.format(verb="pretrain", example="pretrain.train.log_every=50")
    + SETTINGS,
    "generate": """bowstring generate experiment=NAME [settings]
bowstring generate RUN [key=value ...]

Samples teacher trajectories into RUN/shards, all that the training steps will read. The teacher
must be there.
"""
    + STAGE.format(verb="generate", example="cluster.teachers.num_workers=4")
    + SETTINGS,
    "train": """bowstring train experiment=NAME [settings]
bowstring train RUN [key=value ...]

Trains the student on the shards in RUN/shards; waits for those that are still being made.
"""
    + STAGE.format(verb="train", example="train.max_steps=1600")
    + SETTINGS,
    "evaluate": """bowstring evaluate RUN [key=value ...]

Evaluates the last verified checkpoint against its teacher; writes RUN/results.json and
RUN/report.html.

  bowstring evaluate runs/digits
  bowstring evaluate runs/digits eval.num_samples=10000 eval.nfe=[1,2,4]
""",
    "sample": """bowstring sample RUN [--nfe N] [--seed S] [--labels L,L,...] [--num N]
                     [--out FOLDER]

Draws pictures from the last verified checkpoint: a PNG grid and an npz with the arrays.

  --nfe N        network evaluations per picture (default 1)
  --seed S       the same seed gives the same noise (default 0)
  --labels L,..  classes, repeated in turn; -1 is "none" (default: drawn from the seed)
  --num N        pictures (default 64)
  --out FOLDER   default RUN/samples

  bowstring sample runs/digits --nfe 2 --labels 0,1,2,3 --num 16
""",
    "export": """bowstring export RUN [--out FOLDER] [--average NAME]
bowstring export RUN --format fastgen [--out FOLDER]

Writes the student of the last verified checkpoint as model.safetensors + model.json;
`distill.sample.load_student(FOLDER)` opens it.

With --format fastgen: writes the best teacher's trajectories in all committed shards as WebDataset
shards with FastGen's keys, latent.pth noise.pth path.pth. The same command again goes on where the
last one stopped.

  --format NAME    student (default) or fastgen
  --out FOLDER     default RUN/student or RUN/fastgen
  --average NAME   which average of the weights: evaluation (default)

  bowstring export runs/digits --out student
  bowstring export runs/digits --format fastgen
""",
    "submit": """bowstring submit experiment=NAME cluster=slurm [settings] [--dry-run]
bowstring submit RUN [key=value ...]

Submits the Slurm jobs of a run, with a site's settings from cluster.slurm: the trainer, a job array
of teachers, and the evaluation after it. The same command again does nothing while the trainer's
job waits or runs; otherwise it submits what the run still needs. Scripts, logs and job ids are in
RUN/slurm. slurm/README.md tells the rest.

  --dry-run    prints the scripts; submits and writes nothing

  bowstring submit experiment=digits cluster=slurm cluster.slurm.train.partition=gpu
  bowstring submit --config-dir ~/sites experiment=digits cluster=mysite --dry-run
"""
    + SETTINGS,
    "scale": """bowstring scale RUN N

Sets the number of teacher workers of a live run, from any shell that sees its folder. The run
follows within seconds. Workers that are too many finish their shard first; 0 pauses the production.
The next start takes cluster.teachers.num_workers again.

Of a run on Slurm it also sets how many tasks of the teachers' job array run; that stays until the
next `submit`.

  bowstring scale runs/digits 4
""",
    "stop": """bowstring stop RUN

Ends a live run at its next step; the trainer saves first. The command that started it goes on from
there. Of a run on Slurm it ends all jobs, from any machine that has Slurm's commands; of another
one the process that was started on this machine.

  bowstring stop runs/digits
""",
    "status": """bowstring status RUN [--json] [--watch [SECONDS]]

Progress, speed, backlog, leases, disk use, quarantines and the last whole checkpoint, from the
run's files only.

  --json             one JSON object
  --watch [SECONDS]  again every few seconds (default 2) until Ctrl-C

  bowstring status runs/digits --watch
""",
    "verify": """bowstring verify RUN [--json]

Audits shards, ledger, checkpoints and consumption from files. Exit code 1 on any loss, duplicate or
corruption.

  bowstring verify runs/digits --json
""",
    "estimate": """bowstring estimate experiment=NAME [settings] [--json] [--flops FLOP_PER_SECOND]
bowstring estimate RUN [key=value ...]

What a run will cost, before it starts: pairs, shards, bytes, network evaluations, parameters, FLOP,
device-hours, cost. Counts and bytes are exact; FLOP are a formula; hours follow from an assumed
speed per device.

  --json         one JSON object
  --flops F      assumed FLOP/s of one device (default: cluster.device_flops)

  bowstring estimate experiment=fashion
  bowstring estimate experiment=fashion --flops 1e14 cluster.device_cost_per_hour=3
"""
    + SETTINGS,
    "doctor": """bowstring doctor [--json] [--dir FOLDER]

What is installed, which accelerator and collective backends work, cores, memory, shared memory,
free ports, and whether the file system below FOLDER (default runs) can rename, link, lock and sync
as a run needs. Exit code 1 if not.
""",
}
