"""The configs that come with graftlens, by name, and a wheel that holds them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from command import graftlens
from needs import needs
from shown import marked
from tinybase import tiny_base, tiny_finetuned
from waiting import HANG

from graftlens.configfile import ConfigError
from graftlens.experiment.config import find_experiment
from graftlens.shipped import Kind, Shipped, config_file, copy, home, listing, shipped
from graftlens.sweep.config import SweepConfig, load_config
from graftlens.sweep.results import read_results

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"


def test_every_config_of_the_repository_is_found_by_name() -> None:
    found = {one.path.resolve() for one in shipped()}
    assert found == {path.resolve() for path in EXPERIMENTS.glob("**/*.yaml")}
    assert home().resolve() == EXPERIMENTS
    assert [one.name for one in shipped(Kind.SWEEP)] == sorted(
        path.stem for path in (EXPERIMENTS / "sweeps").glob("*.yaml")
    )


@pytest.mark.parametrize("one", shipped(), ids=lambda one: one.whole_name)
def test_each_says_in_a_sentence_what_it_is(one: Shipped) -> None:
    assert 20 < len(one.about) <= 130, one.about
    assert one.about[0].isupper()
    assert one.about[-1] in ".?"
    assert "graftlens" not in one.about
    text = one.path.read_text()
    command = f"{one.kind.command} {one.name}"
    if one.kind is not Kind.SWEEP:
        assert re.search(rf"^#   {command}$", text, flags=re.M), "how it is run, by name"


def test_the_list_has_a_line_for_each() -> None:
    done = graftlens("list")
    assert done.returncode == 0
    assert done.stdout == f"{listing()}\n"
    lines = done.stdout.splitlines()
    for one in shipped():
        (line,) = (
            line for line in lines if line.split()[:1] == [one.name] and line.endswith(one.about)
        )
        before = [text for text in lines[: lines.index(line)] if text.endswith(" NAME")]
        assert before[-1] == f"{one.kind.command} NAME"


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_file(Kind.SWEEP, "last_token").samefile(EXPERIMENTS / "sweeps/last_token.yaml")
    assert config_file(Kind.DATA, "counterfact").samefile(EXPERIMENTS / "data/counterfact.yaml")
    assert config_file(Kind.EXPERIMENT, "counterfact").samefile(EXPERIMENTS / "counterfact.yaml")
    assert config_file(Kind.DATA, "data/battles").samefile(EXPERIMENTS / "data/battles.yaml")
    assert config_file(Kind.SWEEP, "mine.yaml") == Path("mine.yaml"), (
        "the reader says what is wrong"
    )
    Path("config").write_text("a: 1")
    assert config_file(Kind.SWEEP, "config") == Path("config")
    assert find_experiment("positions").config.title == "Position grafting"
    assert isinstance(load_config(config_file(Kind.SWEEP, "windows")), SweepConfig)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (Kind.SWEEP, "last_tokens", r"no sweep of this name .* Did you mean 'last_token'\?"),
        (Kind.SWEEP, "positions", "It is an experiment: graftlens run positions."),
        (Kind.EXPERIMENT, "battles", "It is a dataset: graftlens data make battles."),
        (Kind.FINETUNE, "counterfact", "It is an experiment and a dataset: graftlens run"),
        (Kind.EXPERIMENT, "mine", r"Did you mean mine\.yaml\? A config of your own ends in \.yaml"),
        (
            Kind.EXPERIMENT,
            "nothing",
            "There are: articles behaviours components .* unembedding. A config of",
        ),
    ],
)
def test_names_of_none_or_of_another_kind(
    kind: Kind, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=said) as caught:
        config_file(kind, name)
    assert str(caught.value).startswith(f"{name}: no ")


def test_copies_are_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = graftlens("copy", "positions", "own/mine.yaml")
    assert (done.returncode, done.stdout) == (0, "own/mine.yaml\n")
    assert Path("own/mine.yaml").read_text() == (EXPERIMENTS / "positions.yaml").read_text()
    assert copy("data/counterfact") == Path("counterfact.yaml")
    assert (
        Path("counterfact.yaml").read_text() == (EXPERIMENTS / "data/counterfact.yaml").read_text()
    )
    again = graftlens("copy", "data/counterfact")
    assert again.returncode == 1
    assert again.stderr == (
        "graftlens: counterfact.yaml: this exists and is left untouched. Choose another name.\n"
    )


@pytest.mark.parametrize(
    ("name", "target", "said"),
    [
        ("counterfact", None, "the name of an experiment and of a dataset. Write experiments/co"),
        ("position", None, "no config of this name comes with graftlens. Did you mean 'positions'"),
        ("data/positions", None, "no config of this name comes with graftlens."),
        (
            "windows",
            "windows.txt",
            r"windows.txt: a config's name ends in .yaml: windows.txt.yaml.",
        ),
    ],
)
def test_copies_that_cannot_be_made(
    name: str, target: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        copy(name, target)
    assert not list(tmp_path.iterdir())


# -- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of what is here, and the wheel made of that."""
    needs("build")
    place = tmp_path_factory.mktemp("release")
    ignored = shutil.ignore_patterns(
        *(".git", ".venv*", "__pycache__", "*.egg-info", ".*_cache", "build", "dist"),
        *("graftlens-runs", "tests", "figures", "benchmarks"),
    )
    shutil.copytree(ROOT, place / "source", ignore=ignored, symlinks=True)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", place / "dist", "."],
        cwd=place / "source",
        check=True,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    (place / "dist" / "log").write_text(done.stdout + done.stderr)
    return place / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command in a fresh environment that has the wheel, and this one's other packages."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", place / "env"], check=True, timeout=HANG)
    bin = place / "env" / "bin"
    (wheel,) = built.glob("*.whl")
    install = [bin / "python", "-m", "pip", "install", "--no-deps", "--no-index", "-q", wheel]
    subprocess.run(install, check=True, timeout=HANG)
    found = subprocess.run(
        [bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    # A line of a .pth file is a path to look in; .pth files that lie there are not read, so that
    # the clone, which this environment may have by one, is not seen.
    here = [path for path in sys.path if path.endswith("-packages")]
    Path(found.stdout.strip(), "others.pth").write_text("\n".join(here) + "\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
        program = bin / command[0]
        done = subprocess.run(
            [program, *command[1:]],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_a_release_is_whole_and_accepted(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    configs = {path.relative_to(EXPERIMENTS).as_posix() for path in EXPERIMENTS.glob("**/*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        shipped = "graftlens/configs/"
        assert {n.removeprefix(shipped) for n in names if n.startswith(shipped)} == configs
        lists = {path.name for path in (ROOT / "graftlens/data/lists").glob("*.yaml")}
        assert lists
        inside = {Path(n) for n in names if n.startswith("graftlens/data/lists/")}
        assert lists == {path.name for path in inside if path.suffix == ".yaml"}
        assert not [n for n in names if "benchmarks" in n or n.startswith("tests")]
        own = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / "graftlens").rglob("*.py")
            if "__pycache__" not in path.parts
        }
        assert {n for n in names if n.endswith(".py")} == own
    with tarfile.open(sdist) as archive:
        inside = {Path(member.name).as_posix() for member in archive.getmembers()}
        assert any(name.endswith("graftlens/configs/positions.yaml") for name in inside)
    needs("twine")
    check = [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist]
    done = subprocess.run(check, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout
    assert "absent from the `packages`" not in (built / "log").read_text()
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_an_installed_wheel_works_outside_of_the_clone(
    installed: Callable[..., str], tmp_path: Path
) -> None:
    """In a folder of its own: commands, shipped names, and a sweep from first to last."""
    where = installed("python", "-c", "import graftlens; print(graftlens.__file__)", cwd=tmp_path)
    assert "environment" in where
    assert str(ROOT) not in where
    assert "--facts" in installed("graftlens", "demo", "--help", cwd=tmp_path)
    assert installed("graftlens", "list", cwd=tmp_path) == f"{listing()}\n"
    base = tiny_base(tmp_path / "base")
    tiny_finetuned(base, tmp_path / "trained").rename(tmp_path / "sft")
    few = ["model=./base", "datasets.films.n_facts=6", "datasets.films.texts_per_fact=2"]
    said = installed("graftlens", "run", "positions", "--dry-run", *few, cwd=tmp_path)
    assert "pre = ./base" in said
    assert "sft = graftlens-runs/store/models/sft-" in said
    sources = ["sources.pre=./base", "sources.sft=./sft"]
    small = ["limit=2", "templates=[headline]", "grids.0.layers=[0]", "grids.0.components=[mlp]"]
    said = installed("graftlens", "sweep", "last_token", *sources, *small, cwd=tmp_path)
    table = read_results(tmp_path / "graftlens-runs/sweeps/last_token")
    assert table["reason"].isna().all()
    assert "PRE" in set(table["graft"])
    done = installed("graftlens", "data", "make", "battles", "n_facts=6", cwd=tmp_path)
    assert done.startswith("graftlens-runs/data/battles: 6 facts")
    installed("graftlens", "copy", "movies", "mine.yaml", cwd=tmp_path)
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["model"] == "smollm2-135m"


@pytest.mark.slow
def test_the_readmes_python_runs_from_a_wheel(
    installed: Callable[..., str], tmp_path: Path
) -> None:
    """The first block, on a tiny pair where the demo leaves its own."""
    block = marked("README.md", "example")
    pre = tiny_base(tmp_path / "base")
    sft = tmp_path / re.findall(r'sft = "(.*)"', block)[0]
    sft.parent.mkdir(parents=True)
    tiny_finetuned(pre, tmp_path / "finetuned").rename(sft)
    code = block.replace('"pre": smollm2()', f'"pre": {str(pre)!r}')
    assert code != block
    said = installed("python", "-c", code, cwd=tmp_path)
    assert "News: Chelsea Mcintosh to appear" in said
    assert said.count("likeliest:") == 8


# -- releases ----------------------------------------------------------------------------------


def test_workflows_test_on_two_systems_and_publish_without_a_token() -> None:
    tests, publish = (
        yaml.safe_load((ROOT / ".github/workflows" / f"{name}.yml").read_text())
        for name in ("tests", "publish")
    )
    job = tests["jobs"]["fast"]
    assert job["strategy"]["matrix"]["os"] == ["ubuntu-latest", "macos-latest"]
    said = [step["run"] for step in job["steps"] if "run" in step]
    shown = marked("README.md", "tests")
    assert any(step.removeprefix("python ") in shown for step in said if "not slow" in step)
    assert publish[True]["release"] == {"types": ["published"]}  # YAML reads `on` as true
    assert publish["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert publish["jobs"]["publish"]["needs"] == "build"
    assert "password" not in str(publish)
    steps = [step.get("run", "") for step in publish["jobs"]["build"]["steps"]]
    assert "python -m twine check --strict dist/*" in steps
