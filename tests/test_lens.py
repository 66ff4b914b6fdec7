"""The lens's readings of grafted runs: logit lens, emergence, KL divergence, differences.

Every number is worked out a second time from Hugging Face's own forward and, under a graft, from
the sequential algorithm (`lensoracle`).
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MakeTiny
from families import tiny_model
from lensoracle import (
    ENDS,
    FAMILIES,
    MIXED,
    PROMPTS,
    Oracle,
    kl,
    mixed,
    n_layers,
    oracle_of,
    variants,
)
from torch import Tensor

from graftlens.evaluation import evaluate
from graftlens.graft import Graft
from graftlens.lens import (
    activation_difference,
    direct_logit_attribution,
    emergence,
    kl_divergence,
    logit_lens,
    patching,
    pattern_difference,
    weight_difference,
)
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt, PromptError, Tokenized

NORMED = mixed("gpt2")
#: A text that many tests run is read once.
parsed = cache(Graft.parse)

OracleOf = Callable[[str], Oracle]


@pytest.fixture(scope="module")
def oracles(tiny: MakeTiny) -> OracleOf:
    """The oracle of a variant."""
    return partial(oracle_of, tiny)


def _close(ours: Any, theirs: Any, rtol: float = 2e-4, atol: float = 3e-5) -> None:
    np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs), rtol=rtol, atol=atol)


def _ids(n: int = 6, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- The logit lens ------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", variants(FAMILIES))
def test_every_row_of_the_logit_lens(oracles: OracleOf, variant: str) -> None:
    oracle = oracles(variant)
    parallel = variant == "neox-parallel"
    grafts = ENDS | {"mixed": mixed(variant)}
    table = logit_lens(
        oracle.tiny.model,
        PROMPTS,
        {"mixed": parsed(mixed(variant))},
        incl_mid=not parallel,
        top_k=3,
    )
    last = n_layers(oracle.base)
    depths = [d / 2 for d in range(2 * last + 1)] if not parallel else list(range(last + 1))
    assert len(table) == len(grafts) * len(depths) * sum(len(a.ids) for a in oracle.asked)
    assert table["prompt"].is_monotonic_increasing
    tokenizer = oracle.tiny.tokenizer
    assert tokenizer is not None
    for i, asked in enumerate(oracle.asked):
        of_prompt = table[table["prompt"] == i]
        assert list(dict.fromkeys(of_prompt["graft"])) == list(grafts), "PRE, SFT, then the rest"
        ends = {name: oracle.streams(i, text) for name, text in ENDS.items()}
        for name, text in grafts.items():
            ours = of_prompt[of_prompt["graft"] == name]
            assert set(ours["rule"]) == {text if name in ENDS else str(Graft.parse(text))}
            assert list(dict.fromkeys(ours["layer"])) == depths
            for (layer, label), stream in oracle.streams(i, text).items():
                if layer not in depths:
                    continue
                rows = ours[ours["layer"] == layer]
                said = oracle.read(i, text, stream)
                assert rows["position"].tolist() == list(range(len(asked.ids)))
                assert rows["token"].tolist() == asked.tokens
                assert set(rows["stream"]) == {label}
                assert set(rows["target_id"]) == {asked.target}
                assert set(rows["target"]) == {tokenizer.decode([asked.target])}
                of_target = said[:, asked.target]
                _close(rows["logprob"], of_target)
                _close(rows["prob"], of_target.exp())
                assert rows["rank"].tolist() == (1 + (said > of_target[:, None]).sum(1)).tolist()
                _close(rows["entropy"], torch.distributions.Categorical(logits=said).entropy())
                for column, end in (("kl_base", "PRE"), ("kl_full", "SFT")):
                    other = oracle.read(i, ENDS[end], ends[end][layer, label])
                    _close(rows[column], kl(said, other))
                top = said.topk(3)
                assert rows["top_tokens"].tolist() == [
                    [tokenizer.decode([t]) for t in row] for row in top.indices.tolist()
                ]
                _close(rows["top_probs"].tolist(), top.values.exp())
            # The last stream is the run's own output, whatever norm and cap stand before it.
            _close(
                ours[ours["layer"] == last]["logprob"],
                oracle.run(i, text).logits.log_softmax(-1)[:, asked.target],
            )


def test_the_graft_tells_norm_and_unembedding_apart(oracles: OracleOf) -> None:
    """What the test above relies on: positions with all four pairs of sources at the output."""
    choose = oracles("gpt2").choose(1, NORMED)
    pairs = {
        tuple(choose(component, None, p, None) for component in ("ln_final", "unembed"))
        for p in range(4)
    }
    assert len(pairs) == 4


def test_prompts_beyond_the_short_rotary_factors(tiny: MakeTiny) -> None:
    """Longrope's tables are each prompt's own, whatever stands beside it."""
    text = "The film that {first_entity} made in the city of stone and glass"
    long = Prompt(text, {"first_entity": "Ann"}, " with")
    oracle = Oracle(tiny("phi3-longrope", tokenizer="gpt2"), (PROMPTS[0], long))
    assert len(oracle.asked[1].ids) > 32
    table = logit_lens(oracle.tiny.model, oracle.prompts, "sft @ first_entity")
    for i, asked in enumerate(oracle.asked):
        for name, graft in (ENDS | {"sft @ first_entity": "sft @ first_entity"}).items():
            ours = table[(table["prompt"] == i) & (table["graft"] == name) & (table["layer"] == 2)]
            said = oracle.read(i, graft, oracle.run(i, graft).resid[2])
            _close(ours["logprob"], said[:, asked.target])


def test_positions_and_prompts_do_not_depend_on_one_another(oracles: OracleOf) -> None:
    oracle = oracles("llama-biased")
    model, grafts = oracle.tiny.model, {"mixed": parsed(mixed("llama-biased"))}
    together = logit_lens(model, PROMPTS, grafts)
    numbers = ["logprob", "entropy", "kl_base", "kl_full"]
    for i, prompt in enumerate(PROMPTS[:2]):
        ours = together[together["prompt"] == i].reset_index(drop=True)
        alone = logit_lens(model, prompt, grafts)
        assert alone["top_tokens"].tolist() == ours["top_tokens"].tolist()
        _close(alone[numbers], ours[numbers])
    left = logit_lens(model, model.batch(list(PROMPTS), padding_side="left"), grafts)
    _close(left[numbers], together[numbers])
    assert left["token"].tolist() == together["token"].tolist()
    last = len(oracle.asked[2].ids) - 1
    entity = {p for run in oracle.asked[2].spans["first_entity"] for p in run}
    assert entity | {last} != set(range(last + 1))
    ours = together[together["prompt"] == 2]
    for at, chosen in (
        ("first_entity + last", entity | {last}),
        ("~first_entity", set(range(last + 1)) - entity),
        ("[0, -1]", {0, last}),
    ):
        part = logit_lens(model, PROMPTS[2], grafts, at=at)
        wanted = ours[ours["position"].isin(chosen)]
        assert part["position"].tolist() == wanted["position"].tolist()
        _close(part[numbers], wanted[numbers])


def test_many_rows_are_read_in_pieces(oracles: OracleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unembedding some rows at a time gives each row to its own place."""
    oracle = oracles("gpt2")
    logits = 4 * oracle.tiny.model.cfg.d_vocab  # bytes of a row
    monkeypatch.setattr("graftlens.lens.logit.BYTES", 5 * logits)
    table = logit_lens(oracle.tiny.model, PROMPTS, {"mixed": parsed(MIXED)})
    spread = kl_divergence(oracle.tiny.model, PROMPTS, {"mixed": parsed(MIXED)})
    for i, asked in enumerate(oracle.asked):
        ours = table[(table["prompt"] == i) & (table["graft"] == "mixed") & (table["layer"] == 2)]
        said = oracle.read(i, MIXED, oracle.run(i, MIXED).resid[2])
        assert ours["position"].tolist() == list(range(len(asked.ids)))
        _close(ours["logprob"], said[:, asked.target])
        pair = spread[(spread["prompt"] == i) & (spread["graft"] == "mixed")]
        runs = (
            oracle.run(i, text).logits.double().log_softmax(-1) for text in (MIXED, "sft @ all")
        )
        _close(pair["kl_full"], kl(*runs))


