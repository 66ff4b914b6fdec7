"""What outside code met on the model's surface: threads, weight views, hooks, stacks and caches."""

import asyncio
import copy
import gc
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from contextvars import copy_context
from threading import Event, Thread
from typing import Any

import pytest
import torch
from conftest import MakeTiny, Tiny
from reference import sequential_graft
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from graftlens.components import Component
from graftlens.graft import Graft
from graftlens.lens import direct_logit_attribution, patched
from graftlens.model.grafted import GraftedTransformer
from graftlens.prompts import Prompt

C = Component
N = 7
MIXED = "sft @ [1] + last"


def _ids(n: int = N, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


TOKENS = torch.tensor([_ids()])


def _close(ours: Tensor, theirs: Tensor, tolerance: float = 3e-5) -> None:
    assert ours.shape == theirs.shape
    with torch.no_grad():
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < tolerance, difference


def _far(ours: Tensor, theirs: Tensor) -> None:
    """The test could fail: the wrong weights would give something else."""
    with torch.no_grad():
        assert float((ours - theirs).abs().max() / theirs.abs().max()) > 1e-3


def _at(source_at: Callable[[int], str]) -> Callable[[str, int | None, int, int | None], str]:
    return lambda component, layer, position, head: source_at(position)


_mixed = _at(lambda p: "sft" if p in (1, N - 1) else "pre")


def _clean(model: GraftedTransformer) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    active = model.active
    lists = (p.fwd_hooks or p.bwd_hooks for p in model.hook_points())
    none = not active.stack and not active.running and not active._live
    return none and not hooked and not any(lists) and model.context_level == 0


def _elsewhere(work: Callable[[], Any]) -> Any:
    """What `work` returns or raises in a thread of its own, which knows no context."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


class _Inside:
    """Another thread that stays inside a `with` until it is told to leave."""

    def __init__(self, enter: Callable[[], AbstractContextManager[Any]]) -> None:
        self.enter, self.entered, self.leave = enter, Event(), Event()
        self.thread = Thread(target=self._stay, daemon=True)

    def _stay(self) -> None:
        with self.enter():
            self.entered.set()
            self.leave.wait()

    def __enter__(self) -> "_Inside":
        self.thread.start()
        assert self.entered.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.leave.set()
        self.thread.join(60)


# --- Threads and tasks ---------------------------------------------------------------------------


def test_two_threads_under_two_grafts_run_their_own(tiny: MakeTiny) -> None:
    """A graft in force was on one list of the model, so each thread ran the other's graft."""
    t = tiny("llama-biased")
    inside, done = Event(), Event()

    def first() -> Tensor:
        with t.model.grafted("sft @ all"):
            inside.set()
            assert done.wait(60)
            return t.model(TOKENS)

    def second() -> Tensor:
        assert inside.wait(60)
        with t.model.grafted(MIXED):
            logits = t.model(TOKENS)
            done.set()
            return logits

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(first), pool.submit(second)
        _close(one.result()[0], t.logits("sft", TOKENS[0].tolist()))
        _close(two.result()[0], sequential_graft(t.sources, TOKENS[0].tolist(), _mixed))
    assert _clean(t.model)


def test_a_thread_that_names_no_graft_is_not_guessed_for(tiny: MakeTiny) -> None:
    """A worker started inside `with model.grafted(…)` cannot see it, and must not run the base."""
    t = tiny("llama-biased")
    model, unclear = t.model, r"'sft @ all'.*another thread or task.*graft=….*\"none\""
    attn = model.blocks[0].attn
    with model.grafted("sft @ all"):
        for work in (
            lambda: model(TOKENS),
            lambda: model.run_with_cache(TOKENS),
            lambda: model.generate(TOKENS, 1),
            lambda: attn.W_O,
            lambda: model.ln_final.w,
            lambda: model.unembed(torch.ones(1, N, model.cfg.d_model)),
            lambda: model.accumulated_bias(1),
        ):
            with pytest.raises(RuntimeError, match=unclear):
                _elsewhere(work)
        # What says which graft it means runs, and so does what took the context along.
        base = _elsewhere(lambda: model(TOKENS, graft="none"))
        _close(base[0], t.logits("pre", TOKENS[0].tolist()))
        _close(_elsewhere(lambda: model(TOKENS, graft=MIXED)), model(TOKENS, graft=MIXED))
        context = copy_context()
        ours = _elsewhere(lambda: context.run(model, TOKENS))
        _close(ours[0], t.logits("sft", TOKENS[0].tolist()))
    _close(_elsewhere(lambda: model(TOKENS))[0], t.logits("pre", TOKENS[0].tolist()))


def test_hooks_of_one_thread_do_not_act_in_another(tiny: MakeTiny) -> None:
    """Hooks are on the model, so a second thread's run was changed and cached by the first's."""
    t = tiny("llama-biased")
    model, other = t.model, torch.tensor([_ids(seed=1)])
    zero = [("blocks.0.hook_resid_pre", lambda x, hook: x * 0)]
    for enter in (
        lambda: model.hooks(fwd_hooks=zero),
        lambda: patched(model, TOKENS, "sft @ last : mlp"),
    ):
        with _Inside(enter):
            hooked = [p for p in model.hook_points() if p.has_hooks()]
            for work in (
                lambda: model(other),
                lambda: model(other, graft=MIXED),
                lambda: model.run_with_cache(other),
                lambda: model.run_with_hooks(other, fwd_hooks=zero),
                lambda: model.generate(other, 1),
                lambda: model.logits_at(other, [[0]]),
                lambda: model.ln_final(torch.ones(1, 1, model.cfg.d_model)),
                lambda: model.add_hook("hook_embed", lambda x, hook: None),
                lambda: model.add_caching_hooks("hook_embed"),
                lambda: model.reset_hooks(),
                lambda: patched(model, other, MIXED).__enter__(),
            ):
                with pytest.raises(RuntimeError, match=r"another thread or task.*deepcopy"):
                    work()
            assert hooked == [p for p in model.hook_points() if p.has_hooks()]
        assert _clean(model)
        _close(model(other)[0], t.logits("pre", _ids(seed=1)))


def test_hooks_are_not_put_on_in_the_middle_of_another_threads_run(tiny: MakeTiny) -> None:
    """They would act in its later layers, and its cache would hold both runs."""
    t = tiny("llama-biased")
    model, halfway, go_on = t.model, Event(), Event()

    def first() -> Tensor:
        with torch.no_grad():
            return model(TOKENS, graft="sft @ all")

    def wait(*_: object) -> None:
        if not torch.is_grad_enabled():  # in the first thread alone
            halfway.set()
            assert go_on.wait(60)

    handle = model.blocks[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first)
        assert halfway.wait(60)
        for work in (
            lambda: model.run_with_cache(TOKENS),
            lambda: model.add_perma_hook("hook_embed", lambda x, hook: None),
            lambda: model.set_use_attn_result(True),
        ):
            with pytest.raises(RuntimeError, match="another thread or task is running this model"):
                work()
        # A run without hooks shares nothing with it.
        _close(model(TOKENS)[0], t.logits("pre", TOKENS[0].tolist()))
        go_on.set()
        _close(running.result()[0], t.logits("sft", TOKENS[0].tolist()))
    handle.remove()
    assert not model.cfg.use_attn_result
    assert _clean(model)


def test_a_cache_read_in_one_thread_does_not_stop_another(tiny: MakeTiny) -> None:
    """The cache's own methods put its graft in force for a moment: no other thread's affair."""
    t = tiny("llama-biased")
    _, cache = t.model.run_with_cache(TOKENS, graft="sft @ all")
    seen: list[Tensor] = []

    class Looks(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if not seen:
                seen.append(torch.empty(0))
                seen.append(_elsewhere(lambda: t.model(TOKENS)))
            return super().__torch_function__(func, types, args, kwargs or {})

    stack = cache.accumulated_resid().detach().as_subclass(Looks)
    cache.apply_ln_to_stack(stack, recompute_ln=True)
    _close(seen[1][0], t.logits("pre", TOKENS[0].tolist()))


def test_tasks_keep_their_own_grafts_and_hooks(tiny: MakeTiny) -> None:
    """Tasks of one thread take turns inside each other's `with`."""
    t = tiny("llama-biased")
    model = t.model

    async def under(graft: str, mine: asyncio.Event, other: asyncio.Event) -> Tensor:
        with model.grafted(graft):
            mine.set()
            await other.wait()
            return model(TOKENS)

    async def hooked(mine: asyncio.Event, other: asyncio.Event) -> Tensor:
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x * 0)]):
            mine.set()
            await other.wait()
            return model(TOKENS)

    async def plain(mine: asyncio.Event, other: asyncio.Event) -> Tensor:
        await other.wait()
        try:
            return model(TOKENS)
        finally:
            mine.set()

    async def both() -> list[Any]:
        a, b, c, d = (asyncio.Event() for _ in range(4))
        one = await asyncio.gather(under("sft @ all", a, b), under(MIXED, b, a))
        two = await asyncio.gather(hooked(c, d), plain(d, c), return_exceptions=True)
        with model.grafted("sft @ all"):
            late = asyncio.create_task(asyncio.to_thread(model, TOKENS))
        return [*one, *two, await late]

    sft, mixed, zeroed, refused, late = asyncio.run(both())
    _close(sft[0], t.logits("sft", TOKENS[0].tolist()))
    _close(mixed[0], sequential_graft(t.sources, TOKENS[0].tolist(), _mixed))
    assert isinstance(refused, RuntimeError)
    _far(zeroed[0], t.logits("pre", TOKENS[0].tolist()))
    # A task has the graft that was in force where it was made.
    _close(late[0], t.logits("sft", TOKENS[0].tolist()))
    assert _clean(model)


