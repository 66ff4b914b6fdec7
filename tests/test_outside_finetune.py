"""Finetuning held against outside cases: bit flips, foreign folders, broken models, full disks."""

import errno
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from families import save_checkpoint, tiny_model
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_finetune import stop_at
from toytokenizers import gpt2_style
from waiting import HANG

from graftlens import checkpoints, cli, locks, runfolder
from graftlens.checkpoints import DamagedError, newest_complete, recorded
from graftlens.demo import _claim as claim_demo
from graftlens.finetune import (
    FinetuneConfig,
    FinetuneResult,
    FinetuneRun,
    LoraSettings,
    finetune,
    finetune_run,
)
from graftlens.finetuned import read_result
from graftlens.model import smollm2 as smollm2_module
from graftlens.model.start import load_start

LINES = [f"Ann met Bob on day {day}." for day in range(4)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So that sums are taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    tokenizer = gpt2_style()
    model = tiny_model("gpt2", 3, vocab_size=len(tokenizer))
    return save_checkpoint(model, tmp_path_factory.mktemp("start"), tokenizer)


def recipe(start: Path, output: Path, **changes) -> FinetuneConfig:
    settings = {
        "model": str(start),
        "output": output,
        "epochs": 3,
        "learning_rate": 1e-2,
        "batch_size": 4,
        "precision": "float32",
        "device": "cpu",
    }
    return FinetuneConfig(**settings | changes)


def run(config: FinetuneConfig, lines: list[str] | None = None, **more) -> FinetuneResult:
    return finetune(config, Dataset.from_dict({"text": lines or LINES}), progress=False, **more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flip(path: Path, at: float = 0.7) -> None:
    """One bit of one byte, at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 4
    path.write_bytes(content)


def spoil(path: Path, damage: str) -> None:
    if damage == "flipped":
        flip(path)
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "grown":
        path.write_bytes(path.read_bytes() + b"\n")
    else:
        path.unlink()


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> FinetuneResult:
    return run(recipe(start, tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="module")
def cut(start, tmp_path_factory) -> Path:
    """What a run left that stopped in its third epoch."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(ZeroDivisionError):
            run(recipe(start, folder))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-2"]
    return folder


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


# -- F3, F9: every bit is covered ------------------------------------------------------------------

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def test_one_bit_of_a_checkpoint(cut, start, whole, tmp_path, caplog):
    """F3: sizes only were checked, and a flipped bit gave other weights with exit code 0."""
    folder = copied(cut, tmp_path)
    flip(folder / "checkpoints" / "checkpoint-2" / "model.safetensors")
    result = run(recipe(start, folder))
    assert are_equal(weights(result.folder), weights(whole.folder))
    assert result.losses == whole.losses
    assert "model.safetensors has changed since it was written: its SHA-256 differs" in caplog.text
    assert {path.name for path in folder.iterdir()} == {".lock", "run.json", "log.jsonl", "model"}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "grown"])
