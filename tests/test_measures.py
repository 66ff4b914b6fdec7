"""Measures: every row of `METRICS` against plain formulas over one run's logits, and adding one."""

import json
import pickle
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import MakeTiny, Tiny
from shown import marked
from sweeps import NoReport, assert_equal_tables, checkpoints, config, read_whole
from typer.testing import CliRunner

from graftlens import Graft, GraftedTransformer, Prompt, read_results, run_sweep, summarise, viz
from graftlens.cli import app
from graftlens.evaluation import evaluate
from graftlens.metrics import METRICS, Measure, Predictions, js, kl, known, load, measures
from graftlens.prompts import continuation, tokenize
from graftlens.stats import compare_all, stability
from graftlens.sweep.cells import asked_for
from graftlens.sweep.results import read_manifest, read_prompts, shard_path
from graftlens.sweep.runner import prepare_sweep, work
from graftlens.sweep.scoring import score
from graftlens.sweep.trust import trust_report

ASKED = (
    *("kl_base", "kl_full", "kl_from_base", "kl_from_full", "js_base", "js_full"),
    *("entropy", "margin", "answer_set_prob"),
)
GRAFTS = {
    "PRE": Graft(),
    "SFT": Graft.rule("sft"),
    "LT": Graft.parse("sft @ last"),
    "mlp": Graft.parse("sft @ first_entity + last : mlp"),
    "out": Graft.parse("sft @ last : ln_final + unembed"),
}


def prompts() -> list[Prompt]:
    text = "{first_entity} plays with"
    return [
        Prompt(text, {"first_entity": "Ann"}, " Mara Finn", ("!", " Bo"), answers=(" Mara", " Bo")),
        Prompt(text, {"first_entity": "Zoë Reed-Lang"}, " Bo", ("!", " the film", " Mara")),
        Prompt("In a film {first_entity} was", {"first_entity": "Bo"}, " Mara", answers=("!",)),
    ]


@pytest.fixture(scope="module")
def llama(tiny: MakeTiny) -> Tiny:
    return tiny("llama", tokenizer="llama3")


def by_hand(t: Tiny, prompt: Prompt, grafts: Mapping[str, Graft], base: str, full: str) -> Any:
    """Graft -> measure -> value, from the logits of the grafts run one by one."""
    with torch.no_grad():
        logits = {n: t.model(prompt, graft=g)[0, -1].double() for n, g in grafts.items()}
    said = {n: x.log_softmax(-1) for n, x in logits.items()}
    tokens = tokenize(prompt, t.tokenizer)

    def first(text: str) -> int:
        return continuation(tokens, text, t.tokenizer)[0]

    def kl(p: torch.Tensor, q: torch.Tensor) -> float:
        return float((p.exp() * (p - q)).sum())

    answer, right = first(prompt.answer or ""), sorted({first(text) for text in prompt.answers})
    found: dict[str, dict[str, float]] = {}
    for name, p in said.items():
        here = {"entropy": float(-(p.exp() * p).sum())}
        for run, other in (("base", said[base]), ("full", said[full])):
            middle = ((p.exp() + other.exp()) / 2).log()
            here[f"kl_{run}"], here[f"kl_from_{run}"] = kl(p, other), kl(other, p)
            here[f"js_{run}"] = (kl(p, middle) + kl(other, middle)) / 2
        own = logits[name].tolist()
        here["margin"] = own[answer] - max(x for i, x in enumerate(own) if i != answer)
        here["answer_set_prob"] = float(p[right].exp().sum()) if right else np.nan
        found[name] = here
    return found


