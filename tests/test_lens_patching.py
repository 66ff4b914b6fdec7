"""Cross-model activation patching, held against hooks on Hugging Face's own modules.

The oracle's base has hooks that give, at the sites of a graft, what the same modules of the other
model gave in its own run; under a graft as well, the sequential algorithm runs that hooked model.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pandas as pd
import pytest
import reference
import torch
from conftest import MakeTiny, Tiny
from lensoracle import (
    FAMILIES,
    PROMPTS,
    Asked,
    Oracle,
    Watched,
    chooser,
    mixed,
    n_layers,
    oracle_of,
    patched_copy,
    variants,
)
from pandas.testing import assert_frame_equal
from reference import components_of, sequential_graft
from torch import Tensor

from graftlens.evaluation import evaluate
from graftlens.graft import Graft
from graftlens.lens import direct_logit_attribution, kl_divergence, logit_lens, patched, patching
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt, PromptError
from graftlens.stats import compare, summarise

EACH_FAMILY = pytest.mark.parametrize("variant", variants(FAMILIES))
OracleOf = Callable[[str], Oracle]


@pytest.fixture(scope="module")
def oracles(tiny: MakeTiny) -> OracleOf:
    """The oracle of a variant."""
    return partial(oracle_of, tiny)


def _ids(n: int = 6, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def _close(ours: Tensor, theirs: Tensor, tolerance: float = 3e-5) -> None:
    assert ours.shape == theirs.shape
    difference = float(((ours - theirs).abs().max() / theirs.abs().max()).detach())
    assert difference < tolerance, difference


def _runs(n: int) -> dict[str, list[list[int]]]:
    return {"bos": [[0]], "last": [[n - 1]], "all": [list(range(n))]}


def _expected(
    t: Tiny, ids: Sequence[int], text: str, runs: Any = None, onto: str = "pre"
) -> Tensor:
    """Logits [pos, d_vocab] of the hooked Hugging Face model `onto`."""
    patch = chooser(text, runs or _runs(len(ids)), len(ids))
    model = patched_copy(t.sources, ids, patch, onto)
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0]


def _ours(t: Tiny, ids: Sequence[int], text: str, **run: Any) -> Tensor:
    tokens = torch.tensor([list(ids)])
    with patched(t.model, tokens, text), torch.no_grad():
        return t.model(tokens, **run)[0]


# --- Sites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "gemma3", "phi3-longrope"])
def test_each_component_at_two_places(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    ids = _ids()
    base = t.logits("pre", ids)
    for component in components_of(t.sources["pre"]):
        layer = "" if component in reference.MODEL_COMPONENTS else " : 1"
        text = f"sft @ [2, -1] : {component}{layer}"
        ours = _ours(t, ids, text)
        _close(ours, _expected(t, ids, text))
        moved = (ours - base).abs().amax(-1)
        assert (moved[:2] < 1e-5).all(), "nothing before the patch"
        assert moved[-1] > 1e-4, component


@EACH_FAMILY
def test_many_prompts_of_different_lengths(oracles: OracleOf, variant: str) -> None:
    """A padded batch, spans, heads of q, k, v and o, and every kind of component."""
    oracle = oracles(variant)
    model, text = oracle.tiny.model, mixed(variant) + " | sft @ [3] : q + k : 0,2 : 1"
    for side in ("right", "left") if variant == "qwen3" else ("right",):
        batch = model.batch(list(PROMPTS), padding_side=side)
        with patched(model, batch, text), torch.no_grad():
            logits = model(list(PROMPTS), padding_side=side)
        for row, start, asked in zip(logits, batch.starts, oracle.asked, strict=True):
            ours = row[start : start + len(asked.ids)]
            _close(ours, _expected(oracle.tiny, asked.ids, text, asked.spans))


@pytest.mark.parametrize("variant", ["neox-parallel", "phi3-longrope"])
@pytest.mark.parametrize("component", ["q", "k", "v", "o"])
def test_single_heads(tiny: MakeTiny, variant: str, component: str) -> None:
    t = tiny(variant)
    ids = _ids()
    seen = []
    for heads in ("0", "1"):
        text = f"sft @ [1, 4] : {component} : 0,2 : {heads}"
        ours = _ours(t, ids, text)
        _close(ours, _expected(t, ids, text))
        seen.append(ours)
    assert (seen[0] - seen[1]).abs().max() > 1e-3, "heads must differ"


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "neox-parallel"])
def test_the_bias_of_o_comes_with_all_its_heads(tiny: MakeTiny, variant: str) -> None:
    """Also where another position of the same layer has some of its heads patched only."""
    t = tiny(variant)
    ids = _ids()
    alone = "sft @ [1] : o : 1"
    _close(_ours(t, ids, alone), _expected(t, ids, alone))
    beside = alone + " | sft @ [3] : o : 1 : 0"
    ours = _ours(t, ids, beside)
    _close(ours, _expected(t, ids, beside))
    _close(ours[:3], _ours(t, ids, alone)[:3])


def test_all_heads_one_by_one_are_all_heads(tiny: MakeTiny) -> None:
    t = tiny("llama-biased")
    ids = _ids()
    one_by_one = " | ".join(f"sft @ [1] : o : 1 : {head}" for head in range(4))
    _close(_ours(t, ids, one_by_one), _ours(t, ids, "sft @ [1] : o : 1"))


def test_a_later_rule_takes_sites_back(tiny: MakeTiny) -> None:
    t = tiny("qwen3")
    ids = _ids()
    text = "sft @ all : attn + mlp | pre @ [2] | pre @ all : v : 1 : 0"
    _close(_ours(t, ids, text), _expected(t, ids, text))


@pytest.mark.parametrize("variant", ["gpt2", "gemma3"])
def test_each_site_from_the_source_that_is_named(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant, ("pre", "task", "relation"))
    ids = _ids()
    text = (
        "task @ all : attn : 0-1 | relation @ [3] : mlp | task @ last : mlp : 1 "
        "| relation @ last : o : 1 : 2 | relation @ last : unembed | task @ [0] : embed"
    )
    _close(_ours(t, ids, text), _expected(t, ids, text))
    onto = "task @ all"
    ours = _ours(t, ids, "relation @ [1, -1] : mlp_out", graft=onto)
    _close(ours, _expected(t, ids, "relation @ [1, -1] : mlp_out", onto="task"))


# --- What must hold whatever the weights ---------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "neox-parallel", "gemma3"])
def test_everything_everywhere_is_the_other_model(tiny: MakeTiny, variant: str) -> None:
    t = tiny(variant)
    ids = _ids()
    _close(_ours(t, ids, "sft @ all"), t.logits("sft", ids))
    _close(
        _ours(t, ids, "sft @ last : unembed"),
        torch.cat([t.logits("pre", ids)[:-1], t.logits("sft", ids)[-1:]]),
    )
    tokens = torch.tensor([ids])
    base = t.model(tokens)
    for nothing in ("none", Graft(), t.model.resolve(None, tokens)):
        with patched(t.model, tokens, nothing):
            assert torch.equal(t.model(tokens), base)


def test_a_patch_at_the_residual_stream_carries_the_other_models_information(
    tiny: MakeTiny,
) -> None:
    """All that is written into position 2 by layers 0 and 1 is sft's: so is the stream there."""
    t = tiny("gpt2")
    ids = _ids()
    tokens = torch.tensor([ids])
    writes = "sft @ [2] : embed + pos_embed | sft @ [2] : o + mlp_out : 0-1"
    with patched(t.model, tokens, writes):
        _, cache = t.model.run_with_cache(tokens)
    watched = Watched(t.sources["sft"])
    with torch.no_grad():
        sft = watched.run(watched.model(tokens, use_cache=False).logits[0])
    _close(cache["resid_post", 1][0, 2], sft.resid[2, 2])
    base = t.model.run_with_cache(tokens)[1]
    others = [0, 1, 3, 4, 5]
    assert (cache["resid_post", 1][0, others] - sft.resid[2, others]).abs().max() > 0.1
    _close(cache["resid_pre", 0][0, others], base["resid_pre", 0][0, others])


