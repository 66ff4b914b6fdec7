"""Plots, tables and pages of results; what a notebook needs is exported here.

They are loaded on first use, so that `graftlens.viz.text` can be imported without plotly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftlens.viz.attention import attention_view
    from graftlens.viz.attribution import logit_attribution_bars, logit_attribution_heatmap
    from graftlens.viz.bars import grouped_bars
    from graftlens.viz.differences import difference_heatmap, weight_heatmap
    from graftlens.viz.export import exporter, write_figure
    from graftlens.viz.heatmaps import heatmap
    from graftlens.viz.lens import answer_by_layer, kl_divergence_lines, lens_heatmap
    from graftlens.viz.linecharts import lines
    from graftlens.viz.patching import patching_scatter
    from graftlens.viz.sweeps import dose_response, size_curve, window_triangle

_HOME = {
    "answer_by_layer": "graftlens.viz.lens",
    "attention_view": "graftlens.viz.attention",
    "logit_attribution_bars": "graftlens.viz.attribution",
    "logit_attribution_heatmap": "graftlens.viz.attribution",
    "difference_heatmap": "graftlens.viz.differences",
    "dose_response": "graftlens.viz.sweeps",
    "exporter": "graftlens.viz.export",
    "grouped_bars": "graftlens.viz.bars",
    "heatmap": "graftlens.viz.heatmaps",
    "kl_divergence_lines": "graftlens.viz.lens",
    "lens_heatmap": "graftlens.viz.lens",
    "lines": "graftlens.viz.linecharts",
    "patching_scatter": "graftlens.viz.patching",
    "size_curve": "graftlens.viz.sweeps",
    "weight_heatmap": "graftlens.viz.differences",
    "window_triangle": "graftlens.viz.sweeps",
    "write_figure": "graftlens.viz.export",
}

__all__ = [
    "answer_by_layer",
    "attention_view",
    "difference_heatmap",
    "dose_response",
    "exporter",
    "grouped_bars",
    "heatmap",
    "kl_divergence_lines",
    "lens_heatmap",
    "lines",
    "logit_attribution_bars",
    "logit_attribution_heatmap",
    "patching_scatter",
    "size_curve",
    "weight_heatmap",
    "window_triangle",
    "write_figure",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graftlens.viz' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
