"""Which model is meant by `--model`, and its tokenizer.

A model is a hub id, a model directory, an adapter directory (training goes on from it), or a `sample:` that is made on
this machine. Data preparation and the engines resolve it here, so that they mean the same one. Weights are the engines'
business.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensloth import log, paths
from opensloth.data.models import smollm2 as sample_model
from opensloth.data.models import tiny as tiny_model
from opensloth.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLES = {"sample:smollm2": sample_model.DIRECTORY, "sample:tiny": tiny_model.DIRECTORY}
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# An adapter repository of the hub is fetched whole but for what may hold code or another framework's weights.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
ADAPTER_FILES = (*SMALL_FILES, "*.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_TIMEOUT = 20.0  # seconds


@dataclass(frozen=True)
class ModelRef:
    """`base` is a hub id (then `revision` is a commit) or an absolute directory; `adapter` lies on top of it."""

    spec: str
    base: str
    revision: str | None
    adapter: Path | None
    name: str  # short, for default output names


def resolve_model(spec: str, revision: str | None = None) -> ModelRef:
    """Find the model a user named. The hub is asked for the commit; without a network its cache answers.

    Raises UserError for a wrong name, a directory that holds no model, an adapter without its base, no access.
    """
    if spec.startswith("sample:"):
        return _sample(spec, revision)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _directory(spec, path.absolute(), revision)
    if path.exists():
        raise UserError(f"--model {spec} is a file.", "Name the directory that holds the model.")
    if _looks_like_path(spec):
        raise UserError(f"--model {spec}: there is no such directory.")
    return _hub(spec, revision)


def _sample(spec: str, revision: str | None) -> ModelRef:
    if spec not in SAMPLES:
        raise UserError(f"There is no model {spec}.", nearest(spec, SAMPLES) or f"Known: {', '.join(SAMPLES)}.")
    if revision:
        raise UserError(f"--revision {revision} has no meaning for {spec}.", "Leave it out.")
    return ModelRef(spec, str(sample_directory(SAMPLES[spec])), None, None, spec.removeprefix("sample:"))


def sample_directory(name: str) -> Path:
    """The directory in the cache of that name, whose model is made on the first call."""
    return tiny_model.tiny() if name == tiny_model.DIRECTORY else sample_model.smollm2()


def is_made(spec: str) -> bool:
    """False for a sample model that has not been made on this machine yet, which takes torch."""
    return spec not in SAMPLES or (paths.cache_dir() / "models" / SAMPLES[spec]).is_dir()


def _directory(spec: str, directory: Path, revision: str | None) -> ModelRef:
    if (directory / ADAPTER_CONFIG).is_file():
        return _adapter(spec, directory, directory.name, revision)
    if not (directory / CONFIG).is_file():
        message = f"--model {spec} holds neither {CONFIG} nor {ADAPTER_CONFIG}, so it is no model and no adapter."
        raise UserError(message, _hint_for_directory(directory))
    if revision:
        raise UserError(f"--revision {revision} has no meaning for the directory {spec}.", "Leave it out.")
    return ModelRef(spec, str(directory), None, None, directory.name)


def _hint_for_directory(directory: Path) -> str:
    if (directory / "manifest.json").is_file():
        return "It looks like prepared data, which is a command's INPUT."
    if (directory / "job.json").is_file():
        return "It looks like a run that has not finished: run its command again, or name one of its checkpoints."
    return "Name the directory that save_pretrained wrote, or a model of the hub."


def _adapter(spec: str, directory: Path, name: str, revision: str | None) -> ModelRef:
    """An adapter's base comes from its own config; `revision` (a user's) wins over the one written there."""
    config = _read_object(directory / ADAPTER_CONFIG, "an adapter")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{directory / ADAPTER_CONFIG} does not name its base model (base_model_name_or_path).")
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UserError(f"The adapter {spec} was trained on {base}, which is no model directory (no {CONFIG}).")
        return ModelRef(spec, str(path.absolute()), None, directory, name)
    if path.name in SAMPLES.values():  # the cache was emptied, or the adapter comes from another machine
        return ModelRef(spec, str(sample_directory(path.name)), None, directory, name)
    if _looks_like_path(base):
        hint = "Put the base model back, or write its place into base_model_name_or_path of adapter_config.json."
        raise UserError(f"The adapter {spec} was trained on {base}, which is not there.", hint)
    ref = _hub(base, revision or config.get("revision"))
    if ref.adapter is not None:
        raise UserError(f"The adapter {spec} lies on another adapter ({base}).", "Merge that one into its base first.")
    return ModelRef(spec, ref.base, ref.revision, directory, name)


def _read_object(path: Path, what: str) -> dict[str, Any]:
    value = paths.read_json(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object).")
    return value


def _looks_like_path(text: str) -> bool:
    """Whether `text` cannot be a hub id (`name` or `owner/name`)."""
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or not text.strip("/ ")


def _hub(spec: str, revision: str | None) -> ModelRef:
    import httpx
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    name = spec.rsplit("/", 1)[-1]
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return _cached(spec, revision, name, "HF_HUB_OFFLINE is set")
    try:
        info = HfApi().model_info(spec, revision=revision, timeout=HUB_TIMEOUT)
        files = {sibling.rfilename for sibling in info.siblings or []}
        if CONFIG in files:  # proves access (anyone may see a gated model's info), and `main` is then known offline
            hf_hub_download(spec, CONFIG, revision=revision)
    except HFValidationError as error:
        raise UserError(f"--model {spec} is neither a directory nor a hub id: {error}") from None
    except OfflineModeIsEnabled:
        return _cached(spec, revision, name, "the hub client is offline")
    except HfHubHTTPError as error:
        if error.response.status_code >= 500 or error.response.status_code == 429:
            return _cached(spec, revision, name, f"the hub answers {error.response.status_code}")
        raise _refused(spec, revision, error) from None
    except (httpx.HTTPError, OSError) as error:
        return _cached(spec, revision, name, f"the hub cannot be reached ({type(error).__name__})")
    if ADAPTER_CONFIG in files and CONFIG not in files:
        return _hub_adapter(spec, info.sha, name)
    if CONFIG not in files:
        raise UserError(f"{spec} on the hub holds no {CONFIG}, so it is no transformers model.", _gguf_hint(files))
    return ModelRef(spec, spec, info.sha, None, name)


def _gguf_hint(files: set[str]) -> str:
    gguf = any(name.endswith(".gguf") for name in files)
    return "GGUF files cannot be trained: name the model they were made from." if gguf else ""


def _hub_adapter(spec: str, commit: str | None, name: str) -> ModelRef:
    import httpx
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(spec, revision=commit, allow_patterns=list(ADAPTER_FILES))
    except (httpx.HTTPError, OSError) as error:
        raise UserError(f"The adapter {spec} could not be downloaded: {error}") from error
    return _adapter(spec, Path(folder), name, None)


def _cached(spec: str, revision: str | None, name: str, reason: str) -> ModelRef:
    """The commit that the hub client's cache holds for `revision` (its folder is named after it)."""
    from huggingface_hub import constants, try_to_load_from_cache

    for file in (CONFIG, ADAPTER_CONFIG):
        found = try_to_load_from_cache(spec, file, revision=revision)
        if isinstance(found, str):
            log.say(f"{spec}: {reason}; using the copy in the cache.")
            # The clients would try again for more than a minute at each file; worker processes inherit this too
            os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE = "1", True
            snapshot = Path(found).parent
            if file == ADAPTER_CONFIG:
                return _adapter(spec, snapshot, name, None)
            return ModelRef(spec, spec, snapshot.name, None, name)
    at = f" at revision {revision}" if revision else ""
    hint = beside(spec) or "Connect to the network once, or name a model directory or sample:smollm2."
    raise UserError(f"Model {spec}{at} is not in the hub's cache, and {reason}.", hint)


