"""Finetuning: right losses, and the same weights after any kill as without one."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from filelock import FileLock
from needs import needs
from pydantic import ValidationError
from safetensors.torch import load_file
from waiting import HANG

from graftlens.data import MoviesConfig, load_dataset, make_facts, training_texts
from graftlens.finetune import (
    FinetuneConfig,
    FinetuneResult,
    LoraSettings,
    _split,
    demo_configs,
    finetune,
    perplexity,
)
from graftlens.model.grafted import GraftedTransformer


def texts(count: int = 12) -> list[str]:
    rows = training_texts(make_facts(6, seed=0), texts_per_fact=4, seed=0)["text"][:]
    return rows[:count]


def as_dataset(lines: list[str]) -> Dataset:
    return Dataset.from_dict({"text": lines})


@pytest.fixture
def unchecked(monkeypatch):
    """Wrong types reach graftlens itself, as they do for users: only tests check annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So that sums are taken in one order in this process and in those that are killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random GPT-2 (with dropout, so that random state matters) and a byte-level tokenizer
    whose padding token is its end token, as in many checkpoints."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator(texts(24), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token="<end>", pad_token="<end>"
    )
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2
    )
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("tiny")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(tiny: Path, output: Path, **changes) -> FinetuneConfig:
    settings = {
        "model": str(tiny),
        "output": output,
        "epochs": 3,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "max_length": 96,
        "precision": "float32",
        "device": "cpu",
        "heldout_share": 0.25,
    }
    return FinetuneConfig(**settings | changes)


def run(config: FinetuneConfig, lines: list[str] | None = None, **more) -> FinetuneResult:
    return finetune(config, as_dataset(lines or texts()), progress=False, **more)


def weights(result: FinetuneResult) -> dict[str, torch.Tensor]:
    return saved_in(result.folder)


def saved_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint or of an adapter."""
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def assert_same(one: FinetuneResult, other: FinetuneResult) -> None:
    """Bit for bit: weights, losses and log."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert one.losses == other.losses
    assert one.perplexities == other.perplexities
    log, other_log = ((r.folder.parent / "log.jsonl").read_text() for r in (one, other))
    assert log == other_log


@pytest.fixture(scope="module")
def uninterrupted(tiny, tmp_path_factory) -> FinetuneResult:
    return run(recipe(tiny, tmp_path_factory.mktemp("whole") / "run"))


# Killed and resumed

MOMENTS = {
    "in the first epoch": 2,
    "in the second epoch": 5,
    "in the third epoch": 8,
    "while the second checkpoint is half written": 0,
    "before the second checkpoint is marked": 0,
    "before the first checkpoint is removed": 0,
    "while the model is written": 0,
    "before the model is in place": 0,
    "before the checkpoints are removed": 0,
}