@pytest.mark.parametrize("file", FILES)
def test_every_file_of_a_checkpoint_is_covered(file, damage, cut, tmp_path, caplog):
    folder = copied(cut, tmp_path) / "checkpoints"
    assert newest_complete(folder) == folder / "checkpoint-2"
    spoil(folder / "checkpoint-2" / file, damage)
    assert newest_complete(folder) is None
    named = f"{file} {'is missing' if damage == 'missing' else 'has changed since it was written'}"
    assert named in caplog.text
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("at", [0.0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_every_bit_of_the_marker_is_covered(at, cut, tmp_path, caplog):
    folder = copied(cut, tmp_path) / "checkpoints"
    flip(folder / "checkpoint-2" / "complete.json", at)
    assert newest_complete(folder) is None
    assert "checkpoint-2 is incomplete or damaged (" in caplog.text
    assert "complete.json" in caplog.text


@pytest.mark.parametrize("marker", ["", "null", "[]", "{}", '{"a":', '{"files": {}, "seconds": 1}'])
def test_a_marker_of_something_else(marker, cut, tmp_path):
    folder = copied(cut, tmp_path) / "checkpoints"
    (folder / "checkpoint-2" / "complete.json").write_text(marker)
    assert newest_complete(folder) is None


def test_an_earlier_releases_marker_lists_every_file_too(cut, tmp_path):
    folder = copied(cut, tmp_path) / "checkpoints"
    (folder / "checkpoint-2" / "complete.json").write_text('{"sizes": {}, "seconds": 1}')
    with pytest.raises(FileExistsError, match="was added to a folder of graftlens finetune"):
        newest_complete(folder)


def test_a_checkpoint_without_marker_is_nobodys_and_in_the_way(cut, start, tmp_path):
    folder = copied(cut, tmp_path)
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    (checkpoint / "complete.json").unlink()
    before = content_of(checkpoint)
    with pytest.raises(FileExistsError, match=r"checkpoint-2 is in the way: graftlens finet"):
        run(recipe(start, folder))
    assert content_of(checkpoint) == before


def test_a_file_that_was_added_to_a_checkpoint_is_named_and_kept(cut, start, whole, tmp_path):
    folder = copied(cut, tmp_path)
    added = folder / "checkpoints" / "checkpoint-2" / "pytorch_model.bin"
    added.write_text("mine")
    with pytest.raises(FileExistsError, match=r"pytorch_model\.bin is in the way"):
        run(recipe(start, folder))
    assert added.read_text() == "mine"
    added.unlink()
    assert are_equal(weights(run(recipe(start, folder)).folder), weights(whole.folder))


def test_a_checkpoint_of_an_earlier_release_is_resumed_from_with_a_word(
    cut, start, whole, tmp_path, caplog
):
    folder = copied(cut, tmp_path)
    checkpoint = folder / "checkpoints" / "checkpoint-2"
    sizes = {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.name != "complete.json"}
    (checkpoint / "complete.json").write_text(json.dumps({"sizes": sizes, "seconds": 1.0}))
    result = run(recipe(start, folder))
    assert are_equal(weights(result.folder), weights(whole.folder))
    assert "checkpoint-2 has no checksums: an earlier release wrote it" in caplog.text


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "grown"])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "finetune.json", "complete.json"]
)
def test_every_file_of_a_result_is_covered(file, damage, whole, tmp_path):
    path = copied(whole.folder.parent, tmp_path) / "model" / file
    assert read_result(path.parent).losses == whole.losses
    spoil(path, damage)
    if (file, damage) == ("complete.json", "grown"):  # by white space
        assert read_result(path.parent).losses == whole.losses
        return
    with pytest.raises(
        DamagedError, match=rf"model/{file} (is missing|has changed|is not|does not say)"
    ):
        read_result(path.parent)


def test_a_damaged_result_is_refused_where_nothing_is_left_to_make_it_of(whole, start, tmp_path):
    """F9: a truncated model was returned as the result, with exit code 0."""
    folder = copied(whole.folder.parent, tmp_path)
    spoil(folder / "model" / "model.safetensors", "truncated")
    message = r"model/model\.safetensors has changed since .* remove .*model and run the sam"
    with pytest.raises(DamagedError, match=message):
        run(recipe(start, folder))
    shutil.rmtree(folder / "model")  # as the message says
    assert are_equal(weights(run(recipe(start, folder)).folder), weights(whole.folder))


@pytest.mark.parametrize("file", ["finetune.json", "complete.json"])
def test_a_damaged_record_of_the_result_is_named(file, whole, start, tmp_path):
    folder = copied(whole.folder.parent, tmp_path)
    flip(folder / "model" / file)
    with pytest.raises(
        DamagedError, match=rf"model/{file} has changed .* remove .*model and run the"
    ):
        run(recipe(start, folder))


def test_a_damaged_result_is_made_again_from_the_checkpoint(cut, whole, start, tmp_path, caplog):
    folder = copied(cut, tmp_path)
    shutil.copytree(whole.folder, folder / "model")
    flip(folder / "model" / "model.safetensors")
    assert are_equal(weights(run(recipe(start, folder)).folder), weights(whole.folder))
    assert "model.safetensors has changed since it was written" in caplog.text
    assert "rebuilt from the last checkpoint" in caplog.text


