"""graftlens: find out where a language model keeps what it learned in finetuning.

The names here are loaded on first use, so that `import graftlens` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftlens.components import Component
    from graftlens.dashboards import dashboard
    from graftlens.evaluation import evaluate, position_grafts
    from graftlens.experiment.run import run_experiment
    from graftlens.graft import At, Graft, Rule
    from graftlens.model.grafted import GraftedTransformer
    from graftlens.model.mask import GraftMask
    from graftlens.prompts import Prompt, PromptError
    from graftlens.stats import compare, compare_all, stability, summarise
    from graftlens.sweep.results import read_results
    from graftlens.sweep.runner import run_sweep

__version__ = "0.1.0"

_HOME = {
    "At": "graftlens.graft",
    "Component": "graftlens.components",
    "Graft": "graftlens.graft",
    "GraftMask": "graftlens.model.mask",
    "GraftedTransformer": "graftlens.model.grafted",
    "Prompt": "graftlens.prompts",
    "PromptError": "graftlens.prompts",
    "Rule": "graftlens.graft",
    "compare": "graftlens.stats",
    "compare_all": "graftlens.stats",
    "dashboard": "graftlens.dashboards",
    "evaluate": "graftlens.evaluation",
    "position_grafts": "graftlens.evaluation",
    "read_results": "graftlens.sweep.results",
    "run_experiment": "graftlens.experiment.run",
    "run_sweep": "graftlens.sweep.runner",
    "stability": "graftlens.stats",
    "summarise": "graftlens.stats",
}

__all__ = [
    "At",
    "Component",
    "Graft",
    "GraftMask",
    "GraftedTransformer",
    "Prompt",
    "PromptError",
    "Rule",
    "compare",
    "compare_all",
    "dashboard",
    "evaluate",
    "position_grafts",
    "read_results",
    "run_experiment",
    "run_sweep",
    "stability",
    "summarise",
]


#: Parts that are used by their names: lens.logit_lens, viz.heatmap, data.make_facts.
_PARTS = ("data", "lens", "viz")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"graftlens.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'graftlens' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_HOME, *_PARTS, "__version__"})