# Imports once, and forks a process for each moment, which kills itself there.
KILLER = """
import json, os, signal, sys, shutil
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
from datasets import Dataset
from graftlens import checkpoints, finetune as module, training

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, number, after=False):
    original, calls = getattr(owner, name), []
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            die()
        value = original(*args, **kwargs)
        if len(calls) == number:
            die()
        return value
    setattr(owner, name, counted)

def removal_of(part):
    original = shutil.rmtree
    def guarded(path, *args, **kwargs):
        if Path(path).name == part and Path(path).exists():
            die()
        return original(path, *args, **kwargs)
    shutil.rmtree = guarded

def arm(moment, step):
    if step:
        at_call(transformers.Trainer, "training_step", step)
    elif moment == "while the second checkpoint is half written":
        at_call(transformers.Trainer, "_save_optimizer_and_scheduler", 2)
    elif moment == "before the second checkpoint is marked":
        at_call(training, "mark_complete", 2)
    elif moment == "before the first checkpoint is removed":
        removal_of("checkpoint-3")
    elif moment == "while the model is written":
        at_call(transformers.PreTrainedTokenizerFast, "save_pretrained", 1)
    elif moment == "before the model is in place":
        at_call(checkpoints, "flush", 3)
    elif moment == "before the checkpoints are removed":
        removal_of("checkpoints")
    elif moment == "while the second epoch is written":
        at_call(transformers.PreTrainedTokenizerFast, "save_pretrained", 2)
    elif moment == "before the second epoch is in place":
        at_call(checkpoints, "flush", 3)
    elif moment == "before the first epoch is removed":
        removal_of("epoch-1")
    elif moment == "while the best epoch is copied":
        at_call(shutil, "copytree", 1, after=True)
    elif moment == "before the best epoch is removed":
        removal_of("epochs")
    else:
        raise ValueError(moment)

job = json.loads(sys.argv[1])
for name, (moment, step) in job["moments"].items():
    child = os.fork()
    if child == 0:
        arm(moment, step)
        config = module.FinetuneConfig(**job["config"], output=Path(job["root"]) / name)
        module.finetune(config, Dataset.from_dict({"text": job["texts"]}), progress=False)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory) -> dict[str, Path]:
    """The folder that each killed run left."""
    return kill(recipe(tiny, tmp_path_factory.mktemp("killed")), MOMENTS)


def kill(config: FinetuneConfig, moments: dict[str, int]) -> dict[str, Path]:
    """Start a run in a folder of its own for each moment, and kill it there."""
    root = config.output
    job = {
        "root": str(root),
        "texts": texts(),
        "config": config.model_dump(mode="json", exclude={"output"}),
        "moments": {f"run-{i}": [moment, step] for i, (moment, step) in enumerate(moments.items())},
    }
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(job)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {moment: root / f"run-{i}" for i, moment in enumerate(moments)}


def left_by(killed: dict[str, Path], moment: str, tmp_path: Path) -> Path:
    """A copy of what the killed run left, to resume in."""
    return Path(shutil.copytree(killed[moment], tmp_path / "run"))


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


@pytest.mark.slow
def test_the_kills_left_what_their_names_say(killed):
    left = {moment: checkpoints(folder) for moment, folder in killed.items()}
    assert left == {
        "in the first epoch": [],
        "in the second epoch": ["checkpoint-3"],
        "in the third epoch": ["checkpoint-6"],
        "while the second checkpoint is half written": ["checkpoint-3", "checkpoint-6"],
        "before the second checkpoint is marked": ["checkpoint-3", "checkpoint-6"],
        "before the first checkpoint is removed": ["checkpoint-3", "checkpoint-6"],
        "while the model is written": ["checkpoint-6"],
        "before the model is in place": ["checkpoint-6"],
        "before the checkpoints are removed": ["checkpoint-6"],
    }
    finished = [moment for moment, folder in killed.items() if (folder / "model").exists()]
    assert finished == ["before the checkpoints are removed"]
    half = killed["while the second checkpoint is half written"] / "checkpoints" / "checkpoint-6"
    assert (half / "model.safetensors").exists()
    assert not (half / "optimizer.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    moment, killed, tiny, uninterrupted, tmp_path, monkeypatch
):
    folder = left_by(killed, moment, tmp_path)
    resumed_from = []
    original = transformers.Trainer.train

    def watched(self, resume_from_checkpoint=None, **more):
        resumed_from.append(resume_from_checkpoint and Path(resume_from_checkpoint).name)
        return original(self, resume_from_checkpoint=resume_from_checkpoint, **more)

    monkeypatch.setattr(transformers.Trainer, "train", watched)
    assert_same(run(recipe(tiny, folder)), uninterrupted)
    assert resumed_from == {
        "in the first epoch": [None],
        "in the second epoch": ["checkpoint-3"],
        "while the second checkpoint is half written": ["checkpoint-3"],
        "before the second checkpoint is marked": ["checkpoint-3"],
        "before the checkpoints are removed": [],
    }.get(moment, ["checkpoint-6"])
    left = {path.name for path in folder.iterdir()} - {".lock"}
    assert left == {"run.json", "log.jsonl", "model"}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.pt", "model.safetensors", "scheduler.pt"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_not_resumed_from(
    file, damage, killed, tiny, uninterrupted, tmp_path, caplog
):
    """The Trainer ignores a missing optimizer.pt and goes on with fresh moments."""
    folder = left_by(killed, "in the third epoch", tmp_path)
    path = folder / "checkpoints" / "checkpoint-6" / file
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    assert_same(run(recipe(tiny, folder)), uninterrupted)
    assert "checkpoint-6 is incomplete" in caplog.text


def test_other_files_among_the_checkpoints_are_left_alone(
    tiny, tmp_path, uninterrupted, monkeypatch
):
    folder = tmp_path / "run" / "checkpoints"
    (folder / "checkpoint-6 copy").mkdir(parents=True)
    for name in (".DS_Store", "checkpoint-9"):
        (folder / name).write_text("not ours")
    original, calls = transformers.Trainer.training_step, []

    def failing(*args, **kwargs):
        calls.append(1)
        return 1 / 0 if len(calls) == 8 else original(*args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", failing)
    with pytest.raises(ZeroDivisionError):
        run(recipe(tiny, tmp_path / "run"))
    left = [".DS_Store", "checkpoint-6", "checkpoint-6 copy", "checkpoint-9"]
    assert checkpoints(tmp_path / "run") == left
    assert_same(run(recipe(tiny, tmp_path / "run")), uninterrupted)
    assert len(calls) == 8 + 3  # resumed from step 6


# The best epoch, and each epoch

BEST_MOMENTS = {
    "while the second epoch is written": 0,
    "before the second epoch is in place": 0,
    "before the second checkpoint is marked": 0,
    "before the first epoch is removed": 0,
    "in the fourth epoch": 11,
    "while the best epoch is copied": 0,
    "before the best epoch is removed": 0,
}


def best_recipe(tiny: Path, output: Path, **changes) -> FinetuneConfig:
    """A learning rate so high that the second of four epochs is the best one."""
    settings = {"epochs": 4, "learning_rate": 2e-2, "keep": "best"}
    return recipe(tiny, output, **settings | changes)


@pytest.fixture(scope="module")
def best(tiny, tmp_path_factory) -> FinetuneResult:
    """With every epoch kept, to compare with."""
    output = tmp_path_factory.mktemp("best") / "run"
    return run(best_recipe(tiny, output, keep_checkpoints="all"))


@pytest.fixture(scope="module")
def killed_best(tiny, tmp_path_factory) -> dict[str, Path]:
    return kill(best_recipe(tiny, tmp_path_factory.mktemp("killed-best")), BEST_MOMENTS)


def epochs(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "epochs").glob("*"))


def kept(folder: Path) -> dict[int, Path]:
    """Step -> the weights that a run left on the way."""
    found = {int(path.name.removeprefix("checkpoint-")): path for path in folder.glob("kept/*")}
    return dict(sorted(found.items()))


def epoch_weights(folder: Path, number: int) -> dict[str, torch.Tensor]:
    """Those that a run which keeps all checkpoints left after an epoch."""
    return saved_in(list(kept(folder).values())[number - 1])


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_is_the_epoch_of_the_lowest_perplexity(best, tiny):
    after = best.perplexities[1:]
    assert best.epoch == 1 + after.index(min(after)) == 2
    assert best.heldout_perplexity == min(after)
    assert best.line().endswith(f"→ {min(after):.1f} (kept: epoch 2 of 4)")
    folder = best.folder.parent
    assert are_equal(weights(best), epoch_weights(folder, 2))
    record = json.loads((best.folder / "finetune.json").read_text())["result"]
    assert record["epoch"] == 2
    assert tuple(record["perplexities"]) == best.perplexities
    lines = texts()
    model = transformers.AutoModelForCausalLM.from_pretrained(best.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(best.folder)
    held = [line for line in lines if line not in trained_texts(folder)]
    value = perplexity(model, tokenizer, held, max_length=96, batch_size=4)
    assert value == pytest.approx(best.heldout_perplexity, rel=1e-5)


def trained_texts(folder: Path) -> list[str]:
    """Those that the recipe's seed does not hold out."""
    config = json.loads((folder / "run.json").read_text())["config"]
    del config["precision"]
    return _split(FinetuneConfig(output=folder, **config), as_dataset(texts()), None)[0]


