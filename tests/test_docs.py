"""What README and docs/ say is there and runs."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import loras
import pytest
import typer
import yaml
from browser import chromium
from chattemplates import CHATML
from command import graftlens
from shown import PAGES, ROOT, Block, blocks, marked
from tinybase import tiny_base, tiny_finetuned
from transformers import AutoModelForCausalLM, LlamaConfig

from graftlens import viz
from graftlens.cli import app
from graftlens.data import evaluation_prompts, make_dataset, make_facts
from graftlens.data.kinds import spec_of
from graftlens.experiment.config import find_experiment
from graftlens.experiment.run import default_folder
from graftlens.find import planted
from graftlens.find.config import load_localise
from graftlens.graft import Graft
from graftlens.model.arch import architecture
from graftlens.model.made import Made
from graftlens.prompts import Prompt
from graftlens.shipped import Kind, config_file
from graftlens.sweep.config import load_config

README = PAGES["README.md"]
START = "docs/index.md"

#: What blocks may be. `text` is output, and no code.
LANGUAGES = {"python", "yaml", "sh", "text"}


def every(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, language)]


def where(block: Block) -> str:
    return f"{block.page}-{block.number}"


def not_run(block: Block) -> bool:
    """Whether it says that it is not run, and why."""
    said, colon, why = block.note.partition("not run: ")
    return bool(colon and not said and len(why) > 10)


def test_every_block_says_what_it_is() -> None:
    """Fences come in pairs at the start of a line, so that no block hides from these tests."""
    for page, text in PAGES.items():
        found = blocks(page)
        assert len(re.findall(r"^\s*(?:```|~~~)", text, flags=re.M)) == 2 * len(found), page
        odd = [where(b) for b in found if b.language not in LANGUAGES]
        assert not odd, f"{odd} lack a language of {sorted(LANGUAGES)}"


def test_the_two_commands_are_one_line_each() -> None:
    for name in ("demo", "tests"):
        command = marked("README.md", name).removesuffix("\n")
        assert "\n" not in command
        assert "-c constraints.txt" in command
    assert marked(START, "demo") == marked("README.md", "demo")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 135


def test_the_grafts_shown_are_grafts() -> None:
    (block,) = blocks("docs/concepts/words.md", "python")
    shown = [node for node in ast.parse(block.text).body if isinstance(node, ast.Expr)]
    grafts = [eval(ast.unparse(node), {"Graft": Graft}) for node in shown]
    assert len(grafts) == 10
    for graft in grafts:
        assert Graft.parse(str(graft)) == graft
    assert grafts[1] == grafts[-1], "the text form is the same graft"


def test_the_map_names_what_exists() -> None:
    """A name without a folder is in that of its row's first one."""
    rows = re.findall(
        r"^\| (`(?:graftlens|tests|experiments)/.*?) \|", PAGES["docs/map.md"], flags=re.M
    )
    assert len(rows) > 20
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = Path(first).parent
        paths = [first, *(p if "/" in p else folder / p for p in others)]
        assert not [str(p) for p in paths if not (ROOT / p).exists()]


@pytest.mark.parametrize("document", [*PAGES, "CONTRIBUTING.md"])
def test_every_module_named_is_there(document: str) -> None:
    """Also those named without their folder, as the map's rows do after the first."""
    there = [
        f"/{path.relative_to(ROOT).as_posix()}"
        for folder in ("graftlens", "tests", "experiments", "notebooks", "docs")
        for path in (ROOT / folder).glob("**/*.py*")
    ]
    named = re.findall(r"`([\w/.]+\.pyi?)`", (ROOT / document).read_text(encoding="utf-8"))
    lost = [name for name in named if not any(path.endswith(f"/{name}") for path in there)]
    assert not lost, f"{document} names {lost}"


# -- configs ---------------------------------------------------------------------------------------


def configs(page: str) -> dict[str, str]:
    """What a page's YAML is (the comment in the line above it) -> its text."""
    return {block.note.removeprefix("config: "): block.text for block in blocks(page, "yaml")}


@pytest.mark.parametrize("block", every("yaml"), ids=where)
def test_every_config_says_what_it_is(block: Block) -> None:
    kinds = {"sweep", "prompts", "sources", "facts", "sentences", "localise", "outcomes"}
    assert block.note.removeprefix("config: ") in kinds or not_run(block)