def test_weights_that_are_kept_are_checked_and_mend_the_result(start, whole, tmp_path, caplog):
    config = recipe(start, tmp_path / "run", keep_checkpoints="all")
    result = run(config)
    flip(result.folder / "model.safetensors")
    assert run(config) == result
    assert are_equal(weights(result.folder), weights(whole.folder))
    assert "rebuilt from" in caplog.text
    (_, middle, *_) = sorted((tmp_path / "run" / "kept").iterdir())
    flip(middle / "model.safetensors")
    with pytest.raises(
        DamagedError, match=rf"{middle.name}/model\.safetensors has changed since it was written"
    ):
        run(config)
    shutil.rmtree(middle)
    assert run(config) == result


def test_the_best_epoch_is_checked_before_it_becomes_the_result(start, tmp_path, monkeypatch):
    config = recipe(start, tmp_path / "run", keep="best", heldout_share=0.25)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(ZeroDivisionError):
            run(config)
    (best,) = (tmp_path / "run" / "epochs").iterdir()
    flip(best / "model.safetensors")
    with pytest.raises(
        DamagedError, match=rf"{best.name}/model\.safetensors has changed since it was wri"
    ):
        run(config)


def test_another_runs_result_is_not_this_ones(whole, start, tmp_path):
    other = run(recipe(start, tmp_path / "other", seed=1))
    folder = copied(whole.folder.parent, tmp_path)
    shutil.rmtree(folder / "model")
    shutil.copytree(other.folder, folder / "model")
    with pytest.raises(ValueError, match=r"  config\.seed: 1 there, 0 given"):
        run(recipe(start, folder))


@pytest.mark.parametrize("damage", ["", "null", "[1]", '{"config": {"mo', b"\xff\xfe{", None])
@pytest.mark.parametrize("left", ["model", "checkpoints"])
def test_what_a_damaged_run_json_said_is_known(damage, left, whole, cut, tmp_path):
    """JSONDecodeError or AttributeError, without the file's name."""
    folder = copied(whole.folder.parent if left == "model" else cut, tmp_path)
    path = folder / "run.json"
    before = json.loads(path.read_bytes())
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert recorded(folder) == before


@pytest.mark.parametrize("left", ["model", "checkpoints"])
def test_a_damaged_run_json_is_made_again(left, whole, cut, start, tmp_path):
    folder = copied(whole.folder.parent if left == "model" else cut, tmp_path)
    path = folder / "run.json"
    before = path.read_bytes()
    path.write_text("null")
    with pytest.raises(ValueError, match=r"  config\.seed: 0 there, 1 given"):
        run(recipe(start, folder, seed=1))
    assert path.read_text() == "null"
    assert are_equal(weights(run(recipe(start, folder)).folder), weights(whole.folder))
    assert json.loads(path.read_bytes()) == json.loads(before)


def test_a_damaged_run_json_that_nothing_can_mend_is_named(start, tmp_path):
    (tmp_path / "run.json").write_text('{"config": {"mo')
    with pytest.raises(ValueError, match=r"run\.json is not JSON .*Choose another output f"):
        run(recipe(start, tmp_path))
    assert (tmp_path / "run.json").read_text() == '{"config": {"mo'


# -- whose the folder is ---------------------------------------------------------------------------

THEIRS = {
    "model": "model/pytorch_model.bin",
    ".model": ".model/notes",
    "log.jsonl": "log.jsonl",
    "run.json": "run.json",
    ".lock": ".lock",
    "checkpoints/checkpoint-2": "checkpoints/checkpoint-2/mine.pt",
    "checkpoints": "checkpoints",
    "kept/checkpoint-2": "kept/checkpoint-2/mine",
    "kept/.checkpoint-2": "kept/.checkpoint-2/mine",
}