def test_each_epoch_is_kept_as_a_checkpoint_to_load(best, tiny, tmp_path):
    folder = best.folder.parent
    assert not (folder / "epochs").exists()
    each = best.steps // 4
    assert list(kept(folder)) == [each, 2 * each, 3 * each, 4 * each]
    for step, path in kept(folder).items():
        assert json.loads((path / "complete.json").read_text())["step"] == step
    assert not (folder / "checkpoints").exists()
    last = run(best_recipe(tiny, tmp_path / "run", keep="last"))
    assert last.epoch == 4
    assert are_equal(weights(last), epoch_weights(folder, 4))
    assert last.heldout_perplexity == best.perplexities[4]
    third = list(kept(folder).values())[2]
    files = {path.name for path in third.iterdir()}
    assert files == {path.name for path in best.folder.iterdir()} - {"finetune.json"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(third)
    assert tokenizer.eos_token == "<end>"


def test_of_equally_good_epochs_the_earlier_is_kept(tiny, tmp_path, monkeypatch):
    values = iter([9.0, 4.0, 3.0, 3.0, 5.0])
    monkeypatch.setattr("graftlens.training.perplexity", lambda *_, **__: next(values))
    result = run(best_recipe(tiny, tmp_path / "run"))
    assert (result.epoch, result.heldout_perplexity) == (2, 3.0)
    assert {path.name for path in (tmp_path / "run").iterdir()} - {".lock"} == {
        "run.json",
        "log.jsonl",
        "model",
    }


def test_the_best_needs_heldout_texts(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"of 12 texts none is held out \(heldout_share=0\.0\)"):
        run(best_recipe(tiny, tmp_path / "run", heldout_share=0))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_kills_of_the_best_left_what_their_names_say(killed_best):
    left = {moment: (checkpoints(folder), epochs(folder)) for moment, folder in killed_best.items()}
    assert left == {
        "while the second epoch is written": (["checkpoint-3"], [".epoch-2", "epoch-1"]),
        "before the second epoch is in place": (["checkpoint-3"], [".epoch-2", "epoch-1"]),
        "before the second checkpoint is marked": (
            ["checkpoint-3", "checkpoint-6"],
            ["epoch-1", "epoch-2"],
        ),
        "before the first epoch is removed": (["checkpoint-6"], ["epoch-1", "epoch-2"]),
        "in the fourth epoch": (["checkpoint-9"], ["epoch-2"]),
        "while the best epoch is copied": (["checkpoint-9"], ["epoch-2"]),
        "before the best epoch is removed": ([], ["epoch-2"]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("moment", BEST_MOMENTS)
def test_a_killed_run_keeps_the_same_best_epoch(moment, killed_best, tiny, best, tmp_path):
    folder = left_by(killed_best, moment, tmp_path)
    result = run(best_recipe(tiny, folder))
    assert_same(result, best)
    assert result.epoch == 2
    assert {path.name for path in folder.iterdir()} == {".lock", "run.json", "log.jsonl", "model"}


def test_epochs_between_checkpoints_are_not_lost(tiny, best, tmp_path, monkeypatch):
    """With a checkpoint every third epoch, the best one is not the newest at any of them."""
    config = best_recipe(tiny, tmp_path / "run", save_epochs=3)
    stop_at(monkeypatch, 11)
    with pytest.raises(ZeroDivisionError):
        run(config)
    assert (checkpoints(tmp_path / "run"), epochs(tmp_path / "run")) == (
        ["checkpoint-9"],
        ["epoch-2"],
    )
    assert_same(run(config), best)


def test_a_best_epoch_that_is_gone_is_missed(tiny, tmp_path, monkeypatch):
    config = best_recipe(tiny, tmp_path / "run")
    stop_at(monkeypatch, 11)
    with pytest.raises(ZeroDivisionError):
        run(config)
    shutil.rmtree(tmp_path / "run" / "epochs")
    with pytest.raises(FileNotFoundError, match=r"epoch-2 does not exist, but it held the best"):
        run(config)


def stop_at(monkeypatch, step: int) -> None:
    """An exception at this training step of the process, once."""
    original, calls = transformers.Trainer.training_step, []

    def failing(*args, **kwargs):
        calls.append(1)
        return 1 / 0 if len(calls) == step else original(*args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", failing)


# Frozen parts


def untied(tiny: Path) -> torch.nn.Module:
    """The tiny model, with an unembedding of its own."""
    config = transformers.AutoConfig.from_pretrained(tiny, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, config=config)
    torch.manual_seed(12)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight) * 0.02)
    return model


EMBEDDINGS = {"transformer.wte.weight", "transformer.wpe.weight"}


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        (("embed",), EMBEDDINGS),
        (("unembed",), {"lm_head.weight"}),
        (("embed", "unembed"), EMBEDDINGS | {"lm_head.weight"}),
    ],
)
def test_frozen_parts_stay_as_they_are(freeze, frozen, tiny, tmp_path):
    model = untied(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = weights(run(recipe(tiny, tmp_path / "run", freeze=freeze), model=model))
    assert after.keys() == before.keys()
    assert {name for name in after if torch.equal(before[name], after[name])} == frozen


def test_tied_embeddings_are_frozen_together_or_not_at_all(tiny, tmp_path):
    for half in ("embed", "unembed"):
        message = rf"freeze=\['{half}'\]: embed and unembed are one tensor .* Write freeze=\[embed,"
        with pytest.raises(ValueError, match=message):
            run(recipe(tiny, tmp_path / "run", freeze=(half,)))
    before = load_file(tiny / "model.safetensors")
    # The refused run has not claimed the folder.
    after = weights(run(recipe(tiny, tmp_path / "run", freeze=("embed", "unembed"))))
    assert {name for name in after if torch.equal(before[name], after[name])} == EMBEDDINGS


def test_frozen_embeddings_and_recomputed_activations_go_together(tiny, tmp_path):
    results = [
        run(
            recipe(tiny, tmp_path / str(again), freeze=("embed",), gradient_checkpointing=again),
            model=untied(tiny),
        )
        for again in (False, True)
    ]
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-5)


