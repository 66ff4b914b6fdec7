"""Pairs that differ in their tokens, rotary tables or biases: DESIGN's laws hold for them, too.

The oracle is the sequential algorithm in `reference`, which swaps the parameters of Hugging Face's
modules and turns each head of q and of k by its own source's table.
"""

import copy
import random
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import families
import numpy as np
import pytest
import torch
from conftest import Tiny
from families import model_of
from reference import sequential_graft
from test_laws import _chooser, _close, _join, _random_rules, _tokens
from torch import Tensor
from toytokenizers import TOKENIZERS
from transformers import PreTrainedModel

from graftlens.components import Component
from graftlens.graft import Graft
from graftlens.lens import direct_logit_attribution, kl_divergence, weight_difference
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.sequential import Sequential
from graftlens.prompts import Prompt, PromptError
from graftlens.sweep.scoring import score
from graftlens.sweep.trust import trust_report

Pair = dict[str, PreTrainedModel]


def _gemma3(theta: float, tokens: int) -> Any:
    config = _with_tokens(families._gemma3(), tokens)
    config.rope_parameters["full_attention"]["rope_theta"] = theta
    return config


def _with_tokens(config: Any, tokens: int) -> Any:
    config.vocab_size = tokens
    return config


def _llama3() -> dict[str, Any]:
    scaled = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return families._rope(
        rope_type="llama3", factor=8.0, original_max_position_embeddings=16, **scaled
    )


TOKENIZER = TOKENIZERS["gpt2"]()
FEW, MANY = len(TOKENIZER), len(TOKENIZER) + 7
THETA = families._rope(theta=11.0)


def _llama(**changes: Any) -> Any:
    return families._llama(**{"vocab_size": FEW} | changes)


#: What differs -> configs of the base and of the other source.
CONFIGS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "tokens": lambda: (_llama(), _llama(vocab_size=MANY)),
    "fewer tokens": lambda: (families._gpt2(vocab_size=MANY), families._gpt2(vocab_size=FEW)),
    "theta": lambda: (_llama(), _llama(rope_parameters=THETA)),
    "scaling added": lambda: (_llama(), _llama(rope_parameters=_llama3())),
    "theta of some layers": lambda: (_gemma3(500.0, FEW), _gemma3(30.0, MANY)),
    "theta, a part of each head": lambda: (
        families._neox(vocab_size=FEW),
        families._neox(
            vocab_size=FEW, rope_parameters=families._rope(11.0, partial_rotary_factor=0.5)
        ),
    ),
    "how much of each head is turned": lambda: (
        families._neox(vocab_size=FEW, rope_parameters=families._rope(partial_rotary_factor=0.25)),
        families._neox(
            vocab_size=FEW, rope_parameters=families._rope(11.0, partial_rotary_factor=0.75)
        ),
    ),
    "theta, turned in float32": lambda: (
        families._olmo(vocab_size=FEW),
        families._olmo(vocab_size=FEW, rope_parameters=THETA),
    ),
    "longrope": lambda: (
        families._phi3(vocab_size=FEW),
        _with_tokens(families.VARIANTS["phi3-longrope"](), FEW),
    ),
    "biases": lambda: (_llama(), _llama(attention_bias=True, mlp_bias=True)),
    "all of these": lambda: (
        _llama(tie_word_embeddings=True, attention_bias=True),
        _llama(vocab_size=MANY, mlp_bias=True, rope_parameters=THETA),
    ),
}
TOKENS = ("tokens", "fewer tokens", "theta of some layers", "all of these")
ROTARY = ("theta", "theta of some layers", "longrope", "all of these")
SOME = (
    *("fewer tokens", "theta of some layers", "longrope", "all of these"),
    "how much of each head is turned",
)
EACH = pytest.mark.parametrize("what", CONFIGS)
load = GraftedTransformer.from_pretrained


@cache
def _tiny(what: str) -> Tiny:
    sources = dict(zip(("pre", "sft"), map(model_of, CONFIGS[what](), (1, 2)), strict=True))
    model = load(sources, tokenizer=TOKENIZER, verbose=False)
    return Tiny(what, sources, model, TOKENIZER)