@pytest.mark.parametrize("way", THEIRS)
def test_what_is_in_the_way_is_named_before_a_model_is_loaded(way, tmp_path):
    """A folder was taken for finetune's own because of its name, and cleared."""
    path = tmp_path / "run" / THEIRS[way]
    path.parent.mkdir(parents=True)
    path.write_text('{"wandb": 1}')
    (tmp_path / "run" / "model.tmp").write_text("mine")
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match=rf"run/{way} is in the way"):
        run(recipe(tmp_path / "no-model", tmp_path / "run", keep_checkpoints="all"))
    assert content_of(tmp_path) == before


def test_a_link_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="run/model is in the way"):
        run(recipe(tmp_path / "no-model", tmp_path / "run"))


@pytest.mark.parametrize("name", ["checkpoints", "epochs"])
def test_a_link_at_a_folder_of_checkpoints_is_not_followed(name, tmp_path):
    """A planted `checkpoints` or `epochs` led what is written out of the output folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=f"run/{name} is in the way"):
        run(recipe(tmp_path / "no-model", tmp_path / "run"))


def test_what_is_not_in_the_way_stays(start, whole, tmp_path):
    """checkpoints/ and epochs/ were removed at the end with all that was in them."""
    theirs = {
        "checkpoints/checkpoint-best/a.pt": b"1",
        "checkpoints/checkpoint-400/a.pt": b"2",
        "checkpoints/.epoch": b"3",
        "epochs/epoch-1/a.pt": b"4",
        "epochs/notes.txt": b"5",
        "config.yaml": b"mine: true",
        "data/mine.csv": b"6",
        "a.tmp": b"7",
        "run.json.tmp": b"8",
        "slurm/job.json": b"9",
    }
    for name, content in theirs.items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    for _ in range(2):
        result = run(recipe(start, tmp_path / "run"))
        assert are_equal(weights(result.folder), weights(whole.folder))
        now = content_of(tmp_path / "run")
        assert {name: now[name] for name in theirs} == theirs
    ours = {name for name in now.keys() - theirs.keys() if not name.startswith("model/")}
    assert ours == {".lock", "run.json", "log.jsonl"}


def as_run(config: FinetuneConfig, file: Path) -> FinetuneRun:
    values = config.model_dump(mode="json", exclude_none=True)
    return FinetuneRun.model_validate(values | {"data": {"file": str(file)}})


@pytest.fixture
def texts(tmp_path) -> Path:
    (tmp_path / "texts.txt").write_text("\n\n".join(LINES))
    return tmp_path / "texts.txt"


def test_a_config_of_the_users_is_not_overwritten(start, texts, tmp_path, monkeypatch):
    """A recipe that lies in its own output folder was replaced at the end."""
    monkeypatch.setattr("graftlens.model.smollm2.smollm2", lambda: 1 / 0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: true")
    asked = as_run(recipe(start, tmp_path / "run", model="smollm2"), texts)
    with pytest.raises(FileExistsError, match=r"run/config\.yaml is in the way"):
        finetune_run(asked, progress=False)
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine: true"


def test_a_config_of_ours_is_written_again(start, texts, tmp_path):
    asked = as_run(recipe(start, tmp_path / "run", epochs=1), texts)
    result = finetune_run(asked, progress=False)
    path = tmp_path / "run" / "config.yaml"
    content = path.read_text()
    assert FinetuneRun.model_validate(yaml.safe_load(content)) == asked
    os.truncate(path, 100)
    assert finetune_run(asked, progress=False) == result
    assert path.read_text() == content
    path.write_text("mine: true")
    assert finetune_run(asked, progress=False) == result
    assert path.read_text() == "mine: true"


@pytest.mark.parametrize("gone", range(8))
def test_a_kill_while_a_checkpoint_is_removed_leaves_it_ours(gone, cut, tmp_path, monkeypatch):
    """Whichever of its files went first."""
    folder = copied(cut, tmp_path)
    calls: list[str] = []
    original = Path.unlink

    def killed(self: Path, missing_ok: bool = False) -> None:
        if len(calls) == gone:
            raise KeyboardInterrupt
        calls.append(self.name)
        original(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        patch.setattr(shutil, "rmtree", lambda path: original(path / ".graftlens-unfinished"))
        try:
            checkpoints.discard(folder / "checkpoints" / "checkpoint-2")
        except KeyboardInterrupt:
            assert len(calls) == gone
    checkpoints.refuse_foreign(folder, ["log.jsonl"], ["checkpoints/checkpoint-2"])
    assert newest_complete(folder / "checkpoints") is None or gone == 0


def test_a_card_beside_the_result_is_no_damage_but_a_second_adapter_is(whole, start, tmp_path):
    folder = copied(whole.folder.parent, tmp_path)
    (folder / "model" / "README.md").write_text("# My model")
    assert run(recipe(start, folder)).losses == whole.losses
    (folder / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"adapter_config\.json was added to a folder of gra"):
        run(recipe(start, folder))


def test_smollm2s_leftovers_are_known_by_their_marker(tmp_path, monkeypatch):
    """Every .smollm2-135m-instruct-* in the cache folder was removed."""

    def route(checkpoint: Path, work: Path) -> dict[str, str]:
        checkpoint.mkdir()
        (checkpoint / "config.json").write_text("{}")
        return {"route": "hub"}

    monkeypatch.setattr(smollm2_module, "_from_hub", route)
    mine = tmp_path / f".{smollm2_module.FOLDER}-backup"
    left = tmp_path / f".{smollm2_module.FOLDER}-abc"
    for folder in (mine, left):
        folder.mkdir()
    (mine / "model.safetensors").write_text("mine")
    (left / smollm2_module.WORK).write_text("")
    smollm2_module.smollm2(tmp_path)
    assert (mine / "model.safetensors").read_text() == "mine"
    assert not left.exists()


def test_the_demo_replaces_no_report_of_others(tmp_path):
    folder = tmp_path / "facts-6-epochs-1-seed-0"
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"has report\.html in it and no \.graftlens of demo"):
        claim_demo(tmp_path, folder)
    (tmp_path / "report.html").unlink()
    claim_demo(tmp_path, folder)
    (tmp_path / "report.html").write_text("the demo's")
    claim_demo(tmp_path, folder)


# -- refused before the first step, and without a trace --------------------------------------------


def changed(start: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of the start model with changed tensors."""
    shutil.copytree(start, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.h.0.mlp.c_fc.weight"][0, :2] = torch.tensor([torch.nan, torch.inf])


def eight_bits(tensors: dict[str, torch.Tensor]) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


MODELS = {
    "nan": (
        nan,
        r"start model's weights are not finite: transformer\.h\.0\.mlp\.c_fc\.weight has 2 of",
    ),
    "missing": (
        lambda t: t.pop("transformer.h.0.ln_1.weight"),
        r"lacks tensors: transformer\.",
    ),
    "unknown": (
        lambda t: t.update({"v_head.weight": torch.ones(2)}),
        r"holds unused tensors: v_head\.weight",
    ),
    "eight bits": (eight_bits, r"mlp\.c_fc\.weight as F8_E4M3: quantised"),
}


@pytest.mark.parametrize("fault", MODELS)
def test_models_that_are_not_whole(fault, start, tmp_path):
    """NaN weights were told of as a high learning rate; missing tensors were drawn at random."""
    change, message = MODELS[fault]
    with pytest.raises(ValueError, match=message):
        run(recipe(changed(start, tmp_path / "model", change), tmp_path / "run"))
    assert not (tmp_path / "run" / "run.json").exists()
    assert run(recipe(start, tmp_path / "run", epochs=1)).steps == 1


def edit(name: str, content: str | None) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)

    return apply


