"""Hook points that a flag turns on, because their activations cost memory."""

from typing import Any

from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint


class SilentHookError(ValueError, AssertionError):
    """A hook where nothing fires; TransformerLens's own models raise an AssertionError."""


class UnknownHookError(ValueError, KeyError):
    """A hook that does not exist; TransformerLens's own models raise a KeyError."""

    def __str__(self) -> str:
        return str(self.args[0])  # and not what a KeyError shows, its repr


class FlaggedPoint(HookPoint):
    """A hook point that fires while a flag of the config is on; otherwise hooks are refused."""

    def __init__(self, flags: Any, flag: str, unless: str | None = None) -> None:
        """`flags` has the flag, and the one that replaces it if both are on."""
        super().__init__()
        self.flags, self.flag, self.unless = flags, flag, unless

    @property
    def fires(self) -> bool:
        """Whether a run passes through here now."""
        return self._on(self.flag) and not self._on(self.unless)

    @property
    def hooked(self) -> bool:
        """Whether anything is attached."""
        return bool(
            self._forward_pre_hooks
            or self._forward_hooks
            or self._backward_pre_hooks
            or self._backward_hooks
        )

    @property
    def way(self) -> str:
        """What makes it fire."""
        if self._on(self.unless):
            return f"Turn on model.set_{self.flag}(True) and off model.set_{self.unless}(False)."
        return f"Turn it on with model.set_{self.flag}(True)."

    # What HookPoint.add_hook goes through, and PyTorch's own hooks as well.

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._refuse_silent()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._refuse_silent()
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._refuse_silent()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._refuse_silent()
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self._refuse_silent()
        return super().register_backward_hook(*args, **kwargs)

    def _refuse_silent(self) -> None:
        if not self.fires:
            raise SilentHookError(f"hook: {self.name!r} does not fire, to save memory. {self.way}")

    def _on(self, flag: str | None) -> bool:
        return flag is not None and bool(getattr(self.flags, flag))
