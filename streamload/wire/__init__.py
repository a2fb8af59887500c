"""How do bytes come over HTTP? Ranged GETs whose bodies go from the socket into lent memory."""

from streamload.wire.connection import Response
from streamload.wire.head import Head
from streamload.wire.lanes import Lanes, Server
from streamload.wire.pool import Pool

__all__ = ["Head", "Lanes", "Pool", "Response", "Server"]
