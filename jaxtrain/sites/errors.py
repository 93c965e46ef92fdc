"""The reasons why an exchange between sites stops a run."""


class SiteError(RuntimeError):
    """The sites cannot go on together."""


class PeerRefused(SiteError):
    """The sites do not run the same configuration, data or code."""


class Disagreement(SiteError):
    """Two sites have different codes or references of one round."""


class SiteLeftOut(SiteError):
    """The other sites finished a round without this one; it must fetch their reference.

    Attributes:
        fragment, round: the newest round of which this site is known to be left out.
    """

    def __init__(self, fragment: int, round_: int):
        super().__init__(f"this site was left out of round {round_} of fragment {fragment}")
        self.fragment, self.round = fragment, round_