# --- With caches, hooks and grafts ---------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "gemma2", "olmo2"])
def test_a_patch_under_a_graft(tiny: MakeTiny, variant: str) -> None:
    """What is patched is the source's own; all else runs under the graft, position by position."""
    t = tiny(variant)
    ids = _ids()
    tokens, n = torch.tensor([ids]), len(ids)
    patch = "sft @ [1] : mlp_out + o : 0,1 | sft @ [4] : o : 1 : 1 | sft @ [2] : v : all : 0"
    graft = "sft @ [0, 4] | sft @ last : attn + unembed | sft @ [3] : o : 1 : 0,2"
    runner = patched_copy(t.sources, ids, chooser(patch, _runs(n), n), "pre")
    watched = Watched(runner)
    models = {**t.sources, "pre": watched.model}
    wanted = watched.run(sequential_graft(models, ids, chooser(graft, _runs(n), n)))
    with patched(t.model, tokens, patch):
        logits, cache = t.model.run_with_cache(tokens, graft=graft)
        with t.model.grafted(graft):
            again = t.model(tokens)
    _close(logits[0], wanted.logits)
    _close(again[0], wanted.logits)
    for l in range(n_layers(runner)):
        _close(cache["resid_post", l][0], wanted.resid[l + 1])
        _close(cache["mlp_out", l][0], wanted.mlp[l])
        _close(cache["z", l][0], wanted.z[l])