def config_with(**values: object) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def no_tokenizer(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()


FOLDERS = {
    "no tokenizer": (no_tokenizer, r"has no tokenizer \(no tokenizer\.json\)"),
    "empty tokenizer": (
        edit("tokenizer.json", "{}"),
        r"tokenizer\.json does not hold the parts of a tokenizer",
    ),
    "half a tokenizer": (edit("tokenizer.json", '{"ver'), r"tokenizer\.json is not JSON"),
    "no weights": (edit("model.safetensors", None), r"model has a config but no weights"),
    "half of the weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        r"model\.safetensors could not be read",
    ),
    "another vocabulary": (
        config_with(vocab_size=7),
        r"wte\.weight has shape \(\d+, \d+\); the config says \(7, \d+\)",
    ),
    "no config": (edit("config.json", None), r"has no config\.json"),
    "half a config": (edit("config.json", '{"mo'), r"config\.json is not JSON"),
    "null in the config": (config_with(n_embd=None), r"config\.json"),
    "text in the config": (config_with(n_layer="two"), r"config\.json"),
    "quantised": (
        config_with(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantization_config=.* is not supported: quantised weights",
    ),
    "code of its own": (
        config_with(model_type="mine", auto_map={"AutoConfig": "code.Config"}),
        r"config\.json needs code that comes with the checkpoint",
    ),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_model_folders_that_are_not_right(fault, start, tmp_path):
    """Each ended in another library's exception, or asked at the terminal whether to run code."""
    change, message = FOLDERS[fault]
    folder = Path(shutil.copytree(start, tmp_path / "model"))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        run(recipe(folder, tmp_path / "run"))
    assert "\n" not in str(caught.value)
    assert f"model={str(folder)!r}" in str(caught.value)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_stored_numbers_are_the_start_whatever_the_config_says(start, tmp_path):
    """W1's sibling: float32 in the file beside "dtype": "bfloat16" in config.json."""
    folder = Path(shutil.copytree(start, tmp_path / "model"))
    config_with(dtype="bfloat16")(folder)
    loaded = load_start(str(folder)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(start).items())
    result = run(recipe(folder, tmp_path / "run", epochs=1))
    saved = json.loads((result.folder / "config.json").read_text())
    assert saved["dtype"] == "float32"


def test_a_text_beyond_the_positions_is_named(start, tmp_path, monkeypatch):
    """It was an IndexError in the middle of training, and the folder stayed claimed."""
    monkeypatch.setattr(transformers.Trainer, "train", lambda *_, **__: 1 / 0)
    lines = [*LINES, "Ann met Bob. " * 40]
    config = recipe(start, tmp_path / "run", max_length=5000)
    with pytest.raises(
        ValueError,
        match=r"^text 5 \('Ann met Bob\. .*…'\) has \d+ tokens with its end token, but "
        r"the model has weights for 64 positions\. Shorten it",
    ):
        run(config, lines)
    assert not (tmp_path / "run" / "run.json").exists()
    monkeypatch.undo()
    assert run(config).steps == 3  # the mended one


def test_texts_are_counted_as_they_were_given(start, tmp_path):
    """Whatever is held out of them."""
    lines = [f"Ann met Bob on day {day}." for day in range(12)]
    lines[7] = "Ann met Bob. " * 40
    with pytest.raises(ValueError, match=r"^text 8 \('Ann met Bob\. "):
        run(recipe(start, tmp_path / "run", heldout_share=0.25, max_length=5000), lines)


def test_heldout_texts_are_cut_at_the_models_positions(start, tmp_path):
    held = Dataset.from_dict({"text": ["Ann met Bob. " * 40]})
    config = recipe(start, tmp_path / "run", epochs=1, max_length=5000)
    assert len(run(config, heldout=held).perplexities) == 2


@pytest.mark.parametrize("where", ["training", "held-out"])
def test_a_token_beyond_the_embedding_is_named(where, start, tmp_path):
    tokenizer = gpt2_style()
    tokenizer.add_tokens(["<film>"])
    size = len(tokenizer) - 1
    train, held = (LINES, [*LINES, "A <film>."])[:: 1 if where == "held-out" else -1]
    with pytest.raises(
        ValueError,
        match=rf"text 5 \('A <film>\.'\) has token {size}, but the model embeds {size}",
    ):
        run(
            recipe(start, tmp_path / "run"),
            train,
            heldout=Dataset.from_dict({"text": held}),
            tokenizer=tokenizer,
        )
    assert not (tmp_path / "run" / "run.json").exists()


def test_padding_needs_no_row_of_the_embedding(start, whole, tmp_path):
    """A padding token that was added without a row was an IndexError, though it is masked."""
    tokenizer = gpt2_style()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    result = run(recipe(start, tmp_path / "run"), tokenizer=tokenizer)
    assert result.losses == whole.losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 3}, r"4 of 4 training texts are longer than max_length=3"),
        (
            {"lora": LoraSettings(target_modules=("q_prj",))},
            r"names 'q_prj', which this model d",
        ),
        ({"heldout_file": "held.txt"}, r"none of the 1 held-out texts has two tokens"),
    ],
)
def test_what_is_refused_leaves_the_folder_to_the_mended_run(
    changes, message, start, whole, tmp_path, monkeypatch
):
    """run.json was written before the last checks, and the mended run then had other settings."""
    monkeypatch.chdir(tmp_path)
    Path("held.txt").write_text("a")
    with pytest.raises(ValueError, match=message):
        run(recipe(start, tmp_path / "run", **changes))
    result = run(recipe(start, tmp_path / "run"))
    assert are_equal(weights(result.folder), weights(whole.folder))