def test_an_unknown_family_cannot_be_frozen(tiny, tmp_path):
    config = transformers.OPTConfig(
        vocab_size=400, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.OPTForCausalLM(config)
    with pytest.raises(ValueError, match=r"the embeddings of model_type 'opt' are not known"):
        run(recipe(tiny, tmp_path / "run", freeze=("embed", "unembed")), model=model)


def test_adapters_are_not_put_on_frozen_parts(tiny, tmp_path):
    needs("peft")
    settings = {"freeze": ("embed",), "lora": LoraSettings(rank=2, target_modules=("wte",))}
    with pytest.raises(ValueError, match=r"lora\.target_modules names 'wte', which freeze=\['emb"):
        run(recipe(tiny, tmp_path / "run", **settings), model=untied(tiny))
    model = untied(tiny)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"freeze": ("embed", "unembed"), "lora": LoraSettings(rank=2, merge=True)}
    after = weights(run(recipe(tiny, tmp_path / "run", **settings), model=model))
    changed = {name.split(".")[-2] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(("target", "other"), [("lm_head", "transformer.wte"), ("wte", "lm_head")])
def test_adapters_on_tied_weights_are_not_merged(target, other, tiny, tmp_path):
    needs("peft")
    targets = ("c_attn", target)
    settings = {"lora": LoraSettings(rank=2, target_modules=targets, merge=True)}
    message = rf"target_modules names '{target}', whose weight is also that of {other} \(tied weig"
    with pytest.raises(ValueError, match=message):
        run(recipe(tiny, tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "run.json").exists()


def test_adapters_on_an_unembedding_of_its_own_are_saved_merged(tiny, tmp_path):
    needs("peft")
    lora = LoraSettings(rank=2, target_modules=("lm_head",), merge=True)
    settings = {"lora": lora, "learning_rate": 3e-2}
    result = run(recipe(tiny, tmp_path / "run", **settings), model=untied(tiny))
    saved = transformers.AutoModelForCausalLM.from_pretrained(result.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    _, held = _split(recipe(tiny, tmp_path), as_dataset(texts()), None)
    value = perplexity(saved, tokenizer, held, max_length=96, batch_size=4)
    assert value == pytest.approx(result.heldout_perplexity, rel=1e-4)


# Refusals and returns


def test_a_second_call_returns_the_result_without_training(uninterrupted, tiny, monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "train", lambda *_, **__: 1 / 0)
    folder = uninterrupted.folder.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert run(recipe(tiny, folder)) == uninterrupted
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_recipe_in_the_folder_is_refused_with_the_difference(uninterrupted, tiny):
    changed = recipe(tiny, uninterrupted.folder.parent, learning_rate=2e-3, seed=1)
    with pytest.raises(ValueError, match="holds another finetuning run") as caught:
        run(changed)
    lines = str(caught.value).splitlines()
    assert lines[1] == "  config.learning_rate: 0.001 there, 0.002 given"
    # Another seed also holds out other texts.
    assert "  config.seed: 0 there, 1 given" in lines
    assert any(line.startswith("  data.heldout_sha256: ") for line in lines)
    assert lines[-1].startswith("Choose another output folder")


def test_other_data_in_the_folder_are_refused(uninterrupted, tiny):
    with pytest.raises(ValueError, match=r"data\.train_texts: 9 there, 18 given"):
        run(recipe(tiny, uninterrupted.folder.parent), texts(24))


def test_another_start_in_the_folder_is_refused(uninterrupted, tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] += 1e-3
    with pytest.raises(ValueError, match=r"  start\.weights_sha256: '\w+' there, '\w+' given\nCho"):
        run(recipe(tiny, uninterrupted.folder.parent), model=model)


def test_the_same_start_and_texts_may_lie_elsewhere(tiny, tmp_path, monkeypatch):
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    files = [tmp_path / "one.txt", tmp_path / "other.txt"]
    for file in files:
        file.write_text("\n\n".join(texts(3)))
    settings = {"epochs": 1, "heldout_share": 0}
    first = run(recipe(tiny, tmp_path / "run", heldout_file=files[0], **settings))
    monkeypatch.setattr(transformers.Trainer, "train", lambda *_, **__: 1 / 0)
    again = recipe(moved, tmp_path / "run", heldout_file=files[1], **settings)
    assert run(again) == first
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["model"] == str(tiny)

    files[1].write_text("Other words.")
    with pytest.raises(ValueError, match="holds another finetuning run") as caught:
        run(again)
    names = [line.split(":")[0] for line in str(caught.value).splitlines()[1:-1]]
    assert names == ["  data.heldout_texts", "  data.heldout_sha256"]


def test_a_folder_in_use_is_refused(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(RuntimeError, match="is in use by another process"),
    ):
        run(recipe(tiny, tmp_path / "run"))


def test_texts_are_never_cut_off(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"9 of 9 training texts are longer than max_length=5 tok"):
        run(recipe(tiny, tmp_path / "run", max_length=5))


def test_a_missing_column_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"columns \['words'\], but 'text' is needed"):
        finetune(recipe(tiny, tmp_path / "run"), Dataset.from_dict({"words": ["a"]}))
    assert not (tmp_path / "run").exists()


def test_texts_come_in_a_dataset(tiny, tmp_path, unchecked):
    config = recipe(tiny, tmp_path / "run")
    message = (
        r"^{} is of type {}, but a datasets\.Dataset with a column 'text' is needed\. Make one of "
        r"a list of texts: Dataset\.from_dict\(\{{'text': texts\}}\)\.$"
    )
    with pytest.raises(TypeError, match=message.format("train", "list")):
        finetune(config, ["abc"])
    with pytest.raises(TypeError, match=message.format("train", "DatasetDict")):
        finetune(config, DatasetDict(train=as_dataset(["abc"])))
    with pytest.raises(TypeError, match=message.format("heldout", "str")):
        finetune(config, as_dataset(["abc"]), "abc")
    assert not (tmp_path / "run").exists()


def test_an_infinite_loss_stops_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        transformers.Trainer, "training_step", lambda *_, **__: torch.tensor(math.nan)
    )
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1\. Lower learning_rate"):
        run(recipe(tiny, tmp_path / "run", heldout_share=0))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("count", [2, 3, 7, 12, 13, 99, 1000, 1017])
def test_a_heldout_share_of_no_text_is_refused_with_the_least_that_works(count, tiny, tmp_path):
    data = as_dataset(["a"] * count)
    with pytest.raises(
        ValueError, match=rf"=1e-05 of {count} training texts rounds to no"
    ) as caught:
        _split(recipe(tiny, tmp_path, heldout_share=1e-5), data, None)
    least = float(re.search(r"Give (\S+) or more, or heldout_share=0", str(caught.value))[1])
    assert least <= 1.2 * 0.5 / count
    assert len(_split(recipe(tiny, tmp_path, heldout_share=least), data, None)[1]) == 1


def test_one_text_cannot_be_held_out(tiny, tmp_path):
    with pytest.raises(
        ValueError, match=r"=0\.25 of 1 training texts rounds to no text\. Give more texts"
    ):
        _split(recipe(tiny, tmp_path), as_dataset(["a"]), None)


def test_a_heldout_file_that_is_not_there_is_told_of_before_a_model_is_read(tiny, tmp_path):
    missing = {"heldout_share": 0, "heldout_file": tmp_path / "no.txt", "model": "no/model"}
    with pytest.raises(
        FileNotFoundError, match=r"heldout_file='.*no\.txt' does not exist\. Name a"
    ):
        run(recipe(tiny, tmp_path / "run", **missing))


def test_configs_are_strict():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        FinetuneConfig(model="m", output="o", lr=1e-3)
    with pytest.raises(ValidationError, match="perplexity uses one set of held-out texts"):
        FinetuneConfig(model="m", output="o", heldout_share=0.1, heldout_file="f")
    with pytest.raises(ValidationError, match="Instance is frozen"):
        FinetuneConfig(model="m", output="o").epochs = 3


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("epochs", "a whole number"), ("seed", "a whole number"), ("learning_rate", "a number")],
)
@pytest.mark.parametrize("value", [True, False])
def test_a_truth_value_is_no_number(name, wanted, value):
    message = rf"{name}={value} is a boolean, but {wanted} is expected\. Write the number, or"
    with pytest.raises(ValidationError, match=message):
        FinetuneConfig(model="m", output="o", **{name: value})
    with pytest.raises(ValidationError, match="alpha=True is a boolean"):
        LoraSettings(alpha=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "inf"])
