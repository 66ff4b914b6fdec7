"""graftlens: find out where a language model keeps what it learned in finetuning.

The names here are loaded on first use, so that `import graftlens` is quick.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
