"""Files behind URLs, such as s3://bucket/images.zip and https://host/images.tar.gz, through fsspec.

Credentials, endpoints and other options are those of fsspec and of its packages: AWS's variables and files for S3,
.netrc for HTTP, or variables such as FSSPEC_S3_ANON=true.
"""

import errno
import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipeline.core.errors import UnreachableError, UserError, first_line
from pipeline.core.files import check_disk_space
from pipeline.core.progress import track_reading

if TYPE_CHECKING:  # imported where they are used, for most data are on a disk
    import fsspec

PARTIAL = ".download-{}.part"
MAX_ATTEMPTS = 5
BLOCK_SIZE = 2**24  # bytes per request to a bucket
VERSION_KEYS = ("ETag", "etag", "md5Hash", "LastModified", "Last-Modified", "last_modified", "updated", "mtime")


def is_url(path: str) -> bool:
    return "://" in path


def is_http(url: str) -> bool:
    return urlsplit(url).scheme.lower() in ("http", "https")


def redact_url(url: str) -> str:
    """Return the URL without the user, password and query, in which signatures are."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def open_file_system(url: str, setting: str) -> "tuple[fsspec.AbstractFileSystem, str]":
    """Return the file system of a URL that the user wrote in `setting`, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    if is_http(url):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=30, sock_read=60)  # seconds; no limit of the whole download
        client = {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}
        options = {"client_kwargs": client, "encoded": "%" in url}
    with report_errors(url, setting):
        file_system, path = fsspec.url_to_fs(url, **options)
    return file_system, path


@contextmanager
def report_errors(url: str, setting: str) -> Iterator[None]:
    """Raise errors of file systems as those that users see, who wrote the URL in `setting`.

    Raises:
        UnreachableError: the network or the server fails; it may work later.
        UserError: the file, the permission or a package is missing.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # fsspec reports every error of HTTP's HEAD and GET as a file that is not found.
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        raise _explain(redact_url(url), cause, f"correct {setting}") from error


def _explain(url: str, error: BaseException, correct: str) -> BaseException:
    """Return the UserError that stands for an error; the error itself if it is of this program or of this disk."""
    name, status, text = type(error).__name__, getattr(error, "status", 0), first_line(error)
    reason = f"the server answers {status}" if status else text
    is_remote = isinstance(error, OSError) or type(error).__module__.startswith(("aiohttp", "aiobotocore", "botocore"))
    replacement: BaseException = error
    if isinstance(error, ImportError) and url.startswith("s3:"):
        replacement = UserError(f"{url}: s3:// needs s3fs; run: pip install -c constraints.txt -e '.[s3]'")
    elif isinstance(error, ImportError):
        replacement = UserError(f"{url}: {text}")  # which package to install
    elif isinstance(error, ValueError) and "Protocol not known" in text:
        replacement = UserError(f"{url}: {text}; {correct}")
    elif "bucket does not exist" in text:
        replacement = UserError(f"{url}: no such bucket; {correct}")
    elif isinstance(error, FileNotFoundError) or status in (404, 410):
        replacement = UserError(f"{url}: not found; {correct}")
    elif isinstance(error, PermissionError) or "Credentials" in name or status in (401, 403):
        replacement = UserError(f"{url}: access denied ({reason}); docs/data.md says where credentials are read from")
    elif is_remote and getattr(error, "errno", None) != errno.ENOSPC:
        replacement = UnreachableError(
            f"{url}: no connection ({reason}); check the network and the host, and run again"
        )
    return replacement


def download_file(url: str, setting: str, folder: Path) -> Path:
    """Download a file whose URL the user wrote in `setting` into the folder.

    A call after an interruption resumes, if the file is still the same.

    Returns:
        The file, whose hidden name is that of the URL and the file's version.

    Raises:
        UserError: the file is missing or refused, the server does not answer, or the disk is too small.
    """
    for attempt in range(MAX_ATTEMPTS - 1):
        try:
            return _resume(url, setting, folder)
        except UnreachableError:
            time.sleep(2**attempt)
    return _resume(url, setting, folder)


def remove_downloads(folder: Path) -> None:
    """Remove what `download_file` left in the folder, also files of other URLs and versions."""
    for file in folder.glob(PARTIAL.format("*")):
        file.unlink()


def _resume(url: str, setting: str, folder: Path) -> Path:
    redacted_url, (file_system, path) = redact_url(url), open_file_system(url, setting)
    with report_errors(url, setting):
        info = file_system.info(path)
    versions = [str(info[key]) for key in VERSION_KEYS if info.get(key)]
    size: int | None = info.get("size")
    digest = hashlib.sha256("\n".join([redacted_url, str(size), *versions]).encode()).hexdigest()[:16]
    partial = folder / PARTIAL.format(digest)
    done = partial.stat().st_size if partial.exists() and versions else 0
    if size is not None:
        check_disk_space(folder, size - done)
    if size is None or done < size:
        with report_errors(url, setting):
            source, done = open_at(file_system, path, done)
            with source, partial.open("r+b" if done else "wb") as out:
                out.seek(done)
                out.truncate()
                description = f"downloading {path.rpartition('/')[2]}"
                with track_reading(source, (size or done) - done, description) as stream:
                    shutil.copyfileobj(stream, out, BLOCK_SIZE)
    received = partial.stat().st_size
    if size is not None and received != size:
        if received > size:
            partial.unlink()
        raise UnreachableError(f"{redacted_url}: the connection broke after {received} of {size} bytes; run again")
    return partial


def open_at(file_system: "fsspec.AbstractFileSystem", path: str, start: int) -> tuple[Any, int]:
    """Open a remote file for reading, from `start` if the server can; also return where it begins."""
    if not is_http(path):
        source = file_system.open(path, "rb", block_size=BLOCK_SIZE)
        source.seek(start)
        return source, start
    headers = {"Range": f"bytes={start}-"} if start else {}
    source = file_system.open(path, "rb", block_size=0, headers=headers)  # one request for all that remains
    return source, start if source.r.status == 206 else 0