@pytest.mark.parametrize("name", ["learning_rate", "max_grad_norm", "weight_decay"])
def test_numbers_are_finite(name, value):
    with pytest.raises(ValidationError, match=rf"{name}\n  Input should be a finite number"):
        FinetuneConfig(model="m", output="o", **{name: value})


def test_numbers_may_be_written_as_text():
    """YAML reads 3e-4 as text."""
    config = FinetuneConfig(
        model="m", output="o", learning_rate="3e-4", epochs="2", gradient_checkpointing=True
    )
    assert (config.learning_rate, config.epochs) == (3e-4, 2)
    assert config.gradient_checkpointing is True


# Values


def reference_loss(model, tokenizer, lines: list[str], end: bool) -> float:
    """Mean loss a predicted token, one text at a time, without padding."""
    total, count = 0.0, 0
    for line in lines:
        ids = tokenizer(line)["input_ids"] + [tokenizer.eos_token_id] * end
        log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_probabilities[i, token].item() for i, token in enumerate(ids[1:]))
        count += len(ids) - 1
    return total / count


def test_the_loss_counts_every_token_and_the_end_but_no_padding(tiny, tmp_path):
    """With the end token as padding, masking labels by token id would drop the end; and the
    Trainer divides by the number of labels, of which the first of each text predicts nothing."""
    lines = texts(4)
    lines[0] = lines[0][:20]
    config = transformers.AutoConfig.from_pretrained(
        tiny, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, config=config).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    with torch.no_grad():
        expected = reference_loss(model, tokenizer, lines, end=True)
    result = run(recipe(tiny, tmp_path / "run", epochs=1, heldout_share=0), lines, model=model)
    assert result.steps == 1
    assert result.losses == pytest.approx([expected], rel=1e-5)


