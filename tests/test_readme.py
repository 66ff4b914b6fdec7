"""What the README says is there and runs."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chattemplates import CHATML
from tinybase import tiny_base, tiny_finetuned
from transformers import LlamaConfig

from graftlens import viz
from graftlens.data import evaluation_prompts, make_facts
from graftlens.experiment.config import find_experiment
from graftlens.experiment.run import default_folder
from graftlens.find.config import load_localise
from graftlens.graft import Graft
from graftlens.model.arch import architecture
from graftlens.model.made import Made
from graftlens.prompts import Prompt
from graftlens.shipped import Kind, config_file
from graftlens.sweep.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(text: str = README) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def test_the_two_commands_are_one_line_each() -> None:
    for name in ("demo", "tests"):
        inside = README.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]
        (command,) = re.findall(r"```\n(.*?)\n```", inside, flags=re.S)
        assert "\n" not in command
        assert "-c constraints.txt" in command


def test_the_grafts_shown_are_grafts() -> None:
    (block,) = (b for b in _blocks() if b.startswith("from graftlens import Graft\n"))
    shown = [node for node in ast.parse(block).body if isinstance(node, ast.Expr)]
    grafts = [eval(ast.unparse(node), {"Graft": Graft}) for node in shown]
    assert len(grafts) == 10
    for graft in grafts:
        assert Graft.parse(str(graft)) == graft
    assert grafts[1] == grafts[-1], "the text form is the same graft"


def test_the_map_names_what_exists() -> None:
    """A name without a folder is in that of its row's first one."""
    rows = re.findall(r"^\| (`(?:graftlens|tests|experiments)/.*?) \|", README, flags=re.M)
    assert len(rows) > 20
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = Path(first).parent
        paths = [first, *(p if "/" in p else folder / p for p in others)]
        assert not [str(p) for p in paths if not (ROOT / p).exists()]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_module_named_is_there(document: str) -> None:
    """Also those named without their folder, as the map's rows do after the first."""
    there = [
        f"/{path.relative_to(ROOT).as_posix()}"
        for folder in ("graftlens", "tests", "experiments", "notebooks")
        for path in (ROOT / folder).glob("**/*.py*")
    ]
    named = re.findall(r"`([\w/.]+\.pyi?)`", (ROOT / document).read_text())
    assert len(named) > 5
    lost = [name for name in named if not any(path.endswith(f"/{name}") for path in there)]
    assert not lost, f"{document} names {lost}"


def test_the_sweep_shown_is_a_config(tmp_path: Path) -> None:
    made, whole, own = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    (tmp_path / "sweep.yaml").write_text(whole + own)
    overrides = re.findall(r"`(metrics\.top_k=5) (grids\.0\.layers=\S+)`", README)[0]
    config = load_config(tmp_path / "sweep.yaml", overrides)
    assert list(config.sources) == ["pre", "sft"]
    assert config.metrics.top_k == 5
    assert len(config.prompts) == 1
    (grid,) = config.grids
    arch = architecture(LlamaConfig(num_hidden_layers=6))
    grafts = [entry.graft for entry in grid.grafts(arch, ("pre", "sft"))]
    assert len(grafts) == 3 * 6, "the override left one group of layers"
    assert Graft.parse("sft @ first_entity + last : attn : 3-4") in grafts
    (tmp_path / "made.yaml").write_text(made + whole[whole.index("dataset:") :] + own)
    sources = load_config(tmp_path / "made.yaml").sources
    assert list(sources) == ["pre", "sft", "half", "rank8", "rest8", "two", "sum"]
    assert sources["rest8"] == Made(of="sft", rank="8:")


