"""The trust report, and the sequential algorithm that it holds a sweep against."""

import copy
import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import families
import pandas as pd
import pytest
import torch
from conftest import MakeTiny, Tiny
from families import VARIANTS
from reference import HEAD_COMPONENTS, MODEL_COMPONENTS, components_of, n_heads_of, sequential_graft
from torch import Tensor

from graftlens.graft import Graft
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.sequential import Sequential, SequentialError
from graftlens.prompts import Prompt, PromptError, Tokenized
from graftlens.sweep.scoring import score
from graftlens.sweep.trust import TrustReport, trust_report

EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
LENGTH = 9


def _tokens(n: int = LENGTH, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def _random_graft(tiny: Tiny, rng: random.Random, n_rules: int) -> tuple[Graft, list[tuple]]:
    """A graft, and the same rules as plain values for the slow reference."""
    base = next(iter(tiny.sources.values()))
    available = components_of(base)
    inside = [c for c in available if c not in MODEL_COMPONENTS]
    n_layers = tiny.model.arch.n_layers
    graft, plain = Graft(), []
    for _ in range(n_rules):
        source = rng.choice(list(tiny.sources))
        at = rng.sample(range(LENGTH), rng.randint(1, 4))
        layers = rng.sample(range(n_layers), 2)
        heads = None
        kind = rng.choice(["head", "several", "everywhere"])
        if kind == "head":
            components = [rng.choice(HEAD_COMPONENTS)]
            n_heads = n_heads_of(base, components[0]) or 0
            heads = rng.sample(range(n_heads), rng.randint(1, n_heads))
        elif kind == "several":
            components = rng.sample(inside, rng.randint(1, len(inside)))
        else:
            components, layers = rng.sample(available, rng.randint(1, len(available))), None
        graft |= Graft.rule(source, at, components, "all" if layers is None else layers, heads)
        plain.append((source, at, components, layers, heads))
    return graft, plain


def _reference(tiny: Tiny, tokens: list[int], rules: Sequence[tuple]) -> Tensor:
    def choose(component: str, layer: int | None, position: int, head: int | None) -> str:
        chosen = next(iter(tiny.sources))
        for source, at, components, layers, heads in rules:
            if (
                component in components
                and position in at
                and (layers is None or layer in layers)
                and (heads is None or head in heads)
            ):
                chosen = source
        return chosen

    return sequential_graft(tiny.sources, tokens, choose)


# --- The sequential algorithm ------------------------------------------------------------------


@EVERY_VARIANT
@pytest.mark.parametrize("names", [("pre", "sft"), ("pre", "task", "relation")], ids=["2", "3"])
def test_random_grafts_are_the_slow_reference(
    tiny: MakeTiny, variant: str, names: tuple[str, ...]
) -> None:
    t = tiny(variant, names, seed=7)
    sequential = Sequential(t.model)
    graft, rules = _random_graft(t, random.Random(f"{variant}{names}"), 8)
    tokens = _tokens()
    prompt = Tokenized.bare(tokens)
    ours = sequential.logits(prompt, graft)
    assert (ours - t.logits("pre", tokens)).abs().max() > 1e-2
    _close(ours, _reference(t, tokens, rules))
    _close(sequential.logits(prompt, graft, by_run=True), ours)
    for by_run in (False, True):
        some = sequential.logits(prompt, graft, at=[2, LENGTH - 1], by_run=by_run)
        _close(some, ours[[2, LENGTH - 1]])


@pytest.mark.slow
@EVERY_VARIANT
def test_many_random_grafts_are_the_slow_reference(tiny: MakeTiny, variant: str) -> None:
    """One model after another graft: nothing of the last one may stay."""
    t = tiny(variant, ("pre", "task", "relation"), seed=11)
    sequential = Sequential(t.model)
    for seed in range(8):
        rng = random.Random(f"{variant}{seed}")
        graft, rules = _random_graft(t, rng, rng.randint(1, 15))
        tokens = _tokens(seed=seed)
        prompt, rest = Tokenized.bare(tokens), rng.randint(0, 3)
        ours = sequential.logits(prompt, graft, by_run=bool(seed % 2))
        _close(ours, _reference(t, tokens, rules))
        if rest:
            # Numbers, unlike `last`, mean the same where tokens follow.
            begun = Tokenized.bare(tokens[: LENGTH - rest])
            within = [r for r in rules if max(r[1]) < LENGTH - rest]
            graft = Graft()
            for source, at, components, layers, heads in within:
                chosen = "all" if layers is None else layers
                graft |= Graft.rule(source, at, components, chosen, heads)
            ours = sequential.logits(begun, graft, tokens[LENGTH - rest :])
            _close(ours, _reference(t, tokens, within))


@EVERY_VARIANT
def test_one_source_throughout_is_hugging_face(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant, seed=8)
    sequential = Sequential(t.model)
    tokens = _tokens(40 if "longrope" in variant else 11)
    prompt = Tokenized.bare(tokens)
    for source in ("sft", "pre"):
        theirs = t.logits(source, tokens)
        _close(sequential.logits(prompt, Graft.rule(source)), theirs)
        _close(sequential.whole(prompt, source), theirs)
        _close(sequential.whole(Tokenized.bare(tokens[:7]), source, tokens[7:]), theirs)
    _close(sequential.logits(prompt, Graft()), t.logits("pre", tokens))


def test_what_follows_a_prompt_counts_as_last(tiny: MakeTiny) -> None:
    t = tiny("gemma2", seed=8)
    tokens = _tokens()
    theirs = _reference(
        t, tokens, [("sft", (5, 6, 7, 8), components_of(t.sources["pre"]), None, None)]
    )
    graft = Graft.parse("sft @ last")
    for by_run in (False, True):
        begun = Tokenized.bare(tokens[:6])
        _close(Sequential(t.model).logits(begun, graft, tokens[6:], by_run=by_run), theirs)


def test_parameters_are_the_models_own_and_stay_as_they_were(tiny: MakeTiny) -> None:
    """Only fused projections, and those whose heads differ, have tensors of their own."""
    fused = {"gpt2": ("c_attn",), "phi3": ("qkv_proj", "gate_up_proj")}
    for variant in ("llama-biased", "gpt2", "gemma3", "phi3"):
        t = tiny(variant, seed=9)
        before = {name: value.clone() for name, value in t.model.state_dict().items()}
        stored = {p.data_ptr() for p in t.model.parameters()}
        sequential = Sequential(t.model)
        for text, mixed in (("sft @ last : attn", ()), ("sft @ last : o : 1 : 1", ("1.",))):
            sequential.logits(Tokenized.bare(_tokens()), Graft.parse(text))
            for name, p in sequential._hf.named_parameters(remove_duplicate=False):
                if p.data_ptr() not in stored:
                    ours = any(part in name for part in fused.get(variant, ()))
                    mixed_o = name.endswith(("1.self_attn.o_proj.weight", "1.attn.c_proj.weight"))
                    assert ours or (mixed and mixed_o), name
        assert t.model.state_dict().keys() == before.keys()
        for name, value in t.model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(p.requires_grad for p in t.model.parameters())


def test_assembled_projections_are_forgotten(tiny: MakeTiny) -> None:
    t = tiny("gpt2", seed=9)
    sequential = Sequential(t.model)
    prompt = Tokenized.bare(_tokens())
    texts = [f"sft @ last : {c} : {l} : {h}" for c in "qkvo" for l in range(3) for h in range(4)]
    for text in texts:
        ours = sequential.logits(prompt, Graft.parse(text))
        assert sequential._assembled < 2 * sequential._limit
    _close(ours, t.model(torch.tensor([prompt.ids]), graft=texts[-1])[0].detach())


def test_frequencies_stay_float32_in_half_precision(tiny: MakeTiny) -> None:
    t = tiny("llama3-rope-tied")
    model = GraftedTransformer.from_pretrained(
        t.sources, dtype="bfloat16", check=False, verbose=False
    )
    sequential = Sequential(model)
    rotary = t.sources["pre"].base_model.rotary_emb
    ours = sequential._hf.base_model.rotary_emb.inv_freq
    assert ours.dtype == torch.float32
    assert torch.equal(ours, rotary.inv_freq)
    tokens = _tokens()
    logits = sequential.logits(Tokenized.bare(tokens), Graft.rule("sft"))
    assert logits.dtype == torch.bfloat16
    theirs = t.logits("sft", tokens)
    assert float((logits.float() - theirs).abs().max() / theirs.abs().max()) < 0.05


def test_tables_that_grow_with_the_prompt(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic scaling remembers the longest prompt; here each prompt has its own tables."""
    rope = families._rope(rope_type="dynamic", factor=4.0)
    monkeypatch.setitem(
        VARIANTS,
        "dynamic rope",
        lambda: families._llama(max_position_embeddings=16, rope_parameters=rope),
    )
    t = tiny("dynamic rope")
    sequential = Sequential(t.model)
    for length in (24, 9, 20):
        tokens = _tokens(length)
        fresh = copy.deepcopy(t.sources["sft"])
        with torch.no_grad():
            theirs = fresh(torch.tensor([tokens]), use_cache=False).logits[0]
        prompt = Tokenized.bare(tokens)
        _close(sequential.whole(prompt, "sft"), theirs)
        _close(sequential.logits(prompt, Graft.rule("sft")), theirs)
        _close(sequential.logits(prompt, Graft.rule("sft"), by_run=True), theirs)


def test_a_bias_that_the_base_lacks() -> None:
    pre = families.tiny_model("llama", seed=1)
    sft = families.tiny_model("llama-biased", seed=2)
    model = GraftedTransformer.from_pretrained({"pre": pre, "sft": sft}, check=False, verbose=False)
    tokens = _tokens()
    for source, own in (("sft", sft), ("pre", pre)):
        with torch.no_grad():
            theirs = own(torch.tensor([tokens]), use_cache=False).logits[0]
        _close(Sequential(model).logits(Tokenized.bare(tokens), Graft.rule(source)), theirs)


def test_words_that_the_model_lacks(tiny: MakeTiny) -> None:
    sequential = Sequential(tiny("llama").model)
    prompt = Tokenized.bare(_tokens())
    for text, message in (
        ("other @ all", "rule 'other @ all': no source other. This model has: pre sft."),
        ("sft @ all : q : 9", "no layer 9. This model has: 0 1 2."),
        ("sft @ all : k : 0 : 2", "no k head 2. This model has: 0 1."),
        ("sft @ all : pos_embed", "llama has no component 'pos_embed'."),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sequential.logits(prompt, Graft.parse(text))
    with pytest.raises(PromptError, match="position 20 is outside the prompt"):
        sequential.logits(prompt, Graft.parse("sft @ [20]"))


def test_models_that_hugging_face_cannot_run(tiny: MakeTiny) -> None:
    model = tiny("llama").model
    config, model.hf_config = model.hf_config, None
    with pytest.raises(SequentialError, match="this model has no Hugging Face config"):
        Sequential(model)
    model.hf_config = copy.deepcopy(config)
    model.hf_config.hidden_act = "wavy"
    with pytest.raises(SequentialError, match="cannot build a model from this llama config"):
        Sequential(model)
    model.hf_config = VARIANTS["gpt2"]()
    with pytest.raises(SequentialError, match="GPT2LMHeadModel lacks modules that llama"):
        Sequential(model)
    model.hf_config = VARIANTS["qwen3"]()
    with pytest.raises(SequentialError, match="has parameters that the grafted model lacks: "):
        Sequential(model)


# --- The report --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A small sweep whose table is right."""

    model: GraftedTransformer
    prompts: dict[int, Prompt]
    grafts: dict[str, Graft]
    results: pd.DataFrame

    def report(self, results: pd.DataFrame | None = None, **settings: Any) -> TrustReport:
        given = self.results if results is None else results
        settings = {"seed": 0, **settings}
        return trust_report(self.model, self.prompts, self.grafts, given, **settings)

    def only(self, prompts: Sequence[int], grafts: Sequence[str]) -> "Sweep":
        """The sweep of some prompts and grafts."""
        table = self.results
        kept = table["prompt"].isin(prompts) & table["graft"].isin(grafts)
        return Sweep(
            self.model,
            {number: self.prompts[number] for number in prompts},
            {name: self.grafts[name] for name in grafts},
            table[kept].reset_index(drop=True),
        )

    def changed(self, prompt: int, graft: str, **values: Any) -> pd.DataFrame:
        """The table with some numbers of one cell changed."""
        table = self.results.copy()
        row = table.index[(table["prompt"] == prompt) & (table["graft"] == graft)][0]
        for column, value in values.items():
            table.at[row, column] = value(table.at[row, column]) if callable(value) else value
        return table


GRAFTS = {
    "pre": "none",
    "sft": "sft @ all",
    "lt": "sft @ last",
    "o": "sft @ actor + last : o",
    "head": "sft @ film : q + k : 1 : 0",
    "far": "sft @ [9] : mlp",
}


def _sweep(tiny: MakeTiny, variant: str = "llama", dtype: str | None = None) -> Sweep:
    t = tiny(variant, tokenizer="gpt2")
    model = t.model
    if dtype is not None:
        model = GraftedTransformer.from_pretrained(
            t.sources, tokenizer=t.tokenizer, dtype=dtype, check=False, verbose=False
        )
    wrong = (" Robert", " Anders Lindqvist")
    prompts = {
        number: Prompt(
            "{actor} starred in {film} with", {"actor": actor, "film": film}, answer, wrong
        )
        for number, actor, film, answer in (
            (3, "Renée", "The Quiet Harbour", " Anders"),
            (4, "Anders Lindqvist", "Winter's End", " Renée Zellner-Ortiz"),
            (7, "Chloë Brontë-Smith Sr.", "The Glass River", " José Núñez"),
        )
    }
    grafts = {name: Graft.parse(text) for name, text in GRAFTS.items()}
    results = score(model, prompts, grafts, distractors="whole")
    return Sweep(model, prompts, grafts, results)


@pytest.fixture(scope="module")
def sweep(tiny: MakeTiny) -> Sweep:
    return _sweep(tiny)


def test_a_right_table_is_ok(sweep: Sweep) -> None:
    state = torch.get_rng_state()
    report = sweep.report(cells=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.ok, report.text()
    assert report.problems == ()
    ran = int(sweep.results["reason"].isna().sum())
    assert len(report.cells) == ran < 18
    assert {c.graft for c in report.sources} == {"pre", "sft"}
    assert all(c.recorded for c in (*report.sources, *report.cells))
    rounding = report.rounding
    assert rounding is not None
    assert 0 < rounding.nats < 1e-4
    assert 0 < rounding.hf_nats < 1e-4
    for check in report.cells:
        names = ["logits", "logprob", "answer_logprob", "logit_diff"]
        assert list(check.differences)[:4] == names
        assert {f"distractor_logprobs[{i}]" for i in range(2)} <= check.differences.keys()
        assert max(check.differences.values()) < 1e-4
        assert check.ranks is not None
        assert check.ranks[0] == check.ranks[1]
    (refused, *_) = report.refused
    assert sum(r.count for r in report.refused) == 18 - ran
    assert refused.graft == "far"
    assert "position 9 is outside the prompt" in refused.reason


@pytest.mark.slow
@EVERY_VARIANT
def test_every_variant_is_ok(tiny: MakeTiny, variant: str) -> None:
    report = _sweep(tiny, variant).report(cells=100)
    assert report.ok, report.text()


def test_first_tokens_near_a_change_of_tables(tiny: MakeTiny) -> None:
    """Regression: a sweep of first tokens runs the prompt alone, but was checked with tables of
    prompt and answer together, which are others where the answer passes longrope's limit.
    """
    t = tiny("phi3-longrope", tokenizer="llama3")
    text = "Ann plays"
    while len(t.model.tokenized(Prompt(text))[0]) < 32:
        text += "!"
    assert len(t.model.tokenized(Prompt(text))[0]) == 32
    prompts = {0: Prompt(text, answer=" Mara Finn", distractors=(" Q",))}
    grafts = {"PRE": Graft(), "SFT": Graft.rule("sft"), "LT": Graft.rule("sft", "last")}
    table = score(t.model, prompts, grafts, answers="first")
    assert trust_report(t.model, prompts, grafts, table, seed=0, answers="first").ok
    whole = trust_report(t.model, prompts, grafts, table, seed=0)
    assert not whole.ok, "the tables do differ"


def _prob(shift: float) -> dict[str, Any]:
    """A log-probability shifted, and all that must then agree with it."""
    return {"logprob": lambda x: x + shift, "prob": lambda x: x * math.exp(shift)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_prob(0.01), r"logprob is -\d+\.\d+, Hugging Face gives -"),
        (_prob(math.nan), "logprob|neither numbers nor a reason"),
        ({"answer_logprob": lambda x: x - 0.01}, "answer_logprob is "),
        ({"logit_diff": lambda x: x + 0.01}, "logit_diff is "),
        ({"rank": lambda x: x + 3}, r"rank is \d+, Hugging Face gives \d+"),
        ({"top_tokens": lambda x: [*x[:2], "wrong", *x[3:]]}, "top token 3 is 'wrong' with "),
        ({"top_probs": lambda x: [x[0] * 1.1, *x[1:]]}, "top token 1 is "),
        ({"distractor_logprobs": lambda x: [x[0], x[1] - 1]}, r"distractor_logprobs\[1\] is "),
        ({"prob": 0.5}, "1 row\\(s\\) have a prob that is not exp"),
        ({"rule": "sft @ bos"}, "1 row\\(s\\) have another graft's rule"),
        ({"text": "Another"}, "1 row\\(s\\) have another prompt's text"),
    ],
)
def test_a_changed_number_is_found(sweep: Sweep, values: dict[str, Any], message: str) -> None:
    sweep = sweep.only([4], ["o"])
    report = sweep.report(sweep.changed(4, "o", **values))
    assert not report.ok
    for problem in report.problems:
        assert re.search(message, problem), problem
        assert "prompt 4 under 'o'" in problem
        assert f"  !! {problem}" in report.text().splitlines()
    assert report.text().startswith("trust report: NOT OK, ")


def test_a_changed_source_is_found_however_few_cells_are_drawn(sweep: Sweep) -> None:
    report = sweep.report(sweep.changed(4, "sft", **_prob(0.01)), cells=3)
    assert "sft" not in {c.graft for c in report.cells}
    assert [p.split(":")[0] for p in report.problems] == ["prompt 4 under 'sft'"]


def test_rows_that_changed_places_are_found(sweep: Sweep) -> None:
    sweep = sweep.only([3], ["lt", "o", "head"])
    table = sweep.results.copy()
    a = table.index[(table["prompt"] == 3) & (table["graft"] == "o")][0]
    b = table.index[(table["prompt"] == 3) & (table["graft"] == "lt")][0]
    measures = [c for c in table.columns if c not in ("prompt", "graft", "rule")]
    for column in measures:
        table.at[a, column], table.at[b, column] = table.at[b, column], table.at[a, column]
    report = sweep.report(table)
    named = {p.split(":")[0] for p in report.problems}
    assert named == {"prompt 3 under 'o'", "prompt 3 under 'lt'"}


def test_rows_that_are_missing_doubled_or_foreign(sweep: Sweep) -> None:
    sweep = sweep.only([3, 4], ["pre", "lt"])
    table = sweep.results
    row = (table["prompt"] == 4) & (table["graft"] == "lt")
    assert sweep.report(table[~row]).problems == (
        "1 cell(s) are missing, such as prompt 4 under 'lt'.",
    )
    assert sweep.report(pd.concat([table, table[row]])).problems == (
        "1 cell(s) are present more than once, such as prompt 4 under 'lt'.",
    )
    foreign = table[row].assign(graft="other")
    assert sweep.report(pd.concat([table, foreign])).problems[0] == (
        "1 row(s) belong to no prompt and graft that were requested, such as prompt 4 under "
        "'other'."
    )
    empty = table.iloc[:0]
    report = sweep.report(empty)
    assert report.problems == ("4 cell(s) are missing, such as prompt 3 under 'pre'.",)
    assert "NOT CHECKED against Hugging Face: no cell has numbers." in report.text()


def test_another_models_table_is_found(tiny: MakeTiny, sweep: Sweep) -> None:
    other = tiny("llama", seed=2, tokenizer="gpt2").model
    report = trust_report(other, sweep.prompts, sweep.grafts, sweep.results, seed=0)
    assert not report.ok
    assert {c.graft for c in report.sources if c.problems} == {"pre", "sft"}
    assert all(c.problems for c in report.cells)


def test_cells_are_drawn_over_grafts_and_lengths_of_answers(sweep: Sweep) -> None:
    report = sweep.report(cells=4)
    assert {c.graft for c in report.cells} == {"lt", "o", "head", "far"}
    several = [c for c in report.cells if c.prompt != 3]
    assert 2 <= len(several) <= 3
    assert sweep.report(cells=4) == report
    drawn = (
        {tuple((c.prompt, c.graft) for c in sweep.report(cells=4, seed=s).cells) for s in "012"}
        if False
        else {
            tuple((c.prompt, c.graft) for c in sweep.report(cells=4, seed=s).cells)
            for s in range(2)
        }
    )
    assert len(drawn) > 1


def test_sources_that_no_graft_runs_are_scored_for_the_report(sweep: Sweep) -> None:
    grafts = {name: sweep.grafts[name] for name in ("lt", "o")}
    table = sweep.results[sweep.results["graft"].isin(grafts)]
    report = trust_report(sweep.model, sweep.prompts, grafts, table, seed=0)
    assert report.ok, report.text()
    assert {c.graft for c in report.sources} == {"pre @ all", "sft @ all"}
    assert not any(c.recorded for c in report.sources)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_is_judged_by_its_noise(tiny: MakeTiny, dtype: str) -> None:
    sweep = _sweep(tiny, "llama", dtype).only([4, 7], ["lt", "o"])
    report = sweep.report()
    assert report.ok, report.text()
    assert report.dtype == dtype
    assert report.rounding is not None
    assert 1e-3 < report.rounding.bound_nats < 0.5
    assert not sweep.report(sweep.changed(7, "lt", **_prob(-1.0))).ok


def test_a_model_that_hugging_face_cannot_run_is_said_so(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep.model, "hf_config", None)
    report = sweep.report()
    assert report.ok
    assert report.cells == report.sources == ()
    assert report.rounding is not None
    assert 0 < report.rounding.nats < 1e-4
    assert "NOT CHECKED against Hugging Face: this model has no Hugging Face" in report.text()
    assert not sweep.report(sweep.results.iloc[1:]).ok


def test_only_the_columns_that_are_there_are_checked(sweep: Sweep) -> None:
    light = sweep.results[["prompt", "graft", "logprob", "rank", "reason"]]
    report = sweep.report(light.astype({"graft": "category", "prompt": "int32"}), cells=2)
    assert report.ok, report.text()
    assert list(report.cells[0].differences) == ["logits", "logprob"]


def test_a_failure_while_checking_is_reported(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **settings: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(GraftedTransformer, "logits_at", fails)
    report = sweep.report()
    assert not report.ok
    assert "could not be recomputed: OutOfMemoryError('no memory is left')" in report.text()


def test_the_report_as_text_and_as_json(sweep: Sweep) -> None:
    report = sweep.report(cells=2)
    lines = report.text().splitlines()
    assert lines[0] == "trust report: ok (18 rows, float32 on cpu)"
    assert lines[1].startswith(
        "  rounding: up to 1.0e-03 nats per token and 1.0e-04 of the largest logit are allowed; "
    )
    assert lines[2] == "  one source throughout = Hugging Face's own forward pass, at worst:"
    assert re.fullmatch(r"    pre: logits \d\.\de-\d\d, logprob .*", lines[3])
    assert lines[5].startswith("  random cells = the sequential algorithm: logits ")
    assert re.fullmatch(r"    prompt \d under '\w+': logits .*, rank (\d+) and \1", lines[6])
    assert lines[8] == "  could not be run: 2 cells"
    assert lines[9].startswith("    1 x rule 'sft @ [9] : mlp': position 9 is outside the prompt")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is True
    assert plain["seed"] == 0
    assert len(plain["cells"]) == 2
