"""What an exchange returns about a complete round."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arrived:
    """A complete round.

    Attributes:
        codes: {other site: {link index: code}}.
        tokens: {other site: tokens of its round}.
        participants: sites whose codes count, this one included.
        admitted: sites that were left out and get the outer state after this round.
        payload_bytes: codes (sent, received) over this process's links.
        wire_bytes: all bytes (sent, received) since the round before was returned, with headers,
            retransmissions and what other rounds sent meanwhile: the sum over rounds is exact.
        seconds: from sending the own code until the last one was here; 0 if that was here before,
            or if a restart was in between.
    """

    codes: dict[int, dict[int, bytes]]
    tokens: dict[int, int]
    participants: tuple[int, ...]
    admitted: tuple[int, ...]
    payload_bytes: tuple[int, int]
    wire_bytes: tuple[int, int]
    seconds: float
