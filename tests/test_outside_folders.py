"""Folders and files that were damaged, planted, foreign or unwritable: what outside cases broke."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from families import save_checkpoint, tiny_model
from sweeps import NoReport, assert_equal_tables, checkpoints, config, read_whole
from toytokenizers import gpt2_style

from graftlens import demo as demo_module
from graftlens import folder as folder_module
from graftlens.configfile import ConfigError
from graftlens.dashboards import write_dashboard
from graftlens.experiment.compare import compare_runs
from graftlens.experiment.run import run_experiment
from graftlens.folder import UnwritableError, halves, probe, writable, write_whole
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.smollm2 import origin
from graftlens.prompts import Prompt
from graftlens.sweep import runner
from graftlens.sweep.disk import DamagedError, FolderError, sealed, unsealed
from graftlens.sweep.results import (
    read_end,
    read_manifest,
    read_prompts,
    read_results,
    read_shard,
    shard_path,
)
from graftlens.sweep.runner import is_done, is_finished, prepare_sweep, run_sweep, sweep_result

LONG = "n" * 300


@pytest.fixture(autouse=True)
def _no_trust_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "trust_report", lambda *args, **options: NoReport())


def quietly(given: Any, out: Path, **options: Any) -> None:
    run_sweep(given, out, progress=False, say=lambda text: None, **options)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checkpoints(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def given(sources: dict[str, str]) -> dict[str, Any]:
    return _few(sources)


def _few(sources: dict[str, str]) -> dict[str, Any]:
    """A sweep of four prompts under two grafts, in two shards."""
    found = config(sources, grafts={"PRE": "none", "SFT": "sft @ all"}, shards=4)
    found["prompts"] = found["prompts"][3:7]
    return found


@pytest.fixture(scope="module")
def finished(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "trust_report", lambda *args, **options: NoReport())
        quietly(_few(sources), out)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def never(*_: object, **__: object) -> None:
    raise AssertionError("weights were read")


def as_of_the_first_version(out: Path) -> None:
    """Make a folder what version 0.1.0 wrote: without checksums and without a mark."""
    for path in (out / "prompts.parquet", *(out / "shards").iterdir()):
        path.write_bytes(unsealed(path.read_bytes(), required=True))
    for name in ("sweep.json", "trust.json", "done.json"):
        content = json.loads((out / name).read_text())
        del content["sha256"]
        content.pop("config_sha256", None)
        (out / name).write_text(json.dumps(content))
    (out / "locks" / ".graftlens").unlink()


# Checksums


def test_every_bit_of_a_shard_is_covered(finished: Path) -> None:
    """Regression: of 18,051 flips in a shard's Parquet footer, 338 passed and changed a result."""
    content = bytearray(shard_path(finished, 1).read_bytes())
    plain = unsealed(bytes(content), required=True)
    assert sealed(plain) == bytes(content)
    passed = []
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        try:
            unsealed(bytes(content), required=True)
        except DamagedError:
            pass
        else:
            passed.append(bit)
        content[bit // 8] ^= 1 << bit % 8
    assert passed == []
    for length in range(0, len(content), 7):
        with pytest.raises(DamagedError):
            unsealed(bytes(content[:length]), required=True)


def test_a_flip_in_a_shard_or_in_the_prompts_is_found_by_readers(copied: Path) -> None:
    manifest = read_manifest(copied)
    rng = random.Random(0)
    for path, read in (
        (shard_path(copied, 1), lambda: read_shard(copied, manifest, 1)),
        (copied / "prompts.parquet", lambda: read_prompts(copied)),
    ):
        whole = path.read_bytes()
        footer = 8 + int.from_bytes(whole[-8:-4], "little")
        assert read() is not None
        for _ in range(60):
            place = rng.randrange(len(whole) - footer, len(whole))
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            if path.name == "prompts.parquet":
                with pytest.raises(ValueError, match=r"prompts\.parquet cannot be read .*checksum"):
                    read()
            else:
                assert read() is None, place
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["sweep.json", "done.json", "trust.json"])
def test_a_flip_in_json_changes_nothing_that_is_read(name: str, copied: Path) -> None:
    """Numbers in JSON can change without a change of type."""
    path = copied / name

    def read() -> object:
        return read_manifest(copied) if name == "sweep.json" else read_end(copied)

    whole, right = path.read_bytes(), read()
    rng = random.Random(0)
    passed = 0
    for bit in rng.sample(range(8 * len(whole)), 120):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert read() == right
            passed += 1
        except ValueError:
            pass
    assert passed < 12, "only white space may be otherwise"