def _refused(spec: str, revision: str | None, error: Exception) -> UserError:
    """What a 4xx answer of the hub means. It answers 401 for a name that does not exist too, so both are said."""
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    login = "log in (`hf auth login`) or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return UserError(f"Model {spec} is gated.", f"Accept its terms on the model's page, then {login}.")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"Model {spec} has no revision {revision}.", "Name a branch, tag or commit of that model.")
    if isinstance(error, DisabledRepoError):
        return UserError(f"Model {spec} was disabled on the hub.")
    if status == 403:
        return UserError(f"The hub refuses access to {spec} (403).", f"Ask its owner, then {login}.")
    message = f"There is no directory and no model on the hub that is called {spec} (the hub answers {status})."
    return UserError(message, beside(spec) or f"Check the name; if the model is private, {login}.")


def beside(spec: str) -> str:
    """A hint where the name could be meant as a directory here: its folder is there, and it is not in it."""
    folder = Path(spec).expanduser().parent
    if folder == Path() or not folder.is_dir():
        return ""
    near = nearest(Path(spec).name, [path.name for path in folder.iterdir() if path.is_dir()])
    return f"There is no directory {spec} either. {near}".rstrip()


def load_tokenizer(ref: ModelRef, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The adapter's own tokenizer where it has one, else the base's. Always one of the Rust library ("fast").

    Raises UserError where it is missing, damaged, slow, or needs code of its own that nobody allowed.
    """
    from transformers import AutoTokenizer

    place = ref.base
    if ref.adapter and any((ref.adapter / name).is_file() for name in TOKENIZER_FILES):
        place = str(ref.adapter)
    folder = Path(place) if Path(place).is_dir() else _small_files(ref, trust_remote_code)
    if (folder / "tokenizer.json").is_file():
        _read_object(folder / "tokenizer.json", "a model")  # the library's own error names neither file nor cause
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        wants_code = "trust_remote_code" in str(error)
        hint = "Read that code; if you trust it, add --trust-remote-code." if wants_code else ""
        raise UserError(f"The tokenizer of {place} cannot be loaded: {reason}", hint) from error
    if not getattr(tokenizer, "is_fast", False):
        message = f"The tokenizer of {place} ({type(tokenizer).__name__}) has no fast version (tokenizer.json)."
        raise UserError(message, "Choose a model that has one.")
    result: PreTrainedTokenizerBase = tokenizer
    return result


def _small_files(ref: ModelRef, code: bool) -> Path:
    """The hub model's folder in the cache, with all but its weights. Without a network it is what was fetched before.

    (Asked for a tokenizer by its hub id, transformers looks for each file that could exist, and without a network
    waits 20 s for each that does not.)
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils.tqdm import tqdm

    class NoBar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

    patterns = [*SMALL_FILES, *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(ref.base, revision=ref.revision, allow_patterns=patterns, tqdm_class=NoBar))
    except HfHubHTTPError as error:
        raise _refused(ref.base, ref.revision, error) from None
    except (httpx.HTTPError, OSError) as error:
        raise UserError(f"The tokenizer of {ref.base} could not be downloaded: {error}") from error


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A SHA-256 of all that turns text into ids: vocabulary, merges, splitting, normalizing and added tokens.

    Not of what trainers set for themselves (padding, truncation, the pad token's name), so a tokenizer saved with an
    adapter keeps its base's digest; nor of the template and the end token's name, which the prompt contract holds.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return paths.digest({part: state[part] for part in ("model", "added_tokens", "normalizer", "pre_tokenizer")})
