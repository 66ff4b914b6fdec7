"""What grafted models do: texts that they generate, and what is measured of them.

`sample` generates many texts under many grafts; every function takes or returns a table.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
