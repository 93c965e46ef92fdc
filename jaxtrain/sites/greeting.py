"""The first frame of a connection: who connects, for which job, and what must be equal."""

import asyncio
import contextlib
from typing import Any

from jaxtrain.sites.channel import Channel
from jaxtrain.sites.errors import PeerRefused
from jaxtrain.sites.frames import HELLO, BadFrame, pack, read_frame
from jaxtrain.sites.mailbox import Peer

PROTOCOL = 1
HELLO_S = 10.0


class Greeter:
    """Exchanges and compares greetings.

    Args:
        channels: {(name of a site, process): its link}.
        own: name of the own site, and the process.
        job: name of the job.
        session: identifies this start of the process.
        identity: what must be equal at all sites.
    """

    def __init__(
        self,
        channels: dict[Peer, Channel],
        own: Peer,
        job: str,
        session: str,
        identity: dict[str, str],
    ):
        self._channels, self._own, self._identity = channels, own, identity
        self._hello = {"protocol": PROTOCOL, "job": job, "from": own, "session": session}

    async def greet(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        channel: Channel | None = None,
    ) -> Channel:
        """Exchanges greetings; returns the link of the peer.

        Args:
            channel: the expected peer; None at the end that listens.

        Raises:
            PeerRefused: the peer runs something else.
            BadFrame: the greeting is invalid, is for another process or job, or is from a peer that
                ran the same thing before.
            OSError, EOFError: the connection ended, or the peer sent nothing for HELLO_S.
        """
        async with asyncio.timeout(HELLO_S):
            if channel:  # the end that listens learns first who connects
                writer.write(self._hello_to(channel))
            kind, body = await read_frame(reader)
            if kind != HELLO or not isinstance(body, dict):
                raise BadFrame(f"a connection must begin with a greeting; got {kind!r}")
            found = self._find(body, channel)
            if not channel:
                writer.write(self._hello_to(found))
            await writer.drain()
        self._compare(found, body.get("identity"))
        session = str(body.get("session"))[:64]
        if found.session and found.session != session:  # the peer was restarted
            for stream in found.streams:
                stream.writer.transport.abort()
        found.session = session
        with contextlib.suppress(TypeError, ValueError):
            found.outbox.newest = {int(f): int(r) for f, r in body.get("newest", [])}
        return found

    def _hello_to(self, channel: Channel) -> bytes:
        newest = list(channel.inbox.newest().items())
        extra = {"to": channel.peer, "newest": newest, "identity": self._identity}
        return pack(HELLO, self._hello | extra)

    def _find(self, body: dict, expected: Channel | None) -> Channel:
        for name in ("protocol", "job"):
            if body.get(name) != self._hello[name]:
                theirs = str(body.get(name))[:80]
                raise BadFrame(f"{name} must be {self._hello[name]} at all sites; got {theirs}")
        match body.get("from"):
            case [str(name), int(process)]:
                found = self._channels.get((name, process))
            case _:
                found = None
        if found is None or expected not in (None, found) or body.get("to") != list(self._own):
            raise BadFrame(
                f"a greeting must be from {expected or 'a linked process'} to {self._own}; got one "
                f"from {str(body.get('from'))[:80]} to {str(body.get('to'))[:80]}"
            )
        return found

    def _compare(self, channel: Channel, theirs: Any) -> None:
        theirs = theirs if isinstance(theirs, dict) else {}
        for name in sorted(self._identity.keys() | theirs.keys()):
            if self._identity.get(name) != theirs.get(name):
                own = str(self._identity.get(name))[:200]
                text = (
                    f"{name} must be equal at all sites; got {own} at site {self._own[0]} and "
                    f"{str(theirs.get(name))[:200]} at site {channel.peer[0]}."
                )
                # A peer that was accepted before and comes back different stops only itself.
                raise BadFrame(text) if channel.session else PeerRefused(text)