def test_caches_and_hooks_see_the_patch(tiny: MakeTiny) -> None:
    t = tiny("llama-biased")
    ids = _ids()
    tokens = torch.tensor([ids])
    own = Watched(t.sources["sft"])
    with torch.no_grad():
        sft = own.run(own.model(tokens, use_cache=False).logits[0])
    text = "sft @ [2] : v + mlp_out : 1"
    with patched(t.model, tokens, text):
        _, cache = t.model.run_with_cache(tokens)
        seen: list[Tensor] = []
        logits = t.model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: seen.append(x.clone()))]
        )
        no_mlp = t.model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: x * 0)]
        )
    _close(cache["v", 1][0, 2], sft.v[1, 2])
    _close(cache["mlp_out", 1][0, 2], sft.mlp[1, 2])
    _close(seen[0][0, 2], sft.mlp[1, 2])
    _close(logits[0], _expected(t, ids, text))
    assert (no_mlp - logits)[0, 2].abs().max() > 1e-2


def test_a_patch_is_the_sources_own_whatever_is_in_force_outside(tiny: MakeTiny) -> None:
    t = tiny("gpt2", ("pre", "task", "relation"))
    ids = _ids()
    tokens = torch.tensor([ids])
    text = "relation @ [2] : mlp_out : 1"
    with t.model.grafted("task @ all"), patched(t.model, tokens, text):
        ours = t.model(tokens)
    _close(ours[0], _expected(t, ids, text, onto="task"))


def test_patches_within_patches(tiny: MakeTiny) -> None:
    """Each source is patched in from its own run, not from one that the outer patch has changed."""
    t = tiny("gpt2", ("pre", "task", "relation"))
    ids = _ids()
    tokens = torch.tensor([ids])
    outer, inner = "task @ [1] : mlp_out : 0", "relation @ [3] : mlp_out : 1"
    with patched(t.model, tokens, outer), patched(t.model, tokens, inner):
        ours = t.model(tokens)
    _close(ours[0], _expected(t, ids, f"{outer} | {inner}"))


def test_the_lens_of_a_patched_run(oracles: OracleOf) -> None:
    oracle = oracles("gpt2")
    model, text = oracle.tiny.model, "sft @ first_entity : o + mlp_out : 0,1"
    asked = oracle.asked[2]
    runner = patched_copy(
        oracle.tiny.sources, asked.ids, chooser(text, asked.spans, len(asked.ids)), "pre"
    )
    watched = Watched(runner)
    with torch.no_grad():
        run = watched.run(watched.model(torch.tensor([asked.ids]), use_cache=False).logits[0])
    with patched(model, PROMPTS[2], text):
        table = logit_lens(model, PROMPTS[2])
    for layer in range(4):
        rows = table[(table["graft"] == "PRE") & (table["layer"] == layer)]
        said = oracle.read(2, "none", run.resid[layer])
        assert rows["logprob"].tolist() == pytest.approx(said[:, asked.target].tolist(), abs=1e-4)


# --- What is left behind, what is refused --------------------------------------------------------


def _is_clean(t: Tiny) -> bool:
    hooks = (m._forward_hooks or m._forward_pre_hooks for m in t.model.modules())
    return not any(hooks) and not t.model.active.stack and not t.model.active.running


