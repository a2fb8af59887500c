"""GETs to HTTP servers: redirects followed, credentials kept to whom they are for, bodies into lent memory."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from streamload.errors import OptionError, SourceError
from streamload.wire import Head, Lanes, Response, Server
from streamload.wire.connection import Landed

if TYPE_CHECKING:
    from streamload.sources.http_plain import PlainClient

__all__ = ["Accept", "HttpClient", "Origin", "Resource", "checked_headers", "escaped", "origin_of"]

# As many as RFC 9110 once recommended; who needs more goes in circles.
_MOST_REDIRECTS = 5

_REDIRECTS = {301, 302, 303, 307, 308}

# What may stand in an address as it is; all else is escaped. A percent sign is the beginning of an escape already.
_SAFE = "%/:;=@!$&'()*+,~?#[]"

# What a request says by itself; somebody else's idea of it would make the answer another one than was asked for.
_OURS = frozenset(
    {
        *("accept-encoding", "connection", "content-length", "expect", "host", "if-match", "if-modified-since"),
        *("if-none-match", "if-range", "if-unmodified-since", "range", "te", "trailer", "transfer-encoding", "upgrade"),
    }
)

# RFC 9110, section 5.6.2.
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")

Accept = Callable[[Head], Sequence[memoryview] | None]
"""Looks at the head of an answer that is no error and says where its body goes, or None where the head is all that is
wanted; raises where it is not what was asked for."""


class Origin(NamedTuple):
    """Whom credentials are for: no other scheme, host or port gets them."""

    scheme: str
    host: str
    port: int


@dataclass(slots=True, eq=False)
class Resource:
    """What is asked for.

    Attributes:
        url: Its address, without user name and password.
        address: Where redirects led from there the last time; None where they are to be followed anew.
    """

    url: str
    address: str | None = None


class HttpClient:
    """Asks one server, and those that it redirects to.

    Where redirects led is asked first from then on. Such an address may be a signed one, which expires: when it
    refuses, they are followed anew, once for each request.

    Args:
        origin: Who gets `headers`, and nobody else.
        headers: What goes with each request to it: credentials, mostly.
        connect_timeout_s: How long making a connection may take, in seconds.
        stall_s: For how long a server may send nothing while it owes an answer, in seconds.
        count: Called whenever a request is sent.

    Attributes:
        paths: Bytes that came, by the way they came.
    """

    def __init__(
        self,
        origin: Origin,
        headers: Mapping[str, str],
        *,
        connect_timeout_s: float,
        stall_s: float,
        count: Callable[[], None],
        paths: dict[str, int],
    ) -> None:
        self._origin = origin
        self._headers = dict(headers)
        self._connect_timeout_s = connect_timeout_s
        self._stall_s = stall_s
        self._count = count
        self.paths = paths
        self._lanes = Lanes(connect_timeout_s=connect_timeout_s, stall_s=stall_s)
        self._plain: PlainClient | None = None
        self._unserved: dict[Origin, str] = {}
        self._proxies: dict[Origin, str | None] = {}
        self._context: ssl.SSLContext | None = None

    async def get(
        self,
        resource: Resource,
        headers: Mapping[str, str],
        accept: Accept,
        landed: Landed | None = None,
        *,
        redirected: Callable[[Head], None] | None = None,
    ) -> tuple[Head, Origin]:
        """Ask for something, and follow redirects.

        Args:
            resource: What; where redirects led is noted in it.
            headers: What goes with the request to whomever it goes: a range, a condition.
            accept: Says where the body goes.
            landed: Told of its pieces as they come.
            redirected: Shown the heads of redirects; raises where they are not for what was asked for.

        Returns:
            The head of the answer, an error's, too, and whose it is.

        Raises:
            TransientError: The connection broke or stalled; ``valid_bytes`` says how much of the body is in place.
            SourceError: The redirects do not end or lead to where nobody may be sent, the answer is none; or what
                `accept` raised.
        """
        known = resource.address
        if known is not None:
            head, address = await self._try(resource, known, headers, accept, landed, redirected)
            if not _may_have_expired(head.status):
                return head, origin_of(urlsplit(address))
            if resource.address == known:
                resource.address = None
        head, address = await self._try(resource, resource.url, headers, accept, landed, redirected)
        return head, origin_of(urlsplit(address))

    async def aclose(self) -> None:
        """Close the connections; what is under way fails. May be called twice."""
        try:
            await self._lanes.aclose()
        finally:
            plain, self._plain = self._plain, None
            if plain is not None:
                await plain.aclose()

    async def _try(
        self,
        resource: Resource,
        address: str,
        headers: Mapping[str, str],
        accept: Accept,
        landed: Landed | None,
        redirected: Callable[[Head], None] | None,
    ) -> tuple[Head, str]:
        """Ask at one address, and note where it led."""
        try:
            head, last = await self._follow(address, headers, accept, landed, redirected)
        except SourceError:
            if resource.address == address:
                resource.address = None  # another try may be led to another server
            raise
        if head.status < 300:
            resource.address = None if last == resource.url else last
        return head, last

    async def _follow(
        self,
        address: str,
        headers: Mapping[str, str],
        accept: Accept,
        landed: Landed | None,
        redirected: Callable[[Head], None] | None,
    ) -> tuple[Head, str]:
        """The head of the answer at the end of the redirects, and whose it is."""
        for _ in range(_MOST_REDIRECTS + 1):
            head = (await self._ask(address, headers, accept, landed)).head
            if head.status not in _REDIRECTS:
                return head, address
            if redirected is not None:
                redirected(head)
            address = _next_address(address, head.headers.get("location"))
        raise SourceError(f"{self._origin.host} redirects more than {_MOST_REDIRECTS} times")

    async def _ask(self, address: str, headers: Mapping[str, str], accept: Accept, landed: Landed | None) -> Response:
        parts = urlsplit(address)
        origin = origin_of(parts)
        fields = {
            "Host": _host_field(origin),
            "User-Agent": "streamload",
            "Accept-Encoding": "identity",
            **headers,
        }
        if origin == self._origin:
            fields |= self._headers
        if origin not in self._proxies:
            self._proxies[origin] = _proxy_for(origin)
        proxy = self._proxies[origin]
        reason = "through a proxy" if proxy else self._unserved.get(origin)
        if reason is None:
            try:
                return await self._ask_directly(parts, origin, fields, accept, landed)
            except _UnservedError as error:
                reason = self._unserved[origin] = error.reason
        self._count()
        nbytes = 0

        def place(head: Head) -> Sequence[memoryview] | None:
            nonlocal nbytes
            views = None if head.status >= 300 else accept(head)
            nbytes = sum(view.nbytes for view in views or ())
            return views

        host = f"{origin.host}:{origin.port}"
        response = await self._plain_client().ask(address, fields, proxy, place, host=host)
        self._note_path(f"with aiohttp: {reason}", nbytes)
        return response

    async def _ask_directly(
        self, parts: SplitResult, origin: Origin, fields: Mapping[str, str], accept: Accept, landed: Landed | None
    ) -> Response:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = [f"GET {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        nbytes = 0

        def place(head: Head) -> Sequence[memoryview] | None:
            nonlocal nbytes
            if head.status >= 300:
                return None
            views = accept(head)
            nbytes = sum(view.nbytes for view in views or ())
            if views is not None and head.body_bytes is None:
                raise _UnservedError("its answers do not say how long they are")
            return views

        self._count()
        server = Server(origin.host, origin.port, self._tls() if origin.scheme == "https" else None)
        response = await self._lanes.ask(server, "\r\n".join(lines).encode("latin-1"), place, landed)
        self._note_path("from the socket into place", nbytes)
        return response

    def _note_path(self, path: str, nbytes: int) -> None:
        if nbytes:
            self.paths[path] = self.paths.get(path, 0) + nbytes

    def _plain_client(self) -> PlainClient:
        if self._plain is None:
            # Only here: importing aiohttp takes as long as a small load.
            from streamload.sources.http_plain import PlainClient

            self._plain = PlainClient(self._tls(), connect_timeout_s=self._connect_timeout_s, stall_s=self._stall_s)
        return self._plain

    def _tls(self) -> ssl.SSLContext:
        """The system's certificates, or those that SSL_CERT_FILE and SSL_CERT_DIR name."""
        if self._context is None:
            self._context = ssl.create_default_context()  # takes 20 ms
        return self._context