def test_generators_may_end_in_any_order_and_anywhere(tiny: MakeTiny) -> None:
    """The innermost graft was taken off, whichever `with` had ended."""
    t = tiny("llama-biased")
    model, ids = t.model, TOKENS[0].tolist()

    def under(graft: str) -> Iterator[None]:
        with model.grafted(graft):
            yield

    def hooked(factor: float) -> Iterator[None]:
        with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x * factor)]):
            yield

    one, two = under("sft @ all"), under("pre @ all")
    next(one), next(two)
    _close(model(TOKENS)[0], t.logits("pre", ids))
    one.close()
    assert model.active.stack == [Graft.parse("pre @ all")]
    two.close()
    three = under("sft @ all")
    next(three)
    _elsewhere(three.close)
    _close(model(TOKENS)[0], t.logits("pre", ids))
    four = under("sft @ all")
    next(four)
    del four
    gc.collect()
    assert _clean(model)

    a, b = hooked(2.0), hooked(3.0)
    next(a), next(b)
    a.close()
    (left,) = model.hook_dict["hook_embed"].fwd_hooks
    assert left.hook.id in model.hook_dict["hook_embed"]._forward_hooks
    c = hooked(1.0)
    next(c)
    c.close()
    assert model.hook_dict["hook_embed"].fwd_hooks == [left]
    _elsewhere(b.close)
    assert _clean(model)
    _close(model(TOKENS)[0], t.logits("pre", ids))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_a_hook_leaves_nothing(tiny: MakeTiny, error: type[BaseException]) -> None:
    """Design law 4, for what `except Exception` does not catch as well."""
    t = tiny("llama-biased")
    model = t.model

    def stop(x: Tensor, hook: HookPoint) -> None:
        raise error("stop")

    hooks = [("blocks.1.mlp.hook_post", stop)]
    with pytest.raises(error), model.grafted(MIXED):
        model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    with pytest.raises(error), model.hooks(fwd_hooks=hooks):
        model.run_with_cache(TOKENS)
    with pytest.raises(error), model.hooks(fwd_hooks=hooks):
        model.generate(TOKENS, 2, graft=MIXED)
    assert _clean(model)
    _close(_elsewhere(lambda: model(TOKENS))[0], t.logits("pre", TOKENS[0].tolist()))


