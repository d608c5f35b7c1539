"""Every verb of the command line. A new verb is a function here, and nothing elsewhere: its name is
the verb's, and its docstring the help (`cluster.cli.arguments.verb`).

The functions take the arguments as the parser read them and return an exit code. They import what
is heavy themselves, so --help is instant.
"""

from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from cluster.cli.arguments import JSON, RUN, argument, open_run, read_settings, setting_words, verb

SUPERVISED = {  # exit codes of cluster/supervisor/runner.py
    0: "done, or stopped as asked with everything saved",
    75: "stopped as asked, but the last steps were not saved; the same command goes on",
    130: "interrupted by Ctrl-C; the same command goes on",
}

# -----------------------------------------------------------------------------------------------
# Stages


def pipeline(stage: str, options: Namespace) -> int:
    """Hands each configuration to the supervisor's `stage`, or all to a launcher of Hydra."""
    from cluster.cli.sweep import launch, work
    from cluster.settings.hydra import split_launcher
    from cluster.state.done import check_all, unfinished

    settings, launcher = split_launcher(setting_words(options))
    configs = read_settings(settings)
    check_all(configs)  # refused here, before anything heavy is loaded
    if launcher:
        launch(stage, [*launcher, *settings], options.command)  # flags last: Hydra mixes none
        return 0
    configs = unfinished(configs) if stage == "run" else configs
    for config in configs:
        config.run.command = options.command
        code = work(stage, config)
        if code:
            return code
    return 0


@verb(
    argument(
        "--no-evaluation",
        action="store_true",
        help="leaves evaluation and report to `bowstring evaluate`",
    ),
    takes_settings=True,
    codes=SUPERVISED,
)
def run(options: Namespace) -> int:
    """the main job: teacher -> trajectories -> train -> evaluate -> report; resumes

    Does all of a run: trains the teacher unless there is one, samples its trajectories into
    shards while the student already trains on them, evaluates, and writes results.json and
    report.html. The same command again goes on where the last one stopped, also after a
    kill; finished work is recognised.

    examples:
      bowstring run experiment=digits
      bowstring run experiment=digits objective=bezier train.max_steps=100
      bowstring run --multirun experiment=digits seed=0,1,2
      bowstring run runs/digits
    """
    return pipeline("distil" if options.no_evaluation else "run", options)


@verb(takes_settings=True, codes=SUPERVISED)
def pretrain(options: Namespace) -> int:
    """one stage alone: the rectified-flow teacher

    Trains the rectified-flow teacher of a run on real images, into RUN/teacher/models.

    examples:
      bowstring pretrain experiment=digits
      bowstring pretrain runs/digits pretrain.train.log_every=50
    """
    return pipeline("pretrain", options)


@verb(takes_settings=True, codes=SUPERVISED)
def generate(options: Namespace) -> int:
    """one stage alone: trajectory shards

    Samples teacher trajectories into RUN/shards, all that the training steps will read. The
    teacher must be there.

    examples:
      bowstring generate experiment=digits
      bowstring generate runs/digits cluster.teachers.num_workers=4
    """
    return pipeline("generate", options)


@verb(takes_settings=True, codes=SUPERVISED)
def train(options: Namespace) -> int:
    """one stage alone: the student

    Trains the student on the shards in RUN/shards; waits for those that are still being made.

    examples:
      bowstring train experiment=digits
      bowstring train runs/digits train.max_steps=1600
    """
    return pipeline("train", options)


@verb(
    RUN,
    argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="what differs from the settings that the run was started with",
    ),
    codes=SUPERVISED,
)
def evaluate(options: Namespace) -> int:
    """one stage alone: results.json and report.html

    Evaluates the last verified checkpoint against its teacher; writes RUN/results.json and
    RUN/report.html.

    examples:
      bowstring evaluate runs/digits
      bowstring evaluate runs/digits eval.num_samples=10000 eval.nfe=[1,2,4]
    """
    run = open_run(options.run)
    from cluster.settings.file import load_config
    from cluster.supervisor.runner import evaluate as evaluate_run

    return evaluate_run(load_config(run, options.settings))


# -----------------------------------------------------------------------------------------------
# A student