@pytest.mark.parametrize("budget", [None, 9])
def test_measures_are_those_of_plain_formulas(llama: Tiny, budget: int | None) -> None:
    """Also where grafts are cut into several trees, each with its own rows of the references."""
    table = evaluate(
        llama.model, prompts(), GRAFTS, measures=ASKED, row_budget=budget, progress=False
    )
    plain = evaluate(llama.model, prompts(), GRAFTS, row_budget=budget, progress=False)
    pd.testing.assert_frame_equal(table.drop(columns=[*ASKED]), plain)
    assert list(table.columns)[-len(ASKED) - 1 :] == [*ASKED, "reason"]
    for number, prompt in enumerate(prompts()):
        wanted = by_hand(llama, prompt, GRAFTS, "PRE", "SFT")
        rows = table[table["prompt"] == number].set_index("graft")
        for name, values in wanted.items():
            for measure, value in values.items():
                assert rows.loc[name, measure] == pytest.approx(value, abs=2e-5, nan_ok=True)
        assert rows.loc["PRE", "kl_base"] == rows.loc["SFT", "kl_full"] == 0


def test_recovery_of_every_measure_or_why_there_is_none(llama: Tiny) -> None:
    texts = [prompt for prompt in prompts() if prompt.answers]
    table = evaluate(llama.model, texts, GRAFTS, measures=ASKED, progress=False)
    nobody = table.assign(margin=1.0)
    for name in ASKED:
        summary = summarise(table, by=(), metrics=ASKED, recovery=name, resamples=50).set_index(
            "graft"
        )
        means = table.groupby("graft")[name].mean()
        share = (means - means["PRE"]) / (means["SFT"] - means["PRE"])
        for graft in GRAFTS:
            row = summary.loc[graft]
            assert row[name] == pytest.approx(means[graft])
            if row["recovery_note"] is None:
                assert row["recovery"] == pytest.approx(share[graft])
            else:
                assert np.isnan(row["recovery"]) or graft not in ("PRE", "SFT")
    same = summarise(nobody, by=(), recovery="margin", resamples=50)
    assert same["recovery"].isna().all()
    assert set(same["recovery_note"]) == {"full and base are equal: there is nothing to recover"}


def test_a_reference_that_is_not_in_the_table_has_its_own_rows(llama: Tiny) -> None:
    """Also in several trees; one that a prompt cannot run leaves a measure empty there."""
    some = {name: GRAFTS[name] for name in ("LT", "mlp")}
    named = dict(enumerate(prompts()))
    ends = {"base": Graft(), "full": GRAFTS["SFT"]}
    whole = score(llama.model, named, GRAFTS, measures=ASKED, references=ends)
    for budget in (None, 9):
        found = score(llama.model, named, some, measures=ASKED, references=ends, row_budget=budget)
        rows = whole[whole["graft"].isin(some)].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, rows, rtol=1e-4, atol=2e-5)
    absent = ends | {"full": Graft.parse("sft @ title")}
    found = score(llama.model, named, some, measures=("kl_base", "kl_full"), references=absent)
    assert found["kl_full"].isna().all()
    assert found[["kl_base", "logprob"]].notna().all().all()
    with pytest.raises(ValueError, match="measure 'js_full' compares with the full run"):
        score(llama.model, named, some, measures=["js_full"], references={"base": Graft()})


def shown() -> str:
    """The docs' measure of a user's own."""
    return marked("docs/howto/measures.md", "measure")


def third_by_hand(t: Tiny, prompt: Prompt, graft: Graft) -> float:
    with torch.no_grad():
        logits = t.model(prompt, graft=graft)[0, -1]
    tokens = tokenize(prompt, t.tokenizer)
    answer = continuation(tokens, prompt.answer or "", t.tokenizer)[0]
    return float(logits[answer] - logits.sort(descending=True).values[2])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return checkpoints(tmp_path_factory.mktemp("pair"))


