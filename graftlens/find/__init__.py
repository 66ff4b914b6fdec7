"""Finding places: from what finetuning changed to the grafts that matter, by gradient and by exact
grafts.

Gradients propose, exact grafts judge.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
