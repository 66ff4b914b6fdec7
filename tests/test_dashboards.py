"""What a dashboard is made of, against Hugging Face's own numbers and against the mask, by hand."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command import graftlens
from reference import sequential_graft
from tinybase import LAYERS, tiny_base
from transformers import AutoModelForCausalLM

from graftlens import Graft, GraftedTransformer, Prompt, dashboard, evaluate, lens, outcomes
from graftlens.dashboards import write_dashboard
from graftlens.lens.runs import kept_runs
from graftlens.model.locations import location_of
from graftlens.model.smollm2 import located
from graftlens.model.start import load_tokenizer
from graftlens.presets import PRESETS
from graftlens.prompts import Tokenized

PROMPT = Prompt(
    "News: {first_entity} to appear in a new movie with",
    {"first_entity": "Ann Okafor"},
    answer=" Bea",
)
GRAFTS = {
    "FE": "sft @ first_entity",
    "mixed": "sft @ last : o + mlp : upper_half | sft @ first_entity : q + o : 2,5 : 0,3"
    " | sft @ bos : embed",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pair")
    return {name: str(tiny_base(root / name, seed=i)) for i, name in enumerate(("pre", "sft"))}


@pytest.fixture(scope="module")
def model(pair: dict[str, str]) -> GraftedTransformer:
    return GraftedTransformer.from_pretrained(pair, device="cpu", verbose=False)


def test_the_runs_are_those_of_hugging_face(
    pair: dict[str, str], model: GraftedTransformer
) -> None:
    data = dashboard(model, PROMPT, GRAFTS).data
    assert list(data.runs) == ["PRE", "SFT", "FE", "mixed"]
    ids = model.to_tokens(PROMPT)
    for name, source in (("PRE", "pre"), ("SFT", "sft")):
        own = AutoModelForCausalLM.from_pretrained(pair[source], attn_implementation="eager")
        with torch.no_grad():
            out = own(ids, output_attentions=True)
        run = data.runs[name]
        patterns = torch.stack(out.attentions)[:, 0].numpy()
        np.testing.assert_allclose(run.pattern, patterns, atol=1e-5)
        logprobs = out.logits[0].log_softmax(-1)
        expected = [float(logprobs[i, token]) for i, token in enumerate(ids[0, 1:])]
        np.testing.assert_allclose(run.token_logprobs[1:], expected, atol=1e-4)
        assert np.isnan(run.token_logprobs[0])
    assert "".join(data.tokens).endswith(PROMPT.text)


def test_shares_count_layers_and_heads(model: GraftedTransformer) -> None:
    run = dashboard(model, PROMPT, GRAFTS).data.runs["mixed"]
    mask = model.resolve(GRAFTS["mixed"], PROMPT)
    for row, component in enumerate(model.arch.components):
        outside = component in ("embed", "ln_final", "unembed")
        layers = [None] if outside else list(range(LAYERS))
        heads = range(model.arch.n_units_of(component)) if component in ("q", "o") else [None]
        by_hand = np.mean(
            [mask.source_index(component, l, h)[0] == 1 for l in layers for h in heads], axis=0
        )
        np.testing.assert_allclose(run.shares["sft"][row], by_hand)
        np.testing.assert_allclose(run.shares["pre"][row], 1 - by_hand)


def test_where_says_it_in_words(model: GraftedTransformer) -> None:
    runs = dashboard(model, PROMPT, GRAFTS).data.runs
    spans = model.tokenized(PROMPT)[0].spans
    (entity,) = spans["first_entity"]
    fe, mixed = runs["FE"].where, runs["mixed"].where
    assert {fe[i] for i in entity} == {"sft: all weights"}
    assert {said for i, said in enumerate(fe) if i not in entity} == {""}
    assert mixed[0] == "sft: embed"
    assert {mixed[i] for i in entity} == {"sft: q o (heads 0, 3) in layers 2, 5"}
    assert mixed[-1] == "sft: o mlp_in mlp_gate mlp_out in layers 4–7"
    assert set(runs["PRE"].where) == {""}


def test_attribution_is_what_the_heads_moved(model: GraftedTransformer) -> None:
    data = dashboard(model, PROMPT, GRAFTS).data
    table = lens.direct_logit_attribution(model, PROMPT, GRAFTS, by="head")
    heads = table[table["term"] == "head"].groupby("graft")["contribution"].sum()
    for name, run in data.runs.items():
        assert run.direct_logit_attribution is not None
        assert run.direct_logit_attribution.shape == (len(data.tokens),)
        assert run.direct_logit_attribution.sum() == pytest.approx(heads[name], abs=1e-4)


def test_each_graft_runs_once_for_all_that_the_page_shows(
    model: GraftedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlens.dashboards.ROWS", 5 * 4 * 8)  # layers are left out
    ran: list[int] = []
    counter = model.hook_embed.register_forward_hook(lambda *_: ran.append(1))
    try:
        data = dashboard(model, PROMPT, GRAFTS).data
    finally:
        counter.remove()
    assert len(ran) == len(data.runs) == 4
    assert data.rise is not None
    alone = lens.logit_lens(model, PROMPT, GRAFTS)
    last = len(data.tokens) - 1
    pairs = (
        (data.lens, alone[alone["layer"].isin(data.lens["layer"].unique())]),
        (data.rise, alone[alone["position"] == last]),
        (data.kl_divergence, lens.kl_divergence(model, PROMPT, GRAFTS)),
    )
    for shown, own in pairs:
        order = [name for name in ("graft", "layer", "position") if name in own]
        one, other = (t.sort_values(order, ignore_index=True) for t in (shown, own))
        names = [n for n in ("logprob", "kl_base", "kl_full", "entropy") if n in own]
        np.testing.assert_allclose(one[names], other[names].astype(float), atol=1e-4)
        assert one[order].equals(other[order])


def test_kept_runs_are_read_for_their_own_prompt_and_graft_alone(model: GraftedTransformer) -> None:
    own, other = model.batch("A plain text"), model.batch("A plain fact")
    assert own.tokens.shape == other.tokens.shape
    _, foreign = model.run_with_cache(other)
    expected = {
        name: lens.logit_lens(model, batch) for name, batch in (("own", own), ("other", other))
    }
    with kept_runs(model, own, {Graft(): foreign}):  # not its own, to see that it is read
        read = lens.logit_lens(model, own)
        beside = lens.logit_lens(model, other)
    pd.testing.assert_frame_equal(beside, expected["other"])
    base = read["graft"] == "PRE"
    np.testing.assert_allclose(read[base]["entropy"], beside[base]["entropy"], atol=1e-5)
    assert not np.allclose(read[base]["entropy"], expected["own"][base]["entropy"], atol=1e-4)
    np.testing.assert_array_equal(read[~base]["entropy"], expected["own"][~base]["entropy"])
    pd.testing.assert_frame_equal(lens.logit_lens(model, own), expected["own"])


def test_grafts_that_are_pre_or_sft_are_not_shown_twice(model: GraftedTransformer) -> None:
    given = {"nothing": "none", "FE": "sft @ first_entity", "everything": "sft @ all"}
    assert list(dashboard(model, PROMPT, given).data.runs) == ["PRE", "SFT", "FE"]
    with pytest.raises(ValueError, match=r"called SFT, which is the name of 'sft @ all' here"):
        dashboard(model, PROMPT, {"SFT": "sft @ last"})


def test_a_text_without_an_answer(model: GraftedTransformer) -> None:
    data = dashboard(model, "A plain text", Graft.rule("sft", at="last")).data
    assert data.answer is None
    assert list(data.runs) == ["PRE", "SFT", "sft @ last"]
    bare = dashboard(model, Tokenized.bare(model.to_tokens("A plain text")[0].tolist())).data
    assert bare.text == data.text == "A plain text"


def test_a_model_without_a_tokenizer(pair: dict[str, str]) -> None:
    model = GraftedTransformer.from_pretrained(pair, device="cpu", verbose=False)
    model.tokenizer = None
    data = dashboard(model, Tokenized.bare([5, 6, 7]), "sft @ [1]").data
    assert data.tokens == ["5", "6", "7"]
    assert data.text == "token ids 5 6 7"


def test_token_tensors_and_batches(model: GraftedTransformer) -> None:
    tokens = model.to_tokens("A plain text")
    by_text = dashboard(model, "A plain text").data
    for given in (tokens, tokens[0], model.batch("A plain text"), ["A plain text"]):
        data = dashboard(model, given).data
        assert data.tokens == by_text.tokens
        np.testing.assert_array_equal(data.runs["SFT"].pattern, by_text.runs["SFT"].pattern)
    with pytest.raises(ValueError, match="2 prompts: a dashboard shows one"):
        dashboard(model, ["A", "B"])


def test_without_an_answer_the_full_sources_likeliest_token_is_followed(
    pair: dict[str, str], model: GraftedTransformer
) -> None:
    ids = model.to_tokens("A plain text")
    own = AutoModelForCausalLM.from_pretrained(pair["sft"])
    with torch.no_grad():
        logprobs = own(ids).logits[0, -1].log_softmax(-1)
    likeliest = int(logprobs.argmax())
    for given in ("A plain text", Tokenized.bare(ids[0].tolist())):
        view = dashboard(model, given, "sft @ last")
        data = view.data
        final = data.lens[(data.lens["layer"] == LAYERS) & (data.lens["graft"] == "SFT")]
        assert set(data.lens["target_id"]) == {likeliest}
        assert final["rank"].iloc[-1] == 1
        assert final["logprob"].iloc[-1] == pytest.approx(float(logprobs.max()), abs=1e-4)
        table = lens.direct_logit_attribution(
            model, "A plain text", "sft @ last", by="head", targets=[likeliest]
        )
        heads = table[table["term"] == "head"].groupby("graft")["contribution"].sum()
        for name, run in data.runs.items():
            assert run.direct_logit_attribution is not None
            assert run.direct_logit_attribution.sum() == pytest.approx(heads[name], abs=1e-4)
        assert "the likeliest next token under SFT, is followed" in view.html
    with pytest.raises(
        ValueError, match=r"targets=\[1, 2\]: give the id of one token for each of 1"
    ):
        lens.logit_lens(model, "A plain text", targets=[1, 2])


def test_sources_are_named_beside_their_fingerprints(
    pair: dict[str, str], model: GraftedTransformer
) -> None:
    view = dashboard(model, PROMPT)
    prints = model.fingerprints()
    assert view.data.provenance["sources"] == {
        name: {"from": Path(pair[name]).name, "SHA-256": prints[name]} for name in ("pre", "sft")
    }
    assert str(Path(pair["pre"]).parent) not in view.html


def test_the_lens_of_a_long_prompt_leaves_layers_out_and_says_so(
    model: GraftedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dashboard(model, PROMPT, GRAFTS)
    places = len(whole.data.tokens) * len(whole.data.runs)
    assert whole.data.rise is None
    assert "Left out" not in whole.html
    monkeypatch.setattr("graftlens.dashboards.ROWS", 5 * places)
    view = dashboard(model, PROMPT, GRAFTS)
    assert sorted(set(view.data.lens["layer"])) == [0, 2, 4, 6, LAYERS]
    pd.testing.assert_frame_equal(
        view.data.lens.reset_index(drop=True),
        whole.data.lens[whole.data.lens["layer"].isin([0, 2, 4, 6, LAYERS])].reset_index(drop=True),
    )
    assert view.data.rise is not None
    last = len(view.data.tokens) - 1
    pd.testing.assert_frame_equal(
        view.data.rise.reset_index(drop=True),
        whole.data.lens[whole.data.lens["position"] == last].reset_index(drop=True),
        atol=1e-4,
    )
    assert f"Left out to save time and room: {LAYERS + 1 - 5} of {LAYERS + 1} layers." in view.html
    complete = dashboard(model, PROMPT, GRAFTS, complete=True)
    assert complete.html == whole.html
    with pytest.raises(ValueError, match=rf"layers=\[99\]: name one or more .* from 0 to {LAYERS}"):
        lens.logit_lens(model, PROMPT, layers=[99])


def test_further_sources_do_not_take_sfts_name(pair: dict[str, str]) -> None:
    sources = {**pair, "task": pair["sft"]}
    model = GraftedTransformer.from_pretrained(sources, device="cpu", verbose=False)
    assert dashboard(model, PROMPT, "task @ last").data.runs["SFT"].rule == "sft @ all"
    assert dashboard(model, PROMPT, full="task").data.runs["SFT"].rule == "task @ all"


def test_the_command_writes_the_page(pair: dict[str, str], tmp_path: Path) -> None:
    words = ["dashboard", "--pair", *pair.values()]
    words += ["--prompt", PROMPT.template, "--field", "first_entity=Ann Okafor"]
    words += ["--answer", " Bea", "--graft", "FE=sft @ first_entity", "--graft", "sft @ last : o"]
    words += ["--title", "A title of its own", "--out", "page.html"]
    done = graftlens(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert done.stdout.splitlines()[-1] == str(tmp_path / "page.html")
    assert "<title>A title of its own</title>" in page
    assert "sft @ last : o" in page
    assert f"<dt>from</dt><dd><code>{Path(pair['sft']).name}</code></dd>" in page
    assert "default-src &#x27;none&#x27;" in page, "it may load nothing"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--graft", "FE=sft @ title"], "no span 'title'"),
        (["--field", "nonsense"], "--field 'nonsense': write NAME=VALUE"),
        (["--field", "title=It"], "--field title: the prompt has no {title}"),
        (["--field", "first_entty=It"], "Did you mean 'first_entity'?"),
        (["--graft", "a=sft @ last", "--graft", "a=none"], "--graft 'a' is given twice"),
        (["--source", "sft=there"], "--source sft is one of the pair"),
        (["--image", "page.jpg"], "the picture is a PNG"),
        (["--out", "."], ". is a folder"),
    ],
)
def test_the_command_says_what_is_wrong(
    pair: dict[str, str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    words = ["dashboard", "--pair", *pair.values()]
    words += ["--prompt", "{first_entity} sings", "--field", "first_entity=Ann", *arguments]
    done = graftlens(*words, cwd=tmp_path)
    assert done.returncode != 0
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("grafts", "full", "said"),
    [
        ({"LT": "stf @ last"}, None, "no source 'stf'. This model has: pre sft. Did you mean"),
        ({"LT": "sft @ last : mlp : 9"}, None, "no layer 9"),
        ({"FE": "sft @ title"}, None, "no span 'title' here"),
        ({"PRE": "sft @ last"}, None, "'sft @ last' is called PRE"),
        ({}, "stf", "full='stf' is not a run of a finetuned source"),
    ],
)
def test_what_cannot_run_is_refused_before_weights_are_read(
    pair: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    grafts: dict[str, str],
    full: str | None,
    said: str,
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(GraftedTransformer, "from_pretrained", load)
    asked = Prompt("{first_entity} sings", {"first_entity": "Ann"})
    with pytest.raises(ValueError, match=re.escape(said)):
        write_dashboard(pair, asked, grafts, tmp_path / "page.html", full=full)
    # What is right goes on to the weights.
    with pytest.raises(AssertionError, match="weights were read"):
        write_dashboard(pair, asked, {"LT": "sft @ last"}, tmp_path / "page.html", full="LT")


def test_a_near_miss_of_smollm2_is_not_asked_of_the_hub() -> None:
    with pytest.raises(ValueError, match=r"'smolm2' is not a folder, .* Did you mean 'smollm2'\?"):
        located("smolm2")
    assert located("gpt2") == "gpt2"
    assert located("me/smollm2") == "me/smollm2"


def test_one_name_for_one_model_wherever_a_model_is_named(
    pair: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources in Python, configs, finetuning, writers: all find it by `location_of`."""
    monkeypatch.setattr("graftlens.model.smollm2.smollm2", lambda: Path(pair["pre"]))
    for name in ("smollm2-135m", "smollm2"):
        assert located(name) == location_of("it", name) == pair["pre"]
        model = GraftedTransformer.from_pretrained({"pre": name, "sft": pair["sft"]}, verbose=False)
        assert load_tokenizer(name).get_vocab() == model.tokenizer.get_vocab()
    assert PRESETS["smollm2-135m"].model == "smollm2-135m"
    assert located("llama-3.2-1b") == "meta-llama/Llama-3.2-1B"