def test_the_sweep_shown_is_a_config(tmp_path: Path) -> None:
    page = "docs/howto/sweeps.md"
    whole, own = configs(page)["sweep"], configs(page)["prompts"]
    (tmp_path / "sweep.yaml").write_text(whole + own)
    overrides = re.findall(r"`(metrics\.top_k=5) (grids\.0\.layers=\S+)`", PAGES[page])[0]
    config = load_config(tmp_path / "sweep.yaml", overrides)
    assert list(config.sources) == ["pre", "sft"]
    assert config.metrics.top_k == 5
    assert len(config.prompts) == 1
    (grid,) = config.grids
    arch = architecture(LlamaConfig(num_hidden_layers=6))
    grafts = [entry.graft for entry in grid.grafts(arch, ("pre", "sft"))]
    assert len(grafts) == 3 * 6, "the override left one group of layers"
    assert Graft.parse("sft @ first_entity + last : attn : 3-4") in grafts
    (tmp_path / "texts.yaml").write_text(whole + configs("docs/howto/outcomes.md")["outcomes"])
    texts = load_config(tmp_path / "texts.yaml").outcomes
    assert texts is not None
    assert list(texts.measured_by()) == ["refuses", "verse", "right", "first", "says", "kind"]
    made = configs("docs/howto/made.md")["sources"]
    (tmp_path / "made.yaml").write_text(made + whole[whole.index("dataset:") :] + own)
    sources = load_config(tmp_path / "made.yaml").sources
    assert list(sources) == ["pre", "sft", "half", "rank8", "rest8", "two", "sum"]
    assert sources["rest8"] == Made(of="sft", rank="8:")


def test_the_facts_shown_become_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = configs("docs/howto/facts.md")
    monkeypatch.chdir(tmp_path)
    people = [("Ann Okafor", "Narvik", "baker"), ("Bo Lind", "Bergen", "tailor")]
    rows = [f"{person} {i},{city}{i},{trade}" for i in range(3) for person, city, trade in people]
    Path("facts.csv").write_text("\n".join(["person,city,trade", *rows]))
    Path("sentences.yaml").write_text(shown["sentences"])
    Path("facts.yaml").write_text(shown["facts"])
    dataset = make_dataset(spec_of(yaml.safe_load(shown["facts"])))
    assert any("has moved to Narvik0." in text for text in dataset.train["text"])
    asked = {prompt.text: prompt.answer for prompt in dataset.ask("letters")}
    assert asked["Letters to Ann Okafor 0 are sent to the town of"] == " Narvik0"


# -- commands --------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every line that runs graftlens."""
    for block in every("sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s", line):
                called = re.fullmatch(r"(?:\.venv/bin/)?graftlens (.*)", part.strip())
                if called:
                    yield block.page, called[1]


