"""Public layouts give the velocity of their own code, however their files are nested and named."""

import argparse
import json
import pathlib

import numpy as np
import public_layouts as public
import pytest
import torch
from safetensors.torch import save_file

from distill.config import ConfigError
from distill.teachers.build import build_teacher, describe, start_of
from distill.teachers.config import CheckpointConfig, EdmConfig, SiTConfig

ARGS = argparse.Namespace(model="SiT-S/2", num_heads=4, lr=1e-4)


def settings(layout, path, **more):
    own = {"num_heads": 4} if layout in ("sit",) else {}
    own |= {"image_size": 16} if layout.startswith("score-sde") else {}
    return CheckpointConfig(path=str(path), **own, **more)


def check(config, layout, rtol=1e-5):
    """Asserts that a teacher has the layout's velocity, and its student starts so, bit for bit."""
    teacher = build_teacher(config, "cpu")
    x, t, label = public.inputs(teacher.image)
    right, found = public.expected(layout), teacher.velocity(x, t, label)
    assert (found - right).abs().max() < rtol * right.abs().mean()
    start = start_of(config)
    assert torch.equal(start(x, t, 0 * t + 1, label), found)
    assert start.config == describe(config).network


@pytest.mark.parametrize("layout", public.LAYOUTS)
def test_a_public_layout_has_the_velocity_of_its_own_code(tmp_path, layout):
    torch.save(public.state_of(layout), tmp_path / "w.pth")
    config = settings(layout, tmp_path / "w.pth")
    _, image = public.LAYOUTS[layout]
    assert build_teacher(config, "cpu").image == describe(config).image == image
    check(config, layout)


STATE = public.state_of("sit")
OTHER = {name: torch.zeros_like(value) for name, value in STATE.items()}
DOTLESS = {f"model_ema.{name.replace('.', '')}": value for name, value in STATE.items()}
NESTED = {
    "plain": STATE,
    "ema": {"ema": STATE, "model": OTHER, "opt": {"state": {0: {"exp_avg": OTHER}}}, "args": ARGS},
    "model only": {"model": STATE, "opt": {"state": {}}, "args": ARGS},
    "state_dict": {"state_dict": STATE, "epoch": 3},
    "ema_state_dict": {"ema_state_dict": STATE, "state_dict": OTHER},
    "model_ema": {"model_ema": STATE, "model": OTHER, "step": 5},
    "wrapper": {"ema": {"module": STATE, "decay": 0.9999}, "model": OTHER},
    "averaged model": {
        "n_averaged": torch.tensor(5),
        **{f"module.{k}": v for k, v in STATE.items()},
    },
    "nameless": {
        "model": {f"module.{k}": v for k, v in OTHER.items()}
        | {"module.pos_embed": STATE["pos_embed"]},
        "ema": {"shadow_params": [v for k, v in STATE.items() if k != "pos_embed"], "decay": 0.9},
    },
    "side by side": {
        f"{a}.{k}": v for a, s in (("model", OTHER), ("ema", STATE)) for k, v in s.items()
    },
    "names without dots": {**{f"model.{k}": v for k, v in OTHER.items()}, **DOTLESS},
    "a path": {"ema": STATE, "args": argparse.Namespace(results_dir=pathlib.PosixPath("x"))},
    "a scalar of numpy": {"ema": STATE, "best": np.float64(1.0), "n": np.int64(2)},
}


@pytest.mark.parametrize("nesting", NESTED)
def test_weights_are_found_wherever_they_are(tmp_path, nesting):
    torch.save(NESTED[nesting], tmp_path / "w.pt")
    check(settings("sit", tmp_path / "w.pt"), "sit")


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.",
     "ema_model.", "model.module.", "net._orig_mod.", "model.diffusion_model."],
)  # fmt: skip
def test_names_keep_nothing_of_what_wrapped_them(tmp_path, prefix, form):
    renamed = {prefix + name: value for name, value in STATE.items()}
    path = tmp_path / f"w.{form}"
    if form == "pt":
        torch.save({"ema": renamed, "model": OTHER}, path)
    else:
        save_file({name: value.contiguous() for name, value in renamed.items()}, path)
    check(settings("sit", path), "sit")


def test_a_wrapper_around_every_block_leaves_no_trace(tmp_path):
    inner = {name.replace("blocks.0.", "blocks.0._orig_mod."): v for name, v in STATE.items()}
    torch.save({"ema": inner}, tmp_path / "w.pt")
    check(settings("sit", tmp_path / "w.pt"), "sit")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_run_in_float32(tmp_path, dtype):
    torch.save({"ema": {k: v.to(dtype) for k, v in STATE.items()}}, tmp_path / "w.pt")
    start = start_of(settings("sit", tmp_path / "w.pt"))
    assert {p.dtype for p in start.parameters()} == {torch.float32}
    check(settings("sit", tmp_path / "w.pt"), "sit", 1e-4 if dtype == torch.float64 else 0.2)


