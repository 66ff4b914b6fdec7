"""What a config, a table or a server from elsewhere must not be able to do."""

import json
import logging
import os
import sys
import threading
from html import unescape
from http.server import HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from jsonserver import JsonHandler
from markdown_it import MarkdownIt
from summaries import positions

from graftlens import cli, datacommands
from graftlens.configfile import ConfigError, settings_from
from graftlens.data import load_dataset, make_dataset, save_dataset, spec_of
from graftlens.data.languagemodels import told_on_command_line
from graftlens.data.movies import MoviesConfig
from graftlens.data.rewriting import Draft, Rewrites, rewritten
from graftlens.data.wikipedia import download
from graftlens.experiment import run as run_module
from graftlens.experiment.compare import compare_runs
from graftlens.experiment.config import ExperimentConfig, NamedExperiment, find_experiment
from graftlens.experiment.plan import Plan, Store
from graftlens.experiment.run import default_folder, run_experiment
from graftlens.experiment.show import _unlike, plain
from graftlens.folder import MARKER, at_home, claim, inside, name_fault, name_problems
from graftlens.sweep.config import SweepConfig, load_config
from graftlens.viz.compare import compare_page
from graftlens.viz.page import ExperimentPage, Part, Table, experiment_page, is_page
from graftlens.viz.render import GENERATOR
from graftlens.viz.tables import read_table, write_table

SECRET = "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"
DRAFT = Draft("a", "Ann met Bo.", ("Ann", "Bo"), ())
ARTICLE = {
    "id": "a",
    "text": "Ann sings. Ann is a friend of Bo. Ann met Bo in May.",
    "facts": [{"first_entity": "Ann", "second_entity": "Bo"}],
}


# -- names are names -------------------------------------------------------------------------------

BAD_NAMES = (
    "../../../x", "/tmp/x", "a/b", "a\\b", "..", ".", "", " ", ".hidden", "C:", "c:x", "con",
    "NUL.txt", "com1", "LPT¹", "a\0b", "a\nb", "a\u202eb", "a\u2028b", "x" * 300, "東" * 100, "‥",
    "．．／x", "a／b", "x.", "x ", "~", "~root", "-rf", "a|b", "a*", "\ud800", "a\u200bb",
)  # fmt: skip


def experiment(**changed) -> dict:
    given = {
        "title": "T",
        "question": "Q",
        "model": "smollm2-135m",
        "datasets": {"films": {"n_facts": 3, "texts_per_fact": 1}},
        "models": {"sft": {"data": "films"}},
        "parts": {
            "one": {"title": "P", "prompts": {"dataset": "films"}, "grafts": {"LT": "sft @ last"}}
        },
    }
    return given | changed


def test_the_names_that_are_fine_are_fine():
    settings_from(ExperimentConfig, experiment())
    for name in (
        "one",
        "1–3",
        "title_and preposition",
        "映画",
        "Fílms",
        "a.b",
        "FE+LT",
        "x,y",
        "console",
    ):
        assert name_fault(name) == "", name


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:12])
def test_names_in_an_experiment_are_no_paths(name):
    """`"../../../x"` as a dataset's or part's name wrote outside of --out and the store."""
    part = experiment()["parts"]["one"]
    for changed in (
        {"parts": {name: part}},
        {"datasets": {name: {}}, "models": {"sft": {"data": name}},
         "parts": {"one": part | {"prompts": {"dataset": name}}}},
    ):  # fmt: skip
        key = next(iter(changed))
        wrong = r"(is used as the name of a file|contains half of a character)"
        with pytest.raises(ConfigError, match=rf"(?m)^{key}: .* {wrong}"):
            settings_from(ExperimentConfig, experiment(**changed))


def test_names_that_are_one_to_some_file_systems_are_refused():
    """`One` and `one` would have written into one folder on a Mac or on Windows."""
    part = experiment()["parts"]["one"]
    with pytest.raises(ConfigError, match="'One' and 'one' are the same name on some file systems"):
        settings_from(ExperimentConfig, experiment(parts={"One": part, "one": part}))
    assert name_problems(["é", "e\u0301"])
    assert not name_problems(["a", "b", "a b"])


def test_a_dry_run_refuses_names_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = experiment()["parts"]["one"]
    Path("e.yaml").write_text(yaml.safe_dump(experiment(parts={"../../up": part})))
    with pytest.raises(ConfigError, match=r"'\.\./\.\./up' is used as the name of a file"):
        cli.run("e.yaml", dry_run=True)
    assert [p.name for p in tmp_path.iterdir()] == ["e.yaml"]


