"""The dashboard: one prompt under several runs, on one page that needs no network.

What is grafted where, tokens coloured by a measure, the logit lens, where the answer comes up, and
attention head by head. It takes arrays and tables; `graftlens.lens` makes them.
"""

import base64
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd

from graftlens.folder import write_whole
from graftlens.viz import attention, grid, page, theme
from graftlens.viz.lens import answer_by_layer
from graftlens.viz.screenshot import screenshot
from graftlens.viz.spelling import isolated, visible

#: The narrowest that two charts side by side come to, pixels.
NARROW = 416

#: Attention is kept as 16-bit numbers: this stands for 1.
FULL = 65535


@dataclass(frozen=True)
class Run:
    """What one run of the prompt gave; [pos] is one number a token of the prompt."""

    rule: str
    """The graft's text; "none" for the base."""
    pattern: np.ndarray
    """[layer, head, query, key]: attention, each row adding up to 1."""
    token_logprobs: np.ndarray
    """[pos]: log-probability of each token given those before it (nats); NaN for the first."""
    attribution: np.ndarray | None
    """[pos]: what attention moved from there to the answer's logit (logits), if it was computed."""
    shares: Mapping[str, np.ndarray]
    """Source -> [component, pos]: the share of the component, over layers and heads, from it."""
    where: Sequence[str]
    """[pos]: what is grafted there, in words; "" where nothing is."""


@dataclass(frozen=True)
class DashboardData:
    """One prompt under several runs, the first two of them "PRE" and "SFT"."""

    title: str
    text: str
    answer: str | None
    tokens: Sequence[str]
    components: Sequence[str]
    """What the rows of each run's `shares` are."""
    runs: Mapping[str, Run]
    lens: pd.DataFrame
    """`graftlens.lens.logit_lens` of this prompt: every run, every position."""
    kl_divergence: pd.DataFrame
    """`graftlens.lens.kl_divergence` of this prompt."""
    sources: Sequence[str]
    """The base first."""
    provenance: Mapping[str, object]

    def __post_init__(self) -> None:
        names = list(self.runs)
        if names[:2] != ["PRE", "SFT"]:
            raise ValueError(f"runs are {_listed(names)}; the first two must be 'PRE' and 'SFT'")
        n = len(self.tokens)
        if not n:
            raise ValueError("tokens are empty; a dashboard needs a prompt of one token at least")
        first = np.shape(self.runs["PRE"].pattern)
        if len(first) != 4 or first[2:] != (n, n):
            raise ValueError(
                f"run 'PRE': pattern has shape {first}; it must be [layer, head, query, key], and "
                f"the prompt has {n} tokens"
            )
        for name, run in self.runs.items():
            found: list[tuple[str, Sequence[int], Sequence[int]]] = [
                ("pattern", np.shape(run.pattern), first),
                ("token_logprobs", np.shape(run.token_logprobs), (n,)),
                ("where", (len(run.where),), (n,)),
            ]
            if run.attribution is not None:
                found.append(("attribution", np.shape(run.attribution), (n,)))
            for source, share in run.shares.items():
                if source not in self.sources:
                    raise ValueError(
                        f"run {name!r}: shares of source {source!r}; the sources are "
                        f"{_listed(self.sources)}"
                    )
                found.append((f"shares[{source!r}]", np.shape(share), (len(self.components), n)))
            for what, shape, right in found:
                if tuple(shape) != tuple(right):
                    raise ValueError(
                        f"run {name!r}: {what} has shape {tuple(shape)}; with {n} tokens and "
                        f"{len(self.components)} components it must be {tuple(right)}"
                    )
            low, high = float(np.min(run.pattern)), float(np.max(run.pattern))
            if low < -1e-3 or high > 1 + 1e-3 or np.isnan(low + high):
                raise ValueError(
                    f"run {name!r}: pattern goes from {low:g} to {high:g}; give what the softmax "
                    "gave, from 0 to 1"
                )


