"""Facts, the texts that tell them and the prompts that ask for them: seeded, with provenance."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
