"""Looking into grafted runs: what they compute where, against PRE and SFT.

Every function takes a model, prompts and grafts and returns a table; `graftlens.viz` draws them.
"""

from graftlens.lens.activations import activation_difference, pattern_difference
from graftlens.lens.attribution import attribution
from graftlens.lens.logit import divergence, emergence, logit_lens
from graftlens.lens.patching import patched, patching
from graftlens.lens.weights import weight_difference

__all__ = [
    "activation_difference",
    "attribution",
    "divergence",
    "emergence",
    "logit_lens",
    "patched",
    "patching",
    "pattern_difference",
    "weight_difference",
]