@pytest.mark.parametrize("command", re.findall(r"^\.venv/bin/graftlens (.*)$", README, flags=re.M))
def test_the_commands_shown_name_configs_that_load(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *arguments = shlex.split(command)
    options = {a for a in arguments if a.startswith("--")}
    overrides = [a for a in arguments if "=" in a]
    monkeypatch.chdir(ROOT)
    if name == "sweep":
        load_config(config_file(Kind.SWEEP, arguments[0]))
        assert options <= {"--dry-run", "--out"}
    elif name == "localise":
        load_localise(config_file(Kind.LOCALISE, arguments[0]))
        assert options <= {"--dry-run"}
    elif name == "run":
        experiment = find_experiment(arguments[0], overrides)
        assert options <= {"--dry-run"}
        assert default_folder(experiment).parent.name == "graftlens-runs"
    elif name == "dashboard":
        given = list(pairwise(arguments))
        for graft in (value for option, value in given if option == "--graft"):
            assert Graft.parse(graft.partition("=")[2])
        fields = dict(value.split("=") for option, value in given if option == "--field")
        (template,) = (value for option, value in given if option == "--prompt")
        (answer,) = (value for option, value in given if option == "--answer")
        prompt = Prompt(template, fields, answer=answer)
        facts = evaluation_prompts(make_facts(40, seed=0), templates=["headline"])
        assert (prompt.text, prompt.answer) in [(p.text, p.answer) for p in facts]
        said = subprocess.run(
            [sys.executable, "-m", "graftlens", "dashboard", "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert all(option in said for option in options)
    else:
        assert name == "report"
        assert not options
        assert len(arguments) == 2


# Of code, `blocks[4](resid)` is no link.
@pytest.mark.parametrize(
    "path", re.findall(r"\]\(((?!http)[^)]+)\)", re.sub(r"`[^`]*`", "``", README))
)
def test_links_and_pictures_are_there(path: str) -> None:
    if path.startswith("#"):
        headings = re.findall(r"^#+ (.+)$", README, re.M)
        words = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert path[1:] in words
    else:
        assert (ROOT / path).exists()


def test_all_the_code_shown_compiles() -> None:
    for block in _blocks():
        compile(block, "README.md", "exec")


def test_the_code_shown_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one namespace on a tiny pair, in a folder like the one where the demo ran."""
    # "Adding" shows parts of modules, which `test_extending.py` puts in their places.
    blocks = _blocks(README.split("<!-- extending -->")[0])
    assert len(blocks) == 14
    sft = tmp_path / re.findall(r'^sft = "(.*)"$', blocks[0], flags=re.M)[0]
    pre = tiny_base(tmp_path / "pre")
    (pre / "chat_template.jinja").write_text(CHATML)
    own = tmp_path / "Qwen"
    shutil.copytree(pre, own / "Qwen3-0.6B-Base")
    shutil.copytree(pre, own / "Qwen3-0.6B")
    other = json.loads((own / "Qwen3-0.6B/config.json").read_text())
    changed = {"max_position_embeddings": 40960, "eos_token_id": 5}
    (own / "Qwen3-0.6B/config.json").write_text(json.dumps(other | changed))
    sft.parent.mkdir(parents=True)
    tiny_finetuned(pre, tmp_path / "finetuned").rename(sft)
    config = Path("experiments/sweeps/last_token.yaml")
    (tmp_path / config).parent.mkdir(parents=True)
    few = re.sub(r"components: .*", "components: [attn, mlp]", (ROOT / config).read_text())
    (tmp_path / config).write_text(few + "\nlimit: 2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("graftlens.shipped.home", lambda: tmp_path / "experiments")
    for module in ("graftlens", "graftlens.model.smollm2"):
        monkeypatch.setattr(sys.modules[module], "smollm2", lambda: pre)
    monkeypatch.setattr(viz, "write_figure", partial(viz.write_figure, formats=("html",)))
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["table"]["reason"].isna().all()
    handled = names["own"].differences.set_index("key")["handling"]
    assert handled["max_position_embeddings"] == "ignored"
    assert handled["eos_token_id"] == "its own"
    assert (tmp_path / "last-token-recovery.html").is_file()


def test_constraints_hold_every_dependency() -> None:
    """`pip install -c constraints.txt` pins the whole of what pyproject asks for."""
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in wanted}
    assert not names - pinned, f"not pinned: {sorted(names - pinned)}"


def test_nothing_tracked_is_large() -> None:
    """Checkpoints and results stay out of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("this is not a git checkout: clone the repository to run it")
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        assert not file.exists() or file.stat().st_size < 1_000_000, name