def _same(ours: Tensor, theirs: Tensor) -> None:
    """Equal logits, -inf at the same tokens."""
    assert torch.equal(ours.isneginf(), theirs.isneginf())
    lacks = theirs.isneginf()
    _close(ours.masked_fill(lacks, 0.0), theirs.masked_fill(lacks, 0.0))


def _own(t: Tiny, source: str, tokens: list[int]) -> Tensor:
    """A source's own logits, -inf for tokens that it lacks."""
    logits = t.logits(source, tokens)
    lacks = t.model.arch.d_vocab - logits.shape[1]
    return torch.cat([logits, logits.new_full((len(logits), lacks), -torch.inf)], dim=1)


def _run(t: Tiny, tokens: list[int], graft: str | Graft) -> Tensor:
    return t.model(torch.tensor([tokens]), graft=graft)[0].detach()


# -- the laws ----------------------------------------------------------------------------------


@EACH
def test_one_source_everywhere_is_its_own_model(what: str) -> None:
    t = _tiny(what)
    for length in (1, 11, 40):
        tokens = _tokens(length, seed=length)
        for graft, source in (("none", "pre"), ("sft @ all", "sft"), ("pre @ all", "pre")):
            _same(_run(t, tokens, graft), _own(t, source, tokens))


@EACH
def test_random_grafts_are_the_sequential_algorithm(what: str) -> None:
    t, rng = _tiny(what), random.Random(f"pair {what}")
    peer = Sequential(t.model)
    for number in range(6):
        tokens = _tokens(40 if what == "longrope" and number % 2 else 11, seed=number)
        rules = _random_rules(t, rng, 3, len(tokens))
        graft = _join(rules)
        wanted = sequential_graft(t.sources, tokens, _chooser(rules, "pre"))
        _same(_run(t, tokens, graft), wanted)
        (item,) = t.model.batch(torch.tensor([tokens])).prompts
        _same(peer.logits(item, graft, by_run=bool(number % 2)), wanted)


@pytest.mark.parametrize("what", SOME)
def test_a_sweep_is_its_grafts_one_by_one(what: str) -> None:
    t, rng = _tiny(what), random.Random(f"sweep {what}")
    prompt = Prompt("Anders acted in The", answer=" Quiet Harbour")
    length = len(t.model.to_tokens(prompt.text)[0])
    grafts = {f"g{i}": _join(_random_rules(t, rng, 2, length)) for i in range(10)}
    grafts |= {"pre": Graft(), "sft": Graft.rule("sft")}
    table = score(
        t.model,
        {0: prompt},
        grafts,
        measures=["kl_base", "entropy"],
        references=grafts | {"base": Graft()},
    )
    first = int(table["target_id"].iloc[0])
    base = _run(t, t.model.to_tokens(prompt.text)[0].tolist(), "none")[-1]
    for _, row in table.iterrows():
        logits = t.model([prompt], graft=row["rule"])[0, -1].detach()
        assert row["logprob"] == pytest.approx(float(logits.log_softmax(-1)[first]), abs=2e-5)
        p, q = (x[: t.model.vocabularies.common].double().log_softmax(-1) for x in (logits, base))
        assert row["kl_base"] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5)
        assert row["entropy"] == pytest.approx(float(-(p.exp() * p).sum()), abs=1e-5)
    report = trust_report(t.model, {0: prompt}, grafts, table, seed=1)
    assert report.ok, report.text()
    assert len(report.cells) == 6
    assert not report.unchecked
    assert report.differences == t.model.told_differences
    for difference in report.differences:
        assert difference.key in report.text()


@pytest.mark.parametrize("what", SOME)
def test_generation_with_a_cache_is_that_without(what: str) -> None:
    t = _tiny(what)
    for graft in ("sft @ last", "sft @ [1,2] : q + v | pre @ last : unembed", "sft @ ~last : k"):
        prompts = torch.tensor([_tokens(9, seed=4)])
        ours, theirs = (
            t.model.generate(prompts, 6, graft=graft, stop_at_eos=False, use_past_kv_cache=cached)
            for cached in (True, False)
        )
        assert torch.equal(ours, theirs)