def test_hooks_may_run_the_model_themselves(tiny: MakeTiny) -> None:
    """Runs, hooks and caches inside a run of the same thread are its own."""
    t = tiny("llama-biased")
    model, other = t.model, torch.tensor([_ids(seed=2)])
    inner: dict[str, Tensor] = {}

    def again(x: Tensor, hook: HookPoint) -> None:
        if inner:
            return
        inner["begun"] = x
        attn = model.blocks[0].attn
        with model.grafted("pre @ all"):  # the innermost decides, inside a pass as well
            inner["view"] = attn.W_O
        logits, cache = model.run_with_cache(other, graft="sft @ all")
        inner["logits"], inner["heads"] = logits, cache.stack_head_results()

    with model.grafted(MIXED):
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_pre", again)])
    _close(logits[0], sequential_graft(t.sources, TOKENS[0].tolist(), _mixed))
    _close(inner["logits"][0], t.logits("sft", other[0].tolist()))
    assert torch.equal(inner["view"], model.W_O[0, 0])
    _, cache = model.run_with_cache(other, graft="sft @ all")
    _close(inner["heads"], cache.stack_head_results())
    assert _clean(model)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_in_no_with(tiny: MakeTiny, way: Callable[[Any], Any]) -> None:
    """A copy made inside `with model.grafted(…)` stayed under that graft for ever."""
    t = tiny("llama-biased")
    with t.model.grafted("sft @ all"):
        twin = way(t.model)
        _close(twin(TOKENS)[0], t.logits("pre", TOKENS[0].tolist()))
    assert _clean(twin)
    _, cache = t.model.run_with_cache(TOKENS, graft=MIXED)
    again = way(cache)
    _close(again.stack_head_results(), cache.stack_head_results())
    with pytest.raises(ValueError, match="hook_result' does not fire"):
        twin.add_hook("blocks.0.attn.hook_result", lambda x, hook: None)


