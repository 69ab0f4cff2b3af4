"""Data sets of the Hugging Face hub, through the real `datasets` and `huggingface_hub` clients.

`datasets` tells which files make up a subset and a split; Parquet and JSON files are then fetched one by one, as rows
are asked for, and read here, so nothing is stored twice and one broken line costs one row. What only `datasets` can
read (text, CSV with its options, archives) goes through its own Arrow cache. HF_ENDPOINT, HF_HOME and HF_TOKEN hold.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opensloth import log, paths
from opensloth.data.sources import files, folders
from opensloth.data.sources.hub_errors import Unreachable, causes_of, disk_is_full, gated, hub_errors
from opensloth.data.sources.rows import RawRow, Source
from opensloth.errors import UserError, nearest

TIMEOUT = 20.0  # seconds, for the first answer


@dataclass(frozen=True)
class Listing:
    """What an id, a revision, a subset and a split resolve to. `paths` is empty where `datasets` itself must read."""

    repo: str
    commit: str
    subset: str | None
    split: str
    paths: tuple[str, ...]
    rows: int | None


def open_hub(spec: str, *, split: str, subset: str | None, revision: str | None, samples: int | None) -> Source:
    """Resolve a data set to a commit and its files; nothing but metadata is fetched yet.

    Without a network, a listing that was resolved and fetched before is used, and said. Raises UserError for a wrong
    name, revision, subset or split (with those there are), no access, no network.
    """
    from huggingface_hub import constants

    key = paths.digest([constants.ENDPOINT, spec, revision, subset, split])
    kept = paths.cache_dir() / "hub" / f"{key}.json"
    try:
        with hub_errors(spec, revision):
            listing = _resolve(spec, split, subset, revision)
        paths.write_json(kept, asdict(listing))
    except Unreachable as error:
        listing = _kept_listing(kept, error)
        log.warn(f"{error.message} Using version {listing.commit[:12]} of {spec} from the cache.")
    return Source(
        spec=spec,
        kind="hub",
        name=listing.repo.rsplit("/", 1)[-1],
        split=split,
        subset=listing.subset,
        revision=listing.commit,
        samples=samples,
        total=listing.rows,
        read=partial(_rows, listing),
        fingerprint=partial(paths.digest, ["hub", listing.repo, listing.commit, listing.subset, split]),
    )


def _resolve(spec: str, split: str, subset: str | None, revision: str | None) -> Listing:
    import datasets
    from huggingface_hub import HfApi

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report each data set's name to another host
    info = HfApi().dataset_info(spec, revision=revision, timeout=TIMEOUT)
    repo, commit = info.id, info.sha or "main"
    try:
        builder = datasets.load_dataset_builder(repo, name=subset, revision=commit)
    except (datasets.exceptions.DataFilesNotFoundError, datasets.data_files.EmptyDatasetError):
        raise UserError(f"{spec} holds no data files on the hub.", "Is it the right data set?") from None
    except datasets.exceptions.DatasetNotFoundError:
        if info.gated:  # `datasets` drops the hub's own answer, which said so
            raise gated(spec) from None
        raise
    except ValueError as error:
        raise _no_subset(spec, repo, commit, subset, error) from error
    except RuntimeError as error:
        raise UserError(
            f"{spec} cannot be read: {error}", "Use a copy of it that holds Parquet or JSON files."
        ) from error
    by_split = {str(name): list(parts) for name, parts in (builder.config.data_files or {}).items()}
    if split not in by_split:
        raise folders.no_split(spec, split, sorted(by_split))
    split_info = (builder.info.splits or {}).get(split)
    return Listing(
        repo=repo,
        commit=commit,
        subset=subset or _default_subset(builder),
        split=split,
        paths=_own_files(builder, by_split[split], f"hf://datasets/{repo}@{commit}/"),
        rows=split_info.num_examples if split_info and split_info.num_examples else None,
    )


def _default_subset(builder: Any) -> str | None:
    name = str(builder.config.name)
    return None if name == "default" or name.startswith("default-") else name


def _own_files(builder: Any, urls: list[str], prefix: str) -> tuple[str, ...]:
    """The files' paths in the repository, if they are of a kind that files.py reads as `datasets` would."""
    plain = getattr(builder.config, "field", None) is None and getattr(builder.config, "columns", None) is None
    mine = all(u.startswith(prefix) and files.data_format(Path(u)) in (".parquet", ".jsonl", ".json") for u in urls)
    return tuple(url.removeprefix(prefix) for url in urls) if plain and mine else ()


def _no_subset(spec: str, repo: str, commit: str, subset: str | None, error: ValueError) -> UserError:
    import datasets

    names = datasets.get_dataset_config_names(repo, revision=commit)
    if subset is not None and subset not in names:
        hint = nearest(subset, names) or "Use --subset with one of these, or leave it out."
        return UserError(f"{spec} has no subset {subset!r}; it has: {', '.join(names)}.", hint)
    if subset is None and len(names) > 1:
        return UserError(f"{spec} has several subsets: {', '.join(names)}.", "Choose one with --subset.")
    return UserError(f"{spec} cannot be read: {error}", "Is it a data set of rows?")


def _kept_listing(kept: Path, error: Unreachable) -> Listing:
    """What an earlier run resolved. Raises `error` where that is nothing, or a file of it is not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        fields = json.loads(kept.read_text(encoding="utf-8"))
        listing = Listing(**fields | {"paths": tuple(fields["paths"])})
    except (OSError, ValueError, TypeError, KeyError):
        raise error from None
    cached = (
        try_to_load_from_cache(listing.repo, path, revision=listing.commit, repo_type="dataset")
        for path in listing.paths
    )
    if not listing.paths or not all(isinstance(path, str) for path in cached):
        raise error
    return listing


def _rows(listing: Listing) -> Iterator[RawRow]:
    if not listing.paths:
        yield from _rows_by_datasets(listing)
        return
    number = 0
    for path in listing.paths:
        for row in files.read_file(_fetch(listing, path)):
            number += 1
            yield RawRow(number, row.value, row.problem)


def _fetch(listing: Listing, path: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(listing.repo, path, revision=listing.commit, repo_type="dataset")
    if isinstance(known, str):
        return Path(known)
    log.say(f"Fetching {path} of {listing.repo} ({listing.commit[:12]})")
    with hub_errors(listing.repo), _bars_on_terminals_only():
        return Path(hf_hub_download(listing.repo, path, revision=listing.commit, repo_type="dataset"))


def _rows_by_datasets(listing: Listing) -> Iterator[RawRow]:
    import datasets

    with hub_errors(listing.repo), _bars_on_terminals_only():
        try:
            table = datasets.load_dataset(listing.repo, listing.subset, split=listing.split, revision=listing.commit)
        except datasets.exceptions.DatasetGenerationError as error:
            if any(disk_is_full(cause) for cause in causes_of(error)):
                raise
            raise UserError(f"{listing.repo} cannot be read: {error}", "Fetch its files and convert them.") from error
    batches = (part for rows in table.with_format("arrow").iter(files.BATCH_ROWS) for part in rows.to_batches())
    yield from files.arrow_rows(batches)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    datasets_logging.disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bars()
        datasets_logging.enable_progress_bar()
