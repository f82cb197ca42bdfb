"""Pictures from elsewhere: by https, from hosts on the list, and never from this network.

A host is looked up once. Every address found must be public, and the connection goes to that very address, so a name that is
answered otherwise the second time (DNS rebinding) leads nowhere. Nothing is followed, nothing is unpacked.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpx2

from davsp.errors import DavspError
from davsp.serve.refusals import Refusal, bad

Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: str) -> bool:
    """Whether an IP address is on the open internet; IPv6 that wraps IPv4 is not taken for it."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip.is_site_local):
        return False  # the last one is fec0::/10, of old networks, which Python calls global
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


class Fetcher:
    """Fetches pictures.

    Args:
        hosts: HOST or HOST:PORT, without a port 443.
        max_bytes: of one picture.
        timeout: for one picture as a whole, in seconds.
        resolve, transport: how names are looked up and connections made; for tests.

    Raises:
        DavspError: an entry that is no host.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        max_bytes: int,
        timeout: float,
        resolve: Resolve | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self.hosts = {_entry(host) for host in hosts}
        self.max_bytes, self.timeout, self.resolve = max_bytes, timeout, resolve or _addresses
        self.http = httpx2.AsyncClient(transport=transport, trust_env=False, follow_redirects=False, timeout=timeout)

    async def __call__(self, url: str) -> bytes:
        """The bytes at an address.

        Raises:
            Refusal: 400 if the address may not be asked, 502 or 504 if it gives no picture.
        """
        host, port, target = self._check(url)
        try:
            async with asyncio.timeout(self.timeout):
                addresses = await self.resolve(host, port)
                if not addresses or not all(map(is_public, addresses)):
                    raise bad(f"image_url: {host} is not on the public internet.", "image_url_private")
                return await self._get(target.copy_with(host=addresses[0]), target, host)
        except TimeoutError as error:
            raise Refusal(504, f"image_url: {host} sent no picture in {self.timeout:g} s.", "image_timeout") from error
        except (OSError, UnicodeError, httpx2.HTTPError) as error:
            why = f"image_url: {host} gave no picture ({type(error).__name__})."
            raise Refusal(502, why, "image_unreachable") from error

    def _check(self, url: str) -> tuple[str, int, httpx2.URL]:
        try:
            target = httpx2.URL(url)
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise bad("image_url is no address; send a data URL.", "image_url") from error
        if target.scheme != "https" or target.userinfo or not target.host:
            raise bad("image_url must be a data URL, or https without user and password.", "image_url")
        host, port = target.raw_host.decode(), target.port or 443
        if (host, port) not in self.hosts:
            raise bad(
                f"image_url: {host} is not on the proxy's list (--allow-host); send a data URL.", "image_url_host"
            )
        return host, port, target

    async def _get(self, pinned: httpx2.URL, target: httpx2.URL, host: str) -> bytes:
        headers = {"Host": target.netloc.decode(), "Accept-Encoding": "identity", "Accept": "image/*"}
        data = bytearray()
        async with self.http.stream("GET", pinned, headers=headers, extensions={"sni_hostname": host}) as reply:
            if reply.status_code != 200:  # a redirect could lead anywhere
                raise Refusal(502, f"image_url: {host} answered {reply.status_code}.", "image_unreachable")
            if reply.headers.get("content-encoding", "identity") != "identity":
                raise Refusal(502, f"image_url: {host} sent a compressed reply.", "image_unreachable")
            async for chunk in reply.aiter_raw(65536):
                data += chunk
                if len(data) > self.max_bytes:
                    raise bad(f"image_url: the picture has more than {self.max_bytes} bytes.", "image_too_large")
        return bytes(data)


async def _addresses(host: str, port: int) -> list[str]:
    records = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(record[4][0]) for record in records]


def _entry(host: str) -> tuple[str, int]:
    try:
        url = httpx2.URL(f"https://{host}")
        if url.host and not set(host) & set("*%/@?# "):
            return url.raw_host.decode(), url.port or 443
    except (httpx2.InvalidURL, UnicodeError):
        pass
    raise DavspError(f"--allow-host {host!r} is no host; give one as pictures.example.org, or with a port.")
