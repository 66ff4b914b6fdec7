"""A source is what decides its numbers: its config, its weights, its tokenizer.

Regression for all of this file: only weights counted, so a sweep went on with another config.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from datasets import Dataset
from families import save_checkpoint, tiny_model
from pandas.testing import assert_frame_equal
from sweeps import NoReport, checkpoints, config
from tokenizers import normalizers
from toytokenizers import TOKENIZERS
from transformers import PreTrainedConfig

from graftlens.checkpoints import claim
from graftlens.finetune import FinetuneConfig, finetune
from graftlens.model.arch import PairError
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.identity import config_settings, tokenizer_digest
from graftlens.sweep import runner
from graftlens.sweep.results import (
    read_manifest,
    read_results,
    read_shard,
    shard_path,
    to_bytes,
)
from graftlens.sweep.runner import prepare_sweep, run_sweep
from graftlens.trainingtexts import vocabulary_hash

load = GraftedTransformer.from_pretrained

# -- fingerprints ------------------------------------------------------------------------------


def fingerprint(change: Callable[[PreTrainedConfig], Any], variant: str = "llama") -> str:
    """A source's, of the same tensors under a changed config."""
    model = tiny_model(variant, 1)
    change(model.config)
    pair = {"pre": model, "sft": model}
    return load(pair, check=False, verbose=False).fingerprints()["sft"]


def _rope(**changes: Any) -> Callable[[PreTrainedConfig], Any]:
    def change(settings: PreTrainedConfig) -> None:
        settings.rope_parameters = settings.rope_parameters | changes

    return change


def _set(**changes: Any) -> Callable[[PreTrainedConfig], Any]:
    return lambda settings: [setattr(settings, name, value) for name, value in changes.items()]


OTHER = {
    "llama": [_set(rms_norm_eps=0.031), _rope(rope_theta=51.0), _set(hidden_act="gelu")],
    "llama-yarn": [
        _rope(factor=5.0),
        _rope(attention_factor=1.1),
        _rope(beta_fast=16),
    ],
    "gpt2": [
        _set(layer_norm_epsilon=0.031),
        _set(activation_function="relu"),
        _set(scale_attn_weights=False),
    ],
    "neox-parallel": [_set(layer_norm_eps=0.031), _set(use_parallel_residual=False)],
    "gemma2": [
        _set(query_pre_attn_scalar=8),
        _set(attn_logit_softcapping=1.6),
        _set(final_logit_softcapping=3.1),
        _set(sliding_window=5),
    ],
    "olmo-clip": [_set(clip_qkv=0.9)],
}
SAME = [
    _set(max_position_embeddings=256),
    _set(use_cache=False, architectures=["X"], transformers_version="0", dtype=torch.bfloat16),
    _set(eos_token_id=7, pad_token_id=3),
    _rope(type="default", factor=None),
    _set(attention_dropout=0.5),
]


@pytest.mark.parametrize("variant", OTHER)
def test_a_fingerprint_covers_the_config(variant: str) -> None:
    prints = [fingerprint(change, variant) for change in (lambda settings: None, *OTHER[variant])]
    assert len(set(prints)) == 1 + len(OTHER[variant])


def test_a_fingerprint_leaves_out_what_changes_no_number() -> None:
    assert len({fingerprint(change) for change in (lambda settings: None, *SAME)}) == 1


def test_a_fingerprint_covers_the_tokenizer() -> None:
    tokenizer = TOKENIZERS["llama3"]()
    pair = families.tiny_pair("llama", 1, len(tokenizer))
    model = load(pair, tokenizer=tokenizer, verbose=False)
    before = model.fingerprints()
    tokenizer("a text", truncation=True, max_length=3, padding="max_length")
    assert model.fingerprints() == before, "the settings of a call are not the tokenizer's"
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    after = model.fingerprints()
    assert all(after[name] != before[name] for name in before)
    assert tokenizer_digest(None) is None


def test_the_settings_are_those_that_the_architecture_is_read_from() -> None:
    """Others come and go with transformers' versions, and would stop a run that is the same."""
    settings = config_settings(families.VARIANTS["llama"]())
    assert settings["rms_norm_eps"] == families.NORM_EPS
    assert settings["rope_parameters"] == {"rope_theta": 50.0, "rope_type": "default"}
    assert not settings.keys() & {"initializer_range", "use_cache", "transformers_version"}