class Dashboard:
    """A dashboard: shown by a notebook, saved as a page or as a picture."""

    def __init__(self, data: DashboardData) -> None:
        self.data = data
        self.html = dashboard_page(data)

    def save(self, path: str | Path) -> Path:
        """Write the page to `path` and return it; it appears whole or not at all."""
        return write_whole(path, self.html)

    def save_image(
        self,
        path: str | Path,
        *,
        width: int = 1800,
        height: int | None = None,
        scale: int | float = 1,
        dark: bool = False,
    ) -> Path:
        """Write a PNG of the page, as `graftlens.viz.screenshot.screenshot` does."""
        with tempfile.TemporaryDirectory(prefix="graftlens-") as folder:
            saved = self.save(Path(folder) / "dashboard.html")
            return screenshot(saved, path, width=width, height=height, scale=scale, dark=dark)

    def __repr__(self) -> str:
        return f"<dashboard of {self.data.text!r} under {_listed(self.data.runs)}>"

    def _repr_html_(self) -> str:
        return attention.frame(self.html, height=900, title=self.data.title)


def dashboard_page(data: DashboardData) -> str:
    """The whole page as HTML.

    Raises:
        ValueError: the lens table lacks a run, a layer or a position; or the table of KL
            divergences does.
        ModuleNotFoundError: CircuitsVis is not installed.
    """
    lens = _Lens(data)
    chosen = 2 if len(data.runs) > 2 else 1
    body = "\n".join(
        (
            _header(data, lens),
            "<div class='columns'><div>",
            page.section("grafted", "Which tokens are grafted", _grafted(data, chosen)),
            page.section("tokens", "Tokens", _tokens(data, chosen)),
            "</div><div>",
            page.section("lens", "Logit lens", _lens(data, lens, chosen)),
            page.section("rise", "Where does the answer come up", _rise(data, lens)),
            "</div></div>",
            page.section("attention", "Attention", _attention(data, chosen)),
            page.section("run", "What was run and how", page.definitions(data.provenance)),
            _held("dashboard-data", page.as_json(_facts(data, lens))),
            *(
                _held(f"pattern-{i}", _packed(run.pattern), "text/plain")
                for i, run in enumerate(data.runs.values())
            ),
        )
    )
    scripts = (attention.circuitsvis_script(), attention.RENDER, page.asset("dashboard.js"))
    style = attention.STYLE + page.asset("dashboard.css")
    return page.document(data.title, body, style=style, scripts=scripts)


class _Lens:
    """The lens table as arrays: [layer, pos] of each run, and [layer, pos, k] of its top tokens."""

    def __init__(self, data: DashboardData) -> None:
        table, n = data.lens, len(data.tokens)
        if (prompts := table["prompt"].nunique()) != 1:
            raise ValueError(f"the lens table has {prompts} prompts; give the rows of one")
        self.layers: list[float] = sorted(table["layer"].astype(float).unique().tolist())
        self.streams = table.drop_duplicates("layer").set_index("layer")["stream"].to_dict()
        self.numbers: dict[str, dict[str, np.ndarray]] = {}
        self.top: dict[str, list[list[str]]] = {}
        self.top_probs: dict[str, np.ndarray] = {}
        shape = len(self.layers), n
        for run in data.runs:
            part = table[table["graft"] == run].sort_values(["layer", "position"])
            where = list(zip(part["layer"].astype(float), part["position"], strict=True))
            if where != [(layer, at) for layer in self.layers for at in range(n)]:
                raise ValueError(
                    f"the lens table has {len(where)} rows of run {run!r}; it must have one for "
                    f"each of {shape[0]} layers and {n} positions: logit_lens(…, at='all')"
                )
            self.numbers[run] = {
                name: part[name].to_numpy(dtype=float, na_value=np.nan).reshape(shape)
                for name in ("rank", "prob", "logprob", "kl_base", "kl_full")
            }
            self.top[run] = [list(tokens) for tokens in part["top_tokens"]]
            self.top_probs[run] = np.array(part["top_probs"].tolist(), dtype=float).reshape(
                *shape, -1
            )
        targets = table["target"].dropna()
        self.target: str | None = None if targets.empty else str(targets.iloc[0])

    def last(self, run: str, name: str) -> float:
        """A number of the run's output at the last position."""
        return float(self.numbers[run][name][-1, -1])

    def layer_name(self, layer: float) -> str:
        said = f"{layer:g}"
        if layer == 0:
            return f"{said} embeddings"
        return f"{said} output" if layer == self.layers[-1] else said

    def reached(self, layer: float) -> str:
        """Where in the run that is, for a text."""
        run = f"{layer:g} {'layer has' if layer == 1 else 'layers have'} run"
        said = "embeddings" if layer == 0 else run
        return f"{said} ({self.streams[layer]})"


