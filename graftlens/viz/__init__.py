"""Plots, tables and pages of results; what a notebook needs is exported here.

They are loaded on first use, so that `graftlens.viz.text` loads without plotly.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
