"""From the command line to typed configurations, through Hydra. The only importer of hydra.

`hydra.main` drives everything, so groups, key=value, --multirun, --cfg, --info, --config-dir and
shell completion are Hydra's own. The task that Hydra runs only takes the composed tree; the verbs
run after Hydra has returned, so a sweep is checked to its last job before the first one starts.
Where a launcher is named, Hydra then goes over the sweep again and hands each job to it (`launch`).
"""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
import omegaconf
import yaml
from hydra import errors, types
from hydra._internal import sources_registry
from hydra._internal.core_plugins import file_config_source
from hydra.core import config_store, hydra_config, plugins
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins import config_source
from omegaconf._utils import get_yaml_loader

from cluster.settings import file, schema
from distill.config import ConfigError, TrainConfig, check
from distill.datasets.config import DataConfig
from distill.evaluation.config import EvalConfig
from distill.networks.config import NETWORKS, SameAsTeacherConfig
from distill.objectives.config import OBJECTIVES


class FileConfigSource(file_config_source.FileConfigSource):
    """A folder of `--config-dir`, in whose files the `${...}` of a site's lines is bash's.

    It has the name of Hydra's own, which a launcher's job registers again, and then keeps this one.
    """

    def load_config(self, config_path: str) -> config_source.ConfigResult:
        """The content of a file."""
        path = Path(self.path) / self._normalize_file_name(config_path)
        if not path.is_file():
            raise config_source.ConfigLoadError(f"Config not found : {path}")
        text = path.read_text(encoding="utf-8")
        try:
            tree = yaml.load(text, Loader=get_yaml_loader())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        header = self._get_header_dict(text[:512])
        place, content = f"{self.scheme()}://{self.path}", file.with_bash(tree or {})
        return config_source.ConfigResult(
            self.provider, place, omegaconf.OmegaConf.create(content), header
        )


def register() -> None:
    """Stores one schema per variant, so that an unknown key fails while Hydra composes."""
    file.register_resolvers()
    plugins.Plugins.instance()  # it registers Hydra's own
    sources_registry.SourcesRegistry.instance().types["file"] = FileConfigSource
    store = config_store.ConfigStore.instance()
    store.store(name="base_run", node=file.RunTree)
    store.store(group="data", name="base_data", node=DataConfig)
    store.store(group="train", name="base_train", node=TrainConfig)
    store.store(group="eval", name="base_eval", node=EvalConfig)
    # The root types it: a schema here would set back what the experiment says. Sites name it.
    store.store(group="cluster", name="base_cluster", node={})
    for name, network in NETWORKS.items():
        store.store(group="student", name=f"base_{name}", node=network)
    store.store(group="student", name="base_teacher", node=SameAsTeacherConfig)
    for name, objective in OBJECTIVES.items():
        store.store(group="objective", name=f"base_{name}", node=objective)


def name_of(tree: omegaconf.DictConfig, args: list[str]) -> str:
    """Name of the run; jobs of a sweep get the swept values into theirs.

    It asks for choices that Hydra knows only in its task.
    """
    name = str(tree.run.name)
    if hydra_config.HydraConfig.get().mode == types.RunMode.MULTIRUN:
        suffix = _swept(args, list(hydra_config.HydraConfig.get().overrides.task))
        if suffix:
            name = f"{name}-{suffix}"
    return name