def test_an_identity_is_a_sources_own() -> None:
    """It does not depend on what the source is paired with."""
    theta, tokens = (_tiny(what).model.fingerprints() for what in ("theta", "tokens"))
    assert theta["pre"] == tokens["pre"]
    assert len({*theta.values(), *tokens.values()}) == 3
    sources = _tiny("theta").sources
    other = copy.deepcopy(sources["pre"])
    other.config.rope_parameters["rope_theta"] = 12.0
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config)
    changed = load(sources | {"sft": other}, tokenizer=TOKENIZER, verbose=False).fingerprints()
    assert changed["pre"] == theta["pre"] != changed["sft"], "equal tensors, another table"


# -- tokens that one source lacks --------------------------------------------------------------


@pytest.mark.parametrize("what", TOKENS)
def test_weights_of_tokens_that_a_source_lacks_are_nan(what: str) -> None:
    t = _tiny(what)
    model = t.model
    assert model.vocabularies.common == FEW
    assert model.cfg.d_vocab == MANY
    for number, (name, source) in enumerate(t.sources.items()):
        size = model.vocabularies.sizes[number]
        embed, unembed = source.get_input_embeddings(), source.get_output_embeddings()
        assert torch.equal(model.W_E[number, :size], embed.weight)
        assert torch.equal(model.W_U[number].T[:size], unembed.weight)
        assert bool(model.W_E[number, size:].isnan().all())
        assert bool(model.W_U[number, :, size:].isnan().all())
        with model.grafted(f"{name} @ all"):
            assert bool(model.embed.W_E[size:].isnan().all())
            assert int(model.unembed.W_U.isnan().any(0).sum()) == MANY - size
            assert bool(model.embed.W_E[:size].isfinite().all())
    half = model(torch.tensor([[5, 6]]), graft="0.5*sft @ last : unembed")[0]
    assert int(half[-1].isneginf().sum()) == MANY - FEW, "a share is enough"
    nothing = model(torch.tensor([[5, 6]]), graft="0*sft @ last : unembed")[0]
    assert torch.equal(nothing, model(torch.tensor([[5, 6]]))[0]), "a share of zero is dropped"


@pytest.mark.parametrize("what", TOKENS)
def test_a_token_that_a_source_lacks_is_not_read(what: str) -> None:
    t = _tiny(what)
    few, many = sorted(t.sources, key=lambda name: t.sources[name].config.vocab_size)
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, FEW + 2, 11]])
    for graft in (f"{few} @ all", f"{many} @ all | 0.5*{few} @ [2] : embed"):
        with pytest.raises(PromptError) as caught:
            t.model(tokens, graft=graft)
        assert str(caught.value) == (
            f"prompt 1: token {FEW + 2} ('') at position 2 has no row in the embedding of {few!r} "
            f"({FEW} rows), which is used there. Take embed there from a source that has the token."
        )

    def choose(component: str, layer: Any, position: int, unit: Any) -> str:
        return many if (component, position) == ("embed", 2) else few

    run = _run(t, tokens[1].tolist(), f"{few} @ all | {many} @ [2] : embed")
    _same(run, sequential_graft(t.sources, tokens[1].tolist(), choose))
    _same(_run(t, tokens[1].tolist(), f"{many} @ all"), _own(t, many, tokens[1].tolist()))


