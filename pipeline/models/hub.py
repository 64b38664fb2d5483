"""Slot models on the Hugging Face Hub: a repository holds the files that a model folder does."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from pipeline import storage
from pipeline.storage.hub import push as upload

if TYPE_CHECKING:
    from pipeline.models.segmenter import VideoSegmenter

CARD_FILE = "README.md"


class OnHub:
    """What a `VideoSegmenter` can do with the Hub."""

    @staticmethod
    def from_pretrained(name: str, *, revision: str | None = None) -> VideoSegmenter:
        """A model from the Hugging Face Hub, or from a local folder of that name; in eval mode, on the CPU.

        Downloaded once into the Hub's cache, which also serves without a network (`HF_HUB_OFFLINE=1`). Public
        checkpoint files on the Hub are `load_model`'s (`pipeline.models.build`), as `hf://user/name/file.ckpt`.

        Args:
            name: `user/name` of a repository that holds `config.json` and `model.safetensors`.
            revision: a branch, a tag or a commit; None: the default branch.

        Raises:
            ValueError: not such a name; else as `load_slot_model` of the folder.
            FileNotFoundError: the repository lacks one of the files.
            storage.HubError: no such repository or revision.
            storage.AccessError: it is gated, or the token (`HF_TOKEN`) may not read it.
            storage.UnavailableError: no network, and not in the cache.
        """
        from pipeline.models.checkpoints import MODEL_FILES, load_slot_model  # import this module

        if Path(name).is_dir():
            if revision is not None:
                raise ValueError(
                    f"revision: {revision!r}, but {name!r} is a folder of this machine, which has none"
                )
            return load_slot_model(name)
        at = f"@{quote(revision, safe='')}" if revision is not None else ""
        with storage.local_copy(f"hf://{name}{at}", MODEL_FILES) as folder:
            return load_slot_model(folder)

    def push_to_hub(
        self,
        name: str,
        *,
        card: str | None = None,
        private: bool | None = None,
        branch: str | None = None,
        message: str = "Slot model",
        backbone_weights: str | None = None,
    ) -> str:
        """Uploads `config.json` and `model.safetensors` in one commit, which `from_pretrained` opens.

        The token is that of `HF_TOKEN` or of `hf auth login`, and must be one that may write.

        Args:
            name: `user/name` of a repository, which is made if there is none.
            card: the text of its `README.md`, with Markdown and the Hub's metadata; None leaves that as it is.
            private: of a new repository; None: as the account says.
            branch: made if there is none; None: the default branch.
            message: of the commit.
            backbone_weights: leave the frozen backbone out, whose weights whoever loads the model has from there:
                `timm`, or a file on the Hub, `hf://USER/NAME/FILE`; None: the whole model.

        Returns:
            `hf://user/name@commit`.

        Raises:
            ValueError: not such a name, or weights that are not finite; then nothing is uploaded.
            storage.AccessError: no token that may write there.
            storage.UnavailableError: no network.
        """
        from pipeline.models.checkpoints import save_slot_model
        from pipeline.models.segmenter import VideoSegmenter
        from pipeline.models.slim import BackboneSource

        assert isinstance(self, VideoSegmenter)
        with tempfile.TemporaryDirectory() as scratch:
            slim = BackboneSource(backbone_weights) if backbone_weights is not None else None
            save_slot_model(self, scratch, slim=slim)
            if card is not None:
                (Path(scratch) / CARD_FILE).write_text(card, encoding="utf-8")
            return upload(scratch, name, private=private, branch=branch, message=message)
