"""Looking into grafted runs: what they compute where, against PRE and SFT.

Every function takes a model, prompts and grafts and returns a table; `graftlens.viz` draws them.
Prompts run a few at a time; if hooks are attached to the model, or patches are in force, all run
together, so that a hook is given the whole batch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