# --- Weights without a source axis ---------------------------------------------------------------


def _views(model: GraftedTransformer) -> Iterator[tuple[Component, int | None, str, Any, str]]:
    """(component, layer, path of its owner, owner, name) of every such weight that there is."""
    for layer, block in [(1, model.blocks[1])]:
        for name in ("ln1", "ln2", "ln1_post", "ln2_post", "attn.q_norm", "attn.k_norm"):
            owner: Any = block
            for part in name.split("."):
                owner = getattr(owner, part, None)
            if owner is not None:
                component = C(name.split(".")[-1])
                yield component, layer, f"blocks[{layer}].{name}", owner, "w"
                yield component, layer, f"blocks[{layer}].{name}", owner, "b"
        attn = {C.Q: "Q", C.K: "K", C.V: "V", C.O: "O"}
        for component, letter in attn.items():
            yield component, layer, "", block.attn, f"W_{letter}"
            yield component, layer, "", block.attn, f"b_{letter}"
        mlp = {C.MLP_IN: ("W_in", "b_in"), C.MLP_OUT: ("W_out", "b_out")}
        if C.MLP_GATE in model.arch.components:
            mlp[C.MLP_GATE] = ("W_gate",)
        for component, names in mlp.items():
            for name in names:
                yield component, layer, "", block.mlp, name
    yield C.EMBED, None, "", model.embed, "W_E"
    if C.POS_EMBED in model.arch.components:
        yield C.POS_EMBED, None, "", model.pos_embed, "W_pos"
    yield C.LN_FINAL, None, "ln_final", model.ln_final, "w"
    yield C.LN_FINAL, None, "ln_final", model.ln_final, "b"
    yield C.UNEMBED, None, "", model.unembed, "W_U"
    yield C.UNEMBED, None, "", model.unembed, "b_U"


@pytest.mark.parametrize("variant", ["gpt2", "gemma3"])
def test_weights_inside_a_graft_are_the_grafts(tiny: MakeTiny, variant: str) -> None:
    """The norms' w and b were the base's, whatever the graft; all others must be as W_O is."""
    t = tiny(variant)
    model = t.model
    differ = set()
    for component, layer, path, owner, name in _views(model):
        weight, bias = model.weights_of(component, layer)
        stored = bias if name.startswith("b") else weight
        where = (component, layer, name)
        pre = getattr(owner, name)
        if stored is None:
            assert name == "b" or not pre.any(), where
        with model.grafted("sft @ all"):
            sft = getattr(owner, name)
        if stored is not None:
            assert torch.equal(pre.flatten().sort()[0], stored[0].flatten().sort()[0]), where
            assert torch.equal(sft.flatten().sort()[0], stored[1].flatten().sort()[0]), where
        only = f"sft @ all : {component}" + ("" if layer is None else f" : {layer}")
        for graft in (only, model.resolve(only, TOKENS)):
            with model.grafted(graft):
                assert sft is None or torch.equal(getattr(owner, name), sft), where
        elsewhere = "v" if component is not C.V else "k"
        with model.grafted(f"sft @ last : {elsewhere}"):
            assert pre is None or torch.equal(getattr(owner, name), pre), where
        for graft in (MIXED, model.resolve(MIXED, TOKENS)):
            with model.grafted(graft):
                if stored is None or len(stored.variants) == 1:  # there is no other to be given
                    assert pre is None or torch.equal(getattr(owner, name), pre), where
                    continue
                differ.add(component)
                parameter = "bias" if name.startswith("b") else "weight"
                way = re.escape(f"model.{path}.{parameter}[source]")
                way = way if path else rf"model\.{name[0]}_\w+\[source"
                with pytest.raises(ValueError, match=rf"graft '{MIXED_RE}'.*{component}.*{way}"):
                    getattr(owner, name)
    assert differ == set(model.arch.components)


MIXED_RE = r"sft @ \[1\] \+ last"


