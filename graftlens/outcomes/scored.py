"""Given texts under grafts, token by token: how likely each graft finds what was written."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from graftlens.components import brief
from graftlens.graft import Grafts, named_grafts
from graftlens.memory import ENOUGH_ROWS, LOGITS
from graftlens.metrics import kl
from graftlens.model.grafted import GraftedTransformer
from graftlens.model.tree import TreeBatch, TreeShape
from graftlens.planner import Branches, Piece, Planner, Structure
from graftlens.prompts import Prompt, PromptError, Tokenized, ids_with, tokenize
from graftlens.references import References, marked

#: What is summed over tokens.
_SUMS = ("logprob", "kl_base", "kl_full")


@dataclass(frozen=True, eq=False)
class _Text:
    """A text to be scored: which of its tokens, and the spans that these belong to."""

    number: int
    tokens: Tokenized
    ids: tuple[int, ...]
    first: int
    spans: Mapping[str, tuple[int, ...]]


def score_texts(
    model: GraftedTransformer,
    texts: Iterable[Any],
    grafts: Grafts,
    *,
    continuations: Sequence[str] | None = None,
    field: str | None = None,
    per_token: bool = False,
    full: Any = None,
    prepend_bos: bool | None = None,
    chunk: int = 64,
) -> pd.DataFrame:
    """The log-probability of given texts under grafts, and how far the grafts' predictions are from
    those of the base and of the full run.

    Each text is read as it is (teacher forcing): every token but the first is scored by what the
    graft predicts for it at the position before. Grafts' positions are those of the text as a
    prompt; with `continuations`, what follows a prompt counts as generated, as in `sample`, and
    only that is scored. What grafts share is computed once.

    Args:
        model: the model.
        texts: texts, `Prompt`s (also conversations), or the rows of a `datasets` dataset, streamed:
            `chunk` of them are held at a time.
        grafts: name -> graft, or one or more grafts, which are keyed by their text. The base and
            the full run are scored as well.
        continuations: of each prompt, the text that follows it.
        field: of rows that are mappings, the key of the text or of the list of messages; None is
            `messages` or `text`, whichever there is.
        per_token: one row per token instead of sums.
        full: the run that counts as SFT, as in `evaluate`.
        prepend_bos: None is `model.cfg.default_prepend_bos`.
        chunk: how many texts are planned together.

    Returns:
        Per text, graft and span (`all`; of a conversation each role and `template`; of a prompt its
        fields; of a continuation `generated`): columns `text` (its number), `graft`, `rule`,
        `base_run`, `full_run`, `span`, `n` (tokens), `logprob` (their sum, in nats), `perplexity`
        (exp of minus the mean), `kl_base` and `kl_full` (sums of KL(graft ‖ run) of the predictions
        of these tokens, in nats; NaN without a full run; where vocabularies differ, over the
        `common_tokens` tokens that all sources have) and `reason` (why a text could not be run: all
        numbers are NA then). With `per_token`, per text, graft and token: `position`, `token_id`,
        `token`, `logprob`, `kl_base`, `kl_full`.

    Raises:
        ValueError: no grafts; rows without the field; as many continuations as there are not
            texts, or one that is not a text; a graft that the model cannot run.
    """
    parsed = named_grafts(grafts)
    if not parsed:
        raise ValueError("no grafts: give at least one.")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: write a number from 1.")
    runs = References.of(parsed, model.sources, full)
    scorer = _Scorer(model, runs, per_token)
    single = isinstance(texts, str | Prompt | Tokenized | Mapping)
    given: Iterator[Any] = iter([texts] if single else texts)
    if isinstance(continuations, str):
        continuations = [continuations]
    tails = None if continuations is None else iter(continuations)
    tables, number = [], 0
    bos = model.prepends_bos(prepend_bos)
    while batch := list(itertools.islice(given, chunk)):
        rest = [None] * len(batch) if tails is None else list(itertools.islice(tails, len(batch)))
        if len(rest) < len(batch):
            raise ValueError(
                f"{number + len(rest)} continuations for more texts: give one for each."
            )
        if tails is not None and (odd := [tail for tail in rest if not isinstance(tail, str)]):
            raise ValueError(f"continuations: {brief(odd[0])} is not a text. Give one for each.")
        read: list[_Text | str] = []
        for offset, (item, tail) in enumerate(zip(batch, rest, strict=True)):
            try:
                read.append(_read(model, number + offset, _given(item, field), tail, bos))
            except PromptError as error:
                read.append(str(error))
        tables.append(scorer.table(read, number))
        number += len(batch)
    if tails is not None and next(tails, None) is not None:
        raise ValueError(f"more continuations than the {number} texts: give one for each.")
    if not tables:
        raise ValueError("no texts: give at least one.")
    table = marked(pd.concat(tables, ignore_index=True), runs.base, runs.full)
    return model.vocabularies.marked(table)


def _given(item: Any, field: str | None) -> Any:
    if not isinstance(item, Mapping):
        return item
    key = field or next((k for k in ("messages", "text") if k in item), None)
    if key is None or key not in item:
        raise ValueError(
            f"a row with the keys {' '.join(map(str, item))} has no "
            f"{repr(field) if field else 'text or messages'}. Name the key of its text: field=…"
        )
    found = item[key]
    if isinstance(found, str | Prompt | Tokenized):
        return found
    return Prompt.chat(found, template_options={"add_generation_prompt": False})


def _read(
    model: GraftedTransformer, number: int, item: Any, tail: str | None, bos: bool | None
) -> _Text:
    """What is to be scored of a text.

    Raises:
        PromptError: a text that cannot be run, or has no token to score.
        ValueError: something that is not a text.
    """
    tokens = item if isinstance(item, Tokenized) else tokenize(item, model.tokenizer, bos)
    ids, first = tokens.ids, 1
    if tail is not None:
        ids, first = _continued(model, item, tokens, tail, bos), len(tokens)
        tokens = tokens.generating()
    if len(ids) <= first:
        raise PromptError("the text has no token to score: it needs two or more.")
    if model.arch.rotary_dim == 0 and len(ids) - 1 > model.arch.n_ctx:
        raise PromptError(
            f"the text has {len(ids)} tokens, more than the model's context of "
            f"{model.arch.n_ctx}. Shorten it."
        )
    if max(ids) >= model.arch.d_vocab:
        raise PromptError(
            f"the tokenizer gives token id {max(ids)}, but the model's vocabulary ends at "
            f"{model.arch.d_vocab - 1}."
        )
    scored = range(first, len(ids))
    spans = {"all": tuple(scored)}
    if tail is not None:
        spans["generated"] = tuple(scored)
    else:
        for name, places in tokens.spans.items():
            inside = tuple(sorted({i for tokens in places for i in tokens} & {*scored}))
            if name not in ("all", "bos", "last", "prompt", "turn") and inside:
                spans[name] = inside
    return _Text(number, tokens, ids, first, spans)


def _continued(
    model: GraftedTransformer, item: Any, tokens: Tokenized, tail: str, bos: bool | None
) -> tuple[int, ...]:
    """The tokens of a prompt with the text that follows it."""
    if tokens.prompt is None:
        if not isinstance(item, str):
            raise PromptError("a continuation needs a prompt with text; this one is bare tokens.")
        whole = tokenize(item + tail, model.tokenizer, bos).ids
    else:
        whole = ids_with(tokens, tail, model.tokenizer, bos)
    if whole[: len(tokens)] != tokens.ids:
        raise PromptError(
            f"{tail[:40]!r} does not begin a token of its own. End the prompt without a space and "
            "begin the continuation with one."
        )
    return whole


class _Scorer:
    """Scores chunks of texts under one set of grafts."""

    def __init__(self, model: GraftedTransformer, runs: References, per_token: bool) -> None:
        self.model, self.runs, self.per_token = model, runs, per_token
        self.grafts = dict(runs.grafts)
        self._planner = Planner(
            model.arch,
            model.sources,
            list(self.grafts.values()),
            model.equal_sources,
            references=runs.chosen,
            rotary=model.rotary,
            vocabularies=model.vocabularies,
        )
        device = torch.device(model.cfg.device)
        self._rows = ENOUGH_ROWS.get(device.type, ENOUGH_ROWS["cpu"])

    def table(self, texts: Sequence[_Text | str], first: int) -> pd.DataFrame:
        """The rows of some texts; of one that cannot be read, the reason is given."""
        reasons: dict[tuple[int, int], str] = {}
        found: dict[tuple[int, int], Float[np.ndarray, "sum token"]] = {}
        for offset, text in enumerate(texts):
            if isinstance(text, str):
                reasons |= {(first + offset, graft): text for graft in range(len(self.grafts))}
                continue
            branches = self._branches(text)
            structure, failing = self._planner.structure(text.tokens, branches)
            reasons |= {(text.number, graft): why for graft, why in failing.items()}
            for piece in self._planner.pieces(structure, self._rows):
                for graft, sums in self._run(text, branches, structure, piece):
                    if np.isnan(sums[0]).any():
                        reasons[text.number, graft] = (
                            f"the logits are not finite in {self.model.cfg.dtype}: weights or "
                            "activations overflow. Try a wider dtype."
                        )
                    else:
                        found[text.number, graft] = sums
        known = {text.number: text for text in texts if isinstance(text, _Text)}
        rows = [
            row
            for offset in range(len(texts))
            for graft in range(len(self.grafts))
            for row in self._rows_of(
                first + offset,
                graft,
                known.get(first + offset),
                found.get((first + offset, graft)),
                reasons.get((first + offset, graft)),
            )
        ]
        table = pd.DataFrame(rows)
        why = table["reason"].astype(object)
        return table.assign(reason=why.where(why.notna(), None))

    def _branches(self, text: _Text) -> Branches:
        """The text as one path, whose positions are the prompt's own up to its end."""
        read, n_prompt = len(text.ids) - 1, len(text.tokens)
        limit = self.model.arch.rope_limit
        total = read if limit is not None and read > limit else 0
        return Branches(
            tokens=text.ids[:-1],
            parents=tuple(range(-1, read - 1)),
            totals=(total,) * read,
            columns=tuple(min(place, n_prompt) for place in range(read)),
            paths=(tuple(range(text.first - 1, read)),),
        )

    @torch.no_grad()
    def _run(
        self, text: _Text, branches: Branches, structure: Structure, piece: Piece
    ) -> Iterator[tuple[int, Float[np.ndarray, "sum token"]]]:
        """(graft, [logprob, kl_base, kl_full] of each scored token)."""
        model, tree = self.model, piece.tree
        device = torch.device(model.cfg.device)
        shape = TreeShape([(tree, 1)], self._planner.sides, device)
        batch = TreeBatch.of(shape, [np.array([branches.tokens])])
        nodes = tree.final_nodes
        targets = torch.tensor(text.ids, device=device)[torch.from_numpy(nodes).to(device) + 1]
        row_of = dict(zip(tree.scored, tree.outputs, strict=True))
        runs = dict(piece.references)
        beside = [np.array([row_of[node][column] for node in nodes]) for column in runs.values()]
        values = np.full((3, len(nodes)), np.nan)
        common = model.vocabularies.common

        def keep(logits: Tensor, which: slice, *others: Tensor) -> None:
            logits = logits if logits.element_size() == 8 else logits.float()
            own = logits.log_softmax(-1)
            index = targets[which][:, None]
            values[0, which] = own.gather(1, index)[:, 0].cpu().numpy()
            mine = own if common == own.shape[1] else logits[:, :common].log_softmax(-1)
            for run, other in zip(runs, others, strict=True):
                theirs = other if other.element_size() == 8 else other.float()
                apart = kl(mine, theirs[:, :common].log_softmax(-1))
                values[_SUMS.index(f"kl_{run}"), which] = apart.cpu().numpy()

        model.tree_logits(batch, keep, max(16, LOGITS // model.arch.d_vocab), beside)
        for graft, column in zip(piece.grafts.tolist(), piece.columns.tolist(), strict=True):
            rows = [row_of[node][column] for node in range(text.first - 1, len(text.ids) - 1)]
            yield graft, values[:, rows]

    def _rows_of(
        self,
        number: int,
        graft: int,
        text: _Text | None,
        sums: Float[np.ndarray, "sum token"] | None,
        reason: str | None,
    ) -> Iterator[dict[str, Any]]:
        name, rule = [*self.grafts.items()][graft]
        about = {"text": number, "graft": name, "rule": str(rule)}
        spans: Mapping[str, tuple[int, ...]] = {"all": ()} if text is None else text.spans
        if self.per_token:
            places = () if text is None or sums is None else spans["all"]
            for place, values in zip(places, () if sums is None else sums.T, strict=True):
                assert text is not None
                token = text.ids[place]
                yield about | {
                    "position": place,
                    "token_id": token,
                    "token": self.model.to_single_str_token(token),
                    **dict(zip(_SUMS, values.tolist(), strict=True)),
                    "reason": None,
                }
            if not places:
                empty = {"position": None, "token_id": None, "token": None}
                yield about | empty | dict.fromkeys(_SUMS, np.nan) | {"reason": reason}
            return
        for span, places in spans.items():
            row = about | {"span": span, "n": len(places)}
            numbers = dict.fromkeys((*_SUMS, "perplexity"), np.nan)
            if sums is not None and text is not None:
                here = sums[:, [place - text.first for place in places]].sum(axis=1)
                numbers |= dict(zip(_SUMS, here.tolist(), strict=True))
                numbers["perplexity"] = float(np.exp(-here[0] / len(places)))
            yield row | numbers | {"reason": reason}
