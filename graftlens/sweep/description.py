"""What a sweep would do, in words: worked out without reading any weight."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graftlens.memory import affordable_rows
from graftlens.sweep.cells import Measures, own_measures
from graftlens.sweep.config import Checked, SweepConfig, checked_as_given
from graftlens.sweep.counts import blocks_of
from graftlens.sweep.scoring import dry_plan

#: How many grafts a description names.
SHOWN = 12


def describe_sweep(
    config: SweepConfig | str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    measures: Measures = (),
) -> str:
    """What a sweep would do, as text: its prompts, its grafts, and how much there is to compute.

    No weights are read, and nothing is written. Arguments are those of `run_sweep`.

    Raises:
        ValueError: a config that cannot be run.
    """
    return describe(checked_as_given(config, overrides, own_measures(measures))[0])


def describe(checked: Checked, sources: Mapping[str, Any] | None = None) -> str:
    """What a sweep would do, as text for people: sources, prompts, grafts, cells and the plan.

    `sources` says where the models will be, if others stand in for them in `checked`."""
    config, arch = checked.config, checked.arch
    located = {**config.all_sources, **(sources or {})}
    base, *others = config.all_sources
    lines = [f"sources   {base} = {located[base]} (the base)"]
    lines += [f"          {name} = {located[name]}" for name in others]
    if checked.members:
        names = " ".join(member.name for member in checked.members)
        lines.append(f"members   {len(checked.members)}, one after another: {names}")
    heads = f"{arch.n_heads} heads" + (
        f" ({arch.n_kv_heads} key-value)" if arch.n_kv_heads != arch.n_heads else ""
    )
    lines.append(
        f"model     {arch.family}, {arch.n_layers} layers, {heads}, d_model {arch.d_model}"
    )
    counts = Counter(
        (title, prompt.name or prompt.template)
        for title, prompt in zip(checked.dataset, checked.prompts, strict=True)
    )
    lines.append(f"prompts   {len(checked.prompts)}")
    lines += [f"          {title}: {name}: {n}" for (title, name), n in counts.items()]
    lines.append(f"grafts    {len(checked.grafts)}, recovery from {checked.base} to {checked.full}")
    shown = [f"{g.name} = {g.graft}" if g.name != str(g.graft) else g.name for g in checked.grafts]
    lines += [f"          {line}" for line in shown[:SHOWN]]
    if len(shown) > SHOWN:
        lines.append(f"          … and {len(shown) - SHOWN} more")
    if checked.duplicates:
        dropped, kept = next(iter(checked.duplicates.items()))
        twice = f"{len(checked.duplicates)} given twice are run once"
        lines.append(f"          {twice}, such as {dropped} = {kept}")
    cells = len(checked.prompts) * len(checked.grafts)
    lines += _of_texts(checked, cells)
    if not checked.scored:
        return "\n".join(lines)
    if checked.members:
        lines.append(f"          {cells} of each member, so {cells * len(checked.members)} in all")
    shards = -(-cells // config.shards)
    lines.append(f"cells     {cells}, in {shards} or more shards of up to {config.shards}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.dtype) if config.dtype else torch.float32
    budget = affordable_rows(arch, device, dtype)
    grafts = {named.name: named.graft for named in checked.grafts}
    _, blocks = blocks_of(len(checked.prompts), len(grafts), config.shards)
    planned = dry_plan(
        arch,
        tuple(config.all_sources),
        checked.prepared,
        dict(enumerate(checked.prompts)),
        list(grafts.values()),
        measured=checked.asked,
        references={"base": grafts[checked.base], "full": grafts[checked.full]},
        blocks=blocks,
        row_budget=config.row_budget or budget,
        item=dtype.itemsize,
    )
    if len(blocks) > 1:
        lines.append(
            f"          grafts are cut into {len(blocks)} blocks, as shards hold fewer cells: what "
            "blocks have in common is computed in each"
        )
    return "\n".join([*lines, "", planned.summary()])


def _of_texts(checked: Checked, cells: int) -> list[str]:
    """What is generated, and what is asked about it."""
    given = checked.config.outcomes
    if given is None:
        return []
    n, rounds = given.sampling.n, max(1, len(checked.members))
    texts = cells * n * rounds
    lines = [
        f"texts     {texts:,}, {n} of each prompt and graft, up to "
        f"{given.sampling.max_new_tokens} tokens each"
    ]
    if given.measures:
        lines.append(f"          measured: {' '.join(given.measures)}")
    lines += [
        f"          {name} asks {m.judge.who} about {texts:,} texts at most, "
        f"{texts * m.judge.attempts:,} calls"
        for name, m in given.measures.items()
        if m.judge is not None
    ]
    if not checked.scored:
        lines.append("cells     none: no prompt has an answer")
    return lines
