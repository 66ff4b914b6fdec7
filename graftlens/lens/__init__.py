"""Looking into grafted runs: what they compute where, against PRE and SFT.

Every function takes a model, prompts and grafts and returns a table; `graftlens.viz` draws them.
Prompts run a few at a time; if hooks are attached to the model, or patches are in force, all run
together, so that a hook is given the whole batch.
"""

from graftlens.lens.activations import activation_difference, pattern_difference
from graftlens.lens.attribution import direct_logit_attribution
from graftlens.lens.logit import emergence, kl_divergence, logit_lens
from graftlens.lens.patching import patched, patching
from graftlens.lens.weights import weight_difference

__all__ = [
    "activation_difference",
    "direct_logit_attribution",
    "emergence",
    "kl_divergence",
    "logit_lens",
    "patched",
    "patching",
    "pattern_difference",
    "weight_difference",
]