def test_nothing_is_left_behind(tiny: MakeTiny) -> None:
    t = tiny("gpt2")
    tokens = torch.tensor([_ids()])
    base, prints = t.model(tokens), t.model.fingerprints()
    with patched(t.model, tokens, "sft @ last : mlp") as model:
        assert model is t.model
        assert not torch.equal(t.model(tokens), base)
        assert not _is_clean(t)
    assert _is_clean(t)
    assert torch.equal(t.model(tokens), base)
    with pytest.raises(RuntimeError, match="in between"), patched(t.model, tokens, "sft @ last"):
        raise RuntimeError("in between")
    assert _is_clean(t)

    def fail(x: Tensor, hook: Any) -> None:
        raise RuntimeError("in a hook")

    with (
        pytest.raises(RuntimeError, match="in a hook"),
        patched(t.model, tokens, "sft @ last"),
    ):
        t.model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", fail)])
    assert _is_clean(t)
    # While the source's own run is made.
    with (
        t.model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", fail)]),
        pytest.raises(RuntimeError, match="in a hook"),
        patched(t.model, tokens, "sft @ last"),
    ):
        pass
    assert not any(m._forward_pre_hooks for m in t.model.modules())
    assert _is_clean(t)
    assert torch.equal(t.model(tokens), base)
    assert t.model.fingerprints() == prints
    assert torch.is_grad_enabled()


def test_other_prompts_are_refused(oracles: OracleOf) -> None:
    t = oracles("llama-biased").tiny
    tokens, other = torch.tensor([_ids()]), torch.tensor([_ids(seed=4)])
    refused = pytest.raises(ValueError, match=r"these are not the prompts that are patched")
    with patched(t.model, tokens, "sft @ last : o"):
        for wrong in (other, tokens[:, :-1], tokens.repeat(2, 1)):
            with refused:
                t.model(wrong)
        with refused:
            t.model.generate(PROMPTS[0], max_new_tokens=2)
        t.model(tokens)
    with patched(t.model, list(PROMPTS), "sft @ last : o"), refused:
        t.model(list(PROMPTS), padding_side="left")
    with patched(t.model, list(PROMPTS), "sft @ last : o"), refused:
        t.model(list(PROMPTS)[::-1])
    assert _is_clean(t)


def test_the_same_tokens_padded_elsewhere_are_refused(tiny: MakeTiny) -> None:
    """The pad token also stands in the prompt: which rows are the prompt's, tokens do not say."""
    t = tiny("gpt2")
    tokens = torch.tensor([[5, 9, 8, 5], [7, 6, 4, 3]])
    right = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    left = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    batch = t.model.batch(tokens, attention_mask=right)
    with (
        patched(t.model, batch, "sft @ last : mlp_out"),
        pytest.raises(ValueError, match="these are not the prompts"),
    ):
        t.model(tokens, attention_mask=left)


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in", "use_attn_result"])
def test_flags_by_which_maps_do_not_run_as_one(tiny: MakeTiny, flag: str) -> None:
    t = tiny("gpt2")
    tokens = torch.tensor([_ids()])
    message = rf"model.cfg.{flag} is on, .*model.set_{flag}\(False\)"
    with patched(t.model, tokens, "sft @ last : o"):
        getattr(t.model, f"set_{flag}")(True)
        with pytest.raises(ValueError, match=message):
            t.model(tokens)
    with pytest.raises(ValueError, match=message), patched(t.model, tokens, "sft @ last : o"):
        pass
    assert _is_clean(t)
    # Where nothing is patched, nothing is in the way.
    with patched(t.model, tokens, Graft()):
        assert torch.equal(t.model(tokens), t.model(tokens, graft="none"))


def test_grafts_that_do_not_fit_are_refused(oracles: OracleOf) -> None:
    t = oracles("gpt2").tiny
    for graft, message in (
        ("sft @ friend", "no span 'friend'"),
        ("sft @ last : mlp_gate", "no component 'mlp_gate'"),
        ("stf @ last", "no source 'stf'"),
        ("sft @ last : mlp : 9", "no layer 9"),
    ):
        with pytest.raises(ValueError, match=message), patched(t.model, PROMPTS[0], graft):
            pass
        with pytest.raises(ValueError, match=message):
            patching(t.model, PROMPTS[0], graft)
    assert _is_clean(t)


