"""A folder that is written whole or not at all, and that says nothing about the machine it was written on."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mechtransplant.errors import UsageError

_ABSOLUTE = re.compile(r"^(~|/|[A-Za-z]:[\\/]|\\\\)")
#: how a tokenizer was loaded, which transformers writes down as if it belonged to the tokenizer
_LOADING = ("is_local", "local_files_only")


@contextmanager
def new_folder(folder: str | Path, size: int = 0) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the block ends well; else nothing is left.

    Raises UsageError for a folder that is not empty, a file, too little space for ``size`` bytes, or a failed write.
    """
    import safetensors

    final = Path(folder).expanduser().resolve()
    check_free(final)
    missing = [p for p in (final, *final.parents) if not p.exists()][1:]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if free < size:
            raise UsageError(
                f"{folder} needs about {size / 1e6:,.0f} MB and its disk has {free / 1e6:,.0f} MB free: choose "
                "another folder"
            )
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as temporary:
            # made here, because a temporary folder can be read by its owner alone
            made = Path(temporary) / "made"
            made.mkdir()
            yield made
            for path in made.rglob("*"):
                # safetensors' files can be read by their owner alone
                if path.is_file():
                    path.chmod(made.stat().st_mode & 0o666)
            check_free(final)
            if os.name == "nt" and final.exists():
                # Windows puts no folder in the place of another, not even of an empty one
                final.rmdir()
            os.replace(made, final)
    except (OSError, safetensors.SafetensorError) as error:
        _remove(missing)
        said = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"cannot write to {folder} ({said}), nothing was written: choose another folder") from error
    except BaseException:
        _remove(missing)
        raise


def check_free(folder: str | Path) -> None:
    """Raise UsageError unless there is nothing at ``folder``, or an empty folder."""
    folder = Path(folder)
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UsageError(f"{folder.name} is not empty, and nothing was written: choose another folder, or empty it")
    elif folder.exists():
        raise UsageError(f"{folder.name} is a file, and nothing was written: give the path of a new folder")


def _remove(folders: list[Path]) -> None:
    """Take back the parents that were made, deepest first, where nothing else came into them."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def readable(spec: str) -> str:
    """A model spec without this machine's paths: a local folder is called by its name."""
    return " + ".join(_without_path(part.strip()) for part in str(spec).split(" + "))


def _without_path(text: str) -> str:
    return re.split(r"[\\/]", text.rstrip("\\/"))[-1] if _ABSOLUTE.match(text) else text


def clean_settings(folder: Path) -> None:
    """Take this machine's paths, and how things were loaded, out of the JSON files that transformers writes."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            cleaned = {key: _cleaned(key, value) for key, value in settings.items() if key not in _LOADING}
            if cleaned != settings:
                path.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cleaned(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _cleaned(inner, content) for inner, content in value.items()}
    # a token or a template may begin with a slash: only what is named as a place is one
    if isinstance(value, str) and re.search(r"(path|file|folder|dir|name)$", key):
        return _without_path(value)
    return value
