"""Copies model directories to a disk: python fill.py TARGET; MODELS_SOURCE is a URI, MODELS their names.

A directory appears under its name only when it is complete; what is there already is left alone, so a second
run costs nothing. Weights in formats that can run code are refused.
"""

import os
import shutil
import sys
from pathlib import Path

from pyarrow import fs

REFUSED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def fill(source_uri: str, names: list[str], target: Path) -> None:
    """Copy `source_uri`/NAME to `target`/NAME for each name."""
    source, root = fs.FileSystem.from_uri(source_uri)
    for name in names:
        final, partial = target / name, target / f".{name}.partial"
        if final.exists():
            print(f"{name}: there already", flush=True)
            continue
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was interrupted
        base = f"{root.rstrip('/')}/{name}"
        entries = source.get_file_info(fs.FileSelector(base, recursive=True))
        files = [entry for entry in entries if entry.type == fs.FileType.File]
        if not files:
            sys.exit(f"{source_uri}/{name} has no files: correct the ConfigMap accord-models")
        refused = [entry.path for entry in files if entry.path.lower().endswith(REFUSED)]
        if refused:
            sys.exit(f"{refused[0]} may hold code: put safetensors in its place")
        for number, entry in enumerate(files, 1):
            to = partial / os.path.relpath(entry.path, base)
            to.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(
                entry.path, str(to), source_filesystem=source, destination_filesystem=fs.LocalFileSystem()
            )
            print(f"{name}: {number} of {len(files)} files, {entry.size / 1e6:.1f} MB", flush=True)
        partial.rename(final)


if __name__ == "__main__":
    fill(os.environ["MODELS_SOURCE"], os.environ["MODELS"].split(), Path(sys.argv[1]))