def test_final_norm_of_each_source_is_the_checkpoints(tiny: MakeTiny) -> None:
    """`ln_final.w` inside `with model.grafted("sft @ all")` was the base's."""
    t = tiny("gpt2")
    theirs = t.sources["sft"].transformer
    with t.model.grafted("sft @ all"):
        assert torch.equal(t.model.ln_final.w, theirs.ln_f.weight)
        assert torch.equal(t.model.ln_final.b, theirs.ln_f.bias)
        assert torch.equal(t.model.blocks[1].ln2.b, theirs.h[1].ln_2.bias)
    assert torch.equal(t.model.ln_final.w, t.sources["pre"].transformer.ln_f.weight)
    # Inside a run, a hook reads what runs.
    seen: list[Tensor] = []
    look = [("blocks.1.hook_resid_pre", lambda x, hook: seen.append(t.model.blocks[1].ln1.w))]
    t.model.run_with_hooks(TOKENS, graft="sft @ all", fwd_hooks=look)
    assert torch.equal(seen[0], theirs.h[1].ln_1.weight)


# --- Hooks that do not fire ----------------------------------------------------------------------

SILENT = [
    ("blocks.0.attn.hook_result", "use_attn_result"),
    ("blocks.0.hook_q_input", "use_split_qkv_input"),
    ("blocks.1.hook_k_input", "use_split_qkv_input"),
    ("blocks.1.hook_v_input", "use_split_qkv_input"),
    ("blocks.0.hook_attn_in", "use_attn_in"),
    ("blocks.2.hook_mlp_in", "use_hook_mlp_in"),
]


@pytest.mark.parametrize(("name", "flag"), SILENT)
def test_a_hook_that_would_never_fire_is_refused(tiny: MakeTiny, name: str, flag: str) -> None:
    """add_hook took it, and it never fired; a flag turned off later silenced it as well."""
    model = tiny("gpt2").model
    fired: list[str] = []

    def look(x: Tensor, hook: HookPoint) -> None:
        fired.append(str(hook.name))

    point = model.hook_dict[name]
    message = rf"'{name}' does not fire.*model.set_{flag}\(True\)"
    for add in (
        lambda: model.add_hook(name, look),
        lambda: model.add_perma_hook(name, look),
        lambda: model.add_hook(name, look, dir="bwd"),
        lambda: model.add_caching_hooks(name),
        lambda: model.get_caching_hooks(name),
        lambda: point.add_hook(look),
        lambda: point.add_perma_hook(look),
        lambda: point.add_hook(look, dir="bwd"),
        lambda: point.register_forward_hook(lambda *_: None),
        lambda: point.register_forward_pre_hook(lambda *_: None),
        lambda: point.register_backward_hook(lambda *_: None),
        lambda: point.register_full_backward_pre_hook(lambda *_: None),
        lambda: [p.add_hook(look) for p in model.hook_points() if p is point],
    ):
        with pytest.raises(ValueError, match=message):
            add()
    assert _clean(model)
    with pytest.raises(ValueError, match=r"no hook 'blocks\.0\.hook_nothing'"):
        model.add_hook("blocks.0.hook_nothing", look)
    with pytest.raises(ValueError, match="matches none"):
        model.add_hook(lambda n: n == name, look)

    turn = getattr(model, f"set_{flag}")
    turn(True)
    for add in (lambda: model.add_hook(name, look), lambda: point.add_hook(look)):
        add()
        model(TOKENS)
        assert fired.pop() == name
        with pytest.raises(ValueError, match=rf"{name}, which would not fire.*reset_hooks"):
            turn(False)
        assert getattr(model.cfg, flag)
        setattr(model.cfg, flag, False)
        with pytest.raises(ValueError, match=rf"{name}, which would not fire"):
            model(TOKENS)
        setattr(model.cfg, flag, True)
        model.reset_hooks()
    with model.hooks(fwd_hooks=[(name, look)]), pytest.raises(ValueError, match="would not fire"):
        turn(False)
    turn(False)
    assert _clean(model)
    assert not fired


def test_filters_choose_among_the_hooks_that_fire(tiny: MakeTiny) -> None:
    """As those of run_with_hooks; caching hooks that stay are no other."""
    model = tiny("gpt2").model
    fired: list[str] = []
    model.add_hook(lambda n: n.startswith("blocks.0"), lambda x, hook: fired.append(hook.name))
    cache = model.add_caching_hooks(lambda n: n.endswith("hook_mlp_out"))
    model(TOKENS)
    assert "blocks.0.hook_resid_pre" in fired
    assert not set(fired) & {name for name, _ in SILENT}
    assert set(cache) == {f"blocks.{l}.hook_mlp_out" for l in range(3)}
    model.reset_hooks()
    assert _clean(model)


