"""RedisLink: parses Redis URLs and makes clients with short limits.

redis-py waits up to a minute by default for a server that hangs. Here every command has a short limit and no
retries; the caller tries again. A password is never in a log line, an error or ``str()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from flexkv_sglang.backends.safe_files import read_secret
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.printable import redacted

TIMEOUT_S, CONNECT_TIMEOUT_S = 1.0, 0.5
"""Limits of every command and of a connection. Long enough that a slow Redis is not absent (decision 016)."""

_SCHEMES = {
    "redis": (False, False),
    "rediss": (True, False),
    "redis+sentinel": (False, True),
    "rediss+sentinel": (True, True),
}
_VALID = (
    "redis://[user[:password]@]host[:port][/db], rediss://... (TLS), "
    "redis+sentinel://[user[:password]@]host:port,host:port/service[/db], rediss+sentinel://..., "
    "unix:///path/to/socket; options ?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE"
    "&ssl_check_hostname=false&sentinel_auth=same&protocol=3"
)
_TLS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
_PASSWORD_BYTES_MAX = 65536


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where Redis is and how to log in. ``hosts``: of the server, or of the sentinels if ``service`` is set."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    service: str | None = None
    socket_path: str | None = None
    db: int = 0
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    password_file: str | None = None
    tls: dict[str, str] = field(default_factory=dict)
    sentinel_auth: bool = False
    protocol: int = 2

    def __str__(self) -> str:
        """As a URL without password."""
        if self.socket_path:
            return f"unix://{self.socket_path}"
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        user = f"{self.user}@" if self.user else ""
        service = f"/{self.service}" if self.service else ""
        return f"{self.scheme}://{user}{hosts}{service}/{self.db}"


def parse_redis_url(
    url: str, password_file: str | None = None, ca_file: str | None = None
) -> RedisAddress:
    """Parse ``redis_url``. ``ca_file``: the same as the option ``ssl_ca_certs``, which must not differ.

    Raises ``ConfigError`` without the password.
    """
    try:
        parts = urlsplit(url)
        login, _, places = parts.netloc.rpartition("@")
        user, colon, password = login.partition(":")
        options = dict(
            parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        )
        if ca_file and options.setdefault("ssl_ca_certs", ca_file) != ca_file:
            raise ValueError  # noqa: TRY301 - one message for all of them
        protocol = int(options.pop("protocol", "2"))
        same = {"same": True, "none": False}[options.pop("sentinel_auth", "none")]
        login_fields: dict[str, Any] = {
            "user": unquote(user) or None,
            "password": unquote(password) if colon else None,
            "password_file": password_file,
            "sentinel_auth": same,
            "protocol": protocol,
        }
        if parts.scheme == "unix" and parts.path and not options:
            return RedisAddress("unix", (), socket_path=parts.path, **login_fields)
        tls, sentinel = _SCHEMES[parts.scheme]
        service, db = _service_and_db(parts.path, sentinel)
        wrong = [name for name in options if not tls or name not in _TLS_OPTIONS]
        if wrong or protocol not in (2, 3) or (colon and password_file) or parts.fragment:
            raise ValueError  # noqa: TRY301 - one message for all of them
        hosts = _hosts(places, 26379 if sentinel else 6379)
        if not sentinel and len(hosts) > 1:
            raise ValueError  # noqa: TRY301
        return RedisAddress(
            parts.scheme, hosts, service=service, db=db, tls=options, **login_fields
        )
    except (ValueError, KeyError):
        raise ConfigError(
            f"redis_url: {redacted(url)!r} is not valid"
            + (" beside redis_password_file (two passwords?)" if password_file else "")
            + (" beside redis_ca_file (no rediss://, or two authorities?)" if ca_file else "")
            + f"; valid: {_VALID}"
        ) from None


def _service_and_db(path: str, sentinel: bool) -> tuple[str | None, int]:
    names = [name for name in path.split("/") if name]
    if len(names) > 1 + sentinel or len(names) < sentinel:
        raise ValueError(path)
    service = names.pop(0) if sentinel else None
    return service, int(names[0]) if names else 0


def _hosts(places: str, default_port: int) -> tuple[tuple[str, int], ...]:
    found = []
    for place in places.split(","):
        one = urlsplit(f"//{place}")
        if not one.hostname:
            raise ValueError(place)
        found.append((one.hostname, one.port or default_port))
    return tuple(found)


class _Login:
    """Credentials for redis-py, which asks for every connection: a changed password file is read again."""

    def __init__(self, address: RedisAddress) -> None:
        self._address = address

    def get_credentials(self) -> Sequence[str]:
        address = self._address
        password = address.password or ""
        if address.password_file:
            data = read_secret(Path(address.password_file), _PASSWORD_BYTES_MAX)
            password = data.decode().strip("\r\n")
        return (address.user, password) if address.user else (password,)


class RedisLink:
    """Makes clients for one address. A client is used by one thread."""

    def __init__(self, address: RedisAddress, timeout_s: float = TIMEOUT_S) -> None:
        self.address = address
        self._timeout_s = timeout_s
        try:
            import redis  # noqa: F401 - a node alone needs no Redis
        except ImportError as error:
            raise ConfigError(
                "redis_url: the package redis is missing; valid: pip install 'redis>=5'"
            ) from error

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Exceptions of a command when Redis is absent, hangs, or refuses."""
        import redis

        return (redis.RedisError, OSError)

    def client(self, block_s: float = 0.0) -> Any:
        """Make a client whose commands may block for ``block_s`` in the server. It connects at its first command."""
        import redis
        from redis import sentinel
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        address = self.address
        common: dict[str, Any] = {
            "socket_timeout": self._timeout_s + block_s,
            "socket_connect_timeout": min(CONNECT_TIMEOUT_S, self._timeout_s),
            "retry": Retry(NoBackoff(), 0),
            "protocol": address.protocol,
        }
        login: dict[str, Any] = {}
        if address.user or address.password or address.password_file:
            login["credential_provider"] = _Login(address)
        if address.socket_path:
            del common["socket_connect_timeout"]
            return redis.Redis(unix_socket_path=address.socket_path, **common, **login)
        tls = self._tls()
        if address.service is None:
            ((host, port),) = address.hosts
            return redis.Redis(host=host, port=port, db=address.db, **common, **login, **tls)
        asked = {**common, "socket_timeout": self._timeout_s, **tls}
        if address.sentinel_auth:
            asked |= login
        make: Any = sentinel.Sentinel  # has no types
        sentinels = make(list(address.hosts), sentinel_kwargs=asked)
        return sentinels.master_for(address.service, db=address.db, **common, **login, **tls)

    def _tls(self) -> dict[str, Any]:
        if not self.address.scheme.startswith("rediss"):
            return {}
        options: dict[str, Any] = dict(self.address.tls)
        check = options.pop("ssl_check_hostname", "true").lower() != "false"
        return {
            "ssl": True,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": check,
            **options,
        }
