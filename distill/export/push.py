"""A bundle on the Hugging Face hub: what ships and nothing else, after it has been verified once more."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from distill.errors import OutputError
from distill.export.bundle import MANIFEST
from distill.export.runtime import inside
from distill.export.verify import verify_bundle
from distill.progress import SILENT, Progress


@dataclass(frozen=True)
class Shipment:
    """What is uploaded.

    Attributes:
        repo: The model repository, `owner/name`.
        files: Path in the bundle and in the repository, and bytes.
        url: Where it can be seen; empty in a dry run.
    """

    repo: str
    files: tuple[tuple[str, int], ...]
    url: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    def rows(self) -> list[list[str]]:
        """File and bytes: for a printed table."""
        return [*([name, f"{size:,}"] for name, size in self.files), ["total", f"{self.nbytes:,}"]]


def push_bundle(
    bundle: str | Path, repo: str, *, private: bool = False, dry_run: bool = False, progress: Progress = SILENT
) -> Shipment:
    """Uploads a bundle as one commit; its README.md is the model card.

    Args:
        bundle: Its folder.
        repo: `owner/name`; made where there is none.
        private: Of a repository that is made.
        dry_run: Check and list everything, and reach no network.
        progress: Told while it uploads.

    Raises:
        DistillError: The bundle does not verify.
        OutputError: The name is none, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder = Path(bundle)
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", repo, re.ASCII):
        raise OutputError("is no name of a repository", where=repo, fix="Name it OWNER/NAME.")
    with progress.stage("Verifying the bundle"):
        verdict = verify_bundle(folder)
    if not verdict.ok:
        raise verdict.error()
    manifest = json.loads(inside(folder, MANIFEST).read_text(encoding="utf-8"))
    names = sorted({*manifest["files"], MANIFEST})
    shipment = Shipment(repo, tuple((name, inside(folder, name).stat().st_size) for name in names))
    if dry_run:
        return shipment
    try:
        with progress.stage(f"Uploading {shipment.nbytes / 1e6:.1f} MB to {repo}"):
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"Upload {manifest['name']}",
                allow_patterns=names,
                delete_patterns=["onnx/*"],  # of an earlier bundle: what did not ship with this one fails its check
            )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise OutputError(
            f"the hub did not take it ({_line(error)})",
            where=repo,
            fix="Log in with `hf auth login`, and look at the name, your rights and the network.",
        ) from error
    return Shipment(repo, shipment.files, str(getattr(done, "repo_url", "") or done.commit_url))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