def test_a_sealed_file_is_parquet_for_every_reader(finished: Path) -> None:
    assert len(pd.read_parquet(shard_path(finished, 0))) == 4
    assert pq.read_table(finished / "prompts.parquet").num_rows == 4


def test_a_folder_of_the_first_version_is_read_and_not_gone_on_with(
    given: dict[str, Any], finished: Path, copied: Path
) -> None:
    as_of_the_first_version(copied)
    whole = read_whole(finished)
    assert_equal_tables(read_whole(copied), whole)
    assert is_finished(copied)
    before = {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()}
    quietly(given, copied)
    assert {p: p.read_bytes() for p in copied.rglob("*") if p.is_file()} == before
    shard_path(copied, 1).unlink()
    said = r"^\S+ was started by version 0\.1\.0, whose results can be read but not added to: "
    with pytest.raises(ValueError, match=said):
        quietly(given, copied)
    with pytest.raises(ValueError, match=said):
        runner.work(copied)
    assert not shard_path(copied, 1).exists()


# Damaged files of ours


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _other_type(path: Path) -> None:
    path.write_text("[1, 2]")


@pytest.mark.parametrize("damage", [_truncated, _emptied, _other_type, Path.unlink])
@pytest.mark.parametrize("name", ["config.yaml", "grafts.yaml", "prompts.parquet", "trust.txt"])
def test_a_damaged_file_of_a_finished_sweep_is_written_again(
    name: str,
    damage: Callable[[Path], None],
    given: dict[str, Any],
    finished: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: a truncated trust.txt or config.yaml stayed as it was."""
    if name == "trust.txt" and damage is _truncated:
        (copied / name).write_text("half of the rep")
    else:
        damage(copied / name)
    monkeypatch.setattr(GraftedTransformer, "from_pretrained", never)
    quietly(given, copied)
    assert (copied / name).read_bytes() == (finished / name).read_bytes()
    assert is_finished(copied)


@pytest.mark.parametrize("damage", [_truncated, _emptied, _other_type])
@pytest.mark.parametrize("name", ["done.json", "trust.json"])
def test_a_damaged_record_of_the_end_is_named_and_made_again(
    name: str,
    damage: Callable[[Path], None],
    given: dict[str, Any],
    finished: Path,
    copied: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: a bare JSONDecodeError or KeyError, and the same call could not mend it."""
    damage(copied / name)
    assert not is_done(copied)
    with pytest.raises(ValueError, match=rf"{name}.* Run the sweep's command again: it recreates"):
        sweep_result(copied)
    monkeypatch.setattr(runner.Scorer, "table", never)  # no shard is computed
    quietly(given, copied)
    assert sweep_result(copied) == sweep_result(finished).__class__(
        copied, *(getattr(sweep_result(finished), n) for n in ("cells", "not_run", "trust"))
    )


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("prompt_blocks", "many", "prompt_blocks"),
        ("prompt_blocks", [2, None], r"prompt_blocks\.1"),
        ("grafts", {"PRE": "none"}, "grafts"),
        ("models", [], "models"),
        ("config", None, "config"),
        ("config", {"sources": 3}, "config: sources|config: "),
        ("shards", 7, "7 shards"),
    ],
)
def test_wrong_types_in_the_manifest_are_named(
    key: str, value: object, said: str, given: dict[str, Any], copied: Path
) -> None:
    """Regression: TypeError or AttributeError from deep inside. Without a checksum, as version
    0.1.0 wrote it."""
    as_of_the_first_version(copied)
    path = copied / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"sweep\.json is damaged, or .*({said}).*Remove that"):
        is_finished(copied)
    assert is_done(copied) == (value == {"sources": 3})