def labels(text: str) -> list[int]:
    """Comma-separated classes."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"'{text}' is not a list like 0,1,2") from None


@verb(
    argument(
        "--autoencoder",
        required=True,
        metavar="FOLDER",
        help="whose latents are wanted (default: none, it must be given)",
    ),
    argument("--out", type=Path, default=Path("latents"), metavar="FOLDER", help="for the shards"),
    argument("--flips", action="store_true", help="encodes the mirrored images too"),
    takes_settings=True,
)
def encode(options: Namespace) -> int:
    """latents of an image set, once, for runs in a latent space

    Encodes the images of `data=..` into shards of latents, for `data.name=latents
    data.path=FOLDER`: to train a teacher on, and to compare with. The autoencoder is a folder
    of diffusers (AutoencoderKL, AutoencoderTiny), or NAME_encoder.pth and NAME_decoder.pth of
    the TAESD family. The same command again goes on where the last one stopped.

    examples:
      bowstring encode data=folder data.path=pictures --autoencoder taef2 --out latents
      bowstring encode data=imagenet256 data.path=ILSVRC --autoencoder sd-vae --out latents --flips
    """
    import sys

    from distill.datasets import encode as encoding

    (config,) = read_settings(["experiment=digits", *setting_words(options)])

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    about = encoding.encode(config.data, options.autoencoder, options.out, options.flips, say)
    print(options.out)
    print(
        f"data.name=latents data.path={options.out} data.channels={about.channels} "
        f"data.size={about.size} data.num_classes={about.images['num_classes']}"
    )
    return 0


@verb(
    RUN,
    argument("--nfe", type=int, default=1, metavar="N", help="network evaluations per picture"),
    argument("--seed", type=int, default=0, metavar="S", help="the same seed, the same noise"),
    argument(
        "--labels",
        type=labels,
        metavar="L,L,...",
        help='classes, repeated in turn; -1 is "none" (default: drawn from the seed)',
    ),
    argument("--num", type=int, default=64, metavar="N", help="pictures"),
    argument("--out", type=Path, metavar="FOLDER", help="(default: RUN/samples)"),
)
def sample(options: Namespace) -> int:
    """pictures from a trained student

    Draws pictures from the last verified checkpoint: a PNG grid and an npz with the arrays.

    examples:
      bowstring sample runs/digits
      bowstring sample runs/digits --nfe 2 --labels 0,1,2,3 --num 16
    """
    run = open_run(options.run)
    from cluster.settings.file import load_config
    from distill.sample import sample_run

    given = (options.nfe, options.seed, options.labels, options.num, options.out)
    path = sample_run(run, *given, load_config(run, []).data)
    picture = path.with_suffix(".png")
    print(path, *([picture] if picture.exists() else []), sep="\n")
    return 0


@verb(
    RUN,
    argument(
        "--format",
        choices=["student", "diffusers", "onnx", "torch", "fastgen"],
        default="student",
        help="what to write",
    ),
    argument("--out", type=Path, metavar="FOLDER", help="(default: RUN/FORMAT)"),
    argument("--overwrite", action="store_true", help="replaces an export that is there, whole"),
    argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights, for diffusers"
    ),
    argument("--license", default="unknown", metavar="ID", help="what the model card says"),
    argument(
        "--average",
        choices=["evaluation"],
        default="evaluation",
        help="which average of the weights",
    ),
)
def export(options: Namespace) -> int:
    """a student for other tools: diffusers, ONNX, torch.export; or trajectories for FastGen

    Writes the student of the last verified checkpoint, with a model card, and compares it with
    what was trained before it is there.

    student: model.safetensors + model.json, for `distill.sample.load_student(FOLDER)`.
    diffusers: for `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`, without
    Bowstring. onnx, torch: one jump as a graph, any batch size.

    fastgen: the best teacher's trajectories in all committed shards as WebDataset shards with
    FastGen's keys, latent.pth noise.pth path.pth. The same command again goes on where the last
    one stopped.

    examples:
      bowstring export runs/digits --out student
      bowstring export runs/digits --format diffusers --dtype bf16 --license apache-2.0
      bowstring export runs/digits --format onnx --overwrite
    """
    run = open_run(options.run)
    out = options.out or run.root / options.format
    if options.format == "fastgen":
        from cluster.state.evicted import recorded
        from distill.config import check
        from distill.export.fastgen import export_fastgen

        given = (options.overwrite, options.dtype, options.license)
        check(
            given == (False, "fp32", "unknown"),
            "--overwrite, --dtype and --license are for a student; --format fastgen adds shards "
            "that are not there yet, in their own dtype",
        )
        print(export_fastgen(run, out, recorded(run)))
        return 0
    from distill.export.build import export_student

    form, dtype = options.format, options.dtype
    print(export_student(run, form, out, options.overwrite, dtype, options.license))
    return 0


@verb(
    argument("runs", nargs="+", metavar="RUN", help="folders of runs; two stand side by side"),
    argument("--port", type=int, default=0, metavar="P", help="of this machine; 0 is a free one"),
)
def gallery(options: Namespace) -> int:
    """a page on this machine: student beside teacher

    Shows pictures of a run's student beside its teacher's from the same noise, by seed, class and
    1 to 8 evaluations, with the time each takes. The page is served to this machine alone, at the
    address that is printed, until Ctrl-C; from elsewhere through `ssh -L`.

    examples:
      bowstring gallery runs/digits
      bowstring gallery runs/digits runs/digits-bezier --port 8000
    """
    from contextlib import suppress

    runs = [open_run(folder) for folder in options.runs]
    from cluster.inspect.gallery import Exhibit, server
    from cluster.settings.file import load_config

    configs = [load_config(run, []) for run in runs]
    teachers = [list(config.teacher.values())[-1] for config in configs]
    shown = zip(runs, configs, teachers, strict=True)
    exhibits = [Exhibit(run, config.data, teacher) for run, config, teacher in shown]
    bound, address = server(exhibits, options.port)
    print(address, flush=True)
    with bound, suppress(KeyboardInterrupt):
        bound.serve_forever()
    return 0


# -----------------------------------------------------------------------------------------------
# A live run


@verb(
    argument(
        "--dry-run", action="store_true", help="prints the scripts; submits and writes nothing"
    ),
    argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="jobs of the trainer, each where the one before stopped: for sites that queue no job "
        "again",
    ),
    takes_settings=True,
)
def submit(options: Namespace) -> int:
    """the Slurm jobs of a run

    Submits the Slurm jobs of a run, with a site's settings from cluster.slurm: the trainer,
    a job array of teachers, and the evaluation after it. Nodes, ranks and workers per node,
    cores and time limits follow from the workers, the nodes that Slurm has and the estimate.
    The same command again does nothing while the trainer's job waits or runs; otherwise it
    submits what the run still needs. Scripts, logs and job ids are in RUN/slurm.
    slurm/README.md tells the rest.

    examples:
      bowstring submit experiment=digits cluster=slurm cluster.slurm.train.partition=gpu
      bowstring submit --config-dir ~/sites experiment=digits cluster=mysite --dry-run
      bowstring submit experiment=digits cluster=slurm --chain 4
    """
    configs = read_settings(setting_words(options))
    from cluster.slurm.submit import submit as submit_run

    for config in configs:
        submit_run(config, options.dry_run, options.chain)
    return 0


@verb(RUN, argument("workers", type=int, metavar="N", help="teacher workers"))
def scale(options: Namespace) -> int:
    """the number of teacher workers of a live run

    Sets the number of teacher workers of a live run, from any shell that sees its folder.
    The run follows within seconds. Workers that are too many finish their shard first; 0
    pauses the production. The next start takes cluster.teachers.num_workers again.

    Of a run on Slurm it also sets how many tasks of the teachers' job array run; that stays
    until the next `submit`.

    examples:
      bowstring scale runs/digits 4
      bowstring scale runs/digits 0
    """
    run = open_run(options.run)
    from cluster.slurm.submit import scale as scale_run

    scale_run(run, options.workers)
    print(f"{run.root}: teacher workers wanted: {options.workers}; see `bowstring status`")
    return 0


@verb(RUN)
def stop(options: Namespace) -> int:
    """saves a live run and ends it, its Slurm jobs too

    Ends a live run at its next step; the trainer saves first. The command that started it
    goes on from there. Of a run on Slurm it ends all jobs, from any machine that has
    Slurm's commands; of another one the process that was started on this machine.

    examples:
      bowstring stop runs/digits
    """
    from cluster.slurm.submit import stop as stop_run

    print(*stop_run(open_run(options.run)), sep="\n")
    return 0


@verb(
    RUN,
    JSON,
    argument(
        "--watch",
        type=float,
        nargs="?",
        const=2.0,
        metavar="SECONDS",
        help="again every SECONDS, 2 unless said, until Ctrl-C (default: once)",
    ),
)
def status(options: Namespace) -> int:
    """progress, speed, backlog, leases, checkpoints

    Shows progress, speed, backlog, leases, disk use, quarantines and the last whole
    checkpoint, from the run's files only.

    examples:
      bowstring status runs/digits
      bowstring status runs/digits --watch
    """
    run = open_run(options.run)
    from cluster.inspect.view import show

    show(run, as_json=options.json, every_s=options.watch)
    return 0


@verb(
    RUN,
    argument("--rank", type=int, metavar="R", help="of this trainer rank (default: all)"),
    argument(
        "--worker",
        metavar="W",
        help="of this teacher worker, HOST:PID as the events name it, or PID (default: all)",
    ),
    argument("--follow", action="store_true", help="also what is added, until Ctrl-C"),
)
def logs(options: Namespace) -> int:
    """what ranks and workers have printed

    Prints what a trainer rank or a teacher worker has printed in the newest start, NCCL's and
    CUDA's words too; without --rank or --worker which files there are. They are in RUN/logs, by
    start and node, and stay there after a crash. Slurm's own are in RUN/slurm/logs.

    examples:
      bowstring logs runs/digits
      bowstring logs runs/digits --rank 0
      bowstring logs runs/digits --worker node7:4711 --follow
    """
    run = open_run(options.run)
    from cluster.inspect.logs import show
    from distill.config import check

    check(
        options.rank is None or options.worker is None,
        "--rank and --worker: one of them; without either there are all",
    )
    show(run, options.rank, options.worker, options.follow)
    return 0


@verb(RUN, JSON, codes={0: "nothing is wrong", 1: "something is lost, doubled or corrupt"})
def verify(options: Namespace) -> int:
    """proves from files that nothing is lost, doubled or corrupt

    Audits shards, ledger, checkpoints and consumption from files.

    examples:
      bowstring verify runs/digits
      bowstring verify runs/digits --json
    """
    run = open_run(options.run)
    from cluster.inspect.verify import audit
    from cluster.inspect.view import show_audit

    return show_audit(audit(run), as_json=options.json)


# -----------------------------------------------------------------------------------------------
# Before a run


@verb(
    JSON,
    argument(
        "--flops",
        type=float,
        metavar="F",
        help="assumed FLOP/s of one device (default: cluster.device_flops)",
    ),
    takes_settings=True,
)
def estimate(options: Namespace) -> int:
    """pairs, bytes, device-hours and cost, before anything runs

    Says what a run will cost, before it starts: pairs, shards, bytes, network evaluations,
    parameters, FLOP, device-hours, cost. Counts and bytes are exact; FLOP are a formula;
    hours follow from an assumed speed per device.

    examples:
      bowstring estimate experiment=fashion
      bowstring estimate experiment=fashion --flops 1e14 cluster.device_cost_per_hour=3
    """
    configs = read_settings(setting_words(options))
    from cluster.plan.estimate import show

    for config in configs:
        show(config, options.flops, as_json=options.json)
    return 0


@verb(
    JSON,
    argument(
        "--dir", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs will live"
    ),
    codes={0: "a run works here", 1: "a run would not work here"},
)
def doctor(options: Namespace) -> int:
    """what is installed here and what works

    Says what is installed, which accelerator and collective backends work, cores, memory,
    shared memory, free ports, and whether a file system can rename, link, lock and sync as
    a run needs.

    examples:
      bowstring doctor
      bowstring doctor --dir /scratch/runs --json
    """
    from cluster.inspect.doctor import show

    return show(options.dir, as_json=options.json)


@verb(
    argument("word", nargs="?", metavar="WORD", help="in a key or its words (default: all)"),
    argument("--page", action="store_true", help="as docs/settings.md"),
)
def settings(options: Namespace) -> int:
    """every setting: type, default, and what it is for

    Lists the settings of a run, or those that have WORD in their key or in what they are for.
    The defaults are those without an experiment; `bowstring run experiment=NAME --cfg job` shows
    what an experiment makes of them.

    examples:
      bowstring settings
      bowstring settings precision
      bowstring settings train.
    """
    from cluster.inspect.settings import page, show

    if options.page:
        print(page(), end="")
        return 0
    return show(options.word or "")