def test_more_prompts_than_run_together(oracles: OracleOf) -> None:
    """20 prompts are three chunks: each row is its own prompt's, under its own number."""
    oracle = oracles("qwen3")
    order = [(3 * i) % 3 if i % 4 else i % 3 for i in range(20)]
    prompts = [PROMPTS[i] for i in order]
    model, grafts = oracle.tiny.model, {"mixed": parsed(MIXED)}
    table = logit_lens(model, prompts, grafts, at="last")
    patterns = pattern_difference(model, prompts, grafts, at="last")
    parts = direct_logit_attribution(model, prompts, grafts)
    assert table["prompt"].unique().tolist() == list(range(20))
    for number, i in enumerate(order):
        run, asked = oracle.run(i, MIXED), oracle.asked[i]
        row = table[(table["prompt"] == number) & (table["graft"] == "mixed")]
        _close(row["logprob"].iloc[-1], run.logits[-1].log_softmax(-1)[asked.target])
        assert set(row["position"]) == {len(asked.ids) - 1}
        ours = patterns[(patterns["prompt"] == number) & (patterns["graft"] == "mixed")]
        moved = (run.pattern - oracle.run(i, "none").pattern).abs().sum(-1)[:, :, -1] / 2
        _close(ours["distance_base"], moved.flatten())
        mine = parts[(parts["prompt"] == number) & (parts["graft"] == "mixed")]
        _close(mine["contribution"].sum(), run.logits[-1, asked.target])


# --- Emergence -----------------------------------------------------------------------------------


def _ranks(ranks: list[Any], graft: str = "g", layers: list[float] | None = None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "prompt": 0,
            "graft": graft,
            "layer": list(range(len(ranks))) if layers is None else layers,
            "position": 4,
            "rank": pd.array(ranks, dtype="Int64"),
            "stream": [*["some"] * (len(ranks) - 1), "final_post"],
        }
    )


@pytest.mark.parametrize(
    ("ranks", "k", "layer"),
    [
        ([9, 5, 2, 1], 1, 3),
        ([9, 5, 2, 1], 2, 2),
        ([9, 5, 2, 1], 5, 1),
        ([9, 5, 2, 1], 9, 0),
        ([1, 1, 1, 1], 1, 0),
        ([1, 1, 1, 2], 1, None),
        ([4, 3, 3, 2], 1, None),
        ([9, 1, 4, 1, 1], 1, 3),
        ([1, 4, 1, 9, 2], 2, 4),
        ([1, 9, 1, 9, 9], 8, None),
        ([1], 1, 0),
    ],
)
def test_an_answer_comes_up_where_it_stays(ranks: list[int], k: int, layer: int | None) -> None:
    table = _ranks(ranks)
    for shown in (table, table.iloc[::-1]):  # whatever the order of the rows
        found = emergence(shown, k=k)
        assert found[["prompt", "graft", "position"]].values.tolist() == [[0, "g", 4]]
        value = found["layer"].iloc[0]
        assert pd.isna(value) if layer is None else value == layer
        assert str(found["layer"].dtype) == "Int64"


def test_emergence_keeps_runs_positions_and_prompts_apart() -> None:
    table = pd.concat(
        [
            _ranks([1, 1, 1], "a"),
            _ranks([2, 1, 1], "a").assign(position=5),
            _ranks([2, 2, 1], "b"),
            _ranks([2, 2, 2], "a").assign(prompt=1),
            _ranks([pd.NA] * 3, "a").assign(prompt=2),
        ]
    )
    found = emergence(table)
    keys = found[["prompt", "graft", "position"]].values.tolist()
    assert keys == [[0, "a", 4], [0, "a", 5], [0, "b", 4], [1, "a", 4]], "no answer, no row"
    assert found["layer"].fillna(-1).tolist() == [0, 1, 2, -1]
    halves = emergence(_ranks([3, 2, 1, 1, 1], layers=[0, 0.5, 1, 1.5, 2]), k=2)
    assert halves["layer"].tolist() == [0.5]