class _UnservedError(Exception):
    """This cannot be received on our own connections."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def origin_of(parts: SplitResult) -> Origin:
    """Whom an address means.

    Raises:
        SourceError: Nobody, or somebody who is not asked over HTTP.
    """
    try:
        host, port = parts.hostname, parts.port
        if host is not None:
            host = host if host.isascii() else host.encode("idna").decode("ascii")
    except ValueError:  # UnicodeError is one
        host, port = None, None
    if parts.scheme not in {"http", "https"} or not host:
        raise SourceError("this is not the address of an HTTP server")
    return Origin(parts.scheme, host, port or (443 if parts.scheme == "https" else 80))


def escaped(text: str) -> str:
    """Part of an address, with what may not stand in one escaped, and escapes left as they are."""
    return quote(text, safe=_SAFE)


def checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that somebody wants to be sent.

    Raises:
        OptionError: They cannot be sent, or are not theirs to say. Never shows a value.
    """
    for name, value in headers.items():
        if not isinstance(name, str) or not name or not _TOKEN.issuperset(name):
            raise OptionError(f"{name!r} is no name of an HTTP header")
        if name.lower() in _OURS:
            raise OptionError(f"the header {name} is set for each request, and cannot be given")
        try:
            good = isinstance(value, str) and bool(value.encode("latin-1")) and value.isprintable()
        except UnicodeEncodeError:
            good = False
        if not good:
            raise OptionError(f"the value of the header {name} has characters that no header can have, or none")
    # In one spelling, so that each is sent once.
    return {name.title(): value for name, value in headers.items()}


def _next_address(address: str, location: str | None) -> str:
    """Where a redirect leads. A user name and a password in it are for nobody, and left out."""
    if not location:
        raise SourceError(f"{_host(address)} redirects without saying where to")
    try:
        joined = urlsplit(urljoin(address, escaped(location)))
        origin_of(joined)
    except (SourceError, ValueError):
        raise SourceError(f"{_host(address)} redirects to what is no HTTP server") from None
    if address.startswith("https:") and joined.scheme != "https":
        raise SourceError(f"{_host(address)} redirects from https to http, which anybody on the way could have done")
    return joined._replace(netloc=joined.netloc.rpartition("@")[2], fragment="").geturl()


def _host(address: str) -> str:
    return urlsplit(address).netloc


def _host_field(origin: Origin) -> str:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    usual = origin.port == (443 if origin.scheme == "https" else 80)
    return host if usual else f"{host}:{origin.port}"


def _may_have_expired(status: int) -> bool:
    """Whether an address that had served may refuse with this because it was good for a while only.

    Signed addresses that are too old are answered with 403 by most, with 400, 401, 404 or 410 by some.
    """
    return 400 <= status < 500 and status not in {408, 412, 416, 425, 429}


def _proxy_for(origin: Origin) -> str | None:
    """The proxy that the environment names for whom is asked."""
    proxies = getproxies()
    proxy = proxies.get(origin.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(f"{origin.host}:{origin.port}", proxies):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