@pytest.mark.parametrize("what", TOKENS)
def test_generation_ends_where_a_source_cannot_read(what: str) -> None:
    t = _tiny(what)
    few, many = sorted(t.sources, key=lambda name: t.sources[name].config.vocab_size)
    model = copy.deepcopy(t.model)
    with torch.no_grad():  # the larger source gives mostly tokens of its own
        weight = model.unembed.linear.weight[model.sources.index(many)]
        weight[FEW:] *= 50
    prompts = torch.tensor([_tokens(6, seed=s) for s in range(6)])
    graft = f"{few} @ all | {many} @ last : unembed"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = model.generate(prompts, 5, graft=graft, eos_token_id=[], new_only=True)
        short = model.generate(prompts, 1, graft=graft, eos_token_id=[], new_only=True)
    said = [str(w.message) for w in caught]
    ended = {}
    for number, row in enumerate(made.tolist()):
        read = row[:-1] if len(row) == 5 else row  # all may have ended before
        odd = [step for step, token in enumerate(read) if token >= FEW]
        if odd:
            ended[number] = row[odd[0]], 6 + odd[0]
            assert set(row[odd[0] + 1 :]) <= {0}, "filled up"
    assert len(ended) == len(said) > 0, "nothing is said of a last token, which is not read"
    assert torch.equal(short, made[:, :1])
    for (number, (token, position)), text in zip(
        sorted(ended.items(), key=lambda e: e[1][1]), said, strict=True
    ):
        assert text.startswith(
            f"prompt {number} ends with the token generated last: token {token} ('') at position "
            f"{position} has no row in the embedding of {few!r}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = model.generate(prompts, 5, graft=f"{many} @ all", eos_token_id=[], new_only=True)
    assert bool((alone >= FEW).any())


def test_what_compares_runs_does_so_over_the_common_tokens() -> None:
    t = _tiny("tokens")
    prompt = Prompt("Anders acted in The", answer=" Quiet")
    ids = t.model.to_tokens(prompt.text)[0].tolist()
    table = kl_divergence(t.model, [prompt], {"mixed": "sft @ last : unembed"})
    said = {
        name: _run(t, ids, graft)[:, :FEW].double().log_softmax(-1)
        for name, graft in (("pre", "none"), ("mixed", "sft @ last : unembed"))
    }
    ours = table[table["graft"] == "mixed"]["kl_base"].to_numpy()
    p, q = said["mixed"], said["pre"]
    np.testing.assert_allclose(ours, (p.exp() * (p - q)).sum(-1).numpy(), atol=1e-5)

    found = direct_logit_attribution(t.model, [prompt], {"g": "sft @ last"}, against="mean")
    target = t.model.to_tokens(" Quiet", prepend_bos=False)[0, 0]
    for name, graft in (("g", "sft @ last"), ("none", "none")):
        rows = found[found["graft"] == name] if name == "g" else found[found["rule"] == "none"]
        logits = _run(t, ids, graft)[-1]
        wanted = float(logits[target] - logits[:FEW].mean())
        assert rows["contribution"].sum() == pytest.approx(wanted, abs=1e-4)

    with pytest.raises(PromptError, match=r"prompt 0, position \d+, graft 'none': token 400 \("):
        _attributed(t, FEW + 3)

    changes = weight_difference(t.model).set_index(["component", "parameter"])
    for component, module in (
        ("embed", "get_input_embeddings"),
        ("unembed", "get_output_embeddings"),
    ):
        old, new = (getattr(m, module)().weight[:FEW].double() for m in t.sources.values())
        row = changes.loc[component, "weight"]
        assert row["entries"] == old.numel()
        assert row["frobenius"] == pytest.approx(float((new - old).norm()))


def _attributed(t: Tiny, target: int) -> None:
    """Attribution of a token that the larger source alone has."""
    model = copy.copy(t.model)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_tokens([f"<{i}>" for i in range(MANY - FEW)], special_tokens=True)
    model.tokenizer = tokenizer
    answer = tokenizer.convert_ids_to_tokens(target)
    direct_logit_attribution(model, [Prompt("Anders acted", answer=answer)], {"g": "sft @ all"})


# -- rotary tables that differ -----------------------------------------------------------------


@pytest.mark.parametrize("what", ROTARY)
def test_a_mixture_of_queries_that_are_turned_differently_is_refused(what: str) -> None:
    t = _tiny(what)
    tokens = torch.tensor([_tokens(9, seed=1)])
    layer = 2
    for graft in (f"0.5*sft @ last : q : {layer}", f"2*sft @ [1] : k : {layer} : 0"):
        with pytest.raises(ValueError, match=rf"[qk] in layer {layer} would mix 'pre' and 'sft'"):
            t.model(tokens, graft=graft)
        prompt = Prompt("Anders acted", answer=" in")
        with pytest.raises(ValueError, match="rotary tables differ, so that no table turns"):
            score(t.model, {0: prompt}, {"g": Graft.parse(graft)})
    mask = t.model.resolve(Graft(), tokens)
    strengths = torch.full((9,), 0.5, requires_grad=True)
    with pytest.raises(ValueError, match="a tensor of strengths, as attribution mixes it in: q in"):
        t.model(tokens, graft=mask.strengthened("sft", {("q", layer): strengths}))
    run = t.model(tokens, graft=mask.strengthened("sft", {("v", layer): strengths}))
    run[0, -1, 5].backward()
    assert bool(strengths.grad.abs().sum() > 0)
    for graft in ("1*sft @ last : q", "0*sft @ last : q", "0.5*sft @ last : v + o + mlp"):
        t.model(tokens, graft=graft)


def test_layers_with_the_same_table_may_be_mixed() -> None:
    """Only Gemma 3's full attention layers have another one here."""
    t = _tiny("theta of some layers")
    tokens = _tokens(9, seed=1)
    graft = "0.25*sft @ last : q + k : 0"

    def choose(component: str, layer: Any, position: int, unit: Any) -> Any:
        mixed = component in ("q", "k") and layer == 0 and position == 8
        return {"pre": 0.75, "sft": 0.25} if mixed else "pre"

    _same(_run(t, tokens, graft), sequential_graft(t.sources, tokens, choose))


def test_equal_weights_with_other_tables_are_not_equal_sources() -> None:
    """Regression: a sweep would share the rows of queries that are turned differently."""
    pre = _tiny("theta").sources["pre"]
    other = copy.deepcopy(pre)
    other.config.rope_parameters["rope_theta"] = 11.0
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config)
    model = load({"pre": pre, "sft": other}, tokenizer=TOKENIZER, verbose=False)
    assert model.equal_sources(Component.Q, 0) == model.equal_sources(Component.K, 2) == (0, 1)
    assert model.equal_sources(Component.V, 0) == (0, 0)
    prompt = Prompt("Anders acted in The", answer=" Quiet")
    grafts = {"q": "sft @ last : q", "k": "sft @ ~last : k", "both": "sft @ all"}
    table = score(model, {0: prompt}, {n: Graft.parse(g) for n, g in grafts.items()})
    target = int(table["target_id"].iloc[0])
    seen = set()
    for (_, row), graft in zip(table.iterrows(), grafts.values(), strict=True):
        wanted = model([prompt], graft=graft)[0, -1].detach().log_softmax(-1)[target]
        assert row["logprob"] == pytest.approx(float(wanted), abs=2e-5)
        seen.add(round(row["logprob"], 4))
    assert len(seen) == 3