def test_emergence_of_tables_that_do_not_say(oracles: OracleOf) -> None:
    """Regression: without the last layer, or with rows of several runs under one name, a layer
    came out all the same."""
    table = logit_lens(oracles("gpt2").tiny.model, PROMPTS[:2], at="last")
    assert len(emergence(table, k=50)) == 4
    cut = table[(table["graft"] != "SFT") | (table["prompt"] != 1) | (table["layer"] < 3)]
    with pytest.raises(ValueError, match=r"prompt 1, graft 'SFT', position \d+: .* final_post"):
        emergence(cut)
    with pytest.raises(ValueError, match=r"no row of the last layer"):
        emergence(table[table["layer"] < 3])
    other = table[(table["prompt"] == 1) & (table["layer"] == 2)]
    with pytest.raises(ValueError, match=r"prompt 1, graft 'PRE', .* two rows of layer 2\. "):
        emergence(pd.concat([table, other]))
    some = table[table["layer"] != 1]
    assert len(emergence(some, k=50)) == 4
    with pytest.raises(ValueError, match="the table is not from logit_lens"):
        emergence(table.drop(columns="stream"))


def test_emergence_of_real_runs(oracles: OracleOf) -> None:
    """A rank that every prompt has at the output, against ranks from the oracle."""
    oracle = oracles("gemma2")
    table = logit_lens(
        oracle.tiny.model, PROMPTS, {"mixed": parsed(MIXED)}, at="last", incl_mid=True
    )
    output = table[table["stream"] == "final_post"]
    k = int(output["rank"].median())
    found = emergence(table, k=k)
    for _, row in found.iterrows():
        text = {**ENDS, "mixed": MIXED}[row["graft"]]
        within = []
        for (layer, _), stream in oracle.streams(row["prompt"], text).items():
            said = oracle.read(row["prompt"], text, stream)[-1]
            target = oracle.asked[row["prompt"]].target
            within.append((layer, int((said > said[target]).sum()) + 1 <= k))
        stays = [l for j, (l, _) in enumerate(within) if all(ok for _, ok in within[j:])]
        assert pd.isna(row["layer"]) if not stays else row["layer"] == stays[0]
    assert found["layer"].isna().any()
    assert found["layer"].notna().any()


# --- Divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "gemma2", "olmo-clip"])
def test_kl_divergence_from_the_base_and_the_full_run(oracles: OracleOf, variant: str) -> None:
    oracle = oracles(variant)
    grafts = ENDS | {"mixed": mixed(variant)}
    table = kl_divergence(oracle.tiny.model, PROMPTS, {"mixed": parsed(mixed(variant))})
    numbers = ["kl_base", "kl_full", "kl_from_base", "kl_from_full", "js_base", "js_full"]
    assert list(table.columns) == ["prompt", "graft", "rule", "position", "token", *numbers]
    assert len(table) == len(grafts) * sum(len(a.ids) for a in oracle.asked)
    for i, asked in enumerate(oracle.asked):
        said = {g: oracle.run(i, t).logits.double().log_softmax(-1) for g, t in grafts.items()}
        for graft, rows in table[table["prompt"] == i].groupby("graft"):
            assert rows["position"].tolist() == list(range(len(asked.ids)))
            assert rows["token"].tolist() == asked.tokens
            p = said[graft]
            for run, end in (("base", "PRE"), ("full", "SFT")):
                q = said[end]
                middle = ((p.exp() + q.exp()) / 2).log()
                _close(rows[f"kl_{run}"], kl(p, q))
                _close(rows[f"kl_from_{run}"], kl(q, p))
                _close(rows[f"js_{run}"], (kl(p, middle) + kl(q, middle)) / 2)
        there, back = (kl(said["PRE"], said["SFT"]), kl(said["SFT"], said["PRE"]))
        assert (there - back).abs().max() > 1e-2, "the order of the pair must show"


# --- Activations and attention -------------------------------------------------------------------


def _distances(x: Tensor, base: Tensor, full: Tensor) -> dict[str, np.ndarray]:
    a = x.double().numpy()
    found = {"norm": np.sqrt((a * a).sum(-1))}
    for name, other in (("base", base), ("full", full)):
        b = other.double().numpy()
        size = np.sqrt((b * b).sum(-1))
        found[f"distance_{name}"] = np.sqrt(((a - b) ** 2).sum(-1))
        found[f"relative_{name}"] = np.sqrt(((a - b) ** 2).sum(-1)) / size
        found[f"cosine_{name}"] = (a * b).sum(-1) / (found["norm"] * size)
    return found


@pytest.mark.parametrize("variant", ["neox-parallel", "gemma2"])
def test_activation_differences(oracles: OracleOf, variant: str) -> None:
    oracle = oracles(variant)
    hooks = ["hook_resid_post", "attn.hook_z", "hook_mlp_out", "blocks.1.hook_attn_out"]
    table = activation_difference(oracle.tiny.model, PROMPTS, {"mixed": parsed(MIXED)}, hooks=hooks)
    layers = range(n_layers(oracle.base))
    for i, asked in enumerate(oracle.asked):
        runs = {name: oracle.run(i, t) for name, t in (ENDS | {"mixed": MIXED}).items()}
        of_prompt = table[table["prompt"] == i]
        n = len(asked.ids)
        heads = runs["PRE"].z.shape[2]
        assert len(of_prompt) == 3 * n * (len(layers) * (2 + heads) + 1)
        read = {
            **{f"blocks.{l}.hook_resid_post": (lambda r, l=l: r.resid[l + 1]) for l in layers},
            **{f"blocks.{l}.attn.hook_z": (lambda r, l=l: r.z[l]) for l in layers},
            **{f"blocks.{l}.hook_mlp_out": (lambda r, l=l: r.mlp[l]) for l in layers},
            "blocks.1.hook_attn_out": lambda r: r.attn[1],
        }
        assert set(of_prompt["hook"]) == set(read)
        for hook, what in read.items():
            for name, run in runs.items():
                rows = of_prompt[(of_prompt["hook"] == hook) & (of_prompt["graft"] == name)]
                assert set(rows["layer"]) == {int(hook.split(".")[1])}
                width = heads if hook.endswith("hook_z") else 1
                assert rows["position"].tolist() == np.repeat(np.arange(n), width).tolist()
                assert rows["token"].tolist() == np.repeat(asked.tokens, width).tolist()
                if width > 1:
                    assert rows["head"].tolist() == list(range(heads)) * n
                else:
                    assert rows["head"].isna().all()
                wanted = _distances(what(run), what(runs["PRE"]), what(runs["SFT"]))
                for column, values in wanted.items():
                    _close(rows[column], values.flatten())
                same = {"PRE": "base", "SFT": "full"}.get(name)
                if same:
                    assert (rows[f"distance_{same}"] == 0).all()