def test_the_attention_input_is_silent_where_q_k_and_v_have_their_own(tiny: MakeTiny) -> None:
    """With both flags on, hook_attn_in was taken and never fired."""
    model = tiny("gpt2").model
    model.set_use_attn_in(True)
    model.add_hook("blocks.0.hook_attn_in", lambda x, hook: None)
    with pytest.raises(ValueError, match=r"hook_attn_in, which would not fire"):
        model.set_use_split_qkv_input(True)
    model.reset_hooks()
    model.set_use_split_qkv_input(True)
    off = r"off model\.set_use_split_qkv_input\(False\)"
    with pytest.raises(ValueError, match=off):
        model.add_hook("blocks.0.hook_attn_in", lambda x, hook: None)
    with pytest.raises(ValueError, match=off):
        model.run_with_cache(TOKENS, names_filter="blocks.0.hook_attn_in")


# --- Stacks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased", "gemma2"])
def test_stacks_are_not_read_as_positions(tiny: MakeTiny, variant: str) -> None:
    """A stack with as many rows as the mask took each entry's weights from another position."""
    t = tiny(variant)
    model = t.model
    logits, cache = model.run_with_cache(TOKENS, graft=MIXED)
    d = model.cfg.d_model
    mask = model.resolve(MIXED, TOKENS)
    final = cache["resid_post", model.cfg.n_layers - 1]
    stack = torch.cat([final[:, -1:]] * N, dim=0)  # [component, 1, d_model], N of them
    with model.grafted(mask):
        for module in (model.ln_final, model.unembed):
            for wrong in (stack, stack[:, 0], final[0], torch.ones(N, 1, d)):
                with pytest.raises(ValueError, match=r"\[1, 7\].*\[batch, pos, d_model\]"):
                    module(wrong)
            # A stack of the batch's own streams is read entry by entry.
            _close(module(torch.stack([final, 2 * final]))[1], module(2 * final))
        out = model.unembed(model.ln_final(final))
        cap = model.arch.logit_softcap
        _close(out if cap is None else torch.tanh(out / cap) * cap, logits)
    # Where all places use the same weights, any shape is read by these.
    with model.grafted(model.resolve("sft @ all : ln_final + unembed | sft @ last : o", TOKENS)):
        alone = model.unembed(model.ln_final(stack))
    with model.grafted("sft @ all"):
        _close(model.unembed(model.ln_final(stack[:, 0])), alone[:, 0])
        _close(model.unembed(model.ln_final(final[0, -1])), alone[0, 0])
        _close(model.unembed(model.ln_final(stack[None])), alone[None])
    with model.grafted(MIXED), pytest.raises(ValueError, match="needs a prompt to be resolved"):
        model.ln_final(final)


@pytest.mark.parametrize("variant", ["gpt2", "llama-biased"])
def test_the_caches_own_stacks_go_on(tiny: MakeTiny, variant: str) -> None:
    """Logit lens and norms of stacks under a graft by position, with and without batch axis."""
    t = tiny(variant)
    model, n = t.model, t.model.cfg.n_layers
    theirs, hidden = sequential_graft(t.sources, TOKENS[0].tolist(), _mixed, hidden=True)
    _, cache = model.run_with_cache(TOKENS, graft=MIXED)
    _, bare = model.run_with_cache(TOKENS, graft=MIXED, remove_batch_dim=True)

    def norm(x: Tensor, p: int) -> Tensor:
        source = t.sources["sft" if p in (1, N - 1) else "pre"].base_model
        return (source.ln_f if variant == "gpt2" else source.norm)(x)

    wanted = torch.stack([norm(hidden[:, p], p) for p in range(N)], 1)
    _close(cache.accumulated_resid(apply_ln=True)[:, 0], wanted)
    _close(bare.accumulated_resid(apply_ln=True), wanted)
    _close(cache.apply_ln_to_stack(cache.accumulated_resid(), recompute_ln=True)[:, 0], wanted)
    _close(bare.apply_ln_to_stack(bare.accumulated_resid(), recompute_ln=True), wanted)
    at = cache.accumulated_resid(apply_ln=True, pos_slice=-1)
    _close(at[:, 0], wanted[:, -1])
    some = cache.apply_ln_to_stack(
        cache.accumulated_resid()[:, :, 1:3], pos_slice=(1, 3), recompute_ln=True
    )
    _close(some[:, 0], wanted[:, 1:3])
    _close(cache.logit_lens()[-1, 0], theirs)
    _close(bare.logit_lens()[-1], theirs)
    assert len(cache.logit_lens()) == n + 1


# --- Caches --------------------------------------------------------------------------------------


def _heads(t: Tiny, cache: ActivationCache) -> Tensor:
    """Layer 1's head results, from the checkpoint's own W_O: SFT's."""
    weight = t.sources["sft"].model.layers[1].self_attn.o_proj.weight
    z = cache["z", 1]
    per_head = weight.unflatten(1, (z.shape[-2], -1))
    return torch.einsum("...hi,ohi->...ho", z, per_head)