def test_what_reads_a_few_rows_only_is_refused(oracles: OracleOf) -> None:
    """Regression: a sweep's token tree had the rows replaced that stand at the patched numbers, so
    position 0's logits were taken for the last one's."""
    model, one = oracles("gpt2").tiny.model, PROMPTS[0]
    refused = pytest.raises(ValueError, match="not the prompts that are patched, or not all")
    for text in ("sft @ [0] : unembed", "sft @ last", "sft @ first_entity : mlp_out"):
        with patched(model, one, text):
            for grafts in (["none"], ["none", "sft @ last"], ["sft @ last : mlp", "none"]):
                with suppress(ValueError):
                    table = evaluate(model, one, grafts, answers="first", progress=False)
                    found = table[table["graft"] == "none"]["logprob"].iloc[0]
                    target = int(table["target_id"].iloc[0])
                    wanted = model(one)[0, -1].log_softmax(-1)[target]
                    assert found == pytest.approx(float(wanted), abs=1e-4)
    with patched(model, one, "sft @ [0] : unembed"):
        with refused:
            evaluate(model, one, ["none"], answers="first", progress=False)
        with refused:
            model.logits_at(one, [[1]])


@pytest.mark.parametrize(
    ("variant", "rest"), [("gpt2", "embed + pos_embed + block"), ("gemma2", "embed + block")]
)
def test_streams_are_not_read_where_the_output_is_patched(
    oracles: OracleOf, variant: str, rest: str
) -> None:
    """Regression: they were read by the run's own norm and unembedding, which is another run's
    output. What the message advises patches all that comes before, and its output is the run's."""
    oracle = oracles(variant)
    model, asked = oracle.tiny.model, oracle.asked[1]
    for text, named in (
        ("sft @ last", "ln_final and unembed"),
        ("sft @ first_entity : unembed", "unembed"),
        ("sft @ last : ln_final + mlp", "ln_final"),
    ):
        with patched(model, PROMPTS[1], text), patched(model, PROMPTS[1], "sft @ [0] : v"):
            for function in (logit_lens, kl_divergence, direct_logit_attribution):
                with pytest.raises(ValueError, match=rf"patched\(…\) of {named}: ") as error:
                    function(model, PROMPTS[1])
                assert f'(": {rest}" is all the rest)' in str(error.value)
    advised = f"sft @ last : {rest}"
    inside = "sft @ last | pre @ all : ln_final + unembed"
    wanted = _expected(oracle.tiny, asked.ids, inside, asked.spans)[-1]
    with patched(model, PROMPTS[1], advised):
        lens = logit_lens(model, PROMPTS[1], at="last").set_index(["graft", "stream"])
        parts = direct_logit_attribution(model, PROMPTS[1])
        spread = kl_divergence(model, PROMPTS[1], at="last").set_index("graft")
        sft = model(PROMPTS[1], graft="sft @ all")[0, -1].log_softmax(-1)
    said = wanted.log_softmax(-1)
    ours = lens.loc[("PRE", "final_post"), "logprob"]
    assert ours == pytest.approx(float(said[asked.target]), abs=1e-4)
    kl = float((said.exp() * (said - sft)).sum().detach())
    assert spread.loc["PRE", "kl_full"] == pytest.approx(kl, abs=1e-4)
    if variant == "gpt2":  # Gemma 2 caps its logits
        total = parts[parts["graft"] == "PRE"]["contribution"].sum()
        assert total == pytest.approx(float(wanted[asked.target]), abs=1e-4)
    # Of another model, nothing is patched.
    with patched(model, PROMPTS[1], "sft @ last"):
        assert len(logit_lens(oracles("llama-biased").tiny.model, PROMPTS[1], at="last")) == 8


@pytest.mark.parametrize(
    ("variant", "text", "named"),
    [
        ("gpt2", "sft @ last : o + mlp : 1-2", r"o \(layers 1-2\)"),
        ("gpt2", "sft @ first_entity : o : 0 : 1", r"o \(layers 0\)"),
        ("gemma2", "sft @ last : ln1_post : 1", r"ln1_post \(layers 1\)"),
    ],
)
def test_heads_do_not_add_up_to_a_patched_attention(
    oracles: OracleOf, variant: str, text: str, named: str
) -> None:
    """Regression: their contributions were not those of what was patched in, without a word."""
    model = oracles(variant).tiny.model

    def gaps(by: str) -> pd.Series:
        table = direct_logit_attribution(model, PROMPTS, by=by, at="first_entity + last")
        runs = table.groupby(["prompt", "graft", "position"])
        return runs["contribution"].sum() - runs["logit"].first()

    with patched(model, PROMPTS, text):
        for by in ("head", "src_pos"):
            with pytest.raises(ValueError, match=rf'{named}: what by=\'{by}\' .*by="component" or'):
                gaps(by)
        for by in ("component", "layer"):
            assert gaps(by).abs().max() < 1e-4
    with patched(model, PROMPTS, "sft @ last : q + k + v + mlp : 1"):
        for by in ("head", "src_pos"):
            assert gaps(by).abs().max() < 1e-4


