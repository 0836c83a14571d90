"""Settings: their bounds, their texts, what must be installed, YAML."""

import ast
import inspect
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from pixeldecoder.cli import main
from pixeldecoder.training import config as module
from pixeldecoder.training.config import RECIPES, Data, Lora, Optimizer, Prior, Student, Teacher, check, read_yaml
from pixeldecoder.training.loop import train
from pixeldecoder.training.network import read_architecture


@pytest.mark.parametrize(
    "config, message",
    [
        (Teacher(steps=0), "steps 0: expected at least 1"),
        (Teacher(batch_size=-2), "batch_size -2: expected at least 1"),
        (Teacher(micro_batch_size=0), "micro_batch_size 0: expected at least 1"),
        (Teacher(log_every=0), "log_every 0: expected at least 1"),
        (Teacher(validate_every=-1), "validate_every -1: expected at least 0"),
        (Teacher(checkpoint_every=0), "checkpoint_every 0: expected at least 1"),
        (Teacher(keep_checkpoints=0), "keep_checkpoints 0: expected at least 1"),
        (Teacher(ema_decay=7.0), "ema_decay 7.0: expected at least 0 and at most 1"),
        (Teacher(seed=-1), "seed -1: expected at least 0 and less than 9.22337e+18"),
        (Teacher(seed=10**23), "seed 100000000000000000000000: expected at least 0"),
        (Teacher(data=Data(resolution=0)), "data.resolution 0: expected at least 1"),
        (Teacher(data=Data(resolution=-64)), "data.resolution -64: expected at least 1"),
        (Teacher(data=Data(resolution=10**12)), "data.resolution 1000000000000: expected at least 1 and at most 65536"),
        (Teacher(data=Data(max_aspect_ratio=0.0)), "data.max_aspect_ratio 0.0: expected at least 1"),
        (Teacher(data=Data(max_aspect_ratio=1e300)), "data.max_aspect_ratio 1e+300: expected at least 1 and at most 1"),
        (Teacher(data=Data(workers=0)), "data.workers 0: expected at least 1"),
        (Teacher(lora=Lora(rank=-1)), "lora.rank -1: expected at least 0"),
        (Teacher(optimizer=Optimizer(learning_rate=-1.0)), "optimizer.learning_rate -1.0: expected at least 0"),
        (Teacher(optimizer=Optimizer(learning_rate=float("nan"))), "optimizer.learning_rate nan: expected at least 0"),
        (Teacher(optimizer=Optimizer(learning_rate=float("inf"))), "optimizer.learning_rate inf: expected at least 0"),
        (Teacher(optimizer=Optimizer(warmup_steps=-5)), "optimizer.warmup_steps -5: expected at least 0"),
        (Teacher(optimizer=Optimizer(betas=(0.9, 1.0))), "optimizer.betas 1.0: expected at least 0 and less than 1"),
        (Teacher(optimizer=Optimizer(max_grad_norm=0.0)), "optimizer.max_grad_norm 0.0: expected more than 0"),
        (Teacher(max_sigma=5.0), "max_sigma 5.0: expected at least 0 and at most 1"),
        (Teacher(noise_probability=1.1), "noise_probability 1.1: expected at least 0 and at most 1"),
        (Teacher(latent_dropout=-0.1), "latent_dropout -0.1: expected at least 0 and at most 1"),
        (Teacher(caption_dropout=2.0), "caption_dropout 2.0: expected at least 0 and at most 1"),
        (Prior(repa_block=-1), "repa_block -1: expected at least 0"),
        (Student(feature_blocks=(1, -1)), "feature_blocks -1: expected at least 0"),
        (Student(discriminator_optimizer=Optimizer(weight_decay=-1.0)), "discriminator_optimizer.weight_decay -1.0: e"),
    ],
)
def test_bounds(config, message, tmp_path):
    """Before anything is read or made."""
    config.output = tmp_path / "run"
    with pytest.raises(ValueError) as error:
        train(config)
    assert str(error.value).startswith(message) and not config.output.exists()


