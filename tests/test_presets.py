"""Presets: settings that are valid, models that graftlens reads, and files that a preset fills."""

from pathlib import Path
from types import MappingProxyType

import pytest

from graftlens.configfile import ConfigError, read_settings
from graftlens.finetune import FinetuneConfig, FinetuneRun, demo_configs
from graftlens.model.arch import supported
from graftlens.presets import LAPTOP, PAPER, PRESETS, preset

#: Where the hub keeps each model, and which family it is of.
MODELS = {
    "gemma-1.1-2b": ("google/gemma-1.1-2b-it", "gemma"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "llama"),
    "pythia-2.8b": ("EleutherAI/pythia-2.8b", "gpt_neox"),
    "pythia-1.4b": ("EleutherAI/pythia-1.4b", "gpt_neox"),
    "gpt2": ("openai-community/gpt2", "gpt2"),
    "gpt2-medium": ("openai-community/gpt2-medium", "gpt2"),
    "gpt2-large": ("openai-community/gpt2-large", "gpt2"),
    "gpt2-xl": ("openai-community/gpt2-xl", "gpt2"),
    "olmo-1b": ("allenai/OLMo-1B-hf", "olmo"),
    "smollm2-135m": ("smollm2-135m", "llama"),
    "gemma-3-270m": ("google/gemma-3-270m", "gemma3_text"),
}

SHIPPED = Path(__file__).parent.parent / "experiments" / "finetune" / "paper.yaml"


def test_the_models_of_the_paper_and_some_more_have_presets() -> None:
    assert {name: (p.model, p.family) for name, p in PRESETS.items()} == MODELS
    assert all(name == p.name for name, p in PRESETS.items())


@pytest.mark.parametrize("name", MODELS)
def test_each_is_a_valid_recipe_for_a_supported_family(name: str, tmp_path: Path) -> None:
    chosen = preset(name)
    assert chosen.family in supported()
    config = FinetuneConfig(model=chosen.model, output=tmp_path, **chosen.recipe)
    assert {key: getattr(config, key) for key in chosen.recipe} == dict(chosen.recipe)
    with pytest.raises(TypeError):
        chosen.recipe["epochs"] = 1  # type: ignore[index]


def test_the_papers_settings(tmp_path: Path) -> None:
    config = FinetuneConfig(model="m", output=tmp_path, **PAPER)
    assert (config.learning_rate, config.weight_decay, config.batch_size) == (2e-6, 0.001, 4)
    assert (config.epochs, config.heldout_share, config.keep) == (10, 0.2, "best")
    assert (config.warmup_steps, config.save_epochs, config.freeze) == (0, 1, ())
    assert config.precision == "auto"
    assert sum(p.recipe is PAPER for p in PRESETS.values()) == 9
    assert all(("fp16" in p.source) == (p.recipe is PAPER) for p in PRESETS.values())


def test_the_laptops_settings_are_the_demos(tmp_path: Path) -> None:
    _, demo = demo_configs("m", tmp_path)
    ours = FinetuneConfig(model="m", output=tmp_path, **LAPTOP)
    assert ours.model_copy(update={"max_length": demo.max_length}) == demo
    assert ours.max_length == 128


def test_an_unknown_preset_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"^preset 'gpt2-xxl' is unknown\. Presets: gemma-1\.1-2b"):
        preset("gpt2-xxl")
    with pytest.raises(ValueError, match=r"Did you mean 'gpt2-xl'\? For another model, give model"):
        preset("gpt2-xxl")
    assert isinstance(PRESETS, MappingProxyType)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


THREE_LINES = "preset: gpt2-xl\noutput: runs/xl\ndata: {movies: {n_facts: 3}}\n"


def test_a_file_of_three_lines_is_filled_in(tmp_path: Path) -> None:
    run = read_settings(FinetuneRun, write(tmp_path, THREE_LINES))
    assert run.preset == "gpt2-xl"
    assert run.model == "openai-community/gpt2-xl"
    assert run.recipe == FinetuneConfig(model=run.model, output=Path("runs/xl"), **PAPER)
    # What a finished run's config.yaml holds gives the same run again.
    assert FinetuneRun.model_validate(run.model_dump(mode="json")) == run


def test_what_the_file_gives_stands(tmp_path: Path) -> None:
    path = write(tmp_path, THREE_LINES + "epochs: 2\nmodel: ./mine\nkeep: last\n")
    run = read_settings(FinetuneRun, path, ["learning_rate=1e-5", "heldout_share=0"])
    assert (run.model, run.epochs, run.learning_rate) == ("./mine", 2, 1e-5)
    assert (run.keep, run.heldout_share, run.batch_size) == ("last", 0, 4)
    run = read_settings(FinetuneRun, path, ["preset=smollm2-135m"])
    assert (run.model, run.learning_rate, run.batch_size) == ("./mine", 1e-4, 16)


def test_held_out_texts_of_a_file_take_the_place_of_the_presets_share(tmp_path: Path) -> None:
    path = write(tmp_path, THREE_LINES)
    run = read_settings(FinetuneRun, path, ["heldout_file=held.txt"])
    assert (run.heldout_share, run.heldout_file) == (0, Path("held.txt"))
    both = ["heldout_file=held.txt", "heldout_share=0.1"]
    with pytest.raises(ConfigError, match="perplexity uses one set of held-out texts"):
        read_settings(FinetuneRun, path, both)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preset=gpt-2", r"preset 'gpt-2' is unknown\. Presets: .* Did you mean 'gpt2'\?"),
        ("preset=7", r"preset: 7 should be text"),
        ("preset=null", r"model: this key is missing"),
    ],
)
def test_presets_that_are_not_right(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(FinetuneRun, write(tmp_path, THREE_LINES), [override])


@pytest.mark.parametrize("name", MODELS)
def test_the_shipped_recipe_takes_each(name: str) -> None:
    run = read_settings(FinetuneRun, SHIPPED, [f"preset={name}", "output=elsewhere"])
    assert run.model == MODELS[name][0]