# -- sweeps ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints and a finished sweep of them."""
    root = tmp_path_factory.mktemp("identity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "trust_report", lambda *args, **options: NoReport())
        go(root, checkpoints(root))
    return root


@pytest.fixture
def root(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be changed; the config's relative paths lead to the copies."""
    monkeypatch.setattr(runner, "trust_report", lambda *args, **options: NoReport())
    return Path(shutil.copytree(begun, tmp_path / "copy"))


def go(root: Path, sources: dict[str, str] | None = None) -> Any:
    """The sweep's command again, in the folder of the copies."""
    before = Path.cwd()
    os.chdir(root)
    try:
        given = config({"pre": "./pre", "sft": "./sft"})
        given["prompts"] = given["prompts"][:3]
        return run_sweep(given, Path("out"), progress=False, say=lambda text: None)
    finally:
        os.chdir(before)


def edit(root: Path, change: Callable[[dict[str, Any]], Any], *names: str) -> None:
    for name in names or ("pre", "sft"):
        file = root / name / "config.json"
        settings = json.loads(file.read_text())
        change(settings)
        file.write_text(json.dumps(settings))


def unfinish(root: Path) -> None:
    (root / "out" / "done.json").unlink()
    shard_path(root / "out", 0).unlink()


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "rms_norm_eps": (
        lambda c: c.update(rms_norm_eps=0.05),
        "  config.rms_norm_eps: 0.03 there, 0.05 given",
    ),
    "rope_theta": (
        lambda c: c["rope_parameters"].update(rope_theta=60.0),
        "  config.rope_parameters.rope_theta: 50.0 there, 60.0 given",
    ),
    "hidden_act": (
        lambda c: c.update(hidden_act="gelu"),
        "  config.hidden_act: 'silu' there, 'gelu' given",
    ),
}


@pytest.mark.parametrize("state", ["done", "unfinished"])
@pytest.mark.parametrize("what", CHANGES)
def test_another_config_at_the_same_place_is_refused(what: str, state: str, root: Path) -> None:
    """Regression: "trust report passed", with rows of two models."""
    if state == "unfinished":
        unfinish(root)
    change, difference = CHANGES[what]
    edit(root, change)
    with pytest.raises(ValueError) as caught:
        go(root)
    assert str(caught.value).splitlines() == [
        "out holds results of other weights:",
        difference,
        "Restore the weights that it was started with, or choose another folder.",
    ]


def test_a_change_within_the_clock_s_resolution_is_seen(root: Path) -> None:
    """A file of the same size and time is read, where it is as small as a config."""
    file = root / "sft" / "config.json"
    files = [root / name / "config.json" for name in ("pre", "sft")]
    edit(root, lambda settings: None)  # as `edit` writes it
    go(root)
    times = {path: path.stat() for path in files}
    edit(root, lambda settings: settings.update(rms_norm_eps=0.04))
    for path, before in times.items():
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == times[file].st_size
    with pytest.raises(ValueError, match=r"config\.rms_norm_eps: 0\.03 there, 0\.04 given"):
        go(root)


def test_a_change_of_one_source_is_refused(root: Path) -> None:
    edit(root, lambda settings: settings.update(rms_norm_eps=0.05), "sft")
    with pytest.raises(ValueError, match=r"architecture: rms_norm_eps \(0\.03 and 0\.05\)"):
        go(root)


def test_another_tokenizer_with_the_same_tokens_here_is_refused(root: Path) -> None:
    """What the prompts come to may be the same, and what the answers' texts come to not."""
    for name in ("pre", "sft"):
        tokenizer = TOKENIZERS["llama3"]()
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "-")
        tokenizer.save_pretrained(root / name)
    with pytest.raises(ValueError, match=r"\n  tokenizer: '\w+' there, '\w+' given\n"):
        go(root)


@pytest.mark.parametrize("state", ["done", "unfinished"])
def test_what_changes_no_number_does_not_stop_a_sweep(state: str, root: Path) -> None:
    if state == "unfinished":
        unfinish(root)
    edit(
        root,
        lambda settings: settings.update(
            max_position_embeddings=512, use_cache=False, dtype="bfloat16", transformers_version="0"
        ),
    )
    assert go(root).ok


def earlier(root: Path) -> Path:
    """The folder as the release before wrote it."""
    path = root / "out" / "sweep.json"
    manifest = json.loads(path.read_text())
    for later in ("sha256", "config_sha256"):
        del manifest[later]
    del manifest["models"]["settings"]
    manifest["models"]["files"] = {
        name: {
            file.name: [file.stat().st_size, file.stat().st_mtime_ns]
            for file in sorted((root / name).iterdir())
        }
        for name in ("pre", "sft")
    }
    path.write_text(json.dumps(manifest))
    return root / "out"


def test_folders_of_the_release_before(root: Path) -> None:
    """They are read, and found finished; an unfinished one is refused in one sentence."""
    out = earlier(root)
    table = read_results(out)
    assert len(table) == read_manifest(out).cells
    assert go(root).ok
    assert "settings" not in read_manifest(out).models
    unfinish(root)
    with pytest.raises(ValueError) as caught:
        go(root)
    assert str(caught.value) == (
        "out was started by version 0.1.0, whose results can be read but not added to: start the "
        "sweep in another folder."
    )