# --- Patching the base in ------------------------------------------------------------------------


def test_nothing_of_the_base_can_be_patched_in(oracles: OracleOf) -> None:
    """Regression: `pre @ …` patched nothing, and what ran was what runs without a patch."""
    model = oracles("gpt2").tiny.model
    texts = ("pre @ first_entity", "sft @ all | pre @ all")
    masks = (model.resolve(texts[0], PROMPTS[0]),)
    for graft in (*texts, *map(Graft.parse, texts), *masks):
        with (
            pytest.raises(ValueError, match=r"gives no site to a source other than the") as error,
            patched(model, PROMPTS[0], graft),
        ):
            pass
        assert 'from_pretrained({"sft": …, "pre": …})) and patch "pre @ …"' in str(error.value)


@pytest.mark.parametrize("variant", ["gpt2", "gemma3"])
def test_the_base_is_patched_onto_the_finetuned_model_that_is_loaded_first(
    tiny: MakeTiny, variant: str
) -> None:
    """As the message above advises: PRE's activations in SFT's run."""
    pair = tiny(variant).sources
    turned = {"sft": pair["sft"], "pre": pair["pre"]}
    model = GraftedTransformer.from_pretrained(turned, check=False, verbose=False)
    ids = _ids()
    tokens = torch.tensor([ids])
    text = "pre @ [1, 3] : mlp + v : 0-1 | pre @ [2] : o : 1 : 0"
    choose = chooser(text, _runs(len(ids)), len(ids), base="sft")
    runner = patched_copy(turned, ids, choose, "sft")
    with torch.no_grad(), patched(model, tokens, text):
        ours = model(tokens)[0]
        wanted = runner(tokens, use_cache=False).logits[0]
        sft = turned["sft"](tokens, use_cache=False).logits[0]
    _close(ours, wanted)
    assert (ours - sft)[1:].abs().max() > 1e-2


# --- The table -----------------------------------------------------------------------------------

GRAFTS: Mapping[str, str] = {
    "FE": "sft @ first_entity",
    "LT": "sft @ last : o + mlp_out : 1-2",
}


@pytest.mark.parametrize("variant", ["gpt2"])
def test_grafts_and_patches_side_by_side(oracles: OracleOf, variant: str) -> None:
    oracle = oracles(variant)
    tokenizer = oracle.tiny.tokenizer
    assert tokenizer is not None
    table = patching(oracle.tiny.model, PROMPTS, GRAFTS, top_k=3)
    names = ["PRE", "SFT", "FE", "FE (patched)", "LT", "LT (patched)"]
    assert table["graft"].tolist() == names * 3
    assert table["prompt"].tolist() == [i for i in range(3) for _ in names]
    assert table["how"].tolist() == ["graft", "graft", *["graft", "patch"] * 2] * 3
    assert set(table["base_run"]) == {"PRE"}
    assert set(table["full_run"]) == {"SFT"}
    texts = {"PRE": "none", "SFT": "sft @ all", **GRAFTS}
    for _, row in table.iterrows():
        i, asked = row["prompt"], oracle.asked[row["prompt"]]
        text = texts[row["graft"].removesuffix(" (patched)")]
        assert row["rule"] == str(Graft.parse(text))
        if row["how"] == "patch":
            inside = f"{text} | pre @ all : ln_final + unembed"
            logits = _expected(oracle.tiny, asked.ids, inside, asked.spans)[-1]
        else:
            logits = oracle.run(i, text).logits[-1]
        said = logits.log_softmax(-1)
        assert row["target_id"] == asked.target
        assert row["target"] == tokenizer.decode([asked.target])
        assert (row["text"], row["answer"]) == (asked.prompt.text, asked.prompt.answer)
        assert row["logprob"] == pytest.approx(float(said[asked.target]), abs=1e-4)
        assert row["prob"] == pytest.approx(float(said[asked.target].exp()), rel=1e-3)
        assert row["rank"] == 1 + int((said > said[asked.target]).sum())
        top = said.topk(3)
        assert row["top_tokens"] == [tokenizer.decode([t]) for t in top.indices.tolist()]
        assert row["top_probs"] == pytest.approx(top.values.exp().tolist(), rel=1e-3)
    assert (table["reason"].isna()).all()
    few = patching(oracle.tiny.model, PROMPTS, GRAFTS, top_k=3, patches_only=True)
    kept = table[(table["how"] == "patch") | table["graft"].isin(["PRE", "SFT"])]
    assert_frame_equal(few, kept.reset_index(drop=True))


