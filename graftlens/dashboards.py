"""A dashboard of one prompt: runs it under several grafts and passes the results to the page."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from graftlens import __version__
from graftlens.components import COMPONENTS, Component, format_numbers, suggest
from graftlens.folder import writable
from graftlens.graft import Graft, Grafts
from graftlens.lens import direct_logit_attribution, logit_lens
from graftlens.lens.attribution import attribution_hooks
from graftlens.lens.logit import streams_of
from graftlens.lens.runs import Runs, kept_runs, token_text
from graftlens.model.arch import Architecture
from graftlens.model.cache import GraftedCache
from graftlens.model.grafted import GraftedTransformer, Input
from graftlens.model.inputs import Batch, collate
from graftlens.model.load import preview
from graftlens.model.mask import GraftMask, select, sites_of
from graftlens.model.smollm2 import located
from graftlens.outcomes.drawing import Drawing
from graftlens.outcomes.texts import Sampler
from graftlens.prompts import Prompt, PromptError, Tokenized, tokenize
from graftlens.sweep.devices import check_devices
from graftlens.sweep.prepared import joined_answers
from graftlens.sweep.results import read_manifest
from graftlens.sweep.runner import config_of, content_of
from graftlens.viz.dashboard import Dashboard
from graftlens.viz.dashboarddata import DashboardData, Run
from graftlens.viz.page import is_page

C = Component


def dashboard(
    model: GraftedTransformer,
    prompt: Input | Tokenized,
    grafts: Grafts | None = None,
    *,
    full: Graft | str | None = None,
    title: str = "",
    top_k: int = 5,
    follow: str | None = None,
    max_new_tokens: int = 20,
    prepend_bos: bool | None = None,
    complete: bool = False,
) -> Dashboard:
    """One prompt under PRE, SFT and grafts, side by side, on a page that needs no network.

    It shows which tokens are grafted and with what; tokens coloured by log-probability, KL
    divergence or direct logit attribution; the logit lens; the answer's rank by layer; and
    attention by layer and head, of each run and of the differences between runs. A notebook
    displays it; `.save` writes one HTML file, `.save_image` a picture of it.

    Args:
        model: the model.
        prompt: one prompt, as anything that can be run. Its answer is ranked and attributed;
            without one, the likeliest next token of the full run (of those that all sources have).
        grafts: name -> graft, or grafts, which are keyed by their text, in addition to PRE and SFT.
        full: the run that counts as SFT, if it is not the source `sft` or the only one.
        title: of the page.
        top_k: how many of the likeliest tokens the logit lens shows.
        follow: the name of a run: the prompt is continued with the likeliest tokens under it, and
            all runs read prompt and continuation. Grafts of `generated` tokens can be shown only
            so. The likeliest next token is followed then, and not the prompt's answer.
        max_new_tokens: most tokens of that continuation.
        prepend_bos: None is `model.cfg.default_prepend_bos`: the tokenizer decides, unless set.
        complete: keep the attention of every head in full, and the logit lens of every layer.
            Without it, the page of a long prompt leaves out heads that differ least between the
            runs, small values and layers of the lens, and says so.

    Example:
        >>> view = dashboard(model, prompt, {"FE+LT": "sft @ first_entity + last"})
        >>> view.save("dashboard.html")

    Raises:
        PromptError: a prompt that cannot be run.
        ValueError: several prompts; a graft that the model cannot run, or one wrongly named PRE or
            SFT; a run to follow that there is not.
    """
    runs = _runs(model.sources, grafts, full)
    _refuse_unknown(follow, runs)
    one = [prompt] if isinstance(prompt, Tokenized) else prompt
    given = model.batch(one, prepend_bos=prepend_bos)
    if len(given.prompts) != 1:
        raise ValueError(
            f"{len(given.prompts)} prompts: a dashboard shows one. Make one dashboard per prompt, "
            "or compare them with graftlens.lens."
        )
    start, total = given.starts[0], given.totals[0]
    ids = tuple(given.tokens[0, start : start + total].tolist())
    item = replace(given.prompts[0], ids=ids)
    roles = given.prompts[0].roles()
    added: Sequence[int] = ()
    if follow is None:
        batch = model.batch([item])
    else:
        item = _unanswered(item).generating()
        added = _continued(model, item, runs.grafts[follow], max_new_tokens)
        batch = collate([item], continuations=[added], device=model.cfg.device)
        ids = (*ids, *added)
    asked = item.prompt
    answer = None if asked is None else asked.answer
    if asked is not None and (note := joined_answers([asked])):
        warnings.warn(note, stacklevel=2)
    made = {name: _made(model, batch, graft) for name, graft in runs.grafts.items()}
    options: dict[str, Any] = {
        "full": runs.grafts[runs.full],
        "prepend_bos": prepend_bos,
        "targets": None if answer is not None else [made[runs.full].likeliest],
    }
    layers = None if complete else _layers(model.cfg.n_layers, len(ids) * len(runs.grafts))
    with kept_runs(model, batch, {runs.grafts[name]: run.cache for name, run in made.items()}):
        lens = logit_lens(model, batch, runs.grafts, top_k=top_k, layers=layers, **options)
        rise = (
            None if layers is None else logit_lens(model, batch, runs.grafts, at="last", **options)
        )
        moved = direct_logit_attribution(model, batch, runs.grafts, by="src_pos", **options)
    tokens = [token_text(model, token) for token in ids]
    if roles is not None:
        # An answer that was given with the tokens, or what an assistant goes on to say.
        roles += ("assistant" if added else "",) * (len(ids) - len(roles))
    text = model.to_string(list(ids)) if asked is None and model.tokenizer else None
    goes_on = str(model.added_text(item.ids, added)) if added else ""
    return Dashboard(
        DashboardData(
            title=title or "graftlens dashboard",
            text=asked.text + goes_on
            if asked is not None
            else str(text or f"token ids {' '.join(tokens)}"),
            answer=answer,
            tokens=tokens,
            roles=roles,
            components=[str(c) for c in model.arch.components],
            runs={name: _run(model, batch, runs, name, made[name], moved) for name in runs.grafts},
            lens=lens,
            # The output's distributions are those of the lens's last row.
            kl_divergence=lens[lens["stream"] == "final_post"],
            sources=model.sources,
            provenance=_provenance(model, asked)
            | ({"continued by": follow, "continuation": goes_on} if follow else {}),
            complete=complete,
            rise=rise,
        )
    )


def _refuse_unknown(follow: str | None, runs: Runs) -> None:
    if follow is not None and follow not in runs.grafts:
        raise ValueError(
            f"follow={follow!r} is not a run of this dashboard. Write one of "
            f"{', '.join(map(repr, runs.grafts))}.{suggest(follow, runs.grafts)}"
        )


def _unanswered(item: Tokenized) -> Tokenized:
    """The same prompt without an answer, which is not what comes after a continuation."""
    asked = item.prompt
    if asked is None or asked.answer is None:
        return item
    return replace(item, prompt=replace(asked, answer=None, distractors=(), answers=()))


def _continued(
    model: GraftedTransformer, item: Tokenized, graft: Graft, most: int
) -> tuple[int, ...]:
    """The likeliest tokens after a prompt under a graft, one after another."""
    drawing = Drawing(max_new_tokens=most, temperature=0)
    row = Sampler(model, {"followed": graft}, drawing).table({0: item}).iloc[0]
    if row["reason"] is not None:
        raise PromptError(str(row["reason"]))
    return tuple(int(token) for token in row["tokens"])


#: Most rows of the logit lens (layers × tokens × runs) unless all are asked for: each is a
#: distribution over the vocabulary.
ROWS = 5000


def _layers(n_layers: int, places: int) -> list[int] | None:
    """After which layers the logit lens of a long prompt is read, evenly; None for all."""
    step = -(-(n_layers + 1) * places // ROWS)
    return None if step == 1 else sorted({*range(0, n_layers, step), n_layers})


@dataclass(frozen=True)
class _Made:
    """What one run of the prompt left.

    Attributes:
        cache: the activations that the page's tables read.
        token_logprobs: [pos], of each token given those before it; NaN for the first.
        likeliest: the likeliest next token, of those that all sources have.
    """

    cache: GraftedCache
    token_logprobs: np.ndarray
    likeliest: int


@torch.no_grad()
def _made(model: GraftedTransformer, batch: Batch, graft: Graft) -> _Made:
    """Run the prompt once, for everything that the page shows of this graft."""
    streams = [hook for _, _, hook in streams_of(model)]
    names = [*dict.fromkeys([*streams, *attribution_hooks(model, "src_pos")])]
    logits, cache = model.run_with_cache(batch, graft=graft, names_filter=names)
    assert isinstance(cache, GraftedCache)
    ids = batch.tokens[0, 1:].to(logits.device)
    logprobs = logits[0, :-1].float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return _Made(
        cache,
        np.array([math.nan, *logprobs.cpu().tolist()]),
        int(logits[0, -1, : model.vocabularies.common].argmax()),
    )


def write_dashboard(
    sources: Mapping[str, Any],
    prompt: Prompt,
    grafts: Grafts,
    path: str | Path,
    *,
    image: str | Path | None = None,
    full: str | None = None,
    title: str = "",
    top_k: int = 5,
    follow: str | None = None,
    max_new_tokens: int = 20,
    complete: bool = False,
    device: str | None = None,
    loading: Mapping[str, Any] | None = None,
) -> Path:
    """Load a model, make a dashboard of one prompt, and write its page and optionally a picture of
    it.

    Args:
        sources: name -> hub id, folder, `smollm2-135m`, or what the source is made of; the base
            first.
        path: the page.
        image: a PNG of the whole page.
        prompt, grafts, full, title, top_k, follow, max_new_tokens, complete: as in `dashboard`.
        device: as in `GraftedTransformer.from_pretrained`.
        loading: what else that takes: `tokenizer`, `chat_template`, `dtype`; and `prepend_bos`.

    Raises:
        ValueError, RuntimeError: as `dashboard` and `Dashboard.save_image`.
        OSError: a page or a picture that cannot be written; checked before any weight is read.
    """
    path = writable(path)
    if os.path.lexists(path) and not path.is_symlink() and not is_page(path):
        raise ValueError(
            f"{path} exists and is not a page that graftlens wrote, so it is left untouched. Name "
            "another file."
        )
    if image is not None:
        image = writable(image)
        if image.resolve() == path.resolve():
            raise ValueError(
                f"{path} is both the page and the picture. Name another file for one of them."
            )
    if device is not None:
        check_devices([device])
    locations = {
        name: located(given) if isinstance(given, str) else given for name, given in sources.items()
    }
    loading = dict(loading or {})
    prepend_bos = loading.pop("prepend_bos", None)
    runs = _runs(list(locations), grafts, full)
    _refuse_unknown(follow, runs)
    _check(locations, prompt, runs, loading, prepend_bos, generating=follow is not None)
    model = GraftedTransformer.from_pretrained(locations, device=device, **loading)
    view = dashboard(
        model,
        prompt,
        grafts,
        full=full,
        title=title,
        top_k=top_k,
        follow=follow,
        max_new_tokens=max_new_tokens,
        prepend_bos=prepend_bos,
        complete=complete,
    )
    page = view.save(path)
    if image is not None:
        view.save_image(image)
    return page


def write_sweep_dashboard(
    folder: str | Path, number: int, grafts: Sequence[str], path: str | Path, **options: Any
) -> Path:
    """Make a dashboard of one prompt of a sweep, with the sweep's sources, tokens and dtype.

    Args:
        folder: the sweep's.
        number: the prompt's, as in the sweep's results.
        grafts: names of the sweep's grafts; or others, as `NAME=GRAFT` or `GRAFT`.
        path: the page.
        options: `image`, `title`, `top_k`, `follow`, `max_new_tokens`, `complete` and `device`,
            as in `write_dashboard`.

    Raises:
        ValueError: a folder without a sweep, a prompt or a graft that the sweep does not have; and
            as `write_dashboard`.
        OSError: as `write_dashboard`.
    """
    manifest = read_manifest(Path(folder))
    config = config_of(Path(folder), manifest)
    prompts, known, _ = content_of(Path(folder), manifest)
    if number not in prompts:
        raise ValueError(
            f"--number {number}: the sweep {folder} has {len(prompts)} prompts, 0 to "
            f"{len(prompts) - 1}."
        )
    chosen = {}
    for text in grafts:
        name, separator, rule = text.partition("=")
        if text in known:
            chosen[text] = known[text]
        elif "@" in text:
            chosen[name.strip() if separator else text] = Graft.parse(rule if separator else text)
        else:
            raise ValueError(
                f"--graft {text!r}: the sweep {folder} has no graft of that name."
                f"{suggest(text, known)} Name one of its grafts, or write [NAME=]GRAFT."
            )
    first, whole = (known[manifest.recovery[role]] for role in ("base", "full"))
    if first != Graft():
        chosen[manifest.recovery["base"]] = first
    # On a dashboard PRE is the run without grafts, and SFT the full one.
    named = {
        f"graft {name}" if name in ("PRE", "SFT") else name: graft
        for name, graft in chosen.items()
        if graft not in (Graft(), whole)
    }
    return write_dashboard(
        config.sources,
        prompts[number],
        named,
        path,
        full=str(whole),
        loading=config.loading() | {"prepend_bos": config.prepend_bos},
        **options,
    )


def _check(
    locations: Mapping[str, str],
    prompt: Prompt,
    runs: Runs,
    loading: Mapping[str, Any],
    prepend_bos: bool | None,
    generating: bool,
) -> None:
    """Refuse what cannot run before any weight is read."""
    arch, tokenizer = preview(locations, loading.get("tokenizer"), loading.get("chat_template"))
    if tokenizer is None:
        raise ValueError("no source has a tokenizer. Save one in the folder of the base's weights.")
    item = tokenize(prompt, tokenizer, prepend_bos)
    item = item.generating() if generating else item
    for graft in runs.grafts.values():
        for rule in graft.rules:
            sites_of(rule, arch, list(locations))
            select(rule, item)


def _runs(sources: Sequence[str], grafts: Grafts | None, full: Graft | str | None) -> Runs:
    """The runs, the first two of which are called PRE and SFT whatever the caller calls them."""
    runs = Runs.of(sources, grafts, full)
    first, whole = runs.grafts[runs.base], runs.grafts[runs.full]
    rest = {name: graft for name, graft in runs.grafts.items() if graft not in (first, whole)}
    for name, graft in (("PRE", first), ("SFT", whole)):
        if name in rest:
            raise ValueError(
                f"graft {str(rest[name])!r} is called {name}, which is the name of "
                f"{str(graft)!r} here. Give it another name."
            )
    return Runs({"PRE": first, "SFT": whole, **rest}, "PRE", "SFT")


def _run(
    model: GraftedTransformer,
    batch: Batch,
    runs: Runs,
    name: str,
    made: _Made,
    moved: pd.DataFrame,
) -> Run:
    mask = made.cache.mask
    patterns = [made.cache[f"blocks.{l}.attn.hook_pattern"][0] for l in range(model.cfg.n_layers)]
    here = (moved["graft"] == name) & (moved["term"] == "src_pos")
    # Where the prompt was continued, "last" is each position that was generated from.
    mine = moved[here & (moved["position"] == batch.totals[0] - 1)]
    return Run(
        rule=str(runs.grafts[name]),
        pattern=torch.stack(patterns).float().cpu().numpy(),
        token_logprobs=made.token_logprobs,
        direct_logit_attribution=mine.groupby("src_pos")["contribution"].sum().to_numpy(float),
        shares=_shares(model, mask),
        where=_where(model, mask),
    )


def _shares(model: GraftedTransformer, mask: GraftMask) -> dict[str, np.ndarray]:
    """Source -> [component, pos]: the share of layers (and heads) that come from it."""
    rows = {component: i for i, component in enumerate(model.arch.components)}
    shares = {source: np.zeros((len(rows), mask.shape[1])) for source in model.sources}
    for (component, _), chosen in mask.sites.items():
        layers = len(model.arch.layers_of(component))
        groups = [(group or (0,), selection) for group, selection in chosen.selections()]
        units = sum(len(group) for group, _ in groups)
        for group, selection in groups:
            for number, source in enumerate(model.sources):
                here = selection.share(number).reshape(mask.shape)[0]
                shares[source][rows[component]] += here * (len(group) / units / layers)
    return shares


def _where(model: GraftedTransformer, mask: GraftMask) -> list[str]:
    """Per position, what does not come from the base, in words."""
    finetuned = list(enumerate(model.sources))[1:]
    shares = [
        selection.share(number).reshape(mask.shape)[0]
        for chosen in mask.sites.values()
        for _, selection in chosen.selections()
        for number, _ in finetuned
    ]
    # Many positions are alike: one of each kind is put into words.
    table = np.array(shares).reshape(len(shares), mask.shape[1])
    _, first, kinds = np.unique(table, axis=1, return_index=True, return_inverse=True)
    said = []
    for position in first.tolist():
        found = {s: _components_from(model.arch, mask, position, n) for n, s in finetuned}
        said.append("; ".join(f"{source}: {what}" for source, what in found.items() if what))
    return [said[kind] for kind in kinds.reshape(-1).tolist()]


def _components_from(arch: Architecture, mask: GraftMask, position: int, source: int) -> str:
    """The components of one source at a position, those of the same layers and units together."""
    found: dict[tuple[Component, tuple[int, ...] | None, float], list[int | None]] = {}
    for (component, layer), chosen in mask.sites.items():
        selections = list(chosen.selections())
        of_share: dict[float, list[tuple[int, ...] | None]] = {}
        for units, selection in selections:
            if share := selection.share(source).reshape(mask.shape)[0, position]:
                of_share.setdefault(float(share), []).append(units)
        for share, groups in of_share.items():
            which = None
            if len(groups) < len(selections):
                which = tuple(sorted(unit for units in groups for unit in units or ()))
            found.setdefault((component, which, share), []).append(layer)
    everything = {(c, None, 1.0): list(arch.layers_of(c)) for c in arch.components}
    if found == everything:
        return "all weights"
    together: dict[
        tuple[tuple[int | None, ...], tuple[int, ...] | None, str, float], list[Component]
    ] = {}
    for (component, which, share), layers in found.items():
        word = "" if which is None else COMPONENTS[component].cut.split()[-1]
        together.setdefault((tuple(layers), which, word, share), []).append(component)
    pieces = []
    for (all_layers, which, word, share), components in together.items():
        words = " ".join(components)
        if share != 1:
            words = f"{share:g} of {words}"
        if which is not None:
            words += f" ({_numbered(word, which)})"
        numbers = [layer for layer in all_layers if layer is not None]
        if numbers and len(numbers) < arch.n_layers:
            words += f" in {_numbered('layer', numbers)}"
        elif numbers:
            words += " in all layers"
        pieces.append(words)
    return ", ".join(pieces)


def _numbered(what: str, numbers: Sequence[int]) -> str:
    written = format_numbers(numbers).replace("-", "–").replace(",", ", ")
    return f"{what}{'s' if len(numbers) > 1 else ''} {written}"


def _provenance(model: GraftedTransformer, prompt: Prompt | None) -> dict[str, object]:
    found: dict[str, object] = {
        "model": _named(model.cfg.model_name),
        "sources": {
            name: {"from": _named(model.origins.get(name, "")), "SHA-256": digest}
            for name, digest in model.fingerprints().items()
        },
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "device": str(model.cfg.device),
    }
    if prompt is not None:
        found["template"] = prompt.template
        if prompt.fields:
            found["fields"] = dict(prompt.fields)
    return found | {"graftlens": __version__, "torch": torch.__version__}


def _named(origin: str) -> str | None:
    """What a source was read from: a hub id, or a folder's own name, whose location does not
    concern readers of the page."""
    return (Path(origin).name if Path(origin).is_dir() else origin) or None