def _header(data: DashboardData, lens: _Lens) -> str:
    rows = []
    fills = theme.graft_fills(data.runs)
    ranked = () if lens.target is None else _RANKED
    for name, run in data.runs.items():
        guesses = _guesses(lens.top[name][-1], lens.top_probs[name][-1, -1], lens.target)
        numbers = "".join(
            f"<td data-run='{escape(name)}' data-value='{what}'>"
            f"{escape(_written(lens.last(name, what), form))}</td>"
            for what, form, _ in ranked
        )
        fill = fills[name]
        kind = "swatch hatched" if fill.pattern else "swatch"
        rows.append(
            f"<tr><th scope='row'><span class='name'><span class='{kind}' "
            f"style='--c: {fill.color}'></span>{escape(name)}</span></th>"
            f"<td class='text'>{_rule(name, run) or '<small>as named</small>'}</td>{numbers}"
            f"<td class='text'>{guesses}</td></tr>"
        )
    target = "" if lens.target is None else f" <code>{escape(visible(lens.target))}</code>"
    named = (
        ""
        if lens.target is None
        else f"; the answer's first token{target} in rank, probability and log-probability"
    )
    columns = "".join(f"<th scope='col'>{heading}</th>" for _, _, heading in ranked)
    answer = (
        "The prompt has no answer, so there is nothing to rank."
        if data.answer is None
        else f"Answer: <strong>{escape(visible(data.answer))}</strong>"
    )
    return (
        f"<header><h1>{escape(data.title)}</h1><p class='lead prompt'>{escape(data.text)}</p>"
        f"<p>{answer}</p></header>"
        "<div class='scroll' tabindex='0' role='region' aria-label='What each run says'>"
        f"<table id='outputs'><caption>What comes after the last token{named}</caption><thead><tr>"
        f"<th scope='col'>run</th><th scope='col' class='words'>graft</th>{columns}"
        "<th scope='col' class='words'>most likely tokens</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{_KEY}"
    )


def _rule(name: str, run: Run) -> str:
    """The graft's text; nothing where it is the run's name as well."""
    return "" if run.rule == name else f"<code>{escape(run.rule)}</code>"


def _guesses(tokens: Sequence[str], probs: Iterable[float], target: str | None) -> str:
    items = "".join(
        f"<li{' class=right' if token == target else ''}>"
        f"<span class='token'>{escape(visible(token))}</span> {prob:.3f}"
        f"{' <span aria-label=answer>✓</span>' if token == target else ''}</li>"
        for token, prob in zip(tokens, probs, strict=False)
    )
    return f"<ol class='guesses'>{items}</ol>"


def _grafted(data: DashboardData, chosen: int) -> str:
    others = list(data.sources[1:])
    known = theme.source_colors(data.sources)
    swatches = "".join(
        f"<span class='from whole' style='--c: {known[source]}'>{escape(source)}"
        f"{_mark(others, source)}</span> "
        for source in others
    )
    legend = (
        f"<p class='legend'>Key: <span class='token'>plain</span> {escape(data.sources[0])} (the "
        f"base) alone; {swatches}all components from this source; <span class='from part' "
        "style='--c: var(--muted)'>dashed</span> some components or layers. Hover a token for "
        "which; positions count from 0.</p>"
    )
    strips = "".join(_strip(data, name, run, others) for name, run in data.runs.items())
    grid = (
        f"<h3>Component by component</h3><div class='choices'>{_runs('grid-run', data, chosen)}"
        "</div><p class='legend'>Each cell: the share of the component, over layers and heads, "
        "that comes from another source than the base, in height and, unless it is all (●), in "
        "percent.</p>"
        "<div class='scroll' tabindex='0' role='region' aria-label='Components by position'>"
        "<table id='grid' aria-busy='true'></table></div>"
    )
    return f"{legend}{strips}{grid}"


