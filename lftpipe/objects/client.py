"""The connection to a bucket, and its refusals as our errors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lftpipe.errors import StoreError

#: What is in the messages of a bucket, or of a cloud's service for credentials, that gives no access.
_NO_ACCESS = (
    "169.254.169.254",
    "metadata.google",
    "credential",
    "Unauthenticated",
    "PermissionDenied",
    "403 Forbidden",
)


_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "bucket does not exist")


def client_of(url: str) -> Any:
    """Obstore's client for a URL.

    Parameters
    ----------
    url
        Of a bucket, and of what of it is meant.
    """
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    seconds = float(os.environ.get("LFTPIPE_RETRY_SECONDS", "60"))
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    try:
        return from_url(
            url,
            client_options={
                "connect_timeout": timedelta(seconds=min(seconds, 10)),
                "timeout": timedelta(seconds=max(seconds, 30)),
                "allow_http": endpoint.startswith("http://") or os.environ.get("AWS_ALLOW_HTTP") == "true",
            },
            retry_config={"max_retries": 8, "retry_timeout": timedelta(seconds=seconds)},
        )
    except (BaseError, ValueError) as error:
        raise StoreError(
            f"{url} ({_first_line(error)})", "a bucket's URL", "write it as s3://bucket/folder"
        ) from None


@contextmanager
def refusals(where: str) -> Iterator[None]:
    """What a bucket refuses, in one line each.

    Raises
    ------
    StoreError
        If it cannot be reached, is not there, or gives no access.
    FileNotFoundError, FileExistsError
        If an object is missing, or is there and should not be.
    """
    from obstore import exceptions as refused

    try:
        yield
    except FileNotFoundError as error:
        if any(word in str(error) for word in _NO_BUCKET):
            raise _no_bucket(where) from None
        raise FileNotFoundError(f"{where} has no such object") from None
    except refused.AlreadyExistsError as error:
        raise FileExistsError(where) from error
    except (refused.BaseError, OSError, TimeoutError) as error:
        text = str(error)
        if any(word in text for word in _NO_BUCKET):
            raise _no_bucket(where) from None
        if isinstance(error, refused.UnauthenticatedError | refused.PermissionDeniedError) or any(
            word in text for word in _NO_ACCESS
        ):
            raise StoreError(
                f"{where}: no access ({_first_line(error)})",
                "credentials for it in the environment",
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or those of your cloud",
            ) from None
        raise StoreError(
            f"{where} cannot be reached ({_first_line(error)})",
            "an object store that answers",
            "look at network and endpoint, then run the same command again: what is committed is kept",
        ) from None


def _no_bucket(where: str) -> StoreError:
    return StoreError(f"{where}, whose bucket is not there", "a bucket", "make it first")


def _first_line(error: BaseException) -> str:
    """The first words of an error, without the servers' pages behind them."""
    text = str(error).strip().partition("\n")[0]
    return text if len(text) < 300 else f"{text[:300]}..."