def _plain_caches(t: Tiny) -> Iterator[tuple[str, ActivationCache, ActivationCache]]:
    """Plain caches of a run of SFT, each as made inside and as made outside of its `with`."""
    model = t.model
    with model.grafted("sft @ all"):
        _, found = model.run_with_cache(TOKENS, return_cache_object=False)
        inside = ActivationCache(found, model)
    yield "run_with_cache", inside, ActivationCache(found, model)
    _, named = model.run_with_cache(TOKENS, graft="sft @ all", return_cache_object=False)
    yield "graft=", ActivationCache(named, model), ActivationCache(named, model)
    kept, fwd, _ = model.get_caching_hooks()
    model.run_with_hooks(TOKENS, graft="sft @ all", fwd_hooks=fwd)
    yield "get_caching_hooks", ActivationCache(kept, model), ActivationCache(kept, model)
    added = model.add_caching_hooks()
    model(TOKENS, graft="sft @ all")
    model.reset_hooks()
    yield "add_caching_hooks", ActivationCache(added, model), ActivationCache(added, model)
    with model.grafted("sft @ all"):
        mine: dict[str, Tensor] = {}
        model.get_caching_hooks(cache=mine)
        _, fwd, _ = model.get_caching_hooks(cache=mine)
        model.run_with_hooks(TOKENS, fwd_hooks=fwd)
        inside = ActivationCache(mine, model)
        yield "own dict", inside, inside
    yield "own dict, with ended", inside, inside.apply_slice_to_batch_dim([0])


def test_a_plain_cache_knows_its_graft(tiny: MakeTiny) -> None:
    """Once the `with` had ended, its head results were z times the base's W_O."""
    t = tiny("llama-biased")
    model = t.model
    with model.grafted("sft @ all"):
        bias = model.accumulated_bias(model.cfg.n_layers)
        direction = model.tokens_to_residual_directions(5)
    sft = _final_norm(t, "sft")
    for how, *caches in _plain_caches(t):
        for cache in caches:
            heads = cache.stack_head_results().unflatten(0, (model.cfg.n_layers, -1))[1]
            _close(heads.movedim(0, -2), _heads(t, cache))
            whole = cache.get_full_resid_decomposition(expand_neurons=True, return_labels=True)
            _close(whole[0].sum(0), cache["resid_post", model.cfg.n_layers - 1])
            _close(whole[0][-1][0, 0], bias)
            final = cache.accumulated_resid(apply_ln=True)[-1]
            _close(final, sft(cache["resid_post", model.cfg.n_layers - 1]))
            stack = cache.decompose_resid()
            scale = cache["ln_final.hook_scale"]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _close(cache.logit_attrs(stack, 5), (stack / scale) @ direction)
            with model.grafted("pre @ all"):  # what is in force elsewhere is not its own
                _close(cache.get_neuron_results(1).sum(-2), _mlp(t, cache))
            assert len(how) > 0


def _final_norm(t: Tiny, source: str) -> Any:
    return t.sources[source].model.norm


def _mlp(t: Tiny, cache: ActivationCache) -> Tensor:
    down = t.sources["sft"].model.layers[1].mlp.down_proj
    return cache["post", 1] @ down.weight.T


def test_a_plain_cache_of_a_graft_by_position_gives_its_rows_or_says_so(tiny: MakeTiny) -> None:
    """The mask of the run is known from its dictionary; a dictionary of one's own has none."""
    t = tiny("llama-biased")
    model = t.model
    _, cache = model.run_with_cache(TOKENS, graft=MIXED)
    _, found = model.run_with_cache(TOKENS, graft=MIXED, return_cache_object=False)
    plain = ActivationCache(found, model)
    _close(plain.stack_head_results(), cache.stack_head_results())
    _, cut = model.run_with_cache(TOKENS, graft=MIXED, return_cache_object=False, pos_slice=(1, 4))
    _close(ActivationCache(cut, model).stack_head_results(), cache.stack_head_results()[:, :, 1:4])
    kept, fwd, _ = model.get_caching_hooks(pos_slice=(1, 4))
    with model.grafted(MIXED):
        model.run_with_hooks(TOKENS, fwd_hooks=fwd)
    _close(ActivationCache(kept, model).stack_head_results(), cache.stack_head_results()[:, :, 1:4])

    with model.grafted(MIXED):
        own = ActivationCache(dict(found), model)
    assert torch.equal(own["z", 1], cache["z", 1])
    del own.cache_dict["blocks.1.attn.hook_result"]
    with pytest.raises(ValueError, match=rf"{MIXED_RE}.*no single weight for o in layer 1"):
        own.stack_head_results()
    # A base's cache is as it was: it asks for what is in force.
    _, base = model.run_with_cache(TOKENS, return_cache_object=False)
    assert type(ActivationCache(dict(base), model)) is ActivationCache


