"""Calls that a HookedTransformer's user types, against TransformerLens 3.9's HookedTransformer.

The forward pass, caches and generation, for shapes like GPT-2's, grouped-query Llama's and NeoX's:
the grafted model under each source's uniform graft gives what that source's HookedTransformer
gives. What stays different is a test, too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hookedpairs import EACH_SHAPE, TOKENS, HookedPair, graft_of, hooked_pair, needs_hooked, same
from torch import Tensor
from transformer_lens import TransformerLensKeyValueCache
from transformer_lens.utilities import Slice

from graftlens.model.grafted import GraftedTransformer

pytestmark = [pytest.mark.compat, needs_hooked]

TEXT = "Anders Lindqvist starred in"
TEXTS = [TEXT, "The Quiet Harbour"]

Call = Callable[[Any, dict[str, Any]], Any]


@contextmanager
def under(model: Any, graft: str | None) -> Iterator[None]:
    """A graft in force for a grafted model; nothing for a HookedTransformer."""
    with nullcontext() if graft is None else model.grafted(graft):
        yield


@pytest.fixture(scope="module", params=["gpt2", "llama", "neox-parallel"])
def pair(request: pytest.FixtureRequest) -> HookedPair:
    return hooked_pair(request.param)


def _vectors(model: Any) -> Tensor:
    """Something like a residual stream [2, 11, d_model]."""
    width = model.cfg.d_model
    return torch.randn(2, 11, width, generator=torch.Generator().manual_seed(3))


def _cache_of(model: Any, n: int = 2) -> TransformerLensKeyValueCache:
    if isinstance(model, GraftedTransformer):
        keys = model.arch.n_kv_heads
        assert (model.cfg.n_key_value_heads or model.cfg.n_heads) == keys
    return TransformerLensKeyValueCache.init_cache(model.cfg, torch.device("cpu"), n)


def _in_two(model: Any, g: dict[str, Any], frozen: bool = False) -> Any:
    """Two runs with one cache of keys and values, and what the cache holds then."""
    ones = torch.ones_like(TOKENS)
    cache = _cache_of(model)
    first = model(TOKENS[:, :7], past_kv_cache=cache, attention_mask=ones[:, :7], **g)
    if frozen:
        cache.freeze()
    second = model(TOKENS[:, 7:], past_kv_cache=cache, attention_mask=ones[:, 7:], **g)
    held = [(e.past_keys, e.past_values) for e in cache.entries]
    return [first, second, held, cache.previous_attention_mask.long()]


def _resid(model: Any, layer: int, g: dict[str, Any]) -> Tensor:
    return model.run_with_cache(TOKENS, **g)[1]["resid_pre", layer]


FORWARD: dict[str, Call] = {
    "logits": lambda m, g: m(TOKENS, **g),
    "tokens of one prompt": lambda m, g: m(TOKENS[0], **g),
    "text": lambda m, g: m(TEXT, **g),
    "text with BOS": lambda m, g: m(TEXT, prepend_bos=True, **g),
    "loss": lambda m, g: m(TOKENS, return_type="loss", **g),
    "loss, by place": lambda m, g: m(TOKENS, "loss", True, **g),
    "both": lambda m, g: m(TOKENS, return_type="both", **g),
    "both, by name": lambda m, g: (lambda out: [out.logits, out.loss, *out, out[0], out[1]])(
        m(TOKENS, return_type="both", loss_per_token=True, **g)
    ),
    "nothing": lambda m, g: m(TOKENS, return_type=None, **g),
    "stop": lambda m, g: [m(TOKENS, stop_at_layer=l, **g) for l in (0, 1, -1, 3)],
    "start": lambda m, g: [m(_vectors(m), start_at_layer=l, **g) for l in (0, 1, 2, 3, -1, -2)],
    "start and stop": lambda m, g: [
        m(_vectors(m), start_at_layer=a, stop_at_layer=b, **g)
        for a, b in ((0, 2), (1, 2), (1, -1), (2, 2), (-2, -1))
    ],
    "start, loss": lambda m, g: m(
        _resid(m, 1, g), start_at_layer=1, tokens=TOKENS, return_type="loss", **g
    ),
    "start, both": lambda m, g: m(
        _resid(m, 2, g), start_at_layer=2, tokens=TOKENS, return_type="both", **g
    ),
    "start, nothing": lambda m, g: m(_resid(m, 2, g), start_at_layer=2, return_type=None, **g),
    "start, padded": lambda m, g: m(_vectors(m), start_at_layer=1, attention_mask=_padded(), **g)[
        _padded().bool()
    ],
    "start, cached": lambda m, g: (
        m.run_with_cache(_vectors(m), start_at_layer=1, **g)[1].cache_dict
    ),
    "start, hooked": lambda m, g: m.run_with_hooks(
        _vectors(m),
        start_at_layer=1,
        fwd_hooks=[("blocks.2.hook_resid_pre", lambda value, hook: value * 0.5)],
        **g,
    ),
    "padded": lambda m, g: m(TOKENS, attention_mask=_padded(), **g)[_padded().bool()],
    "padded, loss": lambda m, g: m(
        TOKENS, return_type="loss", attention_mask=_padded(), loss_per_token=True, **g
    ),
    "padded, mean loss": lambda m, g: m(TOKENS, return_type="loss", attention_mask=_padded(), **g),
    "texts, padded on the left": lambda m, g: m(TEXTS, padding_side="left", **g)[0],
    "embedded": lambda m, g: m.input_to_embed(TOKENS, **g),
    "embedded, text": lambda m, g: m.input_to_embed(TEXT, prepend_bos=True, **g),
    "embedded, masked": lambda m, g: m.input_to_embed(
        TOKENS, attention_mask=torch.ones_like(TOKENS), **g
    ),
    "embedded, after others": lambda m, g: _embedded_after(m, g),
    "embedded and run": lambda m, g: m(
        m.input_to_embed(TOKENS, **g)[0], start_at_layer=0, tokens=TOKENS, return_type="both", **g
    ),
    "in two": _in_two,
    "in two, frozen": lambda m, g: _in_two(m, g, frozen=True),
    "in two, one by one": lambda m, g: _one_by_one(m, g),
    "in two, padded": lambda m, g: _padded_twice(m, g),
    "in two, hooks": lambda m, g: _second_cached(m, g),
    "in two, from a layer": lambda m, g: _from_a_layer(m, g),
    "in two, upper half after lower": lambda m, g: _in_halves(m, g),
    "residual": lambda m, g: _residual_by_hand(m, g),
    "loss_fn": lambda m, g: [
        m.loss_fn(m(TOKENS, **g), TOKENS),
        m.loss_fn(m(TOKENS, **g), TOKENS, per_token=True),
        m.loss_fn(m(TOKENS, **g), TOKENS, _padded()),
        m.loss_fn(m(TOKENS, **g), TOKENS, attention_mask=_padded(), per_token=True),
    ],
}


def _padded() -> Tensor:
    """A mask whose second prompt is padded on the left."""
    mask = torch.ones_like(TOKENS)
    mask[1, :4] = 0
    return mask


def _embedded_after(model: Any, g: dict[str, Any]) -> Any:
    cache, ones = _cache_of(model), torch.ones_like(TOKENS)
    model(TOKENS[:, :7], past_kv_cache=cache, attention_mask=ones[:, :7], **g)
    resid, tokens, _, mask = model.input_to_embed(
        TOKENS[:, 7:], attention_mask=ones[:, 7:], past_kv_cache=cache, **g
    )
    return [resid, tokens, mask.long(), cache.previous_attention_mask.long()]


def _one_by_one(model: Any, g: dict[str, Any]) -> list[Tensor]:
    cache, ones = _cache_of(model), torch.ones_like(TOKENS)
    return [
        model(TOKENS[:, i : i + 1], past_kv_cache=cache, attention_mask=ones[:, :1], **g)
        for i in range(TOKENS.shape[1])
    ]


def _padded_twice(model: Any, g: dict[str, Any]) -> list[Tensor]:
    """Each piece padded on the left: the padding in the middle is not read either."""
    cache, mask = _cache_of(model), torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    outs = []
    for piece in (TOKENS[:, :5], TOKENS[:, 5:10]):
        outs.append(model(piece, past_kv_cache=cache, attention_mask=mask, **g)[mask.bool()])
    return outs


def _second_cached(model: Any, g: dict[str, Any]) -> dict[str, Tensor]:
    cache, ones = _cache_of(model), torch.ones_like(TOKENS)
    model(TOKENS[:, :7], past_kv_cache=cache, attention_mask=ones[:, :7], **g)
    _, found = model.run_with_cache(
        TOKENS[:, 7:], past_kv_cache=cache, attention_mask=ones[:, 7:], **g
    )
    return dict(found.cache_dict)


def _from_a_layer(model: Any, g: dict[str, Any]) -> list[Tensor]:
    cache, x = _cache_of(model), _vectors(model)
    ones = torch.ones(2, 11, dtype=torch.long)
    return [
        model(x[:, :6], start_at_layer=0, past_kv_cache=cache, attention_mask=ones[:, :6], **g),
        model(x[:, 6:], start_at_layer=0, past_kv_cache=cache, attention_mask=ones, **g),
    ]


def _in_halves(model: Any, g: dict[str, Any]) -> list[Any]:
    """Each piece first through the lower layers, then through the upper ones, with one cache."""
    cache, outs = _cache_of(model), []
    for piece in (TOKENS[:, :6], TOKENS[:, 6:]):
        given = {"past_kv_cache": cache, **g}
        ones = torch.ones_like(piece)
        middle = model(piece, stop_at_layer=2, attention_mask=ones, **given)
        before = cache.previous_attention_mask.long()
        outs.append(model(middle, start_at_layer=2, attention_mask=before, **given))
    return [*outs, [e.past_keys for e in cache.entries], cache.previous_attention_mask.long()]


def _residual_by_hand(model: Any, g: dict[str, Any]) -> list[Any]:
    cache, ones = _cache_of(model), torch.ones_like(TOKENS)
    model(TOKENS[:, :7], past_kv_cache=cache, attention_mask=ones[:, :7], **g)
    with under(model, g.get("graft")):
        embed = model.embed(TOKENS)
        return [
            model.get_pos_offset(None, 2),
            model.get_pos_offset(cache, 2),
            model.get_residual(embed, 0),
            model.get_residual(embed, 3, tokens=TOKENS, return_shortformer_pos_embed=False),
            model.get_residual(embed, 0, attention_mask=_padded())[0][_padded().bool()],
        ]


@pytest.mark.parametrize("call", FORWARD)
def test_forward(pair: HookedPair, call: str) -> None:
    pair.close(lambda m, graft: FORWARD[call](m, graft_of(graft)), call, 5e-5)


def test_sides_and_bos_come_from_tokenizer_and_cfg(pair: HookedPair) -> None:
    for model in (pair.model, *pair.hooked.values()):
        model.tokenizer.padding_side, model.cfg.default_prepend_bos = "left", True
    try:
        pair.close(lambda m, g: m(TEXTS, **graft_of(g))[0], "left", 5e-5)
        pair.close(lambda m, g: m.to_tokens(TEXTS), "tokens")
        pair.close(lambda m, g: m.input_to_embed(TEXTS, **graft_of(g))[3].long(), "mask")
        pair.close(lambda m, g: m(TEXT, **graft_of(g)), "BOS", 5e-5)
        pair.close(lambda m, g: m(TEXT, prepend_bos=False, **graft_of(g)), "no BOS", 5e-5)
        pair.close(lambda m, g: m.to_tokens(TEXTS, padding_side="right"), "right")
    finally:
        for model in (pair.model, *pair.hooked.values()):
            model.tokenizer.padding_side, model.cfg.default_prepend_bos = "right", False


# -- parts called by themselves -------------------------------------------------------------------

PARTS: dict[str, Callable[[Any], Any]] = {
    "embed": lambda m: m.embed(TOKENS),
    "embed, one prompt": lambda m: m.embed(TOKENS[0]),
    "blocks": lambda m: [m.blocks[l](_vectors(m)) for l in range(3)],
    "block, by name": lambda m: m.blocks[1](resid_pre=_vectors(m), attention_mask=None),
    "ln1": lambda m: m.blocks[1].ln1(_vectors(m)),
    "ln2": lambda m: m.blocks[1].ln2(_vectors(m)),
    "attn": lambda m: m.blocks[1].attn(_vectors(m), _vectors(m) + 1, _vectors(m) * 2),
    "attn, by name": lambda m: m.blocks[2].attn(
        query_input=_vectors(m), key_input=_vectors(m), value_input=_vectors(m)
    ),
    "mlp": lambda m: m.blocks[1].mlp(_vectors(m)),
    "ln_final": lambda m: m.ln_final(_vectors(m)),
    "unembed": lambda m: m.unembed(_vectors(m)),
    "one after another": lambda m: m.unembed(
        m.ln_final(m.blocks[2](m.blocks[1](m.blocks[0](_vectors(m)))))
    ),
    "block, padded": lambda m: m.blocks[1](_vectors(m), attention_mask=_padded())[_padded().bool()],
    "block, after others": lambda m: _block_after(m),
    "a layer by hand": lambda m: _by_hand(m),
}


def _block_after(model: Any) -> list[Tensor]:
    entry, x = _cache_of(model)[1], _vectors(model)
    return [model.blocks[1](part, past_kv_cache_entry=entry) for part in (x[:, :6], x[:, 6:])]


def _by_hand(model: Any) -> Tensor:
    block, x = model.blocks[1], _vectors(model)
    normed = block.ln1(x)
    return x + block.attn(normed, normed, normed) + block.mlp(block.ln2(x))


@pytest.mark.parametrize("part", PARTS)
def test_parts_called_by_themselves(pair: HookedPair, part: str) -> None:
    def call(model: Any, graft: str | None) -> Any:
        with under(model, graft):
            return PARTS[part](model)

    pair.close(call, part, 5e-5)


def test_position_embeddings_called_by_themselves() -> None:
    pair = hooked_pair("gpt2")
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), _padded()], dim=1)
    for options in (
        {},
        {"past_kv_pos_offset": 5},
        {"attention_mask": _padded()},
        {"past_kv_pos_offset": 3, "attention_mask": mask},
    ):

        def call(model: Any, graft: str | None, options: dict[str, Any] = options) -> Any:
            with under(model, graft):
                return model.pos_embed(TOKENS, **options)

        pair.close(call, str(options))


# -- caches ---------------------------------------------------------------------------------------


def _filled(model: Any, g: dict[str, Any], **options: Any) -> Any:
    return model.run_with_cache(TOKENS, **options, **g)[1]


#: Every method of a cache that takes `pos_slice`.
SLICED: dict[str, Callable[[Any, Any], Any]] = {
    "accumulated": lambda c, s: c.accumulated_resid(pos_slice=s, incl_mid=_sequential(c)),
    "accumulated, normed": lambda c, s: c.accumulated_resid(apply_ln=True, pos_slice=s),
    "decomposed": lambda c, s: c.decompose_resid(pos_slice=s),
    "decomposed, normed": lambda c, s: c.decompose_resid(2, apply_ln=True, pos_slice=s),
    "heads": lambda c, s: c.stack_head_results(pos_slice=s, incl_remainder=True),
    "heads, normed": lambda c, s: c.stack_head_results(pos_slice=s, apply_ln=True),
    "neurons": lambda c, s: c.get_neuron_results(1, pos_slice=s),
    "some neurons": lambda c, s: c.get_neuron_results(1, neuron_slice=(2, 9, 3), pos_slice=s),
    "neurons, projected": lambda c, s: c.get_neuron_results(
        1, pos_slice=s, project_output_onto=_vectors(c.model)[0].T
    ),
    "neuron stack": lambda c, s: c.stack_neuron_results(2, pos_slice=s, incl_remainder=True),
    "neuron stack, normed": lambda c, s: c.stack_neuron_results(
        2, pos_slice=s, neuron_slice=[3, 5], apply_ln=True, return_labels=True
    ),
    "neuron stack, projected": lambda c, s: c.stack_neuron_results(
        -1,
        pos_slice=s,
        neuron_slice=[3, 5],
        apply_ln=True,
        incl_remainder=True,
        project_output_onto=_vectors(c.model)[0, 0],
    ),
    "whole": lambda c, s: c.get_full_resid_decomposition(pos_slice=s, return_labels=True),
    "whole, normed": lambda c, s: c.get_full_resid_decomposition(
        2, pos_slice=s, apply_ln=True, expand_neurons=False
    ),
    "whole, projected": lambda c, s: c.get_full_resid_decomposition(
        pos_slice=s, apply_ln=True, project_output_onto=_vectors(c.model)[0].T
    ),
    "attributions": lambda c, s: c.logit_attrs(
        c.decompose_resid(pos_slice=s), 7, 9, pos_slice=s, has_batch_dim=c.has_batch_dim
    ),
    "normed for a layer": lambda c, s: c.apply_ln_to_stack(
        c.decompose_resid(1, pos_slice=s), 1, pos_slice=s, has_batch_dim=c.has_batch_dim
    ),
}


def _sequential(cache: Any) -> bool:
    return not cache.model.cfg.parallel_attn_mlp


@pytest.mark.filterwarnings("ignore:logit_attrs leaves out")
@pytest.mark.parametrize("method", SLICED)
def test_positions_of_every_cache_method(pair: HookedPair, method: str) -> None:
    slices = (None, -1, 4, (2, 9), (1, 10, 3), [0, 5], Slice(3), Slice((2, 5)), Slice([1, -1]))
    call = SLICED[method]
    for source, hooked in pair.hooked.items():
        theirs, ours = _filled(hooked, {}), _filled(pair.model, {"graft": f"{source} @ all"})
        for s in slices:
            same(call(ours, s), call(theirs, s), f"{method}, {s}", 1e-4)


@pytest.mark.filterwarnings("ignore:logit_attrs leaves out")
@pytest.mark.parametrize("method", SLICED)
def test_cache_methods_without_a_batch(pair: HookedPair, method: str) -> None:
    call = SLICED[method]

    def filled(model: Any, g: dict[str, Any], at_once: bool) -> Any:
        _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=at_once, **g)
        return cache if at_once else cache.remove_batch_dim()

    for source, hooked in pair.hooked.items():
        for at_once in (True, False):
            theirs = filled(hooked, {}, at_once)
            ours = filled(pair.model, {"graft": f"{source} @ all"}, at_once)
            for s in (None, -1, (2, 9), Slice([1, 4])):
                same(call(ours, s), call(theirs, s), f"{method}, {s}", 1e-4)


@pytest.mark.parametrize("s", [-1, (2, 9), [0, 5], Slice((1, 8, 2))], ids=str)
def test_caches_of_some_positions(pair: HookedPair, s: Any) -> None:
    """HookedTransformer cuts heads instead of positions at `hook_rot_q` and `hook_rot_k`."""

    def call(model: Any, graft: str | None) -> Any:
        cache = _filled(
            model, graft_of(graft), pos_slice=s, names_filter=lambda name: "hook_rot_" not in name
        )
        return [
            dict(cache.cache_dict),
            cache.decompose_resid(apply_ln=True),
            cache.stack_head_results(apply_ln=True),
            cache.get_full_resid_decomposition(),
        ]

    pair.close(call, str(s), 1e-4)


def test_two_prompts_keep_their_batch(pair: HookedPair) -> None:
    for model in (pair.model, *pair.hooked.values()):
        with pytest.raises(AssertionError, match="Cannot remove batch dimension from cache"):
            _filled(model, {}).remove_batch_dim()
    with pytest.raises(ValueError, match="remove_batch_dim=True with 2 prompts"):
        _filled(pair.model, {}, remove_batch_dim=True)


def test_filters_names_and_their_order(pair: HookedPair) -> None:
    for source, hooked in pair.hooked.items():
        g = {"graft": f"{source} @ all"}
        assert list(pair.model.hook_dict) == list(hooked.hook_dict)
        ours, theirs = _filled(pair.model, g), _filled(hooked, {})
        assert list(ours) == list(theirs)
        for chosen in (lambda name: False, lambda name: "nothing" in name, []):
            ours = _filled(pair.model, g, names_filter=chosen)
            theirs = _filled(hooked, {}, names_filter=chosen)
            assert len(ours) == len(theirs) == 0
            assert ours.has_embed == theirs.has_embed
        for chosen in ("hook_embed", ["blocks.1.hook_resid_post", "hook_embed"]):
            ours = _filled(pair.model, g, names_filter=chosen)
            theirs = _filled(hooked, {}, names_filter=chosen)
            same(dict(ours.cache_dict), dict(theirs.cache_dict), str(chosen))


@pytest.mark.filterwarnings("ignore:logit_attrs leaves out")
def test_attributions_of_a_run_without_logits(pair: HookedPair) -> None:
    def call(model: Any, graft: str | None) -> Any:
        out, cache = model.run_with_cache(TOKENS, return_type=None, **graft_of(graft))
        assert out is None
        found = cache.logit_attrs(cache.decompose_resid(), TOKENS)
        return [found, cache.accumulated_resid(apply_ln=True), list(cache)]

    pair.close(call, tolerance=1e-4)


def test_the_gradient_at_ln1_is_that_of_queries_keys_and_values_together(pair: HookedPair) -> None:
    """HookedTransformer calls ln1 three times, so that its hooks fire three times, and a cache has
    the gradient of the call that comes last; here it is called once, with their sum."""
    name = "blocks.1.ln1.hook_normalized"
    for source, hooked in pair.hooked.items():
        theirs: list[Tensor] = []
        ours: list[Tensor] = []
        for model, found, g in (
            (hooked, theirs, {}),
            (pair.model, ours, {"graft": f"{source} @ all"}),
        ):
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            keep = found.append
            with model.hooks(bwd_hooks=[(name, lambda grad, hook, keep=keep: keep(grad))]):
                model(TOKENS, return_type="loss", **g).backward()
            model.zero_grad()
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        assert (len(theirs), len(ours)) == (3, 1)
        same(ours[0], sum(theirs[1:], start=theirs[0]), source, 1e-4)


# -- generation -----------------------------------------------------------------------------------

GENERATED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, without a cache": {"use_past_kv_cache": False},
    "drawn": {"do_sample": True},
    "top_k": {"do_sample": True, "top_k": 5},
    "more than the vocabulary": {"do_sample": True, "top_k": 10_000},
    "top_p": {"do_sample": True, "top_p": 0.6},
    "small top_p": {"do_sample": True, "top_p": 0.05},
    "temperature": {"do_sample": True, "temperature": 0.4},
    "no temperature": {"do_sample": True, "temperature": 0.0},
    "penalty": {"do_sample": True, "freq_penalty": 1.5, "temperature": 0.8},
    "penalty and top_p": {"do_sample": True, "freq_penalty": 0.7, "top_p": 0.9},
    "left": {"padding_side": "left", "do_sample": True},
    "logits": {"do_sample": True, "output_logits": True},
    "logits of tokens": {"output_logits": True, "return_dict_in_generate": None},
}


def _drawn(model: Any, prompts: Any, options: dict[str, Any], g: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    options = {"do_sample": False, "verbose": False, "stop_at_eos": False, **options, **g}
    if options.pop("return_dict_in_generate", 0) is None and not g:
        options["return_dict_in_generate"] = True  # accepted and ignored there
    found = model.generate(prompts, 12, **options)
    if options.get("output_logits"):
        return [found.sequences, list(found.logits)]
    # HookedTransformer leaves special tokens out of texts, wherever they are.
    text = model.tokenizer.eos_token
    if isinstance(found, list):
        return [each.replace(text, "") for each in found]
    return found.replace(text, "") if isinstance(found, str) else found


@pytest.mark.parametrize("options", GENERATED)
def test_generation(pair: HookedPair, options: str) -> None:
    for prompts in (TOKENS, TEXT, TEXTS):
        if prompts is TEXTS and "penalty" in options:
            continue  # HookedTransformer counts padding as tokens
        pair.close(
            lambda m, g, p=prompts: _drawn(m, p, GENERATED[options], graft_of(g)), options, 1e-4
        )


@pytest.mark.parametrize("ends", ["one", "several"])
def test_generation_ends(pair: HookedPair, ends: str) -> None:
    for source, hooked in pair.hooked.items():
        free = hooked.generate(TOKENS, 12, stop_at_eos=False, do_sample=False, verbose=False)
        end: Any = int(free[0, 14])
        end = end if ends == "one" else [end, int(free[1, 15])]
        wanted = hooked.generate(TOKENS, 12, eos_token_id=end, do_sample=False, verbose=False)
        found = pair.model.generate(TOKENS, 12, eos_token_id=end, graft=f"{source} @ all")
        # After its end a row is filled up with an end token, which with several need not be the
        # tokenizer's.
        for mine, theirs in zip(found.tolist(), wanted.tolist(), strict=True):
            stop = next((i for i in range(11, len(theirs)) if theirs[i] in torch.tensor(end)), None)
            stop = len(theirs) if stop is None else stop + 1
            assert mine[:stop] == theirs[:stop]
            if ends == "one":
                assert mine == theirs


@pytest.mark.parametrize("options", ["greedy", "drawn", "top_p"])
@pytest.mark.parametrize("return_type", ["input", "embeds", "tokens", "str"])
def test_generation_from_embeddings(pair: HookedPair, options: str, return_type: str) -> None:
    def call(model: Any, graft: str | None) -> Any:
        with under(model, graft):
            embeds = model.embed(TOKENS)
        chosen = {**GENERATED[options], "return_type": return_type}
        if graft is None:
            # With its cache, HookedTransformer counts the positions of embeddings twice.
            chosen["use_past_kv_cache"] = False
        return _drawn(model, embeds, chosen, graft_of(graft))

    pair.close(call, options, 1e-4)


@pytest.mark.parametrize("most", [1, 5, 14, 25])
@pytest.mark.parametrize("prompts", [TOKENS, TEXT], ids=["tokens", "text"])
def test_generation_in_pieces(pair: HookedPair, most: int, prompts: Any) -> None:
    def call(model: Any, graft: str | None) -> Any:
        torch.manual_seed(5)
        options = {"stop_at_eos": False, "do_sample": True, "verbose": False}
        with torch.inference_mode():
            return list(
                model.generate_stream(
                    prompts, 9, max_tokens_per_yield=most, **options, **graft_of(graft)
                )
            )

    pair.close(call, str(most))


@EACH_SHAPE
def test_what_stays_different_in_generation(variant: str) -> None:
    """Greedy unless asked; one text in a list is a list; top_k with top_p is refused."""
    pair = hooked_pair(variant)
    for source, hooked in pair.hooked.items():
        graft = f"{source} @ all"
        greedy = hooked.generate(TOKENS, 4, do_sample=False, stop_at_eos=False, verbose=False)
        assert torch.equal(pair.model.generate(TOKENS, 4, graft=graft, stop_at_eos=False), greedy)
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False}
        theirs = hooked.generate([TEXT], 4, **options)
        assert pair.model.generate([TEXT], 4, graft=graft, **options) == [theirs]
        with pytest.raises(ValueError, match=r"top_k=3 and top_p=0\.5: give one of them"):
            pair.model.generate(TOKENS, do_sample=True, top_k=3, top_p=0.5, graft=graft)