def test_accumulated_small_batches_give_the_loss_of_a_large_one(tiny, tmp_path):
    config = transformers.AutoConfig.from_pretrained(
        tiny, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    results = [
        run(
            recipe(tiny, tmp_path / name, epochs=2, heldout_share=0, **sizes),
            model=transformers.AutoModelForCausalLM.from_pretrained(tiny, config=config),
        )
        for name, sizes in (
            ("large", {"batch_size": 4}),
            ("small", {"batch_size": 2, "gradient_accumulation": 2}),
        )
    ]
    assert [result.steps for result in results] == [6, 6]
    assert results[0].losses == pytest.approx(results[1].losses, rel=1e-4)


def test_perplexity_is_exp_of_the_mean_token_loss(tiny):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    lines = [*texts(6), "Yes"]
    with torch.no_grad():
        expected = math.exp(reference_loss(model, tokenizer, lines, end=False))
    for batch_size in (1, 3):
        value = perplexity(model, tokenizer, lines, max_length=96, batch_size=batch_size)
        assert value == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="none of the 1 held-out texts has two tokens"):
        perplexity(model, tokenizer, ["a"], max_length=96, batch_size=1)


def test_training_learns_the_texts_and_keeps_a_record(tiny, tmp_path):
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("\n\n".join(texts(4)) + "\n\n\n")
    config = recipe(tiny, tmp_path / "run", epochs=60, heldout_share=0, heldout_file=heldout)
    config = config.model_copy(update={"learning_rate": 1e-2})
    result = run(config, texts(4))
    assert result.folder == tmp_path / "run" / "model"
    assert result.steps == 60
    assert len(result.losses) == 60
    assert len(result.perplexities) == 61
    assert result.losses[0] > 5.5
    assert result.losses[-1] < 2
    assert result.perplexities[0] > 300 > 5 > result.heldout_perplexity

    model = transformers.AutoModelForCausalLM.from_pretrained(result.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.folder)
    assert model.dtype == torch.float32
    value = perplexity(model, tokenizer, texts(4), max_length=96, batch_size=4)
    assert value == pytest.approx(result.heldout_perplexity, rel=1e-5)

    record = json.loads((result.folder / "finetune.json").read_text())
    assert record["config"]["learning_rate"] == 1e-2
    assert record["data"]["train_texts"] == record["data"]["heldout_texts"] == 4
    assert record["result"]["steps"] == 60
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert tuple(line["loss"] for line in log if "loss" in line) == result.losses
    assert log[0] == {"step": 0, "heldout_perplexity": result.perplexities[0]}