def test_an_answer_that_goes_on_with_a_word_is_told_of(model: GraftedTransformer) -> None:
    with pytest.warns(UserWarning, match=r"the answer 'Bo' continues the prompt's last word"):
        dashboard(model, Prompt("Ann met", answer="Bo"))


def test_the_summary_has_the_numbers_of_evaluate(model: GraftedTransformer) -> None:
    grafts = {"PRE": "none", "SFT": "sft @ all", **GRAFTS}
    scored = evaluate(model, PROMPT, grafts, answers="first", progress=False)
    table = dashboard(model, PROMPT, GRAFTS).data.lens
    final = table[(table["layer"] == LAYERS) & (table["position"] == table["position"].max())]
    assert final["graft"].tolist() == scored["graft"].tolist()
    assert final["rank"].tolist() == scored["rank"].tolist()
    np.testing.assert_allclose(final["logprob"], scored["logprob"].astype(float), atol=1e-4)


def test_a_generated_continuation_is_followed(
    pair: dict[str, str], model: GraftedTransformer
) -> None:
    """Every run reads the same continuation, with the weights of its own graft: by value."""
    grafts = {"new": "sft @ generated", "LT": "sft @ last : mlp"}
    data = dashboard(model, PROMPT, grafts, follow="new", max_new_tokens=6).data
    ids = model.to_tokens(PROMPT)[0].tolist()
    texts = outcomes.sample(model, PROMPT, {"new": grafts["new"]}, temperature=0, max_new_tokens=6)
    row = texts[texts["graft"] == "new"].iloc[0]
    whole = [*ids, *(int(token) for token in row["tokens"])]
    assert data.text == PROMPT.text + model.added_text(ids, whole[len(ids) :])
    assert len(data.tokens) == len(whole) > len(ids)
    assert data.answer is None
    models = {n: AutoModelForCausalLM.from_pretrained(p) for n, p in pair.items()}
    mlp = ("mlp_in", "mlp_gate", "mlp_out")
    chosen = {
        "PRE": lambda component, p: False,
        "new": lambda component, p: p >= len(ids),
        "LT": lambda component, p: p >= len(ids) - 1 and component in mlp,
    }
    for name, inside in chosen.items():

        def choose(component: str, layer: int | None, p: int, unit: int | None) -> str:
            return "sft" if inside(component, p) else "pre"  # noqa: B023

        logprobs = sequential_graft(models, whole, choose).log_softmax(-1)
        expected = [float(logprobs[i, token]) for i, token in enumerate(whole[1:])]
        np.testing.assert_allclose(data.runs[name].token_logprobs[1:], expected, atol=1e-4)
        last = data.lens[(data.lens["graft"] == name) & (data.lens["stream"] == "final_post")]
        assert last["position"].tolist() == list(range(len(whole)))
        best = [model.to_single_str_token(int(t)) for t in logprobs.argmax(-1)]
        assert [top[0] for top in last["top_tokens"]] == best
    assert data.runs["new"].where[len(ids) - 1 : len(ids) + 1] == ["", "sft: all weights"]
    assert data.provenance["continued by"] == "new"
    with pytest.raises(ValueError, match=r"follow='newt' is not a run .* Did you mean 'new'"):
        dashboard(model, PROMPT, grafts, follow="newt")
    with pytest.raises(ValueError, match="'generated' are the tokens that a model adds"):
        dashboard(model, PROMPT, grafts)


def test_the_command_follows_a_continuation(pair: dict[str, str], tmp_path: Path) -> None:
    page = tmp_path / "d.html"
    given = ["--pair", pair["pre"], pair["sft"], "--prompt", "News: Ann", "--out", str(page)]
    follow = ["--graft", "new=sft @ generated", "--follow", "new", "--max-new-tokens", "3"]
    found = graftlens("dashboard", *given, *follow)
    assert found.returncode == 0, found.stderr
    assert "continued by" in page.read_text(encoding="utf-8")
    wrong = graftlens("dashboard", *given, "--follow", "nobody")
    assert wrong.returncode != 0
    assert "follow='nobody' is not a run of this dashboard" in wrong.stderr