def test_activations_outside_the_layers_and_of_chosen_positions(oracles: OracleOf) -> None:
    oracle = oracles("gpt2")
    hooks = ["hook_embed", "hook_pos_embed", "unembed.hook_out"]
    table = activation_difference(
        oracle.tiny.model, PROMPTS, {"mixed": parsed(MIXED)}, hooks=hooks, at="last"
    )
    assert len(table) == 3 * 3 * 3
    assert table["layer"].isna().all()
    for i in range(3):
        runs = {name: oracle.run(i, t) for name, t in (ENDS | {"mixed": MIXED}).items()}
        for hook, what in (
            ("hook_embed", lambda r: r.embed),
            ("hook_pos_embed", lambda r: r.pos_embed),
            ("unembed.hook_out", lambda r: r.logits),
        ):
            for name, run in runs.items():
                row = table[
                    (table["prompt"] == i) & (table["hook"] == hook) & (table["graft"] == name)
                ]
                assert row["position"].tolist() == [len(oracle.asked[i].ids) - 1]
                wanted = _distances(*(what(r)[-1:] for r in (run, runs["PRE"], runs["SFT"])))
                for column, values in wanted.items():
                    _close(row[column], values)


@pytest.mark.parametrize("variant", ["gpt2", "mistral-window", "gemma2"])
def test_pattern_differences(oracles: OracleOf, variant: str) -> None:
    oracle = oracles(variant)
    table = pattern_difference(oracle.tiny.model, PROMPTS, {"mixed": parsed(MIXED)})
    for i, asked in enumerate(oracle.asked):
        runs = {name: oracle.run(i, t).pattern for name, t in (ENDS | {"mixed": MIXED}).items()}
        of_prompt = table[table["prompt"] == i]
        layers, heads, n, _ = runs["PRE"].shape
        assert len(of_prompt) == 3 * layers * heads * n
        for name, pattern in runs.items():
            rows = of_prompt[of_prompt["graft"] == name]
            rows = rows.sort_values(["layer", "head", "position"], kind="stable")
            assert rows["token"].tolist() == asked.tokens * (layers * heads)
            for column, end in (("distance_base", "PRE"), ("distance_full", "SFT")):
                # What one has above the other is what it has below it: the rows add up to 1.
                wanted = (pattern - runs[end]).clamp_min(0).sum(-1)
                assert np.allclose(rows[column], wanted.flatten(), atol=1e-5)
        assert of_prompt["distance_base"].max() > 0.05
    chosen = pattern_difference(oracle.tiny.model, PROMPTS, {"mixed": parsed(MIXED)}, at="last")
    last = table.groupby("prompt")["position"].transform("max") == table["position"]
    np.testing.assert_array_equal(
        chosen[["prompt", "layer", "head", "position"]],
        table[last][["prompt", "layer", "head", "position"]],
    )
    _close(chosen["distance_full"], table[last]["distance_full"])


# --- Which runs ----------------------------------------------------------------------------------