def _mark(others: Sequence[str], source: str) -> str:
    """A number that tells sources apart without their colours, where there are several."""
    return f"<sup>{others.index(source) + 1}</sup>" if len(others) > 1 else ""


def _strip(data: DashboardData, name: str, run: Run, others: Sequence[str]) -> str:
    shares = {s: np.asarray(run.shares[s], dtype=float) for s in others if s in run.shares}
    known = theme.source_colors(data.sources)
    tokens = []
    for at, token in enumerate(data.tokens):
        here = {source: share[:, at] for source, share in shares.items() if share[:, at].any()}
        said = escape(visible(token))
        if not here:
            tokens.append(f"<span class='token'>{said}</span>")
            continue
        # A share is a sum of many small ones.
        whole = len(here) == 1 and bool(np.all(next(iter(here.values())) > 1 - 1e-6))
        colors = [known[source] for source in here]
        several = (
            f"; background-image: linear-gradient(to right, {', '.join(_stripes(colors))})"
            if len(colors) > 1
            else ""
        )
        marks = "".join(_mark(others, source) for source in here)
        tokens.append(
            f"<span class='from {'whole' if whole else 'part'}' style='--c: {colors[0]}{several}' "
            f"title='{escape(f'position {at}: {run.where[at]}')}'>{said}{marks}</span>"
        )
    places: dict[str, list[int]] = {}
    for at, said in enumerate(run.where):
        if said:
            places.setdefault(said, []).append(at)
    items = "".join(
        f"<li>{'position' if len(at) == 1 else 'positions'} {_spanned(at)}: {escape(said)}</li>"
        for said, at in places.items()
    )
    listed = f"<ul class='notes'>{items}</ul>" if items else ""
    if len(places) > 6:
        listed = f"<details><summary>{len(places)} different places</summary>{listed}</details>"
    if not items:
        listed = f"<p class='notes'>{escape(data.sources[0])} everywhere</p>"
    rule = _rule(name, run)
    return (
        f"<div class='graft'><h4>{escape(name)}{f' <small>{rule}</small>' if rule else ''}</h4>"
        f"<p class='tokens' data-strip='{escape(name)}'>{''.join(tokens)}</p>{listed}</div>"
    )


def _stripes(colors: Sequence[str]) -> list[str]:
    """Colours side by side, tinted as one alone is, as stops of a gradient."""
    width = 100 / len(colors)
    return [
        f"color-mix(in srgb, {color} 25%, transparent) {i * width:.0f}% {(i + 1) * width:.0f}%"
        for i, color in enumerate(colors)
    ]