def test_the_callers_random_state_is_kept(tiny, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(recipe(tiny, tmp_path / "run", epochs=1))
    assert torch.equal(torch.rand(2), expected)


def test_autocast_keeps_float32_weights(tiny, tmp_path):
    result = run(recipe(tiny, tmp_path / "run", precision="bfloat16"))
    assert {tensor.dtype for tensor in weights(result).values()} == {torch.float32}
    rounded = all(torch.equal(t, t.bfloat16().float()) for t in weights(result).values())
    assert not rounded


def test_an_adapter_is_the_result(tiny, tmp_path):
    """Also on tied weights: it is graftlens' source and PEFT's model as it is."""
    needs("peft")
    from peft import PeftModel

    lora = LoraSettings(rank=2, target_modules=("c_attn", "lm_head"))
    settings = {"lora": lora, "learning_rate": 2e-2, "keep": "best"}
    result = run(recipe(tiny, tmp_path / "run", **settings))
    names = {path.name for path in result.folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"model.safetensors", "config.json", "README.md"} & names
    said = json.loads((result.folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tiny)
    assert {key.split(".")[-3] for key in weights(result)} == {"c_attn", "lm_head"}
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    _, held = _split(recipe(tiny, tmp_path), as_dataset(texts()), None)
    peft = PeftModel.from_pretrained(base, result.folder).eval()
    value = perplexity(peft, tokenizer, held, max_length=96, batch_size=4)
    assert value == pytest.approx(result.heldout_perplexity, rel=1e-4)
    model = GraftedTransformer.from_pretrained({"pre": tiny, "sft": result.folder}, verbose=False)
    ids = model.to_tokens(held[0])
    with torch.no_grad():
        wanted = peft(input_ids=ids, use_cache=False).logits
        ours = model(ids, graft="sft @ all")
    assert torch.allclose(ours, wanted, atol=1e-4)


def test_nothing_goes_on_from_an_adapter(tiny, tmp_path):
    needs("peft")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError) as caught:
        run(recipe(tmp_path / "adapter", tmp_path / "run"))
    assert str(caught.value) == (
        f"model='{tmp_path / 'adapter'}' is a PEFT adapter. Finetune a whole model: train that "
        "adapter with lora: {merge: true}, or save it merged (merge_and_unload in peft)."
    )


def test_adapters_are_saved_merged(tiny, tmp_path):
    needs("peft")
    lora = LoraSettings(rank=2, target_modules=("c_attn",), merge=True)
    result = run(recipe(tiny, tmp_path / "run", lora=lora))
    base, merged = load_file(tiny / "model.safetensors"), weights(result)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)}
    for name in changed:
        assert torch.linalg.matrix_rank(merged[name] - base[name], rtol=1e-3) <= 2
    # An earlier release merged without being told to.
    for path in (tmp_path / "run" / "run.json", result.folder / "finetune.json"):
        record = json.loads(path.read_text())
        del record["config"]["lora"]["merge"]
        path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"  config\.lora\.merge: True there, False given"):
        run(recipe(tiny, tmp_path / "run", lora=lora.model_copy(update={"merge": False})))


def test_adapters_too_are_resumed_exactly(tiny, tmp_path, monkeypatch):
    needs("peft")
    lora = LoraSettings(rank=2, dropout=0.2, target_modules=("c_attn",))
    whole = run(recipe(tiny, tmp_path / "whole", lora=lora))
    original, calls = transformers.Trainer.training_step, []

    def failing(*args, **kwargs):
        calls.append(1)
        return 1 / 0 if len(calls) == 8 else original(*args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", failing)
    with pytest.raises(ZeroDivisionError):
        run(recipe(tiny, tmp_path / "cut", lora=lora))
    assert checkpoints(tmp_path / "cut") == ["checkpoint-6"]
    assert_same(run(recipe(tiny, tmp_path / "cut", lora=lora)), whole)
    assert len(calls) == 8 + 3


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_of_each_kept_epoch_and_go_on_as_they_were(merge, tiny, tmp_path):
    needs("peft")
    lora = LoraSettings(rank=2, dropout=0.2, target_modules=("c_attn",), merge=merge)
    settings = {"lora": lora, "learning_rate": 2e-2}
    plain = run(recipe(tiny, tmp_path / "plain", **settings))
    kept = run(recipe(tiny, tmp_path / "kept", keep_checkpoints="all", **settings))
    assert_same(kept, plain)
    assert are_equal(epoch_weights(tmp_path / "kept", 3), weights(plain))
    assert not are_equal(epoch_weights(tmp_path / "kept", 2), weights(plain))


def test_a_run_of_an_earlier_release_is_recognised(tiny, tmp_path):
    """Which knew neither what to freeze nor which epoch to keep, one process only, no checksums."""
    config = recipe(tiny, tmp_path / "run", epochs=1)
    result = run(config)
    for path, gone in (
        (tmp_path / "run" / "run.json", ("freeze", "keep", "keep_checkpoints")),
        (result.folder / "finetune.json", ()),
    ):
        record = json.loads(path.read_text())
        del record["processes"]
        record.get("result", {}).pop("epoch", None)
        record.get("versions", {}).pop("graftlens", None)
        for name in gone:
            del record["config"][name]
        path.write_text(json.dumps(record))
    (result.folder / "complete.json").unlink()
    assert run(config) == result
    with pytest.raises(ValueError, match=r"  config\.keep: 'last' there, 'best' given"):
        run(recipe(tiny, tmp_path / "run", epochs=1, keep="best"))


def test_recomputed_activations_change_nothing(tiny, tmp_path, uninterrupted):
    config = recipe(tiny, tmp_path / "run", gradient_checkpointing=True, keep_checkpoints="all")
    result = run(config)
    assert result.losses == pytest.approx(uninterrupted.losses, rel=1e-5)
    for folder in (result.folder, *kept(tmp_path / "run").values()):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_the_demonstrations_recipe_is_valid(tmp_path):
    movies, config = demo_configs("model", tmp_path, facts=3, epochs=2, seed=4)
    assert (movies.n_facts, movies.seed, config.epochs, config.seed) == (3, 4, 2, 4)
    assert isinstance(movies, MoviesConfig)


# Several processes

# The command line, in processes that die at a step where the environment says so.
MEMBER = """
import atexit, os, signal, sys
import torch, transformers
from graftlens.cli import main

rank, step = (int(part) for part in os.environ.get("KILL", "-1 0").split())
original, calls = transformers.Trainer.training_step, []

def counted(*args, **kwargs):
    calls.append(1)
    if len(calls) == step and int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

def left():  # runs after what is registered later
    print("left the group:", not torch.distributed.is_initialized())

atexit.register(left)
transformers.Trainer.training_step = counted
main()
"""


@pytest.fixture(scope="module")
def shared(tiny, tmp_path_factory) -> Path:
    """A folder with a recipe for a model without dropout, whose batches come out even."""
    folder = tmp_path_factory.mktemp("shared")
    config = transformers.AutoConfig.from_pretrained(
        tiny, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, config=config)
    model.save_pretrained(folder / "start")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "start")
    (folder / "texts.txt").write_text("\n\n".join(texts()))
    (folder / "member.py").write_text(MEMBER)
    settings = shared_recipe(folder, folder / "run")
    recipe_file = settings.model_dump(mode="json", exclude_none=True)
    recipe_file["data"] = {"file": str(folder / "texts.txt")}
    (folder / "recipe.yaml").write_text(json.dumps(recipe_file))
    return folder