def small(sources: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Three prompts, one of which cannot run a graft, under four grafts."""
    given = config(sources, **changes)
    names = ("PRE", "SFT", "LT", "T")
    grafts = {name: graft for name, graft in given["grafts"].items() if name in names}
    prompts = [given["prompts"][i] | {"answers": [" Mara", "!"]} for i in (0, 2, 5)]
    return given | {"prompts": prompts, "grafts": grafts}


def sweep(given: Mapping[str, Any], out: Path, **options: Any) -> pd.DataFrame:
    result = run_sweep(given, out, progress=False, say=lambda line: None, **options)
    assert result.ok, (out / "trust.txt").read_text()
    return read_whole(out)


def test_a_measure_is_one_row(
    llama: Tiny, sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the docs say: the row goes through evaluate, a sweep, statistics and plots."""
    names: dict[str, Any] = {"model": llama.model, "prompts": prompts(), "grafts": GRAFTS}
    exec(shown(), names)
    table, toy = names["table"], names["third"]
    monkeypatch.setitem(METRICS, "third", toy)
    for row in table.to_dict("records"):
        wanted = third_by_hand(llama, prompts()[row["prompt"]], GRAFTS[row["graft"]])
        assert row["third"] == pytest.approx(wanted, abs=1e-4)
    summary = summarise(table, by=(), metrics=["third"], recovery="third", resamples=50)
    assert summary["third"].tolist() == pytest.approx(
        table.groupby("graft", sort=False)["third"].mean().tolist()
    )
    assert viz.grouped_bars(summary, "third").layout.yaxis.title.text == "third (logits)"
    swept = sweep(small(sources, metrics={"measures": ["third", "kl_full"]}), tmp_path / "out")
    assert swept["third"].notna().tolist() == swept["reason"].isna().tolist()
    assert (swept.loc[swept["graft"] == "SFT", "kl_full"].dropna() == 0).all()


def test_a_sweep_with_measures_is_one_by_one_and_resumes(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """References lie in every shard: grafts are cut into blocks, and a lost shard comes back."""
    given = small(sources, shards=2, metrics={"top_k": 3, "measures": [*ASKED, "own"]})
    own = Measure("own", ["base_logprobs", "logprobs"], lambda _, q, p: (p - q).abs().amax(-1))
    out = tmp_path / "out"
    whole = sweep(given, out, measures=[own])
    manifest = read_manifest(out)
    assert len(manifest.graft_blocks) > 1
    assert manifest.columns[-len(ASKED) - 2 :] == (*ASKED, "own", "reason")
    some = read_results(out, columns=["own", "graft"])
    assert isinstance(some, pd.DataFrame)
    assert (some.loc[some["graft"] == "PRE", "own"].dropna() == 0).all()

    model = GraftedTransformer.from_pretrained(sources, check=False, verbose=False)
    ran = whole[whole["reason"].isna()]
    grafts = {str(g["name"]): Graft.parse(str(g["rule"])) for g in manifest.grafts}
    stored = read_prompts(out)["as_given"].to_pylist()
    texts = [Prompt(**json.loads(text)) for text in stored]
    t = Tiny("llama", {}, model, model.tokenizer)
    for number in (0, 2):
        rows = ran[ran["prompt"] == number].set_index("graft")
        able = {name: grafts[name] for name in rows.index}
        ends = manifest.recovery["base"], manifest.recovery["full"]
        for name, values in by_hand(t, texts[number], able, *ends).items():
            for measure, value in values.items():
                found = rows.loc[name, measure]
                assert found == pytest.approx(value, abs=2e-5, nan_ok=True)

    for shard in (0, 2):
        shard_path(out, shard).unlink()
    (out / "done.json").unlink()
    with pytest.raises(ValueError, match=r"unknown measure 'own'.*--measure MODULE:NAME"):
        run_sweep(given, out, progress=False, say=lambda line: None)
    monkeypatch.setattr("graftlens.sweep.runner.trust_report", lambda *given, **more: NoReport())
    assert_equal_tables(sweep(given, out, measures=[own]), whole)
    monkeypatch.setattr("graftlens.sweep.models.GraftedTransformer", None)  # nothing to run
    other = small(sources, shards=2, metrics={"top_k": 3})
    with pytest.raises(
        ValueError, match=r"metrics\.measures: \['kl_base', .* there, nothing given"
    ):
        run_sweep(other, out, progress=False)


def test_a_measure_of_the_command_line_is_imported_by_each_worker(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config names it and never imports it."""

    def here(functions: Mapping[str, Any], **options: Any) -> list[Any]:
        sys.modules.pop("mine")
        for function in functions.values():
            pickle.loads(pickle.dumps(function))()
        assert "mine" in sys.modules
        return []

    monkeypatch.setattr("graftlens.sweep.launch.run_processes", here)
    monkeypatch.setattr("graftlens.sweep.runner.trust_report", lambda *given, **more: NoReport())
    (tmp_path / "mine.py").write_text(
        "from graftlens.metrics import Measure\n"
        "best = Measure('best', (), lambda logits: logits.amax(-1))\n"
        "other = 3\n"
    )
    (tmp_path / "raises.py").write_text("raise KeyError('a file')")
    (tmp_path / "syntax.py").write_text("best = (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    given = small(sources)
    Path("s.yaml").write_text(yaml.safe_dump(given))
    code = ["--measure", "mine:best", "--out", "out", "--devices", "cpu,cpu"]
    with monkeypatch.context() as unchecked:
        unchecked.setattr(
            jaxtyping.config, "jaxtyping_disable", True
        )  # of what typer itself passes
        found = CliRunner().invoke(app, ["sweep", "s.yaml", *code])
    assert found.exit_code == 0, found.output
    table = read_results("out")
    assert isinstance(table, pd.DataFrame)
    assert table["best"].notna().tolist() == table["reason"].isna().tolist()
    assert read_manifest(Path("out")).asked == ("best",)
    summary = summarise(table, by=(), metrics=["best"], ks=(), recovery="best", resamples=50)
    assert summary["best"].notna().all()
    for wrong, said in (
        ("mine:other", "is a int, not a measure"),
        ("mine:nothing", r"cannot be imported \(AttributeError: "),
        ("raises:best", r"cannot be imported \(KeyError: 'a file'\)"),
        ("syntax:best", r"cannot be imported \(SyntaxError: "),
        ("mine", "write MODULE:NAME"),
    ):
        with pytest.raises(ValueError, match=said):
            load(wrong)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Types are checked in tests only; what a user gives reaches the library."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["kl_ful"], r"unknown measure 'kl_ful'. Allowed: kl_base .*Did you mean 'kl_full'\?"),
        (["margin", "margin"], "measure 'margin' is given twice"),
        (["top5"], "'top5' is not measured in a run: graftlens.summarise computes it"),
        (["recovery"], "'recovery' is not measured in a run"),
        ([Measure("margin", (), lambda x: x)], "tables have another column of this name"),
        ([Measure("layer", (), lambda x: x)], "tables have another column of this name"),
        ([Measure("many", (), lambda x: x, holds="numbers")], "only measures with one number per"),
        ([Measure("own", (), lambda x: x, always=True)], "'own': always=True is for what every"),
        ([Measure("own")], "measure 'own': give it a function"),
        *(
            ([Measure(name, (), lambda x: x)], f"{name!r}: tables have another column")
            for name in ("n", "failed", "recovery_low", "recovery_note", "top5", "neuron")
        ),
        ([3], r"measures=\[3\]: give a list of measures' names or of Measures"),
        (None, "measures=None: give a list"),
    ],
)
def test_measures_that_cannot_be_asked_for(given: Any, said: str, unchecked: None) -> None:
    """Also where a config names what is given beside it."""
    with pytest.raises(ValueError, match=said):
        asked_for(given)
    own = [m for m in given or () if isinstance(m, Measure)]
    if own:
        with pytest.raises(ValueError, match=said):
            asked_for([m.name for m in own], own)


def test_names_of_columns_of_statistics_are_taken(llama: Tiny) -> None:
    table = evaluate(llama.model, prompts()[:1], GRAFTS, progress=False)
    table["level_of"] = 1
    free = {m.name for m in measures()}
    for made in (
        summarise(table, by=(), resamples=50),
        compare_all(table, [("LT", "mlp")], resamples=50, permutations=50),
        stability(table, by="level_of", metric="logprob", resamples=50),
    ):
        for name in {*made.columns} - free - {"level_of=1"}:
            with pytest.raises(ValueError, match="another column of this name"):
                asked_for([Measure(str(name), (), lambda x: x)])


def test_measures_that_cannot_be_made(llama: Tiny, unchecked: None) -> None:
    with pytest.raises(ValueError, match="a measure's name is a column"):
        Measure("my measure")
    with pytest.raises(ValueError, match=r"measure 'm' needs 'answr'. Allowed: answer distractors"):
        Measure("m", ("answr",))
    facts: dict[str, Any]
    for facts, said in (
        ({"needs": None}, "'m': needs=None. Write a list of answer"),
        ({"function": 3}, "'m': function=3 cannot be called"),
        ({"summary": "xyz"}, "'m': summary='xyz'. Allowed: 'mean' 'share' 'recovery' None"),
        ({"better": "up"}, "'m': better='up'. Allowed: 'higher' 'lower' None"),
        ({"holds": "text"}, "'m': holds='text'. Allowed: 'number' 'count'"),
        ({"over": "all"}, "'m': over='all'. Allowed: 'next' 'answer'"),
        ({"bounds": 3}, r"'m': bounds=3. Write \(least, largest\)"),
        ({"bounds": (1.0, 0.0)}, r"'m': bounds=\(1.0, 0.0\)"),
    ):
        with pytest.raises(ValueError, match=said):
            Measure("m", **facts)
    for function, said in (
        (lambda logits: logits[:, 0] * 1j, "gave complex numbers. Its function must give real"),
        (lambda logits: logits, r"gave values of shape \(\d+, \d+\) for logits of \d+ rows"),
        (lambda logits: 3.0, "gave a float. Its function must give a tensor"),
    ):
        with pytest.raises(ValueError, match=said):
            score(llama.model, {0: prompts()[0]}, GRAFTS, measures=[Measure("m", (), function)])


def test_functions_get_copies_and_may_give_short_floats(llama: Tiny) -> None:
    """Regression: an own function's in-place operation changed the measures after it."""

    def spoil(logits: torch.Tensor, *more: Any) -> torch.Tensor:
        more[-1][0][:] = 7
        return sum(x.mul_(0).sum(-1) for x in (logits, *more[:-1])).bfloat16() + 1.5

    bad = Measure("bad", ("logprobs", "base_logprobs", "standing"), spoil)
    asked = [bad, "entropy", "kl_base", "margin"]
    table = evaluate(llama.model, prompts(), GRAFTS, measures=asked, progress=False)
    plain = evaluate(llama.model, prompts(), GRAFTS, measures=asked[1:], progress=False)
    assert (table["bad"] == 1.5).all()
    pd.testing.assert_frame_equal(table.drop(columns="bad"), plain)


def test_a_sweep_refuses_another_function_of_the_same_name(
    sources: dict[str, str], tmp_path: Path
) -> None:
    """Regression: the columns of two functions were mixed. No weights are read here."""

    def scaled(by: float) -> Measure:
        return Measure("own", (), lambda logits: by * logits.amax(-1))

    given = small(sources)
    manifest = prepare_sweep(given, tmp_path / "out", measures=[scaled(2)])
    assert prepare_sweep(given, tmp_path / "out", measures=[scaled(2)]) == manifest
    least = Measure("own", (), lambda logits: logits.amin(-1))
    for other in (scaled(3), least, replace(scaled(2), log=True)):
        for start in (partial(prepare_sweep, given), work):
            with pytest.raises(
                ValueError, match="numbers from a different function of measure 'own'"
            ):
                start(out=tmp_path / "out", measures=[other])
    with pytest.raises(ValueError, match="two measures are called 'own'"):
        prepare_sweep(given, tmp_path / "out", measures=[least, scaled(2)])


def test_measures_of_every_table_are_there_once(sources: dict[str, str], tmp_path: Path) -> None:
    """Regression: "Duplicate column names found", after the models were loaded."""
    given = small(sources, metrics={"measures": ["rank", "logprob", "margin", "top_probs"]})
    manifest = prepare_sweep(given, tmp_path / "out")
    assert manifest.asked == ("margin",)
    assert len({*manifest.columns}) == len(manifest.columns)


def test_trust_covers_measures_of_ones_own(llama: Tiny) -> None:
    """Regression: a random measure passed."""
    rng = torch.Generator().manual_seed(0)
    asked = [
        Measure("apart", ("logprobs", "full_logprobs"), lambda _, p, q: (p - q).abs().amax(-1)),
        Measure("steep", (), lambda x: (20 * (x - x.mean(-1, keepdim=True))).sin().sum(-1)),
        Measure("noise", (), lambda x: torch.rand(len(x), generator=rng)),
        Measure("wrong", (), lambda x: x.amax(-1)),
    ]
    named, ends = dict(enumerate(prompts()[:1])), {"base": GRAFTS["PRE"], "full": GRAFTS["SFT"]}
    some = {"mlp": GRAFTS["mlp"]}
    table = score(llama.model, named, some, measures=asked, references=ends)
    table["wrong"] += 0.1
    report = trust_report(
        llama.model, named, some, table, seed=0, cells=1, references=ends, asked=asked
    )
    (cell,) = report.cells
    assert {"apart", "steep"} <= {*cell.differences}
    assert cell.differences["wrong"] == pytest.approx(0.1, abs=1e-3)
    noise, wrong = sorted(cell.problems)
    assert noise == "noise has several values for the same logits."
    assert wrong.startswith("wrong is ")


def test_a_token_without_probability_counts_nothing() -> None:
    """Regression: NaN, as 0 · log 0 is; and the divergence from oneself was not 0."""
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]), torch.tensor([[0.25, 0.5, 0.25]] * 2)
    p, q = p.log(), q.log()
    half = np.log(2) / 2
    assert kl(p, q).tolist()[0] == pytest.approx(half)
    assert kl(q, p).tolist()[0] == np.inf
    middle = (p.exp() + q.exp()).log() - np.log(2)
    expected = (kl(p, middle) + kl(q, middle))[0] / 2
    assert js(p, q).tolist()[0] == pytest.approx(float(expected)) == float(js(q, p)[0])
    entropy = Predictions(p).of(METRICS["entropy"])
    assert entropy.tolist()[0] == pytest.approx(np.log(2))
    assert js(p, p).tolist() == kl(p, p).tolist() == [0, 0]
    # Also of one that is too small for float32, but not 0 (0 · inf is NaN).
    small, none = torch.tensor([[0.0, -150.0]]), torch.tensor([[0.0, -torch.inf]])
    assert (kl(small, none).tolist(), kl(none, small).tolist()) == ([np.inf], [0])
    p.requires_grad_()
    entropy = Predictions(p).of(METRICS["entropy"])
    for value in (kl(p, q), js(p, q), js(p, p), entropy):
        (gradient,) = torch.autograd.grad(value.sum(), p, retain_graph=True)
        assert gradient.isfinite().all()


def test_measures_that_are_always_there_are_not_asked_for() -> None:
    assert asked_for(["logprob", "rank", "margin"]) == (METRICS["margin"],)


def test_rows_say_what_they_are() -> None:
    for m in measures():
        low, high = m.bounds
        assert low is None or high is None or low < high
        assert m.label
        assert m.function is not None or m.summary == "recovery"
        assert (m.holds in ("numbers", "tokens")) <= (m.summary is None)
    five = known("top5")
    assert five is not None
    assert (five.column, five.at_most, five.share) == ("rank", 5, True)
    assert known("top0") is None
    assert known("accuracy") is None


def test_gradients_reach_the_logits_of_measures_that_say_so() -> None:
    """At random logits: by central differences."""
    rng = torch.Generator().manual_seed(0)
    base, full, logits = torch.randn(3, 4, 9, generator=rng, dtype=torch.float64)
    answer, lists = torch.tensor([0, 3, 5, 8]), torch.tensor([[1, 2], [4, 5], [0, 7], [2, 6]])
    for m in measures():
        if m.function is None or not m.differentiable or m.holds != "number":
            continue

        def value(x: torch.Tensor, m: Measure = m) -> torch.Tensor:
            runs = {"base": Predictions(base), "full": Predictions(full)}
            given = {"answer": answer, "distractors": lists, "answers": lists}
            return Predictions(x, **given, **runs).of(m).sum()

        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(x), x)
        step = torch.zeros_like(logits)
        step[1, 3] = 1e-3
        slope = (value(logits + step) - value(logits - step)) / 2e-3
        assert float(gradient[1, 3]) == pytest.approx(float(slope), abs=2e-3), m.name