def _spanned(numbers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def _tokens(data: DashboardData, chosen: int) -> str:
    measures = [
        (name, str(fact["title"]), name == "attribution" and not _attributed(data))
        for name, fact in _MEASURES.items()
    ]
    return (
        f"<div class='choices'>{_runs('tokens-run', data, chosen)}"
        f"{_select('tokens-measure', 'Measure', measures, 'logprob')}</div>"
        "<p class='legend' id='tokens-note'></p>"
        "<div class='circuits view'><div id='tokens-legend'></div>"
        "<div id='tokens-shown' aria-busy='true'></div></div>"
        "<details><summary>The same as numbers</summary><div class='scroll' tabindex='0' "
        "role='region' aria-label='Numbers of the tokens'><table id='tokens-table'></table></div>"
        "</details>"
    )


def _lens(data: DashboardData, lens: _Lens, chosen: int) -> str:
    kinds = [
        (name, title, lens.target is None and name in _OF_ANSWER) for name, title in _KINDS.items()
    ]
    first = "kl_base" if lens.target is None else "logprob"
    return (
        "<p class='legend'>What the model would say if it stopped after a layer: the residual "
        "stream there, through this run's final norm and unembedding. Bottom: the embeddings; "
        "top: the output. The label is the most likely token. One colour scale for all runs.</p>"
        f"<div class='choices'>{_runs('lens-run', data, chosen)}"
        f"{_select('lens-value', 'Value', kinds, first)}</div>"
        "<div id='lens-legend'></div><div class='scroll' id='lens-scroll' tabindex='0' "
        "role='region' aria-label='Logit lens'>"
        "<div id='lens-shown' role='img' aria-label='Heat map: layer by position' "
        "aria-busy='true'></div></div>"
    )


def _rise(data: DashboardData, lens: _Lens) -> str:
    if lens.target is None:
        return "<p>The prompt has no answer, so there is nothing to rank.</p>"
    target, runs = isolated(visible(lens.target)), ", ".join(data.runs)
    fitting = grid.legend_above(list(data.runs), 380, NARROW)
    rows = pd.concat([data.lens[data.lens["graft"] == run] for run in data.runs])
    charts = [
        page.Figure(
            f"{what[0].upper()}{what[1:]} of {target} at the last position, by layer{how}",
            f"Lines of {runs}: the answer's {what} after each layer.",
            answer_by_layer(rows, value).update_layout(fitting),
        )
        for value, what, how in (
            ("rank", "rank", " (logarithmic; 1 on top)"),
            ("logprob", "log-probability", ""),
        )
    ]
    return f"<div class='pair'>{page.figures(charts, folder=Path())}</div>"


def _attention(data: DashboardData, chosen: int) -> str:
    layers = np.shape(data.runs["PRE"].pattern)[0]
    start = _start(data)
    named = list(enumerate(data.runs))
    panels = []
    for side, a, b in (("left", chosen, None), ("right", chosen, 0)):
        runs = [(str(i), name, False) for i, name in named]
        minus = [("", "nothing", False), *runs]
        panels.append(
            f"<div class='panel' id='{side}'><div class='choices'>"
            f"{_select(f'{side}-a', 'Show', runs, str(a))}"
            f"{_select(f'{side}-b', 'minus', minus, '' if b is None else str(b))}</div>"
            f"<div class='circuits'><div id='{side}-legend'></div><div class='heads' role='group' "
            f"aria-label='Heads, {side}'></div><h3 class='shown-name' aria-live='polite'></h3>"
            f"<div class='pattern' id='{side}-pattern' aria-busy='true'></div></div>"
            f"<p class='notes most'></p></div>"
        )
    return (
        "<p class='legend'>Row: the token that attends; column: the token attended to. Hover a "
        "head to look, click to keep it. The view opens at the head whose attention from the last "
        f"token differs most between PRE and SFT (L{start[0]}H{start[1]}).</p>"
        "<div class='choices'>"
        "<button type='button' id='layer-back' aria-label='Previous layer'>◀</button>"
        f"{_select('layer', 'Layer', [(str(i), str(i), False) for i in range(layers)], start[0])}"
        "<button type='button' id='layer-on' aria-label='Next layer'>▶</button></div>"
        f"<div class='panels'>{''.join(panels)}</div>"
    )


def _start(data: DashboardData) -> tuple[int, int]:
    """Layer and head where the last token attends most differently under PRE and SFT."""
    pre, sft = (np.asarray(data.runs[name].pattern)[:, :, -1] for name in ("PRE", "SFT"))
    apart = np.abs(sft - pre).sum(-1)
    layer, head = np.unravel_index(int(apart.argmax()), apart.shape)
    return int(layer), int(head)


def _facts(data: DashboardData, lens: _Lens) -> dict[str, object]:
    """All that the page's script needs, save the attention patterns."""
    measures = {name: _measured(data, name) for name in _MEASURES}
    words: dict[str, int] = {}
    lenses = []
    for run in data.runs:
        k = lens.top_probs[run].shape[-1]
        shape = (*lens.numbers[run]["rank"].shape, k)
        ids = [words.setdefault(_token(t), len(words)) for ts in lens.top[run] for t in ts]
        lenses.append(
            {name: _short(values) for name, values in lens.numbers[run].items()}
            | {
                "rank": lens.numbers[run]["rank"].tolist(),
                "top": np.array(ids).reshape(shape).tolist(),
                "top_probs": _short(lens.top_probs[run]),
            }
        )
    _, heads, _, _ = np.shape(data.runs["PRE"].pattern)
    others = list(data.sources[1:])
    known = theme.source_colors(data.sources)
    return {
        "tokens": [_token(token) for token in data.tokens],
        "runs": list(data.runs),
        "measures": {
            name: _MEASURES[name] | _scale(values.values(), name == "attribution")
            for name, values in measures.items()
        },
        "values": {
            name: [_short(values[run]) if run in values else None for run in data.runs]
            for name, values in measures.items()
        },
        "components": list(data.components),
        "sources": [{"name": s, "color": known[s]} for s in others],
        "shares": [
            [_short(np.asarray(run.shares[s])) if s in run.shares else None for s in others]
            for run in data.runs.values()
        ],
        "lens": {
            "layers": [lens.layer_name(layer) for layer in lens.layers],
            "reached": [lens.reached(layer) for layer in lens.layers],
            "words": list(words),
            "runs": lenses,
            "kinds": {
                name: {"title": title} | _lens_scale(lens, name) for name, title in _KINDS.items()
            },
        },
        "heads": heads,
        "start": _start(data),
        "full": FULL,
        "colors": {
            "pattern": attention.PATTERN,
            "negative": attention.NEGATIVE,
            "positive": attention.POSITIVE,
            "sequential": theme.SEQUENTIAL,
            "diverging": theme.DIVERGING,
        },
    }


def _token(token: str) -> str:
    return isolated(visible(token))


def _measured(data: DashboardData, name: str) -> dict[str, np.ndarray]:
    """Run -> a measure at each position; without the runs that lack it."""
    if name == "logprob":
        return {run: np.asarray(given.token_logprobs) for run, given in data.runs.items()}
    if name == "attribution":
        return {
            run: np.asarray(given.attribution)
            for run, given in data.runs.items()
            if given.attribution is not None
        }
    n = len(data.tokens)
    found = {}
    for run in data.runs:
        part = data.kl_divergence[data.kl_divergence["graft"] == run].sort_values("position")
        if part["position"].tolist() != list(range(n)):
            raise ValueError(
                f"the table of KL divergences has {len(part)} rows of run {run!r}; it must have "
                f"one for each of {n} positions"
            )
        found[run] = part[name].to_numpy(dtype=float)
    return found


def _attributed(data: DashboardData) -> bool:
    return any(run.attribution is not None for run in data.runs.values())


def _scale(values: Iterable[np.ndarray], symmetric: bool) -> dict[str, float]:
    """The least and the greatest of all runs, with 0 between them or at an end."""
    known = [value[np.isfinite(value)] for value in map(np.asarray, values)]
    all_ = np.concatenate([*known, np.zeros(1)])
    low, high = float(all_.min()), float(all_.max())
    if symmetric:
        high = max(high, -low)
        low = -high
    return {"low": low, "high": high}


def _after_embeddings(values: Sequence[np.ndarray], symmetric: bool) -> dict[str, object]:
    """A scale over the layers' rows, and whether the embeddings' own row goes beyond it.

    Log-probabilities of the bare embeddings are so low that they would take the whole scale.
    """
    kept = [value[1:] if len(value) > 1 else value for value in values]
    scale, whole = _scale(kept, symmetric), _scale(values, symmetric)
    return {**scale, "beyond": whole != scale}


def _lens_scale(lens: _Lens, name: str) -> dict[str, object]:
    if name == "top_prob":
        return {"low": 0.0, "high": 1.0, "kind": "sequential"}
    if name in ("diff_base", "diff_full"):
        # One scale for both differences, so that they can be compared.
        known = lens.numbers
        both = [known[a]["logprob"] - known[b]["logprob"] for a in known for b in ("PRE", "SFT")]
        return _after_embeddings(both, True) | {"kind": "diverging"}
    values = [numbers[name] for numbers in lens.numbers.values()]
    if name == "logprob":
        return _after_embeddings(values, False) | {"kind": "sequential"}
    if name == "rank":
        return {"low": 0.0, "high": _scale([np.log10(v) for v in values], False)["high"]} | {
            "kind": "rank"
        }
    if name in ("kl_base", "kl_full"):
        values = [numbers[kl] for numbers in lens.numbers.values() for kl in ("kl_base", "kl_full")]
    return _scale(values, False) | {"kind": "sequential"}


def _short(values: np.ndarray) -> object:
    """Nested lists of five significant digits; what is not finite stays so."""
    values = np.asarray(values, dtype=float)
    known = np.isfinite(values) & (np.abs(values) > 1e-12)
    size = np.floor(np.log10(np.abs(values), where=known, out=np.zeros_like(values)))
    unit = 10.0 ** (4 - size)
    # Dividing by a power of ten and not multiplying by its inverse: the shortest decimals.
    return np.where(
        known, np.round(values * unit) / unit, np.where(np.isnan(values), values, 0.0)
    ).tolist()


def _packed(pattern: np.ndarray) -> str:
    """Base64 of [layer, head, lower triangle by rows] in little-endian 16-bit numbers."""
    rows, columns = np.tril_indices(pattern.shape[-1])
    lower = np.clip(np.asarray(pattern, dtype=np.float64)[:, :, rows, columns], 0, 1)
    return base64.b64encode(np.round(lower * FULL).astype("<u2").tobytes()).decode()


def _held(name: str, content: str, kind: str = "application/json") -> str:
    return f"<script type='{kind}' id='{name}'>{content}</script>"


def _runs(name: str, data: DashboardData, chosen: int) -> str:
    return _select(name, "Run", [(str(i), run, False) for i, run in enumerate(data.runs)], chosen)


def _select(name: str, label: str, options: Sequence[tuple[str, str, bool]], chosen: object) -> str:
    """A choice: (value, what is read, whether it cannot be chosen)."""
    items = "".join(
        f"<option value='{escape(value)}'{' selected' if value == str(chosen) else ''}"
        f"{' disabled' if off else ''}>{escape(said)}</option>"
        for value, said, off in options
    )
    return f"<label>{escape(label)} <select id='{name}' autocomplete='off'>{items}</select></label>"


def _written(value: float, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form).replace("-", "−")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


_KEY = (
    "<p class='legend'>In tokens, · is a space, ↵ a line break, → a tab. ✓ is the answer's first "
    "token.</p>"
)

#: Columns on the answer: value, how it is written, heading.
_RANKED = (
    ("rank", ".0f", "rank<small>1 = most likely</small>"),
    ("prob", ".4f", "probability"),
    ("logprob", ".3f", "log-prob.<small>nats</small>"),
)

_MEASURES: dict[str, dict[str, object]] = {
    "logprob": {
        "title": "log-probability",
        "unit": "nats",
        "note": "Log-probability of each token given those before it. No colour: certain. The "
        "first token has none.",
    },
    "kl_base": {
        "title": "KL to PRE",
        "unit": "nats",
        "note": "KL(run ‖ PRE) of the distributions of what comes after each token.",
    },
    "kl_full": {
        "title": "KL to SFT",
        "unit": "nats",
        "note": "KL(run ‖ SFT) of the distributions of what comes after each token.",
    },
    "attribution": {
        "title": "attribution",
        "unit": "logits",
        "note": "What the attention of all layers moved from each position to the last one, as its "
        "direct contribution to the answer's logit.",
    },
}

_KINDS = {
    "logprob": "log-probability of the answer (nats)",
    "rank": "rank of the answer (logarithmic)",
    "top_prob": "probability of the most likely token",
    "kl_base": "KL to PRE at the same layer (nats)",
    "kl_full": "KL to SFT at the same layer (nats)",
    "diff_base": "log-probability of the answer, run − PRE (nats)",
    "diff_full": "log-probability of the answer, run − SFT (nats)",
}
_OF_ANSWER = ("logprob", "rank", "diff_base", "diff_full")