def test_bounds_of_the_command_and_of_yaml(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("optimizer: {learning_rate: .nan}")
    for arguments, message in [
        (["train", "prior", "--data.resolution", "-64"], "data.resolution -64: expected at least 1 and at most 65536"),
        (["train", "prior", "--config", "run.yaml"], "optimizer.learning_rate nan: expected at least 0"),
        (["distill", "--ema-decay", "7"], "ema_decay 7.0: expected at least 0 and at most 1"),
    ]:
        assert main(arguments) == 2
        assert capsys.readouterr().err == f"pixeldecoder: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_the_recipes_are_in_bounds():
    for stage in RECIPES.values():
        for recipe in stage.values():
            assert check(recipe()) is None
    assert check(Teacher(optimizer=Optimizer(max_grad_norm=None))) is None  # no clipping
    ends = Teacher(noise_probability=0.0, max_sigma=1.0, validate_every=0, seed=2**63 - 1)
    assert check(ends) is None


def every_setting(kind: type):
    """(class, name, type) of all settings, also of the parts."""
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        yield kind, one.name, hints[one.name]
        if is_dataclass(hints[one.name]):
            yield from every_setting(hints[one.name])


def test_every_number_has_bounds():
    for stage in (Prior, Teacher, Student):
        for kind, name, hint in every_setting(stage):
            plain = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
            if plain in (int, float) or {int, float} & set(get_args(plain)):
                assert hasattr(hint, "__metadata__"), f"{kind.__name__}.{name}"


def test_every_setting_has_a_text():
    for part in ast.parse(inspect.getsource(module)).body:
        if isinstance(part, ast.ClassDef) and part.name != "Range":
            for setting, text in zip(part.body, [*part.body[1:], None], strict=True):
                if isinstance(setting, ast.AnnAssign):
                    described = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                    assert described, f"{part.name}.{ast.unparse(setting.target)}"


@pytest.mark.parametrize(
    "missing", ["pydantic", "yaml", "matplotlib", "peft", "webdataset", "braceexpand", "tensorboard"]
)
def test_a_missing_package_is_told_at_once(missing, teacher, tmp_path, monkeypatch):
    """In one line, before anything is read or made; what a run does not need may be missing."""
    config = replace(
        teacher,
        output=tmp_path / "run",
        architecture=tmp_path / "nothing",
        lora=Lora(rank=4),
        data=Data(source="nothing-{0..3}.tar"),
        tracker="tensorboard",
    )
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError) as error:
        train(config)
    assert str(error.value) == f"training needs {missing}: pip install 'pixeldecoder[train]'"
    assert not config.output.exists()
    if missing in ("peft", "webdataset", "braceexpand", "tensorboard"):
        check(teacher)


def test_a_missing_package_ends_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.yaml").write_text("steps: 3")
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for arguments in (["distill"], ["train", "teacher", "--config", str(tmp_path / "run.yaml")]):
        assert main(arguments) == 2
        assert capsys.readouterr().err == "pixeldecoder: training needs pydantic: pip install 'pixeldecoder[train]'\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: [" + "1, " * 1000 + "1]", "steps: Input should be a valid integer (got [1, 1, 1"),
        ("- 1", "expected keys and values, got list"),
        ("[]", "expected keys and values, got list"),
        ("a: [", "not readable as YAML"),
        (b"\xff\xfe\x00", "not readable as YAML"),
        (None, "No such file or directory"),
    ],
)
def test_errors_of_yaml_are_short_and_name_the_file(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read_yaml(path, Teacher())
    assert str(error.value).startswith(f"{path}: {message}") and len(str(error.value)) < len(str(path)) + 400


HOSTILE = [
    ("a: &a [x, x]\nb: [*a, *a]", "expected settings without aliases"),
    ("data: {source: &a [x], captions: [*a]}", "expected settings without aliases"),
    ("&a {data: *a}", "expected settings without aliases"),
    ("[" * 3000, "got more than 8 levels"),
    ("{" * 3000, "got more than 8 levels"),
    ("- " * 3000, "got more than 8 levels"),
    ("a:\n" + "".join(" " * n + "b:\n" for n in range(1, 900)), "got more than 8 levels"),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE)
@pytest.mark.parametrize("read", [lambda path: read_yaml(path, Teacher()), read_architecture])
def test_a_small_file_does_not_stand_for_a_large_one(tmp_path, text, message, read):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read(tmp_path / "run.yaml")
    assert message in str(error.value) and len(str(error.value)) < len(str(tmp_path)) + 200


@pytest.mark.parametrize(
    "source",
    [
        "pipe:touch CANARY; cat /dev/null #.tar",
        "PIPE:touch CANARY #.tar",
        "{pi,x}pe:touch CANARY #.tar",
        "{https://here/a,pipe:touch CANARY #}.tar",
    ],
)
def test_a_file_runs_no_command(tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(f"data: {{source: '{source}'}}")
    assert main(["train", "teacher", "--recipe", "nano", "--config", "run.yaml"]) == 2
    line = capsys.readouterr().err
    assert "code is run for --data.source alone, not for a file" in line and line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_file_may_name_shards_and_folders(tmp_path):
    for source in "https://here/{0..3}.tar", "data-{0000..0041}.tar", "C:/photos":
        (tmp_path / "run.yaml").write_text(f"data: {{source: '{source}'}}")
        assert read_yaml(tmp_path / "run.yaml", Teacher()).data.source == source


def test_the_home_folder_in_yaml(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("output: ~/run\ndata: {source: ~/photos}")
    config = read_yaml(tmp_path / "run.yaml", Teacher())
    assert (config.output, config.data.source) == (tmp_path / "run", f"{tmp_path}/photos")


def test_settings_come_back_from_yaml(tmp_path):
    config = Teacher(optimizer=Optimizer(max_grad_norm=None, learning_rate=1e-4))
    module.write_yaml(config, Path(tmp_path / "run.yaml"))
    assert read_yaml(tmp_path / "run.yaml", Teacher()) == config
