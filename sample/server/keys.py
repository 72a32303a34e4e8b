"""Who may use the server: access keys with their secrets, as a JWT that the client signs or as the plain secret."""

from __future__ import annotations

import hmac
import stat
import warnings
from pathlib import Path

import jwt
from kling_programs.sample.server.wire import AUTH_EARLY, AUTH_EMPTY, AUTH_FAILED, AUTH_INVALID, AUTH_LATE, WireError

from kling.errors import UserError
from kling.runtime.files import parse_json

SHORTEST = 16  # characters of a secret
LOCAL = "local"  # whose tasks they are on a server without keys


class Keys:
    """access key -> secret. Without any, everybody is `LOCAL`."""

    def __init__(self, secrets: dict[str, str]) -> None:
        self.secrets = secrets

    def who(self, authorization: str | None) -> str:
        """The access key of a request by its Authorization header. Raises `WireError` (401) if it has none."""
        if not self.secrets:
            return LOCAL
        if not authorization:
            raise WireError(AUTH_EMPTY, "Authorization is empty: send 'Bearer TOKEN', a JWT signed with your secret or the secret itself")
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise WireError(AUTH_INVALID, "Authorization is no 'Bearer TOKEN': send a JWT signed with your secret or the secret itself")
        if plain := self._plain(token):
            return plain
        if token.count(".") == 2:
            return self._signed(token)
        raise WireError(AUTH_FAILED, "the key is unknown: check it, or ask for one")

    def _plain(self, token: str) -> str | None:
        """The key whose secret, or ACCESS:SECRET, this is. All are compared, each in constant time."""
        found = None
        for name, secret in self.secrets.items():
            for right in (secret, f"{name}:{secret}"):
                if hmac.compare_digest(token.encode(), right.encode()):
                    found = name
        return found

    def _signed(self, token: str) -> str:
        try:
            name = jwt.decode(token, options={"verify_signature": False}).get("iss")
            known = isinstance(name, str) and name in self.secrets
            secret = self.secrets[name] if known else "0" * 32  # an unknown key takes as long as a wrong signature
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about secrets of less than 32 bytes, which Kling hands out too
                jwt.decode(token, secret, algorithms=["HS256"], options={"require": ["exp", "iss"]})
        except jwt.ExpiredSignatureError:
            raise WireError(AUTH_LATE, "the token has expired (exp): sign a new one") from None
        except jwt.ImmatureSignatureError:
            raise WireError(AUTH_EARLY, "the token is not valid yet (nbf): check the clock that signed it") from None
        except (jwt.InvalidTokenError, TypeError, ValueError, OverflowError, RecursionError) as error:  # the latter by odd claims
            line = f"the token is not valid ({str(error)[:100]}): sign it by HS256 with your secret, with iss = your access key and exp"
            raise WireError(AUTH_FAILED, line) from None
        if not known:
            raise WireError(AUTH_FAILED, "the token's iss is no access key of this server: check it, or ask for one")
        return name


def read_keys(file: str | None) -> Keys:
    """The keys of a JSON file {"ACCESS": "SECRET"}. Raises `UserError` for another file, or one that others may read."""
    if file is None:
        return Keys({})
    path, example = Path(file), 'write {"ACCESS": "SECRET"} into it, chmod 600'
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
    except (OSError, ValueError) as error:
        raise UserError(f"--keys {file} cannot be read ({getattr(error, 'strerror', error)}): {example}") from None
    if mode != 0o600:
        raise UserError(f"--keys {file} has mode {mode:04o}, so that others may use its secrets: chmod 600 {file}")
    try:
        secrets = parse_json(text, once=True)
    except ValueError as error:
        raise UserError(f"--keys {file} is no JSON ({error}): {example}") from None
    if not isinstance(secrets, dict) or not secrets or not all(isinstance(s, str) and k for k, s in secrets.items()):
        raise UserError(f"--keys {file} is not an object of access keys and secrets: {example}")
    for name, secret in secrets.items():
        if len(secret) < SHORTEST:
            raise UserError(f"--keys {file}: the secret of '{name}' has {len(secret)} characters: give at least {SHORTEST}")
    if len(set(secrets.values())) < len(secrets):
        raise UserError(f"--keys {file}: two keys have the same secret: give each its own")
    return Keys(secrets)