def test_many_patches_are_captured_a_few_at_a_time(
    oracles: OracleOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source runs once for all of them, or where memory is small for each; the numbers stay."""
    model, runs = oracles("gpt2").tiny.model, []
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: runs.append(value))]):
        together = patching(model, PROMPTS, GRAFTS, patches_only=True)
        counts = [len(runs)]
        monkeypatch.setattr(sys.modules["graftlens.lens.patching"], "HELD", 1)
        assert_frame_equal(patching(model, PROMPTS, GRAFTS, patches_only=True), together)
        counts.append(len(runs) - counts[0])
    assert counts == [2 + 1 + 2, 2 + 2 + 2]  # PRE and SFT; SFT again; the patched runs


def test_the_table_goes_into_the_statistics(oracles: OracleOf) -> None:
    oracle = oracles("gpt2")
    prompts = [PROMPTS[2 * (i % 2)] for i in range(10)]
    table = patching(oracle.tiny.model, prompts, GRAFTS)
    assert table["prompt"].tolist() == [i for i in range(10) for _ in range(6)]
    summary = summarise(table, by=(), resamples=200).set_index("graft")
    means = table.groupby("graft")["logprob"].mean()
    for name in ("FE", "FE (patched)", "LT (patched)"):
        recovery = (means[name] - means["PRE"]) / (means["SFT"] - means["PRE"])
        assert summary.loc[name, "recovery"] == pytest.approx(recovery, abs=1e-5)
        assert summary.loc[name, "n"] == 10
    found = compare(table, "FE (patched)", "FE", "logprob", resamples=200, permutations=200)
    assert found.difference == pytest.approx(means["FE (patched)"] - means["FE"], abs=1e-5)


def test_the_output_itself_is_not_patched(oracles: OracleOf) -> None:
    """SFT's own logits are SFT's answer whatever came before, which would say nothing."""
    oracle = oracles("gpt2")
    inside = "sft @ last | pre @ all : ln_final + unembed"
    grafts = {"LT": "sft @ last", "LT inside": inside, "out": "sft @ last : unembed"}
    table = patching(oracle.tiny.model, PROMPTS[0], grafts).set_index("graft")
    assert table.loc["LT (patched)", "logprob"] == table.loc["LT inside (patched)", "logprob"]
    assert table.loc["LT (patched)", "logprob"] != pytest.approx(table.loc["SFT", "logprob"])
    asked = oracle.asked[0]
    wanted = _expected(oracle.tiny, asked.ids, inside, asked.spans)[-1].log_softmax(-1)
    wanted_logprob = pytest.approx(float(wanted[asked.target]), abs=1e-4)
    assert table.loc["LT inside (patched)", "logprob"] == wanted_logprob
    assert pd.isna(table.loc["out (patched)", "logprob"])
    assert "output is the answer itself" in table.loc["out (patched)", "reason"]
    assert table.loc["out", "reason"] is None
    summary = summarise(table.reset_index(), by=(), grafts=["PRE", "SFT", "LT"], resamples=50)
    assert summary["n"].tolist() == [1, 1, 1]


def test_a_graft_without_sites_has_no_patch(oracles: OracleOf) -> None:
    """Regression: the reason was that of a graft of the output, whatever the graft was."""
    model = oracles("gpt2").tiny.model
    alone = Prompt("{first_entity}", {"first_entity": "A"}, " Robert")
    grafts = {
        "base": "none",
        "base again": "none",
        "written out": "pre @ all",
        "taken back": "sft @ last | pre @ first_entity",
        "out": "sft @ last : unembed | pre @ first_entity",
    }
    table = patching(model, [alone, PROMPTS[0]], grafts)
    assert table["graft"].iloc[0] == "base"
    table = table.set_index(["graft", "prompt"])
    no_site = "the graft gives no site to a source other than the base"
    for name, reasons in (
        ("base again", [no_site, no_site]),
        ("written out", [no_site, no_site]),
        ("taken back", [no_site, None]),
        ("out", [no_site, "the graft covers only ln_final and unembed"]),
    ):
        for prompt, reason in enumerate(reasons):
            row = table.loc[(f"{name} (patched)", prompt)]
            assert row["how"] == "patch"
            assert str(row["reason"]).startswith(str(reason))
            numbers = row[["rank", "prob", "logprob", "top_tokens", "top_probs"]]
            assert [n is pd.NA for n in numbers] == [reason is not None] * 5
            graft = table.loc[(name, prompt)]
            assert graft["reason"] is None
            assert graft["rank"] >= 1, "the graft's own row keeps its numbers"
    moved = table.loc[("taken back (patched)", 1), "logprob"]
    with patched(model, PROMPTS[0], "sft @ last : embed + pos_embed + block | pre @ first_entity"):
        said = model(PROMPTS[0])[0, -1].log_softmax(-1).detach()
    target = table.loc[("base", 1), "target_id"]
    assert moved == pytest.approx(float(said[target]), abs=1e-4)


def test_the_lens_of_many_patched_prompts(oracles: OracleOf) -> None:
    """Those that are patched together run together, however many they are."""
    oracle = oracles("gpt2")
    many = [PROMPTS[0]] * 10
    with patched(oracle.tiny.model, many, "sft @ last : mlp_out"):
        table = logit_lens(oracle.tiny.model, many, at="last")
    asked = oracle.asked[0]
    wanted = _expected(oracle.tiny, asked.ids, "sft @ last : mlp_out", asked.spans)[-1]
    ours = table[(table["graft"] == "PRE") & (table["layer"] == 3)]["logprob"]
    assert ours.tolist() == pytest.approx([float(wanted.log_softmax(-1)[asked.target])] * 10)


def test_names_of_patched_runs_are_their_own(oracles: OracleOf) -> None:
    """Two runs of one name would be one graft to the statistics."""
    model = oracles("gpt2").tiny.model
    grafts = {"FE": "sft @ first_entity", "FE (patched)": "sft @ last"}
    with pytest.raises(ValueError, match=r"'FE \(patched\)', which is the name of the patch"):
        patching(model, PROMPTS[0], grafts)


def test_where_nothing_is_patched_a_flag_is_no_hindrance(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    model.set_use_attn_result(True)
    try:
        table = patching(model, PROMPTS[0], {"SFT": "sft @ all"})
    finally:
        model.set_use_attn_result(False)
    assert table["graft"].tolist() == ["PRE", "SFT"]


def test_prompts_that_cannot_be_scored(oracles: OracleOf) -> None:
    model, graft = oracles("gpt2").tiny.model, GRAFTS["LT"]
    bare = Prompt("Ann met")
    with pytest.raises(PromptError, match=r"prompt 1 has no answer to score"):
        patching(model, [PROMPTS[0], bare], graft)
    with pytest.raises(PromptError, match=r"prompt 9 has no answer to score"):
        patching(model, [PROMPTS[0]] * 9 + [bare], graft)
    with pytest.raises(PromptError, match=r"prompt 0 has no answer to score"):
        patching(model, "Ann met", graft)
    with pytest.raises(PromptError, match=r"prompt 9, rule 'sft @ first_entity': no span"):
        patching(model, [PROMPTS[0]] * 9 + [Prompt("Al met", answer=" Robert")], GRAFTS)


def test_several_sources_need_one_to_be_held_against(tiny: MakeTiny) -> None:
    t = tiny("gpt2", ("pre", "task", "relation"), tokenizer="gpt2")
    with pytest.raises(ValueError, match=r'sources pre task relation: .*full="relation @ all"'):
        patching(t.model, PROMPTS[0], "task @ last")
    both = "task @ first_entity | relation @ last : mlp"
    table = patching(t.model, PROMPTS[0], {"both": both}, full="task @ all")
    asked = Asked(PROMPTS[0], t.tokenizer)
    ours = table.set_index("graft")["logprob"]
    wanted = _expected(t, asked.ids, both, asked.spans)[-1].log_softmax(-1)[asked.target]
    assert ours["both (patched)"] == pytest.approx(float(wanted), abs=1e-4)
    said = t.logits("task", asked.ids)[-1].log_softmax(-1)[asked.target]
    assert ours["SFT"] == pytest.approx(float(said), abs=1e-4)


def test_ends_under_their_own_names_are_not_patched(oracles: OracleOf) -> None:
    model = oracles("gpt2").tiny.model
    table = patching(model, PROMPTS[0], {"whole": "sft @ all", "LT": "sft @ last : o"})
    assert table["graft"].tolist() == ["PRE", "whole", "LT", "LT (patched)"]
    assert set(table["base_run"]) == {"PRE"}
    assert set(table["full_run"]) == {"whole"}