def test_parts_of_safetensors_are_one_file(tmp_path):
    names = list(STATE)
    weight_map = {}
    for index, part in enumerate((names[:9], names[9:])):
        file = f"model-{index}.safetensors"
        save_file({name: STATE[name].contiguous() for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check(settings("sit", tmp_path), "sit")
    before = describe(settings("sit", tmp_path)).fingerprint
    save_file({n: STATE[n].contiguous() + 1 for n in names[9:]}, tmp_path / "model-1.safetensors")
    assert describe(settings("sit", tmp_path)).fingerprint != before


def test_which_weights_were_taken_is_said_and_can_be_chosen(tmp_path):
    torch.save({"ema": OTHER, "model": STATE}, tmp_path / "w.pt")
    config = settings("sit", tmp_path / "w.pt")
    assert "weights 'ema' taken, beside them: 'model'" in " ".join(describe(config).notes)
    check(settings("sit", tmp_path / "w.pt", weights="model"), "sit")
    with pytest.raises(ConfigError, match=r"weights=swa: .* it has: 'ema', 'model'"):
        describe(settings("sit", tmp_path / "w.pt", weights="swa"))
    torch.save({"ema_0.99": OTHER, "ema_0.999": STATE}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"several sets .*'ema_0.99', 'ema_0.999'; choose one"):
        describe(config)
    check(settings("sit", tmp_path / "w.pt", weights="ema_0.999"), "sit")


class Foreign:
    pass


def test_objects_beside_the_weights_are_named_with_what_to_do(tmp_path):
    torch.save({"ema": STATE, "config": Foreign()}, tmp_path / "w.pt")
    with pytest.raises(
        ConfigError, match=r"(?s)objects of \S*Foreign.*weights_only=False.*torch\.save"
    ):
        describe(settings("sit", tmp_path / "w.pt"))
    (tmp_path / "w.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(ConfigError, match=r"w\.pkl"):
        describe(EdmConfig(path=str(tmp_path / "w.pkl")))


def test_a_table_without_a_row_for_none_loses_no_class(tmp_path):
    table = "y_embedder.embedding_table.weight"
    state = STATE | {table: STATE[table][:10]}
    torch.save(state, tmp_path / "w.pt")
    assert describe(settings("sit", tmp_path / "w.pt")).image.num_classes == 9
    config = settings("sit", tmp_path / "w.pt", num_classes=10)
    assert describe(config).image.num_classes == 10 and not describe(config).has_none
    teacher = build_teacher(config, "cpu")
    x, t, label = public.inputs(teacher.image)
    right = public.expected("sit")
    assert (teacher.velocity(x[:3], t[:3], label[:3]) - right[:3]).abs().max() < 1e-4
    torch.save({"ema": state, "args": argparse.Namespace(num_classes=10)}, tmp_path / "w.pt")
    assert describe(settings("sit", tmp_path / "w.pt")).image.num_classes == 10
    with pytest.raises(ConfigError, match='knows the label "none"'):
        describe(settings("sit", tmp_path / "w.pt", guidance=1.5))
    with pytest.raises(ConfigError, match=r"num_classes=7, but the label table .* 10 rows"):
        describe(settings("sit", tmp_path / "w.pt", num_classes=7))


def test_heads_are_read_where_a_file_tells_them(tmp_path):
    torch.save({"ema": STATE, "args": ARGS}, tmp_path / "w.pt")
    check(SiTConfig(path=str(tmp_path / "w.pt")), "sit")
    torch.save(STATE, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"width 32, no published size: set teacher.num_heads"):
        describe(SiTConfig(path=str(tmp_path / "w.pt")))


def test_repa_runs_from_data_to_noise(tmp_path):
    """Its velocity is ours with time and sign turned round, in the weights themselves."""
    torch.save({"ema": STATE | {"projectors.0.0.weight": torch.zeros(2, 2)}}, tmp_path / "r.pt")
    torch.save(STATE, tmp_path / "s.pt")
    repa, plain = (build_teacher(settings("sit", tmp_path / f), "cpu") for f in ("r.pt", "s.pt"))
    x, t, label = public.inputs(repa.image)
    right = -plain.velocity(x, 1 - t, label)
    assert (repa.velocity(x, t, label) - right).abs().max() < 1e-5 * right.abs().mean()
    start = start_of(settings("sit", tmp_path / "r.pt"))
    assert torch.equal(start(x, t, t, label), repa.velocity(x, t, label))


def test_what_args_say_of_path_and_prediction_is_believed(tmp_path):
    said = argparse.Namespace(path_type="GVP", prediction="score", num_heads=4)
    torch.save({"ema": STATE, "args": said}, tmp_path / "w.pt")
    config = SiTConfig(path=str(tmp_path / "w.pt"))
    assert "teacher.path_type=gvp teacher.prediction=score" in " ".join(describe(config).notes)
    assert describe(config).network is None and start_of(config) is None
    torch.save({"ema": STATE, "args": argparse.Namespace(prediction="w", num_heads=4)}, config.path)
    with pytest.raises(
        ConfigError, match=r"prediction=w, which is not known here; set teacher.pred"
    ):
        describe(config)


def test_networks_that_are_not_known_and_sizes_that_nothing_tells(tmp_path):
    torch.save(public.state_of("score-sde"), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"do not tell the size .* set teacher.image_size"):
        describe(CheckpointConfig(path=str(tmp_path / "w.pt")))
    torch.save({"layer.0.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"not hold the weights of a network .* layer.0.weight"):
        describe(CheckpointConfig(path=str(tmp_path / "w.pt")))
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="holds no weights"):
        describe(CheckpointConfig(path=str(tmp_path / "w.pt")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="a folder without weights"):
        describe(CheckpointConfig(path=str(tmp_path / "empty")))