def _swept(args: list[str], overrides: list[str]) -> str:
    """key=value of what the sweep varies, apart from what run.name holds anyway."""
    given = [word for word in args if "=" in word and not word.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(given)
    keys = {override.key_or_group for override in parsed if override.is_sweep_override()}
    if keys & {"run.name", "run.dir"}:
        return ""
    keys -= {"experiment", "objective"}
    return "-".join(override for override in overrides if override.partition("=")[0] in keys)


@contextlib.contextmanager
def _hydra_process(args: list[str]) -> Iterator[None]:
    """Sets what Hydra reads from the process, and puts it back: its arguments, and exceptions
    instead of printed traces.
    """
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["bowstring", *args]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full is not None:
            os.environ["HYDRA_FULL_ERROR"] = full


def drive(task: types.TaskFunction, args: list[str]) -> None:
    """Lets Hydra run a task with its arguments.

    Raises:
        ConfigError: one sentence that names the key or the option.
    """
    register()
    words = checked_words(args)
    through_hydra = hydra.main(
        version_base="1.3", config_path="pkg://bowstring_configs", config_name="config"
    )
    try:
        with _hydra_process(words):
            through_hydra(task)()
    except errors.HydraException as error:
        raise ConfigError(_explain(error)) from error
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ConfigError(file.sentence(error)) from error
    except AssertionError as error:
        below = [word for word in args if word.lstrip("+~").startswith("cluster.slurm.")]
        if "Unexpected type for root" not in str(error) or not below:
            raise
        raise ConfigError(
            f"{below[0]}: these settings name no Slurm cluster; add cluster=slurm, or a file of "
            "your site"
        ) from error


def compose(args: list[str]) -> list[schema.RunConfig]:
    """The configurations that Hydra arguments ask for: one, several with --multirun, none when
    Hydra only shows something.

    Raises:
        ConfigError: one sentence that names the key or the option.
    """
    check(
        not split_launcher(args)[1],
        "a launcher is for the jobs of `bowstring run`, pretrain, generate and train; `bowstring "
        "submit` asks Slurm itself",
    )
    trees: list[omegaconf.DictConfig] = []
    here = os.getpid()

    def task(tree: omegaconf.DictConfig) -> None:
        check(os.getpid() == here, "a launcher must stand on the command line: hydra/launcher=NAME")
        tree.run.name = name_of(tree, args)
        trees.append(tree)

    drive(task, args)
    return [file.to_config(tree) for tree in trees]


# -----------------------------------------------------------------------------------------------
# Words of the command line

# Flags of Hydra's that a word of their own follows
FOLLOWED = {"-cd", "--config-dir", "-c", "--cfg", "-p", "--package", "-cn", "--config-name", "-i"}


def checked_words(args: list[str]) -> list[str]:
    """The words of the command line as Hydra shall read them.

    Raises:
        ConfigError: Hydra cannot read one, or takes it for several values; with what to write.
    """
    is_sweep = not {"-m", "--multirun"}.isdisjoint(args)
    before = ["", *args]
    return [
        word
        if word.startswith(("-", "~")) or before[place] in FOLLOWED
        else _checked(word, is_sweep)
        for place, word in enumerate(args)
    ]


def _checked(word: str, is_sweep: bool) -> str:
    key, equals, value = word.partition("=")
    check(key != "", f"{word} names no setting; write key=value")
    check(equals != "", f"'{word}' has no value; write {word}=VALUE")
    if file.is_bash(key.lstrip("+")) and "${" in value:
        text = f"{key}={file.escaped(value)}"
        word = text if _parsed(text) else f"{key}={file.escaped(quoted(value))}"
    found, way = _parsed(word), shlex.quote(f"{key}={quoted(value)}")
    if found is None:
        raise ConfigError(f"{word} cannot be read as it stands; in a shell write {way}")
    check(
        is_sweep or not found.is_sweep_override(),
        f"{word} has a comma; as one text, in a shell, write {way}, as a list "
        f"{shlex.quote(f'{key}=[{value}]')}, and for a run of each add --multirun",
    )
    return word


def _parsed(word: str) -> Override | None:
    """A word as Hydra reads it; None where it cannot."""
    try:
        return OverridesParser.create().parse_override(word)
    except errors.HydraException:
        return None


def quoted(value: str) -> str:
    """A value in quotes of Hydra; of a list each of its texts."""
    if len(value) > 1 and value[0] + value[-1] == "[]":
        return f"[{','.join(quoted(part.strip()) for part in value[1:-1].split(','))}]"
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value
    return '"' + value.replace('"', '\\"') + '"'


# -----------------------------------------------------------------------------------------------
# Jobs that a launcher of Hydra starts elsewhere


def _explain(error: errors.HydraException) -> str:
    """One sentence for an error of Hydra."""
    cause = error.__cause__
    if isinstance(cause, omegaconf.errors.OmegaConfBaseException):
        return file.sentence(cause)
    text = str(error).split("See https")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    options = [
        line
        for line in lines[1:]
        if not line.startswith(("base_", "Available", "Config search", "provider"))
    ]
    if "Could not override 'cluster'" in str(error):
        return (
            f"{lines[0].partition(':')[0]}: 'override /cluster' stands in an experiment; the "
            "cluster's file comes after it, for the site has the last word: write what the "
            "experiment needs below cluster: instead"
        )
    if "You must specify 'experiment'" in str(error):
        return f"which experiment? Say experiment=NAME, with NAME one of: {', '.join(options)}"
    listed = isinstance(error, errors.ConfigCompositionException) and "Available options" in str(
        error
    )
    return f"{lines[0].rstrip('.')}; options: {', '.join(options)}" if listed else " ".join(lines)


def complete(args: list[str], verbs: tuple[str, ...]) -> None:
    """Answers a shell's completion request (-sc query=bash): verbs first, then Hydra's groups,
    options and keys.
    """
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(verbs))
        return
    rest = line.split(None, 2)[2] if len(words) > 2 else ""
    os.environ["COMP_LINE"] = f"bowstring {rest}"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        compose(args)
    print(" ".join(word for word in shown.getvalue().split() if "=base_" not in word))


LAUNCHER = ("hydra/launcher=", "hydra.launcher.")


def split_launcher(args: list[str]) -> tuple[list[str], list[str]]:
    """Hydra arguments that say what to run, and those that name and set up a launcher."""
    own = [word for word in args if word.lstrip("+~").startswith(LAUNCHER)]
    return [word for word in args if word not in own], own