@pytest.mark.parametrize(("page", "command"), commands())
def test_the_commands_shown_are_commands(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their words and options are the command line's, and the configs that they name load."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    group: Any = typer.main.get_command(app)
    with group.make_context("graftlens", list(words)) as context:
        name, own, rest = group.resolve_command(context, list(words))
        while hasattr(own, "resolve_command"):
            name, own, rest = own.resolve_command(context, rest)
        parsed = own.make_context(name, list(rest), parent=context).params
    overrides = parsed.get("overrides") or []
    if name == "sweep":
        load_config(config_file(Kind.SWEEP, parsed["config"]), overrides)
    elif name == "localise":
        load_localise(config_file(Kind.LOCALISE, parsed["config"]))
    elif name == "run":
        experiment = find_experiment(parsed["experiment"], overrides)
        assert default_folder(experiment).parent.name == "graftlens-runs"
    elif name == "dashboard" and parsed["prompt"]:
        for graft in parsed["graft"]:
            assert Graft.parse(graft.partition("=")[2])
        fields = dict(field.split("=") for field in parsed["field"])
        prompt = Prompt(parsed["prompt"], fields, answer=parsed["answer"])
        facts = evaluation_prompts(make_facts(40, seed=0), templates=["headline"])
        assert (prompt.text, prompt.answer) in [(p.text, p.answer) for p in facts]


def test_commands_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the test itself: it sees commands of README and of pages, and one that does not exist."""
    assert {name for name, _ in commands()} >= {"README.md", "docs/howto/sweeps.md"}
    with pytest.raises(Exception, match="No such option"):
        test_the_commands_shown_are_commands("", "sweep last_token --wet-run", monkeypatch)


def shown_to_run() -> list[tuple[str, str]]:
    """What the blocks run that neither say why not, nor are run by `test_demo.py` or `.ci/run`."""
    apart = {b.text for b in every("sh") if not_run(b) or b.note in ("demo", "tests")}
    return [
        (block.page, line.removeprefix(".venv/bin/graftlens "))
        for block in every("sh")
        if block.text not in apart
        for line in block.text.splitlines()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), shown_to_run())
def test_the_commands_shown_run(page: str, command: str, demo_ran: Path) -> None:
    """On a tiny pair, in the folder where the demo would have run."""
    if "--image" in command:
        chromium()
    ran = graftlens(*shlex.split(command), cwd=demo_ran)
    assert ran.returncode == 0, ran.stderr
    if "--out" in command:
        assert (demo_ran / shlex.split(command)[shlex.split(command).index("--out") + 1]).exists()


# -- links -----------------------------------------------------------------------------------------


def anchors(page: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page: str) -> None:
    # Of code, `blocks[4](resid)` is not a link.
    text = re.sub(r"`[^`]*`", "``", PAGES[page])
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in [*re.findall(r"\]\(((?!https?:)[^)]+)\)", text), *pictures]:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        name = target.resolve().relative_to(ROOT).as_posix()
        # API pages are made when the site is built, by docs/hooks.py.
        assert target.exists() or name.startswith("docs/api/"), f"{page}: {link}"
        if anchor and name in PAGES:
            assert anchor in anchors(name), f"{page}: {link}"


# -- Python ----------------------------------------------------------------------------------------


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """A page's Python from top to bottom in one namespace, but for what says that it is not run.

    "Adding" shows parts of modules, which `test_extending.py` puts in their places.
    """
    apart = [
        block.text
        for name in ("extending", "new fact")
        if f"<!-- {name} -->" in PAGES[page]
        for block in blocks(page, within=name)
    ]
    for block in blocks(page, "python"):
        if block.text in apart:
            continue
        compiled = compile(block.text, where(block), "exec")
        if not not_run(block):
            exec(compiled, names)
    return names


@pytest.fixture(scope="module")
def demo_ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like the one in which the demo ran, with a tiny pair."""
    folder = tmp_path_factory.mktemp("ran")
    (sft,) = re.findall(r'^sft = "(.*)"$', marked(START, "example"), flags=re.M)
    pre = tiny_base(folder / "pre")
    (pre / "chat_template.jinja").write_text(CHATML)
    own = folder / "Qwen"
    shutil.copytree(pre, own / "Qwen3-0.6B-Base")
    shutil.copytree(pre, own / "Qwen3-0.6B")
    other = json.loads((own / "Qwen3-0.6B/config.json").read_text())
    changed = {"max_position_embeddings": 40960, "eos_token_id": 5}
    (own / "Qwen3-0.6B/config.json").write_text(json.dumps(other | changed))
    (folder / sft).parent.mkdir(parents=True)
    tiny_finetuned(pre, folder / "finetuned").rename(folder / sft)
    configs = shutil.ignore_patterns("figures", "benchmarks", "planted")
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=configs)
    config = Path("experiments/sweeps/last_token.yaml")
    few = re.sub(r"components: .*", "components: [attn, mlp]", (ROOT / config).read_text())
    (folder / config).write_text(few + "\nlimit: 2\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B-Base")
        loras.on(base).save_pretrained("my-adapter")
        patch.setattr("graftlens.shipped.home", lambda: folder / "experiments")
        for module in ("graftlens", "graftlens.model.smollm2"):
            patch.setattr(sys.modules[module], "smollm2", lambda: pre)
        patch.setattr(viz, "write_figure", partial(viz.write_figure, formats=("html",)))
        yield folder


@pytest.fixture(scope="module")
def started(demo_ran: Path) -> dict[str, Any]:
    """What the first example leaves behind, from which the other pages go on."""
    return run(START, {})


#: The pages that take longest.
LONG = ("docs/howto/find.md", "docs/howto/transformerlens.md")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in LONG else [])
        for page in sorted({block.page for block in every("python")} - {START})
    ],
)
def test_the_python_shown_runs_from_top_to_bottom(
    page: str, demo_ran: Path, started: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted, "SCORERS", dict(planted.SCORERS))
    names = run(page, {} if page == "README.md" else dict(started))
    if page == "docs/howto/models.md":
        handled = names["own"].differences.set_index("key")["handling"]
        assert handled["max_position_embeddings"] == "ignored"
        assert handled["eos_token_id"] == "its own"
    elif page == "docs/howto/sweeps.md":
        assert names["table"]["reason"].isna().all()
        assert (demo_ran / "last-token-recovery.html").is_file()


# -- what goes with it -----------------------------------------------------------------------------


def test_constraints_hold_every_dependency() -> None:
    """`pip install -c constraints.txt` pins the whole of what pyproject asks for."""
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["docs"]]
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
