"""What the hub's clients raise for a data set, as one clear error: its cause and the way out.

The clients wrap exceptions in exceptions, so the cause is looked for in the whole chain.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from opensloth.errors import UserError

LOGIN = "`hf auth login` or HF_TOKEN"


class Unreachable(UserError):
    """The hub did not answer; what was fetched before may still serve."""


@contextmanager
def hub_errors(spec: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the clients raise in the block into UserError (Unreachable where no answer came)."""
    import httpx
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (OSError, httpx.HTTPError, HFValidationError, DatasetsError) as error:
        raise explain(spec, error, revision) from error


def gated(spec: str) -> UserError:
    from huggingface_hub import constants

    page = f"{constants.ENDPOINT}/datasets/{spec}"
    return UserError(f"{spec} is gated: its owner wants you to accept terms.", f"Accept them at {page}, then {LOGIN}.")


def explain(spec: str, error: BaseException, revision: str | None = None) -> UserError:
    """The error to show for what a client raised about the data set `spec`."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    causes = list(causes_of(error))

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any(disk_is_full(cause) for cause in causes):
        hint = f"Free space, or set HF_HOME (now {constants.HF_HOME})."
        return UserError(f"The disk is full: {spec} does not fit.", hint)
    if among(hub.HFValidationError):
        return UserError(f"{spec} is neither a file here nor a possible hub id.", "A hub id looks like owner/name.")
    if among(hub.GatedRepoError):
        return gated(spec)
    if among(hub.RevisionNotFoundError):
        hint = f"Look at {constants.ENDPOINT}/datasets/{spec}/commits, or leave --data-revision out."
        return UserError(f"{spec} has no revision {revision!r}.", hint)
    if among(hub.OfflineModeIsEnabled):
        return Unreachable(f"HF_HUB_OFFLINE is set and {spec} is not in the cache.", "Unset it, or name a local file.")
    statuses = [cause.response.status_code for cause in causes if isinstance(cause, hub.HfHubHTTPError)]
    if statuses or among(hub.RepositoryNotFoundError):
        return _refused(spec, 404 if among(hub.RepositoryNotFoundError) else statuses[0], constants.ENDPOINT)
    if among(httpx.TransportError, ConnectionError, TimeoutError, hub.LocalEntryNotFoundError):
        hint = "Check the connection, or name a local file."
        return Unreachable(f"The hub at {constants.ENDPOINT} cannot be reached for {spec}.", hint)
    return UserError(f"{spec} cannot be read from the hub: {error}", "Fetch its files by hand and name those.")


def _refused(spec: str, status: int, endpoint: str) -> UserError:
    match status:
        case 401:
            return UserError(f"The hub does not accept your token for {spec} (401).", f"Give a valid one: {LOGIN}.")
        case 403:
            return UserError(f"Your token may not read {spec} (403).", f"Give one with read access: {LOGIN}.")
        case 404:  # the hub hides private data sets from those who may not read them
            message = f"There is no data set {spec} on {endpoint} that you may read, and no such file here."
            return UserError(message, f"Check its name. If it is private, give a token: {LOGIN}.")
        case 429:
            return Unreachable(f"The hub limits your requests (429) for {spec}.", f"Wait, or give a token: {LOGIN}.")
        case _:
            return Unreachable(f"The hub at {endpoint} failed with status {status} for {spec}.", "Try again later.")


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def disk_is_full(error: BaseException) -> bool:
    if not isinstance(error, OSError):
        return False
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "Not enough disk space" in str(error)