def test_links_out_of_a_folder_are_refused(tmp_path):
    """A link that somebody planted in --out or in the store led what is written elsewhere."""
    for name in ("out", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "tables").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / "ring").symlink_to(tmp_path / "out" / "ring")
    for name in ("tables", "ring"):
        with pytest.raises(ValueError, match="leads out of"):
            inside(tmp_path / "out", name, "x")
    store = Store(tmp_path / "out")
    (tmp_path / "out" / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        store.dataset("films", MoviesConfig(n_facts=3, texts_per_fact=1))
    assert not list((tmp_path / "elsewhere").iterdir())
    # The folder itself may be a link: that is its owner's choice.
    (tmp_path / "mine").symlink_to(tmp_path / "elsewhere")
    assert inside(tmp_path / "mine", "x") == tmp_path / "mine" / "x"


def test_a_models_name_is_no_path_in_the_default_folder():
    for model, end in (("a/..", ".."), ("x\\..\\y", "x-..-y"), ("o/m:1", "m-1")):
        config = settings_from(ExperimentConfig, experiment()).model_copy(update={"model": model})
        named = NamedExperiment("films", config, "")
        assert default_folder(named) == Path("graftlens-runs") / f"films-{end}"


def test_figures_have_names_of_their_own_that_are_not_too_long():
    """A part "a b" drew over the figures of a part "a-b"; a long grid's name failed at the end."""
    taken: set[str] = set()
    assert [_unlike(plain(n), taken) for n in ("a b-top5", "a-b-top5", "A-b-top5")] == [
        "a-b-top5",
        "a-b-top5-2",
        "A-b-top5-3",
    ]
    long = [plain(f"one-{'é' * 300}{n}") for n in (1, 2)]
    assert long[0] != long[1]
    assert all(len(name.encode()) <= 160 for name in long)


# -- what cannot be written or read ----------------------------------------------------------------


def test_a_dataset_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    """ "[Errno 17] File exists: …/file", after the dataset had been made."""
    (tmp_path / "file").write_text("")
    (tmp_path / "d.yaml").write_text("facts: fake_movies\nn_facts: 3\n")
    for name in ("graftlens.data.make_dataset", "graftlens.experiment.plan.make_dataset"):
        monkeypatch.setattr(name, None)
    with pytest.raises(OSError, match=r"file/x cannot be written \(not a directory\)\. Make its"):
        datacommands.make(str(tmp_path / "d.yaml"), out=tmp_path / "file" / "x")
    with pytest.raises(OSError, match=r"cannot be written \(not a directory\)\. Make its folder"):
        Store(tmp_path / "file").dataset("films", FILMS)


def test_a_dataset_on_a_full_disk_is_named(tmp_path, monkeypatch):
    """ "[Errno 28] No space left on device" named nothing."""

    def full(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("datasets.Dataset.save_to_disk", full)
    with pytest.raises(OSError, match=r"/ds cannot be written \(no space left on device\)\. Free"):
        save_dataset(make_dataset(MoviesConfig(n_facts=3, texts_per_fact=1)), tmp_path / "ds")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_configs_of_other_encodings_are_refused_by_name(tmp_path, encoding):
    """ "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"."""
    path = tmp_path / "c.yaml"
    path.write_bytes("title: é\n".encode(encoding))
    with pytest.raises(ConfigError, match=r"c\.yaml: is not UTF-8 text .* Save it as UTF-8\."):
        load_config(path)


# -- the store ---------------------------------------------------------------------------------

FILMS = MoviesConfig(n_facts=3, texts_per_fact=1)


def test_a_planted_note_leads_nowhere(tmp_path):
    """A note in the store was joined to a path: one with `../..` in it named any folder."""
    store = Store(tmp_path / "store")
    folder = store.dataset("films", FILMS)
    (note,) = (tmp_path / "store" / "made").iterdir()
    said = note.read_text()
    other = save_dataset(make_dataset(FILMS.model_copy(update={"seed": 5})), tmp_path / "other")
    # One of another dataset, even inside of the store, does not count either.
    planted = save_dataset(make_dataset(FILMS.model_copy(update={"seed": 5})),
                           folder.with_name("films-0123456789"))  # fmt: skip
    for evil in ("../../other", str(other), "..", "", planted.name, "x\0y", "\udcff"):
        note.write_bytes(evil.encode(errors="surrogateescape"))
        assert store.dataset("films", FILMS) == folder
        assert note.read_text() == said
    note.unlink()
    note.symlink_to(other / "provenance.json")
    before = (other / "provenance.json").read_bytes()
    assert store.dataset("films", FILMS) == folder
    assert (other / "provenance.json").read_bytes() == before
    assert not note.is_symlink()


def test_a_damaged_dataset_in_the_store_is_made_again_and_kept(tmp_path, caplog):
    """A truncated provenance.json ended each later run with `Expecting value: line 1`."""
    store = Store(tmp_path / "store")
    folder = store.dataset("films", FILMS)
    whole = (folder / "facts.json").read_bytes()
    for name in ("provenance.json", "facts.json"):
        (folder / name).write_text("{")
        with caplog.at_level(logging.WARNING):
            assert store.dataset("films", FILMS) == folder
        assert (folder / "facts.json").read_bytes() == whole
    assert sorted(p.name for p in folder.parent.iterdir()) == [
        folder.name, f"{folder.name}.damaged-1", f"{folder.name}.damaged-2",
    ]  # fmt: skip
    assert "was damaged: it is rebuilt" in caplog.text


def test_a_folder_is_not_the_stores_by_its_name(tmp_path):
    store = Store(tmp_path / "store")
    folder = store.dataset("films", FILMS)
    folder.rename(tmp_path / "away")
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not a dataset that graftlens made .*left untouched"):
        store.dataset("films", FILMS)
    assert (folder / "thesis.txt").read_text() == "mine"


# -- folders that are not ours -----------------------------------------------------------------


@pytest.fixture
def planned(monkeypatch):
    """`run_experiment` without models: what it does before and after them."""
    config = settings_from(ExperimentConfig, experiment()).model_copy(update={"parts": {}})
    monkeypatch.setattr(run_module, "plan", lambda config, store: Plan(config, {}, {}, {}, {}))
    return NamedExperiment("films", config, "title: T\n")


@pytest.mark.parametrize("name", ["index.html", "experiment.yaml", "tables", "figures", "sweeps"])
def test_a_folder_that_is_not_of_an_experiment_is_left_alone(planned, tmp_path, name):
    """`graftlens run --out .` wrote over the user's own index.html and experiment.yaml."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"has {name} in it and no {MARKER}.*nothing there is ov"):
        run_experiment(planned, tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: "mine"}


def test_a_folder_of_ours_is_taken_up_and_others_files_stay(planned, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        result = run_experiment(planned, tmp_path, say=lambda s: None)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert is_page(result.page)
    assert (tmp_path / MARKER).read_text() == "graftlens experiment\n"
    # One that an older version finished has another marker, or none but its record.
    (tmp_path / MARKER).unlink()
    run_experiment(planned, tmp_path, say=lambda s: None)
    (tmp_path / MARKER).unlink()
    (tmp_path / "experiment.json").write_text("{}")
    (tmp_path / "graftlens-run.json").write_text('{"experiment": "films"}')
    run_experiment(planned, tmp_path, say=lambda s: None)
    assert json.loads((tmp_path / "experiment.json").read_text())["name"] == "films"
    (tmp_path / "experiment.json").write_text("{}")
    (tmp_path / MARKER).unlink()
    (tmp_path / "graftlens-run.json").unlink()
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(ValueError, match=f"no {MARKER}"):
        run_experiment(planned, tmp_path)


@pytest.mark.parametrize("name", ["sweeps", "tables", "figures"])
def test_a_planted_link_at_a_folder_is_found_before_anything_is_trained(
    planned, tmp_path, monkeypatch, name
):
    """It was found when tables were written, after all the training and sweeping."""
    out = tmp_path / "out"
    run_experiment(planned, out, say=lambda s: None)
    (out / name).symlink_to(tmp_path)
    monkeypatch.setattr(run_module, "exporter", None)
    with pytest.raises(ValueError, match=f"{name} leads out of"):
        run_experiment(planned, out, say=lambda s: None)


def test_a_planted_link_at_a_file_is_replaced_and_not_followed(planned, tmp_path):
    out = tmp_path / "out"
    run_experiment(planned, out, say=lambda s: None)
    (tmp_path / "mine").write_text("mine")
    for name in ("index.html", "experiment.yaml", "experiment.json"):
        (out / name).unlink()
        (out / name).symlink_to(tmp_path / "mine")
    run_experiment(planned, out, say=lambda s: None)
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (out / "index.html").is_symlink()


def test_home_folders_are_home_folders(planned, tmp_path, monkeypatch):
    """--out ~/x made a folder that is called ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    run_experiment(planned, "~/run", store="~/store", say=lambda s: None)
    save_dataset(make_dataset(FILMS), Path("~/films"))
    assert load_dataset(Path("~/films")).facts == make_dataset(FILMS).facts
    write_table(pd.DataFrame({"a": [1]}), "~/t")
    (tmp_path / "d.yaml").write_text("n_facts: 3\ntexts_per_fact: 1\n")
    datacommands.make("d.yaml", out=Path("~/made"))
    home = sorted(p.name for p in (tmp_path / "home").iterdir())
    assert home == ["films", "made", "run", "t.csv", "t.md"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.yaml", "home"]
    with pytest.raises(ValueError, match="home folder of a user who does not exist"):
        at_home("~nobody-of-that-name/x")


def test_a_dangling_link_is_there(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_dataset(make_dataset(FILMS), tmp_path / "out")


def test_a_claim_takes_no_folder_of_somebody_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("")
    with pytest.raises(ValueError, match=r"has x in it and no \.graftlens of toy"):
        claim(tmp_path / "a", "toy")
    claim(tmp_path / "a", "toy", taken=["y"])
    claim(tmp_path / "a", "toy")
    with pytest.raises(ValueError, match=r"no \.graftlens of tables"):
        claim(tmp_path / "a", "tables")
    with pytest.raises(ValueError, match="is not a folder"):
        claim(tmp_path / "a" / "x", "toy")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / MARKER).symlink_to(tmp_path / "a" / MARKER)
    with pytest.raises(ValueError, match=r"has \.graftlens in it"):
        claim(tmp_path / "b", "toy", taken=["y"])


# -- reports -------------------------------------------------------------------------------------


def finished(folder: Path, parts=("one",)) -> Path:
    """What a comparison reads of a finished experiment."""
    folder.mkdir(parents=True)
    record = {
        "name": folder.name, "model": "m", "datasets": {}, "finished": "",
        "parts": {name: {"title": "T"} for name in parts},
    }  # fmt: skip
    (folder / "experiment.json").write_text(json.dumps(record))
    return folder


def test_a_report_overwrites_no_file_that_is_not_a_page_of_ours(tmp_path):
    """`graftlens report --out thesis.html` replaced whatever was there."""
    out = tmp_path / "report.html"
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b")]
    for content in ("<html>mine</html>", ""):
        out.write_text(content)
        with pytest.raises(ValueError, match=r"is not a page that graftlens wrote.*--out"):
            compare_runs(runs, out)
        assert out.read_text() == content
    # A page of version 0.1.0 does not say whose it is, but is ours.
    ours = experiment_page(tmp_path / "ours.html", ExperimentPage("T", "Q", "L", [], {}))
    said = ours.read_text()
    out.write_text(said.replace(GENERATOR + "\n", ""))
    with pytest.raises(ValueError, match=r"by-template\.csv"):
        compare_runs(runs, out)
    out.write_text(said)
    with pytest.raises(ValueError, match=r"by-template\.csv"):
        compare_runs(runs, out)


def test_the_folder_of_a_reports_tables_is_its_own(tmp_path):
    (tmp_path / "r_tables").mkdir()
    (tmp_path / "r_tables" / "mine.csv").write_text("mine")
    many = pd.concat([positions().assign(graft=lambda f, i=i: f["graft"].astype(str) + str(i))
                      for i in range(20)])  # fmt: skip
    runs = {"x": {"p": many}, "y": {"p": many}}
    with pytest.raises(ValueError, match=r"has mine\.csv in it and no \.graftlens of tables"):
        compare_page(tmp_path / "r.html", runs, provenance={})
    for _ in range(2):
        assert is_page(compare_page(tmp_path / "s.html", runs, provenance={}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"experiment\.json is not JSON .*Run the experiment again"),
        ("[]", r"experiment\.json is not what an experiment writes.*Run the experiment again"),
        ('{"parts": 3}', r"not what an experiment writes"),
        ('{"name": 1, "name": 2}', "'name' appears twice"),
        ("\xff", "is not UTF-8"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, content, message):
    runs = [finished(tmp_path / "a"), finished(tmp_path / "b")]
    (runs[0] / "experiment.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        compare_runs(runs, tmp_path / "r.html")


def test_a_record_from_elsewhere_names_no_path(tmp_path):
    runs = [finished(tmp_path / "a", ["../../b"]), finished(tmp_path / "b")]
    with pytest.raises(ValueError, match=r"'\.\./\.\./b' is used as the name of a file"):
        compare_runs(runs, tmp_path / "r.html")
    runs = [finished(tmp_path / "c"), finished(tmp_path / "d")]
    for run in runs:
        (run / "tables").mkdir()
        (run / "tables" / "one-by-template.csv").write_bytes(b"\x80\x81")
    with pytest.raises(ValueError, match=r"one-by-template\.csv is not UTF-8.*Run the experiment"):
        compare_runs(runs, tmp_path / "r.html")
    for content in ("", 'a,b\n"', "a,b\n1,2,3\n4,5,6,7\n", "a\n1\n"):
        (runs[0] / "tables" / "one-by-template.csv").write_text(content)
        with pytest.raises(ValueError, match=r"one-by-template\.csv is not a table.*Run the exper"):
            compare_runs(runs, tmp_path / "r.html")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("provenance.json", "{"),
        ("provenance.json", "[]"),
        ("provenance.json", '{"sha256": 3, "config": {}, "counts": {}}'),
        ("provenance.json", "null"),
        ("facts.json", '[{"x": 1}]'),
        ("facts.json", "17"),
        ("facts.json", ""),
    ],
)
def test_a_damaged_dataset_is_named(tmp_path, name, content):
    """A KeyError or `Expecting value` of Python's, which named no file."""
    folder = save_dataset(make_dataset(FILMS), tmp_path / "films")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"films/{name}.*Recreate the dataset"):
        load_dataset(folder)


def test_a_damaged_table_of_texts_is_named(tmp_path):
    folder = save_dataset(make_dataset(FILMS), tmp_path / "films")
    for file in (folder / "train").glob("*.arrow"):
        file.write_bytes(b"no table")
    with pytest.raises(ValueError, match="films/train cannot be read as a dataset"):
        load_dataset(folder)


# -- keys ------------------------------------------------------------------------------------------


class Thief(JsonHandler):
    """Keeps every header, and says them again in its error."""

    seen: list[dict[str, str]]
    status = 401
    location = ""

    def do_POST(self):
        self.asked_for()
        self.seen.append(dict(self.headers))
        if self.status == 200:
            text = f"Ann met Bo, {self.headers['Authorization']}."
            message = {"role": "assistant", "content": text}
            said = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        else:
            said = {"error": {"message": str(dict(self.headers))}}
        self.answer(self.status, said, self.location)


@pytest.fixture
def thief(monkeypatch):
    """A server's handler, with its `address`."""
    pytest.importorskip("openai", reason="the extra llm is not installed")
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    handler = type("Handler", (Thief,), {"seen": []})
    http = HTTPServer(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=lambda: http.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    yield handler
    http.shutdown()
    thread.join()
    http.server_close()


def config(tmp_path: Path, **rewrites) -> Path:
    (tmp_path / "a.jsonl").write_text(json.dumps(ARTICLE) + "\n")
    given = {"endpoint_model": "m", "n": 1, "attempts": 1, **rewrites}
    made = {"facts": "articles", "path": str(tmp_path / "a.jsonl"), "rewrites": given}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(made))
    return tmp_path / "c.yaml"


def make(tmp_path: Path, *overrides: str) -> None:
    """graftlens data make c.yaml OVERRIDES… --out out"""
    datacommands.make(str(tmp_path / "c.yaml"), list(overrides), tmp_path / "out")


def test_a_config_alone_sends_no_key_anywhere(thief, tmp_path):
    """`endpoint` and `api_key_env` of a config posted any variable's value to any server."""
    config(tmp_path, endpoint=thief.address, api_key_env="AWS_SECRET_ACCESS_KEY")
    for overrides in (
        [],
        [f"rewrites.endpoint={thief.address}"],
        ["rewrites.api_key_env=AWS_SECRET_ACCESS_KEY"],
        ["seed=3"],
    ):
        with pytest.raises(ValueError, match=r"is not sent to .* name both on the command line"):
            make(tmp_path, *overrides)
    assert thief.seen == []
    assert not (tmp_path / "out").exists()


def test_what_the_command_line_names_is_sent_and_said_nowhere(thief, tmp_path, caplog):
    """The server's error, with the request's headers in it, was quoted."""
    config(tmp_path, endpoint="https://api.openai.com/v1")
    both = [f"rewrites.endpoint={thief.address}", "rewrites.api_key_env=AWS_SECRET_ACCESS_KEY"]
    with caplog.at_level(logging.DEBUG), pytest.raises(RuntimeError) as caught:
        make(tmp_path, *both)
    assert [headers["Authorization"] for headers in thief.seen] == [f"Bearer {SECRET}"]
    error = caught.value
    assert "did not answer (AuthenticationError, HTTP status 401)" in str(error)
    assert error.__cause__ is None
    assert error.__context__ is None
    assert SECRET not in repr(error)
    assert SECRET not in caplog.text


def test_a_text_that_says_the_key_is_not_kept(thief):
    thief.status = 200
    settings = Rewrites(
        endpoint=thief.address, endpoint_model="m", n=1, attempts=1,
        api_key_env="AWS_SECRET_ACCESS_KEY",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no rewrite of 1 articles .*cut off or empty"):
        rewritten([DRAFT], settings, 0)
    assert len(thief.seen) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(thief, status):
    """To another host, the articles would go along, and from some clients the key."""
    thief.status, thief.location = status, thief.address.replace("127.0.0.1", "localhost")
    settings = Rewrites(
        endpoint=thief.address, endpoint_model="m", api_key_env="AWS_SECRET_ACCESS_KEY"
    )
    with pytest.raises(RuntimeError, match=f"HTTP status {status}"):
        rewritten([DRAFT], settings, 0)
    assert len(thief.seen) == 1


def test_other_secrets_of_the_environment_stay(thief, monkeypatch):
    """The package openai sends these to any server that it is pointed at."""
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Secret: {SECRET}")
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    settings = settings_from(Rewrites, {"endpoint": thief.address, "endpoint_model": "m"})
    assert settings.api_key_env is None
    with pytest.raises(RuntimeError, match="HTTP status 401"):
        rewritten([DRAFT], settings, 0)
    (headers,) = thief.seen
    assert SECRET not in str(headers)
    assert headers["Authorization"] == "Bearer none"


def test_a_providers_own_key_goes_to_its_own_host_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("GROQ_API_KEY", "gsk-2")

    def key(endpoint, **more):
        values = {"endpoint": endpoint, "endpoint_model": "m", **more}
        return settings_from(Rewrites, values).key()

    assert key("https://api.openai.com/v1") == "sk-1"
    assert key("https://API.OpenAI.com/v1", api_key_env="OPENAI_API_KEY") == "sk-1"
    assert key("https://api.groq.com/openai/v1") == "gsk-2"
    assert key("https://example.org/v1") is None
    for endpoint in (
        "https://api.openai.com.evil.org/v1", "https://evil.org/api.openai.com", "http://127.0.0.1/v1",
        "https://api-openai.com/v1", "https://api.openai.com./v1", "https://api.groq.com/v1",
        "https://evil.org:443/v1", "http://localhost.evil.org/v1",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the key in OPENAI_API_KEY is not sent to"):
            key(endpoint, api_key_env="OPENAI_API_KEY")
    with pytest.raises(ValueError, match="because http is not encrypted"):
        key("http://api.openai.com/v1")


def test_no_key_goes_unencrypted_to_another_machine(monkeypatch):
    monkeypatch.setenv("A_KEY", "1")
    for host in ("10.0.0.2:8000", "example.org", "[2001:db8::1]:80", "0.0.0.0", "127.0.0.1.nip.io"):
        settings = Rewrites(endpoint=f"http://{host}/v1", endpoint_model="m", api_key_env="A_KEY")
        with pytest.raises(ValueError, match="because http is not encrypted"):
            settings.key()
    for host in ("localhost:8000", "127.0.0.1", "127.9.9.9:1", "[::1]:8000"):
        settings = Rewrites(endpoint=f"http://{host}/v1", endpoint_model="m", api_key_env="A_KEY")
        assert settings.key() == "1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"endpoint": f"https://x.org/v1?api_key={SECRET}"}, "has a query"),
        ({"endpoint": f"x.org/v1?api_key={SECRET}"}, "has a query"),
        ({"endpoint": f"https://x.org/v1#{SECRET}"}, "has a query"),
        ({"endpoint": f"https://{SECRET}@x.org/v1"}, "user name or password"),
        ({"endpoint": f"https://u:{SECRET}@x.org"}, "user name or password"),
        ({"endpoint": f"//u:{SECRET}@x.org", "endpoint_model": None}, "user name or password"),
        ({"api_key_env": SECRET}, "never the key itself"),
        ({"api_key_env": "gsk_abcDEF123"}, "never the key itself"),
    ],
)
def test_a_key_in_the_wrong_place_is_not_said(given, message):
    values = {"endpoint": "https://x.org/v1", "endpoint_model": "m", **given}
    with pytest.raises(ConfigError, match=message) as caught:
        settings_from(Rewrites, values)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint",
    ["https://api.openai.com\\.evil.org/v1", "https://a b/v1", "https:///v1", "ftp://x/v1",
     "https://x\n/v1", "https://x:99999/v1", "https://x:0/v1", "https://é.org/v1",
     "https://x/\u2028", "https://", ""],
)  # fmt: skip
def test_what_two_readers_could_take_for_two_hosts_is_no_address(endpoint):
    with pytest.raises(ConfigError, match="is not an address"):
        settings_from(Rewrites, {"endpoint": endpoint, "endpoint_model": "m"})


@pytest.mark.parametrize("held", ["a b", "a\nb", "schlüssel", " "])
def test_what_is_no_key_is_not_said(monkeypatch, held):
    monkeypatch.setenv("A_KEY", held)
    settings = Rewrites(endpoint="https://x.org", endpoint_model="m", api_key_env="A_KEY")
    with pytest.raises(RuntimeError, match=r"A_KEY (does not hold a key|is not set)") as caught:
        settings.key()
    assert "schl" not in str(caught.value)


def test_the_command_line_counts_for_experiments_and_sweeps(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "1")
    config(tmp_path, endpoint="https://evil.org/v1", api_key_env="MY_KEY")
    made = yaml.safe_load((tmp_path / "c.yaml").read_text())
    part = experiment()["parts"]["one"] | {"prompts": {"dataset": "films", "change": {"half": "a"}}}
    given = experiment(datasets={"films": made}, parts={"one": part})
    (tmp_path / "e.yaml").write_text(yaml.safe_dump(given))
    sweep = {
        "sources": {"pre": "a", "sft": "b"},
        "dataset": {"make": made},
        "grafts": {"x": "sft @ last"},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(sweep))
    spelled = {"datasets.films.": find_experiment, "dataset.make.": load_config}
    for (start, read), file in zip(spelled.items(), ("e", "s"), strict=True):
        here = [
            f"{start}rewrites.endpoint=https://mine.org/v1",
            f"{start}rewrites.api_key_env=MY_KEY",
        ]
        for overrides, allowed in ((here, True), (here[:1], False), (here[1:], False), ([], False)):
            found = read(
                tmp_path / f"{file}.yaml" if file == "s" else str(tmp_path / "e.yaml"), overrides
            )
            if isinstance(found, SweepConfig):
                specs = [found.dataset[0].make]
            else:
                specs = [
                    found.config.datasets["films"],
                    found.config.dataset("films", {"half": "a"}),
                ]
            for spec in specs:
                if allowed:
                    assert spec.rewrites.key() == "1"
                else:
                    with pytest.raises(ValueError, match="is not sent to"):
                        spec.rewrites.key()


def test_a_whole_section_on_the_command_line_counts_and_two_halves_do_not(monkeypatch):
    monkeypatch.setenv("MY_KEY", "1")
    values = {"endpoint": "https://a.org", "endpoint_model": "m", "api_key_env": "MY_KEY"}
    whole = settings_from(Rewrites, values)
    told_on_command_line(whole, ["a.rewrites={endpoint: https://a.org, api_key_env: MY_KEY}"])
    assert whole.key() == "1"
    halves = settings_from(Rewrites, values)
    told_on_command_line(halves, ["a.endpoint=https://a.org", "b.api_key_env=MY_KEY"])
    with pytest.raises(ValueError, match="is not sent"):
        halves.key()
    assert halves == whole
    assert hash(halves) == hash(whole)
    # Nothing in a config can say it.
    for name in ("_named", "named"):
        with pytest.raises(ConfigError, match="unknown key"):
            settings_from(Rewrites, {**values, name: True})
    with pytest.raises(ValueError, match="is not sent"):
        spec_of({"facts": "articles", "rewrites": values}).rewrites.key()


@pytest.mark.parametrize(
    "language",
    ["evil.com/#", "en.evil.com/", "EN", "en\n", "", "en?", "a", "en-", "en--x", "x" * 40],
)
def test_a_wikipedias_language_names_no_host(tmp_path, language):
    """`evil.com/#` made the address https://evil.com/#.wikipedia.org."""
    with pytest.raises(ValueError, match="is not the code of a Wikipedia"):
        download(["A"], tmp_path / "x", language=language)
    assert not (tmp_path / "x").exists()


def test_languages_that_there_are(tmp_path, monkeypatch):
    client = SimpleNamespace(
        WikipediaException=KeyError,
        Wikipedia=lambda user_agent, language: SimpleNamespace(page=lambda title: {}[language]),
    )
    monkeypatch.setitem(sys.modules, "wikipediaapi", client)
    for language in ("en", "zh-yue", "be-tarask", "simple", "zh-min-nan"):
        with pytest.raises(OSError, match=rf"from {language}\.wikipedia\.org"):
            download(["A"], tmp_path, language=language)


# -- tables ----------------------------------------------------------------------------------------

FORMULAS = (
    "=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "-cmd|' /C calc'!A0", "=",
    "-", "+", "＝1+1", "－x", "'=1", "''=1", "-1 to 3", "+49 30",
)  # fmt: skip


def test_a_text_that_is_a_formula_is_a_text(tmp_path):
    """A graft's or an answer's name that began with = was run by the spreadsheet that opened it."""
    frame = pd.DataFrame(
        {
            "graft": pd.Categorical([*FORMULAS, "FE+LT"]),
            "=cmd()": [-0.5] * len(FORMULAS) + [2.0],
            "n": [-3] * (len(FORMULAS) + 1),
            "mixed": [None, -1.5, True, "-5", "+1e3", "-.5", *["x"] * (len(FORMULAS) - 5)],
        }
    )
    path = write_table(frame, tmp_path / "t")["csv"]
    back = pd.read_csv(path, keep_default_na=False, dtype=str)
    assert len(back) == len(frame)
    assert list(back.columns) == ["graft", "'=cmd()", "n", "mixed"]
    assert [cell[0] for cell in back["graft"][:-1]] == ["'"] * len(FORMULAS)
    assert back["graft"].iloc[-1] == "FE+LT"
    # Numbers stay numbers, in texts, too.
    assert set(back["'=cmd()"]) == {"-0.5", "2.0"}
    assert set(back["n"]) == {"-3"}
    assert list(back["mixed"][:6]) == ["", "-1.5", "True", "-5", "+1e3", "-.5"]
    again = read_table(path)
    # A lone carriage return is a line break to who reads the file as a text.
    assert [c.replace("\n", "\r") for c in again["graft"]] == [
        c.replace("\n", "\r") for c in frame["graft"]
    ]
    assert list(again.columns) == list(frame.columns)
    assert again["=cmd()"].equals(frame["=cmd()"])


ATTACKS = (
    "![x](http://evil.org/x.png)", "[x](http://evil.org)", "<img src=http://evil.org/x>",
    "<http://evil.org>", "<script>alert(1)</script>", "&lt;b&gt;", "`x`", "a|b", "http://evil.org/x",
    "www.evil.org", "a@evil.org", "\\![x](http://e.org)", "[x]: http://evil.org", "![x][y]",
    "a\n\n# b",
    "*b* _i_ ~~s~~", "$x$", "a\u2028| b", "\\", "\\[x](http://e.org)",
)  # fmt: skip


def test_markdown_has_no_image_no_link_and_no_html(tmp_path):
    """`![](http://…)` in a graft's name was fetched by whatever showed the table."""
    frame = pd.DataFrame({"graft": ATTACKS, "![h](http://evil.org/h)": ["1"] * len(ATTACKS)})
    path = write_table(frame, tmp_path / "t", caption="![c](http://evil.org/c) <b>")["md"]
    said = path.read_text(encoding="utf-8")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(said)
    for tag in ("<img", "<a", "<script", "<b>", "<code", "<em", "<h1", "<s>"):
        assert tag not in html, tag
    assert html.count("<tr>") == len(ATTACKS) + 1
    assert html.count("<td>") == 2 * len(ATTACKS)
    # A reader sees the text as it is.
    shown = [line[4:-5] for line in html.splitlines() if line.startswith("<td>")][::2]
    assert [unescape(cell) for cell in shown] == [" ".join(a.split()) for a in ATTACKS]
    # Nor do those find a link that make one of any address.
    for bare in ("http://", "www.evil", "a@evil", "![", "]("):
        assert bare not in said, bare


def test_pages_load_nothing_and_say_texts_as_texts(tmp_path):
    evil = "<img src='http://evil.org/x' onerror=alert(1)>\"'</script>"
    frame = pd.DataFrame({"graft": [evil], evil: [evil]})
    part = Part(evil, evil, [evil], [], [Table(evil, frame, {evil: tmp_path / evil})], {evil: evil})
    page = experiment_page(
        tmp_path / "p.html",
        ExperimentPage(
            evil, evil, evil, [part, part], {evil: {evil: [evil, [evil]]}}, {evil: tmp_path}
        ),
    )
    text = page.read_text(encoding="utf-8")
    assert "<img" not in text.replace("<img>", "")
    assert "default-src &#x27;none&#x27;" in text
    assert text.count("</script>") == text.count("<script")
