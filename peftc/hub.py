"""Where an adapter's files are: a local folder, or a repository on the Hugging Face Hub.

huggingface_hub does all the talking and caching, and is imported when the first Hub id is used, not before.  Files of
one adapter come from one commit: the one that the first download resolved the revision to.
"""

import os
import re
from collections.abc import Callable
from typing import Any, Union

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"

#: Keyword arguments of a download that `load_adapter(adapter_kwargs=…)` may carry.
DOWNLOAD_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "resume_download",
    "revision",
    "subfolder",
    "token",
    "user_agent",
    "endpoint",
    "etag_timeout",
    "headers",
)

_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


class AdapterFiles:
    """The files of one adapter.

    Args:
        location: a local folder (`str` or `os.PathLike`), or the id of a repository on the Hub ("user/name").
            A folder that exists wins over a repository of that name.
        subfolder: folder inside `location` that holds the adapter.
        revision: branch, tag, commit or "refs/pr/N" of the repository; the default branch when None.
        token: access token, True for the stored one, False for none, None for the stored one if there is one.
        **download: further arguments of `huggingface_hub.hf_hub_download`: cache_dir, force_download,
            local_files_only, proxies, endpoint, etag_timeout, headers, user_agent.

    Raises:
        TypeError: an argument that a download does not know.
    """

    def __init__(
        self,
        location: Union[str, "os.PathLike[str]"],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: bool | str | None = None,
        **download: Any,
    ) -> None:
        download.pop("_commit_hash", None)  # Transformers passes what it has seen; the download finds it out itself
        unknown = sorted(set(download) - set(DOWNLOAD_ARGUMENTS))
        if unknown:
            raise TypeError(
                f"adapter_kwargs has {', '.join(map(repr, unknown))}, which is neither an option of load_adapter nor of "
                f"a download. Known are {', '.join(DOWNLOAD_ARGUMENTS)}, device and key_mapping."
            )
        self.location = os.fspath(location)
        if not isinstance(self.location, str):
            raise TypeError(f"peft_model_id must be a str or a path, got {location!r}")
        self.subfolder = subfolder or None
        self.is_local = os.path.isdir(self.location)
        self._revision = revision
        self._token = token
        # resume_download has no effect any more and newer versions refuse it
        self._download = {k: v for k, v in download.items() if v is not None and k != "resume_download"}

    @property
    def folder(self) -> str:
        """The local folder that holds the files (only when `is_local`)."""
        return os.path.join(self.location, self.subfolder) if self.subfolder else self.location

    def config(self) -> str:
        """Path of adapter_config.json, downloaded if need be.

        Raises:
            ValueError: there is no such file ("adapter model file not found in …").
            OSError: the repository or revision cannot be read: it does not exist, is private or gated, or the id is
                not one. The text says which.
        """
        return self._find([CONFIG_NAME], self._no_config)

    def weights(self, prefer_bin: bool = False) -> str:
        """Path of adapter_model.safetensors or else of adapter_model.bin, downloaded if need be; or the other way round.

        Raises:
            ValueError: there is neither.
            OSError: as `config`.
        """
        names = [BIN_NAME, SAFETENSORS_NAME] if prefer_bin else [SAFETENSORS_NAME, BIN_NAME]
        return self._find(names, self._no_weights)

    # ------------------------------------------------------------------ looking

    def _find(self, names: list[str], missing: Callable[[str], Exception]) -> str:
        if self.is_local:
            for name in names:
                path = os.path.join(self.folder, name)
                if os.path.isfile(path):
                    return path
            raise missing("")
        self._check_id()
        reason = ""
        for name in names:
            found, reason = self._from_hub(name)
            if found is not None:
                if commit := _COMMIT.search(found):
                    self._revision = commit.group(1)
                return found
        raise missing(reason)

    def _check_id(self) -> None:
        """Refuse what cannot be a repository id before huggingface_hub is imported for it."""
        name = self.location
        if os.path.isfile(name):
            raise NotADirectoryError(
                f"{name} is a file; peft_model_id is the folder that holds {CONFIG_NAME} and {SAFETENSORS_NAME}"
            )
        looks_local = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name or os.path.isabs(name)
        if looks_local or not name:
            raise FileNotFoundError(
                f"there is no folder {name!r}, and it is not the id of a repository on the Hub either (user/name)"
            )

    def _from_hub(self, filename: str) -> tuple[str | None, str]:
        """(path, "") or, when the repository has no such file or cannot be asked, (None, the reason)."""
        try:
            import huggingface_hub
            from huggingface_hub import errors
        except ImportError as error:
            raise ImportError(
                f"{self.location!r} is not a local folder, and loading from the Hub needs the package huggingface_hub: "
                "pip install huggingface_hub"
            ) from error

        where = f"{self.location!r}"
        revision = f" at revision {self._revision!r}" if self._revision else ""
        try:
            path = huggingface_hub.hf_hub_download(
                self.location,
                filename,
                subfolder=self.subfolder,
                revision=self._revision,
                token=self._token,
                library_name="peftc",
                **self._download,
            )
            return os.fspath(path), ""
        except errors.LocalEntryNotFoundError:
            cache = self._download.get("cache_dir") or huggingface_hub.constants.HF_HUB_CACHE
            if self._download.get("local_files_only"):
                why = "local_files_only=True"
            elif huggingface_hub.constants.HF_HUB_OFFLINE:
                why = "HF_HUB_OFFLINE is set"
            else:
                why = "the Hub does not answer"
            return None, f"{filename} is not in the cache {cache}, and it was not downloaded because {why}."
        except errors.EntryNotFoundError:
            return None, f"The repository{revision} has no {self._in_repository(filename)}."
        except errors.GatedRepoError as error:
            raise OSError(
                f"access to {where} is restricted: ask for access on its page on the Hub, then pass token=… or log in "
                "with `hf auth login`"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise OSError(
                f"{where} is neither a local folder nor a repository on the Hub that may be read with this token. If "
                "it is private, pass token=… or log in with `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise OSError(f"the repository {where} has no revision {self._revision!r}") from error
        except errors.HFValidationError as error:
            raise OSError(
                f"{where} is neither a local folder nor the id of a repository on the Hub: {error}"
            ) from error
        except errors.HfHubHTTPError as error:
            raise OSError(f"{filename} of {where}{revision} cannot be downloaded: {error}") from error

    def _in_repository(self, filename: str) -> str:
        return f"{self.subfolder}/{filename}" if self.subfolder else filename

    # ------------------------------------------------------------------ messages

    def _no_config(self, reason: str) -> Exception:
        place = f"{self.location} (subfolder {self.subfolder})" if self.subfolder else self.location
        text = (
            f"adapter model file not found in {place}. Make sure you are passing the correct path to the adapter model."
        )
        return ValueError(f"{text} {reason}" if reason else f"{text} The folder has no {CONFIG_NAME}.")

    def _no_weights(self, reason: str) -> Exception:
        place = self.folder if self.is_local else repr(self.location)
        text = f"no adapter weights in {place}: it has neither {SAFETENSORS_NAME} nor {BIN_NAME}."
        return ValueError(f"{text} {reason}" if reason else text)
