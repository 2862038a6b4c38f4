"""Why a contender sits a case out."""


class Unavailable(Exception):
    """The contender cannot run this case here; the message says why. ``by_design``: it never runs such cases."""

    def __init__(self, reason: str, *, by_design: bool = False) -> None:
        super().__init__(reason)
        self.by_design = by_design
