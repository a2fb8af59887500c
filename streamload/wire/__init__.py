"""How do bytes come over HTTP? Ranged GETs whose bodies go from the socket into lent memory."""

from streamload.wire.connection import Response
from streamload.wire.head import Head
from streamload.wire.lanes import Lanes, Server
from streamload.wire.pool import Pool
from streamload.wire.tls import NO_TLS, ONLY_TLS, is_plain, speaks_tls

__all__ = ["NO_TLS", "ONLY_TLS", "Head", "Lanes", "Pool", "Response", "Server", "is_plain", "speaks_tls"]