# -- with adapters -----------------------------------------------------------------------------


def test_an_adapter_beside_a_source_with_more_tokens_and_another_table() -> None:
    """Its additions to q go with its base's table, those to the tables with its base's tokens."""
    from peft import LoraConfig, get_peft_model

    sources = dict(_tiny("all of these").sources)
    untied = copy.deepcopy(_tiny("theta").sources["pre"])
    targets = ["q_proj", "k_proj", "lm_head", "embed_tokens"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapter = get_peft_model(copy.deepcopy(untied), lora).eval()
    model = load(
        {"pre": untied, "lora": adapter, "chat": sources["sft"]},
        tokenizer=TOKENIZER,
        verbose=False,
    )
    assert model.vocabularies.sizes == (FEW, FEW, MANY)
    tokens = torch.tensor([_tokens(9, seed=3)])
    with torch.no_grad():
        theirs = adapter(input_ids=tokens).logits[0]
    ours = _run_model(model, tokens, "lora @ all")
    _close(ours[:, :FEW], theirs)
    assert bool(ours[:, FEW:].isneginf().all())
    merged = {"pre": untied, "lora": copy.deepcopy(adapter).merge_and_unload()}

    def choose(component: str, layer: Any, position: int, unit: Any) -> str:
        chat = component in ("q", "v", "mlp_in") and position == 8
        return "chat" if chat else "lora" if component in ("k", "embed", "unembed") else "pre"

    graft = "lora @ all : k + embed + unembed | chat @ last : q + v + mlp_in"
    whole = merged | {"chat": sources["sft"]}
    _same(_run_model(model, tokens, graft), sequential_graft(whole, tokens[0].tolist(), choose))


def _run_model(model: GraftedTransformer, tokens: Tensor, graft: str) -> Tensor:
    return model(tokens, graft=graft)[0].detach()