def test_the_ends_are_always_there_and_keep_the_names_they_are_given(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    one = PROMPTS[0]

    def names(grafts: Any, **more: Any) -> dict[str, str]:
        table = logit_lens(model, one, grafts, at="last", **more)
        return dict(zip(table["graft"], table["rule"], strict=True))

    assert names(None) == {"PRE": "none", "SFT": "sft @ all"}
    assert names("sft @ last") == {**ENDS, "sft @ last": "sft @ last"}
    assert names(["none", "sft @ last"]) == {
        "none": "none",
        "SFT": "sft @ all",
        "sft @ last": "sft @ last",
    }
    ordered = names({"LT": "sft @ last", "all of it": "sft @ all", "nothing": Graft()})
    assert list(ordered) == ["nothing", "all of it", "LT"], "the ends come first"
    # A name that is taken by another graft is not given to an end as well.
    clash = names({"SFT": "sft @ last", "PRE": "sft @ [0]"})
    assert clash == {
        "none": "none",
        "sft @ all": "sft @ all",
        "SFT": "sft @ last",
        "PRE": "sft @ [0]",
    }
    crossed = names({"PRE": "sft @ all"})
    assert crossed == {"none": "none", "PRE": "sft @ all"}


def test_a_name_that_is_taken_twice_hides_no_run(oracles: OracleOf) -> None:
    """Here both the usual name and the text of the full graft go to other grafts."""
    model = oracles("gpt2").tiny.model
    given = {"SFT": "sft @ last", "sft @ all": "sft @ [0]"}
    table = logit_lens(model, PROMPTS[0], given, at="last")
    assert "sft @ all" in set(table["rule"]), "the full run is there under some name"
    full = table[table["rule"] == "sft @ all"]
    assert (full["kl_full"] == 0).all()
    rules = dict(zip(table["graft"], table["rule"], strict=True))
    assert rules["SFT"] == "sft @ last"
    assert rules["sft @ all"] == "sft @ [0]"


def test_grafts_that_are_an_end_in_other_words_read_the_same(oracles: OracleOf) -> None:
    oracle = oracles("llama-biased")
    grafts = {
        "base": "pre @ all",
        "full": "sft @ last | sft @ ~last",
        "back": "sft @ all | pre @ all",
    }
    table = logit_lens(oracle.tiny.model, PROMPTS[1], grafts)
    for name, column, same in (
        ("base", "kl_base", "PRE"),
        ("back", "kl_base", "PRE"),
        ("full", "kl_full", "SFT"),
    ):
        ours = table[table["graft"] == name].reset_index(drop=True)
        end = table[table["graft"] == same].reset_index(drop=True)
        assert (ours[column].abs() < 1e-6).all()
        _close(ours["logprob"], end["logprob"])
    assert (table[table["graft"] == "SFT"]["kl_base"] > 1e-3).all()


def test_several_finetuned_sources_need_one_to_be_held_against(tiny: MakeTiny) -> None:
    t = tiny("llama-biased", ("pre", "task", "relation"), tokenizer="llama3")
    for function in (
        logit_lens,
        kl_divergence,
        activation_difference,
        pattern_difference,
        direct_logit_attribution,
    ):
        with pytest.raises(ValueError, match=r'sources pre task relation: .*full="relation @ all"'):
            function(t.model, PROMPTS[0], {"x": "task @ last"})
    with pytest.raises(ValueError, match=r"sources pre task relation: .*source='relation'"):
        weight_difference(t.model)
    table = logit_lens(t.model, PROMPTS[0], {"x": "relation @ last"}, full="task @ all")
    assert dict(zip(table["graft"], table["rule"], strict=True)) == {
        "PRE": "none",
        "SFT": "task @ all",
        "x": "relation @ last",
    }
    oracle = Oracle(t)
    output = table[(table["layer"] == 3) & (table["graft"] == "x")]
    said, task = (
        oracle.run(0, text).logits.double().log_softmax(-1)
        for text in ("relation @ last", "task @ all")
    )
    _close(output["kl_full"], kl(said, task))
    spread = kl_divergence(t.model, PROMPTS[0], full=Graft.rule("relation"))
    assert set(spread["graft"]) == {"PRE", "SFT"}
    runs = (
        oracle.run(0, text).logits.double().log_softmax(-1) for text in ("none", "relation @ all")
    )
    _close(spread[spread["graft"] == "PRE"]["kl_full"], kl(*runs))


def test_a_graft_in_force_outside_changes_no_run(oracles: OracleOf) -> None:
    """PRE is the base alone, also inside `with model.grafted(…)`."""
    oracle = oracles("gpt2")
    model = oracle.tiny.model
    with model.grafted("sft @ last"):
        lens = logit_lens(model, PROMPTS[1], at="last")
        parts = direct_logit_attribution(model, PROMPTS[1])
    output = lens[lens["layer"] == 3].set_index("graft")
    for name, text in ENDS.items():
        said = oracle.run(1, text).logits[-1]
        target = oracle.asked[1].target
        _close(output.loc[name, "logprob"], said.log_softmax(-1)[target])
        _close(parts[parts["graft"] == name]["contribution"].sum(), said[target])
    assert model.active.stack == []
    assert model.active.running == []


def test_nothing_is_left_behind(oracles: OracleOf) -> None:
    oracle = oracles("gpt2")
    model = oracle.tiny.model
    before = model.fingerprints()
    for function in (
        logit_lens,
        kl_divergence,
        activation_difference,
        pattern_difference,
        direct_logit_attribution,
    ):
        function(model, PROMPTS[0], {"mixed": parsed(MIXED)})
    with pytest.raises(ValueError, match="no layer 7"):
        logit_lens(model, PROMPTS[0], "sft @ last : mlp : 7")
    assert not any(hook.has_hooks() for hook in model.hook_dict.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.active.stack == []
    assert model.active.running == []
    assert model.fingerprints() == before
    assert torch.is_grad_enabled()


# --- Inputs of every kind ------------------------------------------------------------------------


def test_plain_texts_have_no_answer(oracles: OracleOf) -> None:
    oracle = oracles("llama-biased")
    texts = [p.text for p in PROMPTS]
    table = logit_lens(oracle.tiny.model, texts, "sft @ last")
    about = ["target", "target_id", "rank", "prob", "logprob"]
    assert table[about].isna().all().all()
    asked = oracle.asked[0]
    row = table[(table["graft"] == "sft @ last") & (table["layer"] == 3) & (table["prompt"] == 0)]
    said = oracle.run(0, "sft @ last").logits.double().log_softmax(-1)
    _close(row["entropy"], -(said.exp() * said).sum(-1))
    _close(row["kl_base"], kl(said, oracle.run(0, "none").logits.double().log_softmax(-1)))
    assert row["token"].tolist() == asked.tokens
    with pytest.raises(ValueError, match="no prompt of this table has an answer"):
        emergence(table)
    spread = kl_divergence(oracle.tiny.model, texts[0], "sft @ last")
    assert len(spread) == 3 * len(asked.ids)


def test_answers_beside_prompts_without(oracles: OracleOf) -> None:
    oracle = oracles("llama-biased")
    bare = Prompt(PROMPTS[1].template, PROMPTS[1].fields)
    prompts = [bare, PROMPTS[0], PROMPTS[1].text]
    table = logit_lens(oracle.tiny.model, prompts, "sft @ last")
    about = ["target", "target_id", "rank", "prob", "logprob"]
    for number in (0, 2):
        ours = table[table["prompt"] == number]
        assert ours[about].isna().all().all()
        assert ours["top_probs"].map(sum).between(0, 1.0001).all()
    ours = table[(table["prompt"] == 1) & (table["graft"] == "SFT") & (table["layer"] == 3)]
    said = oracle.run(0, "sft @ all").logits.log_softmax(-1)
    _close(ours["logprob"], said[:, oracle.asked[0].target])
    assert str(table["rank"].dtype) == str(table["target_id"].dtype) == "Int64"
    assert emergence(table, k=400)["prompt"].unique().tolist() == [1]


@pytest.mark.parametrize("variant", ["gpt2", "gemma2"])
def test_token_tensors_without_a_tokenizer(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    rows = torch.tensor([_ids(6, 1), _ids(6, 2)])
    lens = logit_lens(t.model, rows, "sft @ last", top_k=2)
    output = lens[(lens["layer"] == t.model.cfg.n_layers) & (lens["graft"] == "SFT")]
    for i, row in enumerate(rows.tolist()):
        ours = output[output["prompt"] == i]
        said = t.logits("sft", row).double().log_softmax(-1)
        assert ours["token"].tolist() == [str(token) for token in row]
        assert ours["top_tokens"].tolist() == [
            [str(token) for token in best] for best in said.topk(2).indices.tolist()
        ]
        base = t.logits("pre", row).double().log_softmax(-1)
        _close(ours["kl_base"], kl(said, base))
    one = logit_lens(t.model, rows[0], "sft @ last")
    assert one["prompt"].unique().tolist() == [0]
    assert pattern_difference(t.model, rows)["distance_full"].max() > 0.05
    with pytest.raises(PromptError, match="prompt 0 has no answer to attribute"):
        direct_logit_attribution(t.model, rows)


def test_padded_tokens_are_read_where_they_are(tiny: MakeTiny) -> None:
    t = tiny("mistral-window")
    ids = [_ids(7, 1), _ids(4, 2)]
    for side in ("left", "right"):
        pads = [[5] * (7 - len(row)) for row in ids]
        ones = [[1] * len(row) for row in ids]
        if side == "left":
            tokens = [p + row for p, row in zip(pads, ids, strict=True)]
            real = [[0] * len(p) + one for p, one in zip(pads, ones, strict=True)]
        else:
            tokens = [row + p for p, row in zip(pads, ids, strict=True)]
            real = [one + [0] * len(p) for p, one in zip(pads, ones, strict=True)]
        batch = t.model.batch(torch.tensor(tokens), attention_mask=torch.tensor(real))
        table = activation_difference(t.model, batch, hooks="unembed.hook_out")
        for i, row in enumerate(ids):
            ours = table[(table["prompt"] == i) & (table["graft"] == "SFT")]
            assert ours["token"].tolist() == [str(token) for token in row]
            sft, pre = t.logits("sft", row), t.logits("pre", row)
            _close(ours["distance_base"], (sft - pre).norm(dim=-1))
            _close(ours["norm"], sft.norm(dim=-1))


def test_a_batch_whose_ids_the_host_does_not_know(tiny: MakeTiny) -> None:
    """Tokens on a GPU are not copied to the host to be looked at: such a batch's prompts have the
    right length and no ids, and what runs is its tensor."""
    t = tiny("gpt2")
    ids = _ids(6, 1)
    batch = t.model.batch(torch.tensor([ids]))
    batch = dataclasses.replace(batch, prompts=(Tokenized.bare([0] * len(ids)),))
    table = activation_difference(t.model, batch, hooks="unembed.hook_out")
    ours = table[table["graft"] == "SFT"]
    _close(ours["norm"], t.logits("sft", ids).norm(dim=-1))
    assert ours["token"].tolist() == [str(token) for token in ids]


def test_prompts_of_one_token(oracles: OracleOf) -> None:
    oracle = Oracle(oracles("gpt2").tiny, (Prompt("A", answer=" Robert", distractors=["!"]),))
    assert len(oracle.asked[0].ids) == 1
    model, prompt, graft = oracle.tiny.model, oracle.prompts[0], "sft @ last : mlp"
    said = oracle.run(0, graft).logits[0]
    target = oracle.asked[0].target
    lens = logit_lens(model, prompt, graft)
    row = lens[(lens["graft"] == graft) & (lens["layer"] == 3)].iloc[0]
    _close(row["logprob"], said.log_softmax(-1)[target])
    assert (pattern_difference(model, prompt, graft)["distance_full"] == 0).all(), (
        "1 is all there is"
    )
    for by in ("layer", "component", "head", "src_pos"):
        parts = direct_logit_attribution(model, prompt, graft, by=by)
        _close(parts[parts["graft"] == graft]["contribution"].sum(), said[target])


@pytest.mark.parametrize("variant", ["llama3-rope-tied", "gemma2"])
def test_narrow_dtypes(tiny: MakeTiny, variant: str) -> None:
    """In bfloat16 the lens reads what Hugging Face's model says in bfloat16, to its rounding."""
    t = tiny(variant, tokenizer="llama3")
    model = t.model.to(torch.bfloat16)
    assert t.tokenizer is not None
    ids = t.tokenizer(PROMPTS[1].text)["input_ids"]
    table = logit_lens(model, PROMPTS[1], "sft @ all")
    output = table[table["layer"] == model.cfg.n_layers].set_index("graft")
    for name, source in (("PRE", "pre"), ("sft @ all", "sft")):
        half = copy.deepcopy(t.sources[source]).to(torch.bfloat16)
        with torch.no_grad():
            said = half(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        target = int(output["target_id"].iloc[0])
        _close(output.loc[name, "logprob"], said[:, target], rtol=2e-2, atol=6e-2)
        _close(output.loc[name, "entropy"], -(said.exp() * said).sum(-1), rtol=2e-2, atol=3e-2)
    assert (output.loc["PRE", "kl_base"] == 0).all()
    parts = direct_logit_attribution(model, PROMPTS[1], by="head")
    sums = parts.groupby("graft")["contribution"].sum()
    logits = parts.groupby("graft")["logit"].first()
    _close(sums, logits, rtol=5e-2, atol=0.15)
    assert np.isfinite(pattern_difference(model, PROMPTS[1])["distance_full"]).all()


def test_a_bos_that_is_forced_is_there_everywhere(tiny: MakeTiny) -> None:
    t = tiny("llama-biased", tokenizer="gpt2")
    assert t.tokenizer is not None
    prompt = PROMPTS[0]
    ids = [t.tokenizer.bos_token_id, *t.tokenizer(prompt.text)["input_ids"]]
    whole = t.tokenizer(prompt.text + (prompt.answer or ""))["input_ids"]
    target = whole[len(ids) - 1]
    said = t.logits("sft", ids)
    lens = logit_lens(t.model, prompt, prepend_bos=True)
    ours = lens[(lens["graft"] == "SFT") & (lens["layer"] == 3)]
    assert len(ours) == len(ids)
    _close(ours["logprob"], said.log_softmax(-1)[:, target])
    parts = direct_logit_attribution(t.model, prompt, against="distractors", prepend_bos=True)
    others = [
        t.tokenizer(prompt.text + text)["input_ids"][len(ids) - 1] for text in prompt.distractors
    ]
    wanted = said[-1, target] - said[-1, others].mean()
    _close(parts[parts["graft"] == "SFT"]["contribution"].sum(), wanted)


@pytest.mark.parametrize(("tokenizer", "bos"), [("gpt2", True), ("llama3", False)])
def test_a_batch_says_itself_whether_it_has_a_bos(
    tiny: MakeTiny, tokenizer: str, bos: bool
) -> None:
    """Regression: where the tokenizer would do otherwise, its answers "began no token"."""
    model = tiny("llama-biased", tokenizer=tokenizer).model
    batch = model.batch(list(PROMPTS[:1]), prepend_bos=bos)
    single = model.tokenized(PROMPTS[0], prepend_bos=bos)
    assert batch.prompts == single
    assert single != model.tokenized(PROMPTS[0]), "the tokenizer does otherwise"
    for function in (
        partial(logit_lens, at="last"),
        partial(direct_logit_attribution, against="distractors"),
        partial(patching, grafts="sft @ last : o"),
    ):
        wanted = function(model, PROMPTS[:1], prepend_bos=bos)
        for given, said in ((batch, None), (single, None), (batch, not bos), (batch, bos)):
            pd.testing.assert_frame_equal(function(model, given, prepend_bos=said), wanted)


def test_a_vocabulary_wider_than_the_tokenizer(tiny: MakeTiny) -> None:
    """Models are padded beyond their tokenizer: such ids may be likeliest and have no text."""
    reader = tiny("gpt2", tokenizer="gpt2").tokenizer
    assert reader is not None
    sources = {
        s: tiny_model("gpt2", 40 + i, len(reader) + 60) for i, s in enumerate(("pre", "sft"))
    }
    with torch.no_grad():
        sources["sft"].transformer.wte.weight[-60:] *= 3
    model = GraftedTransformer.from_pretrained(
        sources, tokenizer=reader, check=False, verbose=False
    )
    table = logit_lens(model, PROMPTS[0], at="last")
    with torch.no_grad():
        tokens = torch.tensor([reader(PROMPTS[0].text)["input_ids"]])
        said = sources["sft"](tokens).logits[0, -1].softmax(-1)
    best = said.topk(5)
    assert int(best.indices.max()) >= len(reader)
    row = table[(table["graft"] == "SFT") & (table["layer"] == 3)].iloc[0]
    _close(row["top_probs"], best.values)


# --- Errors --------------------------------------------------------------------------------------


def _unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a user has it: in the tests, types are checked before the function is reached."""
    return inspect.unwrap(function)


def test_errors_say_what_is_allowed(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    one = PROMPTS[0]
    with pytest.raises(ValueError, match=r"top_k=0: write a whole number from 1"):
        logit_lens(model, one, top_k=0)
    with pytest.raises(ValueError, match=r"k=0: write a whole number from 1"):
        emergence(logit_lens(model, one), k=0)
    with pytest.raises(ValueError, match=r"by='neuron'. Allowed: layer component head src_pos\."):
        _unchecked(direct_logit_attribution)(model, one, by="neuron")
    with pytest.raises(ValueError, match=r"against='median'. Allowed: mean distractors, or None\."):
        _unchecked(direct_logit_attribution)(model, one, against="median")
    with pytest.raises(ValueError, match=r"no hook 'hook_resid_pots'.*Did you mean"):
        activation_difference(model, one, hooks="hook_resid_pots")
    with pytest.raises(ValueError, match=r"'blocks.0.attn.hook_pattern' is over pairs"):
        activation_difference(model, one, hooks="hook_pattern")
    with pytest.raises(ValueError, match=r"does not fire.*set_use_attn_result\(True\)"):
        activation_difference(model, one, hooks="hook_result")
    with pytest.raises(ValueError, match="no source 'stf'"):
        logit_lens(model, one, "stf @ last")
    with pytest.raises(ValueError, match="no source 'other'"):
        kl_divergence(model, one, full="other @ all")
    with pytest.raises(PromptError, match="no prompts: give at least one"):
        logit_lens(model, [])


def test_a_sources_name_is_that_source_everywhere(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    by_name = kl_divergence(model, PROMPTS[0], full="sft")
    pd.testing.assert_frame_equal(by_name, kl_divergence(model, PROMPTS[0], full="sft @ all"))


def test_a_given_grafts_name_is_that_graft(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    for grafts in ({"most": "sft @ ~last"}, {"sft": "sft @ ~last"}):
        (name,) = grafts
        table = logit_lens(model, PROMPTS[0], grafts, full=name)
        assert list(dict.fromkeys(table["graft"])) == ["PRE", name]
        assert set(table[table["graft"] == name]["rule"]) == {"sft @ ~last"}
        assert (table[table["graft"] == name]["kl_full"] == 0).all()
    named = kl_divergence(model, PROMPTS[0], ["sft @ last"], full="sft @ last")
    assert set(named["graft"]) == {"PRE", "sft @ last"}


def test_what_cannot_count_as_sft(tiny: MakeTiny) -> None:
    """Regression: the base was taken for the run that PRE is held against."""
    model = tiny("gpt2", ("pre", "task", "relation"), tokenizer="gpt2").model
    grafts = {"nothing": "none", "mostly": "task @ ~last"}
    for full in ("none", "pre", "pre @ all", "pre @ last : o", "nothing", Graft()):
        with pytest.raises(ValueError, match=r"not a run of a finetuned.* sources task relat"):
            logit_lens(model, PROMPTS[0], grafts, full=full)
    for slip, meant in (("tsk", "task"), ("mostyl", "mostly")):
        message = rf"full='{slip}' is not a run .* task relation, .* Did you mean '{meant}'\?"
        with pytest.raises(ValueError, match=message):
            kl_divergence(model, PROMPTS[0], grafts, full=slip)


def test_errors_of_prompts_name_the_prompt(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    bare = Prompt(PROMPTS[1].template, PROMPTS[1].fields)
    single = Prompt("{first_entity}", {"first_entity": "A"})
    with pytest.raises(PromptError, match=r"prompt 2, at='friend': no span 'friend' here"):
        logit_lens(model, [PROMPTS[2], PROMPTS[2], PROMPTS[0]], at="friend")
    with pytest.raises(PromptError, match=r"prompt 9: at='first_entity & last' selects no posit"):
        logit_lens(model, [single] * 9 + [PROMPTS[0]], at="first_entity & last")
    with pytest.raises(PromptError, match="prompt 9 has no answer to attribute"):
        direct_logit_attribution(model, [PROMPTS[1]] * 9 + [bare])
    with pytest.raises(PromptError, match="prompt 9 has no distractors"):
        direct_logit_attribution(model, [PROMPTS[0]] * 9 + [PROMPTS[1]], against="distractors")


def test_a_graft_that_does_not_fit_a_late_prompt_names_that_prompt(oracles: OracleOf) -> None:
    """Numbers count through the whole input, not through those that run together."""
    model = oracles("gpt2").tiny.model
    prompts = [PROMPTS[2]] * 9 + [PROMPTS[0]]
    with pytest.raises(PromptError, match=r"prompt 9, rule 'sft @ friend': no span 'friend'"):
        logit_lens(model, prompts, "sft @ friend", at="last")


def test_parallel_blocks_have_no_middle(oracles: OracleOf) -> None:
    with pytest.raises(
        ValueError, match=r"incl_mid=True: attention and MLP of gpt_neox are parallel"
    ):
        logit_lens(oracles("neox-parallel").tiny.model, PROMPTS[0], incl_mid=True)


def test_hooks_of_the_output_rest_while_streams_are_read(oracles: OracleOf) -> None:
    """Regression: they saw the lens's rows as [batch, pos], and changed other prompts' rows."""
    model = oracles("gpt2").tiny.model
    plain = logit_lens(model, PROMPTS, at="last")
    fired = []

    def zero_last(x: Any, hook: Any) -> Any:
        fired.append(hook.name)
        x[:, -1] = 0
        return x

    with model.hooks(fwd_hooks=[("ln_final.hook_normalized", zero_last)]):
        pd.testing.assert_frame_equal(logit_lens(model, PROMPTS, at="last"), plain)
        assert not fired
        model(PROMPTS[0])
    assert fired == ["ln_final.hook_normalized"], "and act again afterwards"


def test_hooks_are_given_all_prompts_together(oracles: OracleOf) -> None:
    """Regression: they were given eight at a time, so one that knows rows changed three prompts."""
    model = oracles("gpt2").tiny.model
    order = [i % 3 for i in range(20)]
    prompts = [PROMPTS[i] for i in order]
    name = "blocks.0.hook_resid_post"
    rows = []

    def zero_fourth(x: Any, hook: Any) -> None:
        rows.append(len(x))
        x[3] = 0

    for function in (
        partial(logit_lens, at="last"),
        kl_divergence,
        partial(activation_difference, at="last"),
        partial(pattern_difference, at="last"),
        direct_logit_attribution,
        partial(patching, grafts="sft @ last : o"),
    ):
        plain = function(model, prompts)
        with model.hooks(fwd_hooks=[(name, zero_fourth)]):
            table = function(model, prompts)
        value = plain.select_dtypes("float").columns[-1]
        changed = ~np.isclose(plain[value], table[value], atol=1e-4)
        assert set(plain["prompt"][changed]) == {3}
        assert set(rows) == {20}
    handle = model.hook_dict[name].register_forward_hook(lambda m, args, out: rows.append(len(out)))
    rows.clear()
    logit_lens(model, prompts, at="last")
    handle.remove()
    assert set(rows) == {20}


@pytest.mark.parametrize("hooks", [(), []])
def test_no_hook_is_not_all_hooks(oracles: OracleOf, hooks: Any) -> None:
    with pytest.raises(ValueError, match="does not name a hook"):
        activation_difference(oracles("gpt2").tiny.model, PROMPTS[0], hooks=hooks)


def test_wrong_types_are_named_for_users_who_run_without_type_checks(
    tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under pytest the run-time checks refuse these first; users see the library's own words.

    Regression: a tokenizer's output ran as the prompts "input_ids" and "attention_mask", and
    others were "object is not iterable".
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = tiny("gpt2", tokenizer="gpt2").model
    assert model.tokenizer is not None
    one = PROMPTS[0]
    encoded = model.tokenizer(one.text, return_tensors="pt")
    mask = model.resolve("sft @ last", one)

    printed: list[str] = []

    def tried(function: Callable[..., Any], *args: Any, **more: Any) -> None:
        try:
            printed.append(f"accepted {len(function(model, *args, **more))}")
        except ValueError as error:
            printed.append(" ".join(str(error).split())[:88])

    tried(logit_lens, encoded)
    tried(type(model).forward, dict(encoded))
    tried(logit_lens, model.batch(encoded["input_ids"], attention_mask=encoded["attention_mask"]))
    tried(logit_lens, None)
    tried(logit_lens, 5)
    for grafts in (mask, {"a": mask}, [mask], {"a": None}, 5, [None]):
        tried(logit_lens, one, grafts)
    tried(evaluate, [one], {"a": mask}, progress=False)
    tried(evaluate, [one], {"a": None}, progress=False)
    tried(logit_lens, one, full=mask)
    tried(logit_lens, one, full=5)
    for top_k in (np.int64(3), True, "3", 3.0, 0, None):
        tried(logit_lens, one, at="last", top_k=top_k)
        tried(patching, one, "sft @ last : o", top_k=top_k)
    table = logit_lens(model, one, at="last")
    for k in (np.int64(2), True, "1", 1.5, None):
        tried(lambda model, **more: emergence(table, **more), k=k)
    tried(weight_difference, source=1)
    for hooks in (5, None, [5], np.array(["hook_z", "hook_q"])):
        tried(activation_difference, one, hooks=hooks, at="last")
    for at in (torch.tensor([0]), torch.tensor(-1), np.array([0, -1]), torch.tensor([0.5]), None):
        tried(logit_lens, one, at=at)
    tried(logit_lens, one, at=torch.tensor([True]))
    tokens = "with the keys input_ids attention_mask is not a prompt. Of what a"
    none = "is not a prompt. Give texts, Prompts, or a tensor of token ids."
    mask = "is a GraftMask, which belongs to one batch of prompts. Give the graft"
    graft = "is not a graft. Give a Graft or its one-line text"
    number = "write a whole number from 1."
    options = [f"top_k={k}: {number}" for k in ("True", "'3'", "3.0", "0", "None") for _ in (0, 1)]
    hook = "Write a hook's name, or its last part for every layer: hook_embed"
    wanted = [
        *(f"a BatchEncoding {tokens}", f"a dict {tokens}", "accepted 56"),
        *(f"None {none}", f"5 {none}"),
        *(f"grafts {mask}", f"grafts['a'] {mask}", f"grafts[0] {mask}"),
        *(f"grafts['a']=None {graft}", f"grafts=5 {graft}", f"grafts[0]=None {graft}"),
        *(f"grafts['a'] {mask}", f"grafts['a']=None {graft}"),
        *(f"full {mask}", f"full=5 {graft}"),
        *("accepted 8", "accepted 4", *options),
        *("accepted 2", *(f"k={k}: {number}" for k in ("True", "'1'", "1.5", "None"))),
        "source=1 is not a source of this model. Allowed: pre sft.",
        *(f"no hook {name}. {hook}" for name in (5, None, 5)),
        *("accepted 48", "accepted 8", "accepted 8", "accepted 16"),
        *("at=[0.5]: 0.5 is not a whole number.", "at=None is not a position."),
        "at=[True]: True is not a whole number.",
    ]
    for said, start in zip(printed, wanted, strict=True):
        assert said.startswith(start)