def test_logit_attributions_say_once_what_they_leave_out(tiny: MakeTiny) -> None:
    """TransformerLens's direct_logit_attribution missed the logit, without a word."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    t = tiny("llama-biased", tokenizer="llama3")
    model, prompt = t.model, Prompt("a b c", answer=" d")
    _, cache = model.run_with_cache(prompt, graft=MIXED)
    with pytest.warns(
        UserWarning, match=r"ln_final's weight.*graftlens\.lens\.direct_logit_attribution"
    ):
        found = analysis.direct_logit_attribution(model, answer_tokens=5, cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = cache.logit_attrs(cache.decompose_resid(), 5)
    with pytest.warns(UserWarning, match="ln_final"), model.grafted("sft @ all"):
        analysis.direct_logit_attribution(model, prompt, answer_tokens=5)
    logit = float(model(prompt, graft=MIXED)[0, -1, 5].detach())
    assert abs(float(found.attribution.sum()) - logit) > 1e-2 * abs(logit)
    assert float(again[:, 0, -1].sum()) == pytest.approx(float(found.attribution.sum()), rel=1e-4)
    # What it names adds up.
    table = direct_logit_attribution(model, prompt, [MIXED], at="last")
    row = table[table["rule"] == MIXED]
    assert len(row)
    assert float(row["contribution"].sum()) == pytest.approx(float(row["logit"].iloc[0]), rel=1e-4)


def test_a_cache_of_one_s_own_says_what_it_leaves_out(tiny: MakeTiny) -> None:
    """T9: a plain cache that was filled by one's own hooks inside a `with` said nothing."""
    model = tiny("llama-biased").model
    mine: dict[str, Tensor] = {}

    def save(x: Tensor, hook: HookPoint) -> None:
        mine[str(hook.name)] = x.detach()

    with model.grafted("sft @ all"):
        model.run_with_hooks(TOKENS, fwd_hooks=[(lambda _: True, save)])
        cache = ActivationCache(mine, model)
    stack = cache.decompose_resid()
    with pytest.warns(
        UserWarning, match=r"ln_final's weight.*graftlens\.lens\.direct_logit_attribution"
    ) as told:
        found = cache.logit_attrs(stack, 5)
    assert [w.filename for w in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _close(cache.logit_attrs(stack, 5), found)
        _, known = model.run_with_cache(TOKENS, graft="sft @ all")
    with pytest.warns(UserWarning, match="ln_final's weight"):
        _close(found, known.logit_attrs(known.decompose_resid(), 5))


def test_a_norm_that_is_folded_is_not_warned_of(tiny: MakeTiny) -> None:
    """OLMo's norms have no weight: its attributions add up to the logit."""
    t = tiny("olmo")
    _, cache = t.model.run_with_cache(TOKENS, graft="sft @ all")
    stack = cache.decompose_resid()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cache.logit_attrs(stack, 5)
    _close(found.sum(0)[0], t.logits("sft", TOKENS[0].tolist())[:, 5])


def test_with_statements_of_all_kinds_nest(tiny: MakeTiny) -> None:
    """One thread may be inside of all of them, whatever order they were entered in."""
    t = tiny("llama-biased")
    model = t.model
    with ExitStack() as inside:
        inside.enter_context(model.grafted("sft @ all"))
        inside.enter_context(model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: None)]))
        inside.enter_context(patched(model, TOKENS, "sft @ last : mlp"))
        inside.enter_context(model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: None)]))
        _close(model.run_with_cache(TOKENS)[0][0], t.logits("sft", TOKENS[0].tolist()))
    assert _clean(model)


def test_a_printed_model_is_a_screen(tiny: MakeTiny) -> None:
    """nn.Module's own text was 129 kB for a model of 30 layers."""
    model = tiny("gemma3").model
    text = repr(model)
    assert len(text.splitlines()) <= 8
    assert len(text) < 1000
    for said in (
        "gemma3_text, 4 layers, d_model 24, sources pre sft (base pre)",
        "6 heads of 10 (3 key-value heads), gated MLPs of 40 neurons",
        "float32 on cpu",
        f"components: {' '.join(model.arch.components)}",
        "graft in force: none",
    ):
        assert said in text, text
    with model.grafted("sft @ last : mlp"):
        assert "graft in force: sft @ last : mlp" in repr(model)