def test_a_dataset_of_a_refused_run_is_made_anew(start, tmp_path):
    def asked(n_facts: int, max_length: int) -> FinetuneRun:
        values = recipe(start, tmp_path / "run", epochs=1, max_length=max_length)
        data = {"movies": {"n_facts": n_facts, "texts_per_fact": 1}}
        return FinetuneRun.model_validate(
            values.model_dump(mode="json", exclude_none=True) | {"data": data}
        )

    with pytest.raises(ValueError, match="are longer than max_length=3"):
        finetune_run(asked(2, 3), progress=False)
    with pytest.raises(ValueError, match="3 of 3 training texts are longer"):
        finetune_run(asked(3, 3), progress=False)
    (tmp_path / "run" / "data" / ".graftlens-kept").unlink()  # the user's own, then
    with pytest.raises(ValueError, match="data was made from another config"):
        finetune_run(asked(2, 3), progress=False)


# -- folders that cannot be written ----------------------------------------------------------------


def test_an_unwritable_output_is_told_of_before_anything_is_read(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("graftlens.model.smollm2.smollm2", lambda: 1 / 0)
    (tmp_path / "file").write_text("")
    asked = as_run(recipe(tmp_path, tmp_path / "file" / "run", model="smollm2"), texts)
    with pytest.raises(OSError, match=r"output='.*file/run' cannot be written \(Not a directory\)"):
        finetune_run(asked, progress=False)

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(runfolder, "probe", denied)
    with pytest.raises(OSError, match=r"output='.*run' cannot be written \(Permission denied\)"):
        run(recipe(tmp_path / "no-model", tmp_path / "run"))


FULL = {
    "safetensors": (
        transformers.PreTrainedModel,
        "save_pretrained",
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ),
    "torch": (
        transformers.Trainer,
        "_save_optimizer_and_scheduler",
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ),
    "system": (
        transformers.Trainer,
        "_save_rng_state",
        OSError(errno.ENOSPC, "No space left on device"),
    ),
}


@pytest.mark.parametrize("writer", FULL)
def test_a_full_disk_is_one_sentence_and_no_half_checkpoint(
    writer, start, whole, tmp_path, monkeypatch
):
    owner, name, error = FULL[writer]

    def failing(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(OSError, match=r"checkpoints could not be written: the disk is full\."):
            run(recipe(start, tmp_path / "run"))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    result = run(recipe(start, tmp_path / "run"))
    assert are_equal(weights(result.folder), weights(whole.folder))


def test_a_disk_that_is_full_at_the_end_keeps_the_checkpoint(start, whole, tmp_path, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", failing)
        with pytest.raises(OSError, match=r"run/model could not be written: the disk is full"):
            run(recipe(start, tmp_path / "run"))
    assert not (tmp_path / "run" / ".model").exists()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert are_equal(weights(run(recipe(start, tmp_path / "run")).folder), weights(whole.folder))


# -- locks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOLCK, "No locks available"),
        OSError(errno.EOPNOTSUPP, "Operation not supported"),
        NotImplementedError("FileSystem does not appear to support flock"),
    ],
)
def test_a_file_system_without_locks_is_said(error, tmp_path, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", failing)
    with pytest.raises(OSError, match=r"the file system of .*run has no file locks \("):
        run(recipe(tmp_path / "no-model", tmp_path / "run"))


def test_a_lock_that_does_not_answer_is_said(tmp_path, monkeypatch):
    """On some network file systems flock hangs, though it is told not to wait."""
    heard = threading.Event()
    notes: list[str] = []
    monkeypatch.setattr(locks, "SAID", 0.0)
    original = FileLock.acquire

    def hanging(self: FileLock, *args: object, **kwargs: object) -> object:
        assert heard.wait(HANG)
        return original(self, *args, **kwargs)

    def say(note: str) -> None:
        notes.append(note)
        heard.set()

    monkeypatch.setattr(FileLock, "acquire", hanging)
    with locks.locked(tmp_path / ".lock", say=say) as held:
        assert held
    assert notes == [f"{tmp_path / '.lock'} cannot be locked yet: its file system does not answer"]


@pytest.fixture
def unchecked(monkeypatch):
    """Only tests check annotations, and typer gives None for what was not said."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# -- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_finished_run_does_not_die_of_what_it_prints(encoding, unchecked, monkeypatch, tmp_path):
    """ "loss 1.0 → 0.5" was a UnicodeEncodeError on a terminal of Latin-1, with exit code 1."""
    shown, errors = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(errors, encoding=encoding))
    result = FinetuneResult(Path("r/model"), (1.0, 0.5), (), 2, 1.0, 1)
    monkeypatch.setattr("graftlens.finetune.finetune_run", lambda run: result)
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\noutput: o\ndata: {file: x.txt}\n")
    monkeypatch.setattr(sys, "argv", ["graftlens", "finetune", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    sys.stdout.flush()
    assert ended.value.code == 0
    assert shown.getvalue().startswith(b"r/model: 2 steps, loss 1.000 ")
    assert shown.getvalue().endswith(b" 0.500 nats per token\n")


def test_what_is_said_is_in_a_log_file_at_once(monkeypatch):
    """ "waiting for …/claim.lock" stayed in Python's buffer for as long as it was waited for."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="utf-8"))
    cli._print_anything()
    print("waiting for a lock")
    assert shown.getvalue() == b"waiting for a lock\n"


def test_home_folders_in_every_path(unchecked, tmp_path, monkeypatch):
    """A literal ~ folder appeared."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    seen: list[FinetuneRun] = []

    def never(run: FinetuneRun) -> FinetuneResult:
        seen.append(run)
        return FinetuneResult(run.output, (1.0,), (), 1, 1.0, 1)

    monkeypatch.setattr("graftlens.finetune.finetune_run", never)
    (tmp_path / "recipe.yaml").write_text(
        "model: ~/m\noutput: o\nheldout_file: ~/h.txt\n"
        "data: {file: ~/x.txt, supplement: {file: ~/s.txt, share: 0.1}}\n"
    )
    words = ["graftlens", "finetune", "~/recipe.yaml", "output=~/runs/a"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    (asked,) = seen
    assert (asked.model, asked.output) == (str(tmp_path / "m"), tmp_path / "runs" / "a")
    assert asked.heldout_file == tmp_path / "h.txt"
    assert asked.data.file == tmp_path / "x.txt"
    assert asked.data.supplement is not None
    assert asked.data.supplement.file == tmp_path / "s.txt"
    with pytest.raises(ValueError, match="there is no such user, and no folder of that name"):
        FinetuneConfig(model="m", output=Path("~no-such-user/run"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("~")]


def test_checksums_are_of_the_whole_file(tmp_path):
    """The digest is hashlib's own, so `sha256sum` checks a folder by hand."""
    checkpoints.begin(tmp_path / "model")
    (tmp_path / "model" / "a").write_text("abc")
    checkpoints.seal(tmp_path / "model")
    marker = json.loads((tmp_path / "model" / "complete.json").read_text())
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert marker["files"] == {"a": expected}
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["a", "complete.json"]