def test_a_manifest_that_was_removed_is_made_again(
    given: dict[str, Any], finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message advises: the folder's mark says that the rest is ours, and whole shards are
    kept."""
    _truncated(copied / "sweep.json")
    with pytest.raises(ValueError, match=r"Remove that file and run the sweep's own command"):
        quietly(given, copied)
    (copied / "sweep.json").unlink()
    monkeypatch.setattr(runner.Scorer, "table", never)
    quietly(given, copied)
    assert_equal_tables(read_whole(copied), read_whole(finished))


# What is not ours


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "grafts.yaml",
        "prompts.parquet",
        "trust.txt",
        "done.json",
        "shards/00000.parquet",
        "locks/claim.lock",
        "shards",
        "locks",
    ],
)
def test_a_file_that_is_not_a_sweeps_is_not_overwritten(
    name: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: config.yaml and others in a user's own folder were overwritten."""
    out = tmp_path / "mine"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    monkeypatch.setattr(GraftedTransformer, "from_pretrained", never)
    with pytest.raises(ValueError, match=rf"is not a sweep's folder, and {name} is in it"):
        quietly(given, out)
    assert [p for p in out.rglob("*") if p.is_file()] == [out / name]
    assert (out / name).read_text() == "mine"


def test_a_users_files_beside_a_sweep_stay(given: dict[str, Any], tmp_path: Path) -> None:
    """Regression: a sweep's end removed every *.tmp, also the user's."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    mine = [out / "notes.tmp", out / "shards" / "x.tmp", out / "shards" / "00000.parquet.tmp"]
    for path in mine:
        path.write_text("mine")
    ours = [
        out / ".sweep.json.7-0123456789abcdef.tmp",
        out / "shards" / ".00001.parquet.7-0123456789abcdef.tmp",
        out / "shards" / "00001.parquet.my-node.cluster-7.tmp",  # as version 0.1.0 named them
    ]
    for path in ours:
        path.write_text("half")
    quietly(given, out)
    assert [path.read_text() for path in mine] == ["mine"] * 3
    assert not any(path.exists() for path in ours)


def test_a_demo_does_not_overwrite_a_users_page(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("<p>mine</p>")
    with pytest.raises(ValueError, match=r"has report\.html in it and no \.graftlens of demo"):
        demo_module.demo(tmp_path, facts=6, epochs=1)
    assert page.read_text() == "<p>mine</p>"
    assert list(tmp_path.iterdir()) == [page]


# Links


def test_nothing_is_written_through_a_planted_link(
    given: dict[str, Any], copied: Path, tmp_path: Path
) -> None:
    """Regression: temporary files of foreseeable names were opened through links."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("trust.txt", "trust.json", "done.json"):
        (copied / name).unlink()
        (copied / name).symlink_to(victim)
    shard_path(copied, 0).unlink()
    shard_path(copied, 0).symlink_to(victim)
    quietly(given, copied)
    assert victim.read_text() == "mine"
    assert is_finished(copied)
    assert not (copied / "done.json").is_symlink()


def test_a_demos_results_are_not_written_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "demo"
    folder.mkdir()
    for name in ("results.parquet", "results.json"):
        (folder / name).symlink_to(victim)
        (folder / f"{name}.tmp").symlink_to(victim)
    table = pd.DataFrame({"rank": [1, 2]})
    demo_module._keep_results(folder, {"graftlens": "x"}, table)
    assert victim.read_text() == "mine"
    kept = demo_module._kept_results(folder, {"graftlens": "x"})
    assert kept is not None
    assert kept["rank"].tolist() == [1, 2]
    content = bytearray((folder / "results.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "results.parquet").write_bytes(content)
    assert demo_module._kept_results(folder, {"graftlens": "x"}) is None
    for damage in ("[]", "3", "{", '{"graftlens": []}'):
        (folder / "results.json").write_text(damage)
        assert demo_module._kept_results(folder, {"graftlens": "x"}) is None


# Places that cannot be written


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    assert writable(tmp_path / "a" / "b" / "page.html") == tmp_path / "a" / "b" / "page.html"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    for path, why in (
        (tmp_path / "file" / "page.html", "not a directory"),
        (tmp_path, "is a directory"),
        (tmp_path / LONG, "file name too long"),
        (tmp_path / "a" / LONG / "page.html", "file name too long"),
    ):
        with pytest.raises(UnwritableError, match=rf"cannot be written \({why}\)\. Make its"):
            writable(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_names_that_just_fit_are_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "é" * 127):
        assert probe(tmp_path / name) is None
        assert write_whole(tmp_path / name, "x").read_text() == "x"
        (tmp_path / f".{name[:100]}").write_text("mine")
        assert list(halves(tmp_path / name)) == []


def test_home_is_expanded(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a folder called ~ appeared."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    quietly(given, Path("~/out"))
    assert is_finished(tmp_path / "out")
    assert len(read_results(Path("~/out"))) == 8
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["shards", "locks"])
def test_a_link_at_a_folder_of_a_sweep_is_not_followed(
    name: str, given: dict[str, Any], tmp_path: Path
) -> None:
    """A planted `shards` or `locks` led what is written out of the sweep's folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"out/{name} leads out of \S+out\. Remove the link"):
        quietly(given, tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.parametrize(
    ("content", "why"),
    [("null", "it holds no keys"), ("[]", "it holds no keys"), ("", "its text is not JSON")],
)
def test_a_damaged_manifest_is_said_without_pythons_words(
    content: str, why: str, copied: Path, given: dict[str, Any]
) -> None:
    """ "'NoneType' object has no attribute 'items'", and the file's name twice."""
    (copied / "sweep.json").write_text(content)
    with pytest.raises(
        ValueError, match=rf"graftlens writes \({why}.*\)\. Remove that file"
    ) as told:
        quietly(given, copied)
    assert str(told.value).count("sweep.json") == 1
    assert ".)" not in str(told.value)


def test_a_full_disk_is_named_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dashboard ended in "[Errno 28] No space left on device" and named nothing."""

    def full(half: Path, content: bytes) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("graftlens.folder._write", full)
    with pytest.raises(UnwritableError) as told:
        write_whole(tmp_path / "page.html", "x")
    assert told.value.errno == 28
    assert str(told.value) == (
        f"{tmp_path / 'page.html'} cannot be written (no space left on device). Free space there, "
        "or choose another place."
    )


def test_a_dashboard_overwrites_no_file_that_is_not_a_page_of_ours(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`graftlens dashboard` replaced whatever was at dashboard.html."""
    monkeypatch.setattr(GraftedTransformer, "from_pretrained", never)
    page = tmp_path / "dashboard.html"
    page.write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a page that graftlens wrote"):
        write_dashboard(sources, Prompt("Ann"), {}, page)
    assert page.read_text() == "mine"


def test_a_sweep_finds_before_the_weights_that_it_cannot_write(
    given: dict[str, Any], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GraftedTransformer, "from_pretrained", never)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file", tmp_path / "new" / LONG):
        with pytest.raises(
            FolderError, match=r"cannot be written .* Make sure that the folder can"
        ):
            quietly(given, out)
    assert not (tmp_path / "new").exists(), "a refusal leaves nothing behind"
    # One that was claimed while it could be written.
    shard_path(copied, 1).unlink()

    def full(path: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(runner, "probe", full)
    with pytest.raises(FolderError, match=r"No space left on device.* Free space there"):
        quietly(given, copied)


def test_pages_are_refused_before_the_weights(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlens.dashboards.located", never)
    monkeypatch.setattr(demo_module, "smollm2", never)
    monkeypatch.setattr("graftlens.experiment.run.plan", never)
    (tmp_path / "file").write_text("")
    blocked = tmp_path / "file" / "x.png"
    page = tmp_path / "page.html"
    asked = Prompt("Ann met")
    for place, image in ((blocked, None), (page, blocked), (page, tmp_path / LONG)):
        with pytest.raises(UnwritableError, match="cannot be written"):
            write_dashboard(sources, asked, {}, place, image=image)
    with pytest.raises(ValueError, match="is both the page and the picture"):
        write_dashboard(sources, asked, {}, page, image=page)
    with pytest.raises(ConfigError, match="'nonsense' does not exist here"):
        write_dashboard(sources, asked, {}, page, device="nonsense")
    with pytest.raises(UnwritableError, match=r"report.html cannot be written \(not a directory\)"):
        demo_module.demo(tmp_path / "file", facts=6, epochs=1)
    monkeypatch.chdir(Path(__file__).parent.parent)
    with pytest.raises(UnwritableError, match=r"index.html cannot be written"):
        run_experiment("positions", tmp_path / "file", devices=["cpu"])
    with pytest.raises(UnwritableError, match="cannot be written"):
        compare_runs([tmp_path, tmp_path], blocked)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Refusals leave nothing behind


def test_a_device_that_is_not_here_claims_nothing(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the folder was claimed, and then the device was refused."""
    out = tmp_path / "out"
    for device in ("nonsense", "cuda:77"):
        with pytest.raises(ConfigError, match=f"devices: '{device}' does not exist here"):
            quietly(given, out, device=device)
    assert not out.exists()


def test_models_that_are_refused_leave_the_folder_free(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the mended config was told that the folder holds another sweep."""

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("the sources differ")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(GraftedTransformer, "from_pretrained", refuse)
        with pytest.raises(ValueError, match="the sources differ"):
            quietly(given | {"seed": 1}, out)
        assert not (out / "sweep.json").exists()
        # A claim of an earlier call stays.
        prepare_sweep(given, tmp_path / "earlier")
        with pytest.raises(ValueError, match="the sources differ"):
            quietly(given, tmp_path / "earlier")
        assert (tmp_path / "earlier" / "sweep.json").exists()
    quietly(given, out)
    assert is_finished(out)


def test_a_name_that_is_not_text_leaves_nothing_behind(
    given: dict[str, Any], tmp_path: Path
) -> None:
    """Regression: a lone surrogate in a graft's name left a half-written folder."""
    given["grafts"] = given["grafts"] | {"\ud800": "sft @ last"}
    with pytest.raises(ValueError):
        prepare_sweep(given, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_cache_s_damaged_record_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("llama", 3, len(gpt2_style())), tmp_path / "base")
    (folder / "provenance.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"provenance\.json is not JSON .* Remove the folder .*bas"
    ):
        origin(folder)


def test_processes_that_begin_together_do_not_take_a_new_folder_from_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tries to write there and removes the folder that it made, just as another needs it."""
    write, removed = folder_module._write, []

    def late(half: Path, content: bytes) -> None:
        if len(removed) < 3:
            removed.append(half.parent)
            half.parent.rmdir()
        write(half, content)

    monkeypatch.setattr(folder_module, "_write", late)
    probe(tmp_path / "runs" / "out" / "sweep.json")
    assert len(removed) == 3
    assert list(tmp_path.iterdir()) == [], "and nothing is left"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "link" / "sweep.json")


def test_a_folder_that_another_process_claims_meanwhile_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the other's files by the time that they are looked for."""
    claimed, looks = folder_module.is_claimed, []

    def slow(place: Path, what: str) -> bool:
        looks.append(claimed(place, what))
        if len(looks) == 1:
            write_whole(place / folder_module.MARKER, "graftlens tables\n")
            write_whole(place / "table.csv", "a\n")
        return looks[-1]

    monkeypatch.setattr(folder_module, "is_claimed", slow)
    folder_module.claim(tmp_path / "out", "tables")
    assert looks == [False, True]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"has mine.txt in it and no \.graftlens of tables"):
        folder_module.claim(tmp_path / "other", "tables")