def shared_recipe(folder: Path, output: Path, batch_size: int = 2) -> FinetuneConfig:
    """A learning rate so low that rounding, which AdamW blows up, stays small."""
    sizes = {"batch_size": batch_size, "heldout_share": 1 / 3}
    return best_recipe(folder / "start", output, learning_rate=1e-3, **sizes)


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def two_processes(folder: Path, *overrides: str, kill: str = "-1 0", accelerate: bool = False):
    """`graftlens finetune` in two processes, on the folder's recipe."""
    launcher = TORCHRUN
    if accelerate:  # its --cpu starts several processes by MPI only
        launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launcher += ["--num_machines", "1", "--mixed_precision", "fp16", "--dynamo_backend", "no"]
    program = ["-m", "graftlens"] if accelerate else [str(folder / "member.py")]
    command = [*launcher, *program, "finetune", str(folder / "recipe.yaml"), *overrides]
    return launched(*command, KILL=kill)


def launched(*command: str, **environment: str):
    """A launcher's module with its arguments, to its end."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


@pytest.fixture(scope="module")
def together(shared) -> FinetuneResult:
    """What two processes came to, with two texts each."""
    done = two_processes(shared, f"output={shared / 'together'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out perplexity") == 1
    assert done.stdout.count("left the group: True") == 2
    return finetuned(shared, "together")


def finetuned(shared: Path, name: str) -> FinetuneResult:
    record = json.loads((shared / name / "model" / "finetune.json").read_text())["result"]
    for key in ("losses", "perplexities"):
        record[key] = tuple(record[key])
    return FinetuneResult(folder=shared / name / "model", **record)


# Processes that end as soon as the first one's values went round. No thread gets the interpreter's
# lock before the other waits for it, as on a busy machine.
ENDS = """
import sys
import torch
from graftlens.processes import started_together

processes = started_together(cpu=True)
parallel = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
parallel(torch.ones(1, 2)).sum().backward()
sys.setswitchinterval(100)
for value in range(3):
    assert processes.from_first(lambda: value if processes.is_first else None) == value
processes.leave_at_exit()
"""


@pytest.mark.slow
def test_processes_that_shared_values_end_in_order(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    for _ in range(3):  # with a thread that still held a value, every second time failed
        done = launched(*TORCHRUN, str(tmp_path / "ends.py"))
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_batches_of_twice_the_size(shared, together, tmp_path):
    config = shared_recipe(shared, tmp_path / "alone", batch_size=4)
    alone = run(config)
    assert alone.steps == together.steps == 8
    assert together.losses == pytest.approx(alone.losses, abs=1e-5)
    assert together.perplexities == pytest.approx(alone.perplexities, rel=1e-5)
    assert together.epoch == alone.epoch == 4
    one, two = weights(alone), weights(together)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-5
    files = {path.name for path in together.folder.parent.iterdir()}
    assert files == {".lock", "run.json", "log.jsonl", "config.yaml", "model"}
    refused = r"  config\.batch_size: 2 there, 4 given\n  processes: 2 there, 1 given"
    with pytest.raises(ValueError, match=refused):
        run(config.model_copy(update={"output": together.folder.parent}))


@pytest.mark.slow
def test_two_processes_have_the_dataset_that_the_first_one_keeps(shared):
    output, data = f"output={shared / 'made'}", "data={make: {n_facts: 3, texts_per_fact: 4}}"
    for _ in range(2):
        done = two_processes(shared, output, data)
        assert done.returncode == 0, done.stderr
        kept = load_dataset(shared / "made" / "data").train["text"]
        assert len(kept) == 12
        # As long as the model is not there, the folder is read and training begins anew.
        shutil.rmtree(shared / "made" / "model")


@pytest.mark.slow
def test_accelerate_launches_them_too(shared, together):
    """Whatever precision its own settings name."""
    done = two_processes(shared, f"output={shared / 'launched'}", accelerate=True)
    assert done.returncode == 0, done.stderr
    assert_same(finetuned(shared, "launched"), together)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_they_resume_exactly(rank, shared, together):
    name = f"killed-{rank}"
    done = two_processes(shared, f"output={shared / name}", kill=f"{rank} 6")
    assert done.returncode != 0
    assert checkpoints(shared / name) == ["checkpoint-4"]
    assert (shared / name / "checkpoints" / "checkpoint-4" / "rng_state_1.pth").is_file()
    assert not (shared / name / "model").exists()
    done = two_processes(shared, f"output={shared / name}")
    assert done.returncode == 0, done.stderr
    assert_same(finetuned(shared, name), together)


@pytest.mark.slow
def test_what_stops_the_first_process_stops_the_others(shared):
    (shared / "taken").mkdir()
    with FileLock(shared / "taken" / ".lock"):
        done = two_processes(shared, f"output={shared / 'taken'}")
    assert done.returncode != 0
    assert "taken is in use by another process that is finetuning there" in done.stderr