def before_chats(root: Path) -> None:
    """The folder as a version wrote it that knew fewer settings and made other fingerprints."""
    out = root / "out"
    there = read_manifest(out)
    assert there.models is not None
    models = {k: v for k, v in there.models.items() if k != "scheme"}
    older = replace(
        there,
        identity={k: v for k, v in there.identity.items() if k != "chat_template"},
        models=models | {"fingerprints": dict.fromkeys(("pre", "sft"), 64 * "0")},
    )
    for shard in range(there.shards):
        rows = read_shard(out, there, shard)
        assert rows is not None
        keyed = rows.replace_schema_metadata({"graftlens.key": older.key})
        shard_path(out, shard).write_bytes(to_bytes(keyed))
    (out / "sweep.json").write_text(older.to_json())


def test_settings_that_a_folder_s_version_did_not_know(root: Path) -> None:
    """Regression: a finished folder "holds another sweep", with an empty list of differences."""
    table = read_results(root / "out")
    before_chats(root)
    assert go(root).ok
    assert_frame_equal(read_results(root / "out"), table)
    unfinish(root)
    with pytest.raises(ValueError, match=r"out was started by version 0\.1\.0, whose results can"):
        go(root)


def test_preparing_reads_no_weights_and_so_compares_none(root: Path) -> None:
    edit(root, lambda settings: settings.update(rms_norm_eps=0.05))
    given = config({"pre": str(root / "pre"), "sft": str(root / "sft")})
    prepare_sweep(given, root / "other")
    assert read_manifest(root / "other").models is None


# -- finetuning --------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Path:
    tokenizer = TOKENIZERS["llama3"]()
    return save_checkpoint(tiny_model("llama", 1, len(tokenizer)), tmp_path / "start", tokenizer)


class _Stopped(Exception):  # noqa: N818
    """Before the training."""


def train(start: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training up to where its folder is claimed."""

    def stop(*args: Any) -> None:
        raise _Stopped

    monkeypatch.setattr("graftlens.finetune.train", stop)
    recipe = FinetuneConfig(model=str(start), output=output, epochs=1, heldout_share=0)
    with pytest.raises(_Stopped):
        finetune(recipe, Dataset.from_dict({"text": ["Ann plays with Bo."] * 4}), progress=False)


def test_another_config_to_start_from_is_refused(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    train(start, output, monkeypatch)
    train(start, output, monkeypatch)
    for change, line in (
        ({"rms_norm_eps": 0.05}, r"  start\.settings\.rms_norm_eps: 0\.03 there, 0\.05 given"),
        (
            {"attention_dropout": 0.5},
            r"  start\.settings\.attention_dropout: 0\.0 there, 0\.5 given",
        ),
    ):
        changed = Path(shutil.copytree(start, tmp_path / f"changed {len(line)}"))
        edit(changed.parent, lambda settings, change=change: settings.update(change), changed.name)
        with pytest.raises(ValueError, match=line):
            train(changed, output, monkeypatch)


def test_another_tokenizer_to_train_with_is_refused(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: only the vocabulary counted."""
    train(start, tmp_path / "run", monkeypatch)
    tokenizer = TOKENIZERS["llama3"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(start)
    with pytest.raises(ValueError, match=r"  start\.tokenizer_sha256: '\w+' there, '\w+' given"):
        train(start, tmp_path / "run", monkeypatch)


def test_a_training_of_the_release_before_is_not_gone_on_with(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    train(start, output, monkeypatch)
    record = json.loads((output / "run.json").read_text())
    del record["start"]["settings"]
    record["start"]["tokenizer_sha256"] = vocabulary_hash(TOKENIZERS["llama3"]())
    (output / "run.json").write_text(json.dumps(record))
    claim(output, record)
    with pytest.raises(ValueError, match=r"^\S+ was started by an earlier release, which did not"):
        train(start, output, monkeypatch)


def test_a_finished_training_of_the_release_before_is_given_back(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: it was refused, so that an experiment over its store could not be shown again."""
    output = tmp_path / "run"
    recipe = FinetuneConfig(model=str(start), output=output, epochs=1, device="cpu")
    texts = Dataset.from_dict({"text": ["Ann plays with Bo."] * 4})
    result = finetune(recipe, texts, progress=False)
    before = TOKENIZERS["llama3"]()
    (output / "model" / "complete.json").unlink()
    for path in (output / "run.json", output / "model" / "finetune.json"):
        record = json.loads(path.read_text())
        del record["start"]["settings"]
        record["start"]["tokenizer_sha256"] = vocabulary_hash(before)
        record.get("versions", {}).pop("graftlens", None)
        path.write_text(json.dumps(record))
    assert finetune(recipe, texts, progress=False) == result
    assert "was started by an earlier release" in caplog.text
    other = Dataset.from_dict({"text": ["Ann plays with Zoe."] * 4})
    with pytest.raises(ValueError, match=r"data\.train_sha256"):
        finetune(recipe, other, progress=False)


def test_training_reads_a_start_in_one_sentence(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: transformers' own exceptions came out here, too."""
    os.truncate(start / "model.safetensors", 5000)
    with pytest.raises(PairError, match=r"^model='\S+': \S+safetensors could not be read \("):
        train(start, tmp_path / "run", monkeypatch)
