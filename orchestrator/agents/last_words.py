"""What a trainer says when it fails: the kind, the line of the user's code, the microbatch at work."""

from __future__ import annotations

import importlib.util
import site
import sysconfig
import traceback
from pathlib import Path

import torch.distributed as dist

from orchestrator.errors import DamagedCheckpointError, RunMismatchError, StorageError
from orchestrator.messages.attempts import ExitKind, TrainerExit
from trainers.errors import ConfigError, CorruptionError, DivergedError, StateMismatchError
from trainers.trace import Blame, Place, Stage

_KINDS: dict[type[BaseException], ExitKind] = {
    ConfigError: ExitKind.CONFIG,
    RunMismatchError: ExitKind.CONFIG,
    DivergedError: ExitKind.DIVERGED,
    CorruptionError: ExitKind.CORRUPTED,
    StateMismatchError: ExitKind.DAMAGED,
    DamagedCheckpointError: ExitKind.DAMAGED,
    StorageError: ExitKind.STORAGE,
    dist.DistBackendError: ExitKind.PEER_LOST,
    dist.DistNetworkError: ExitKind.PEER_LOST,
    dist.DistStoreError: ExitKind.PEER_LOST,
}

_GLOO_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo", "Broken pipe")


def last_words(error: BaseException, place: Place | None, quarantine: bool) -> TrainerExit:
    """The report of `error`.

    Args:
        place: the microbatch at work, if one was.
        quarantine: a sample that can not be read is to be left out, not to be refused.
    """
    kind = next((kind for cls, kind in _KINDS.items() if isinstance(error, cls)), ExitKind.ERROR)
    if kind is ExitKind.ERROR and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _GLOO_LOST):
        kind = ExitKind.PEER_LOST
    if quarantine and place is not None and place.stage is Stage.DATA and place.blame is Blame.EXACT:
        kind = ExitKind.ERROR
    skip, num_rollbacks = (error.skip, error.num_rollbacks) if isinstance(error, DivergedError) else (None, 0)
    ranks, alike_step = (error.ranks, error.alike_step) if isinstance(error, CorruptionError) else ((), 0)
    return TrainerExit(
        kind=kind,
        message=_said(error) if kind in (ExitKind.ERROR, ExitKind.PEER_LOST) else str(error),
        details="".join(traceback.format_exception(error)),
        frame=blamed_frame(error),
        place=place,
        skip=skip,
        num_rollbacks=num_rollbacks,
        ranks=ranks,
        alike_step=alike_step,
    )


def _said(error: BaseException) -> str:
    """`repr`; with the file, which that of an OSError leaves out."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{type(error).__name__}({error})"
    return repr(error)


def blamed_frame(error: BaseException) -> str:
    """`file:line, in function`: the innermost frame of the user's code; without any, the innermost of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours, libraries = _folders("orchestrator", "trainers"), _library_folders()
    theirs = [frame for frame in frames if not _inside(frame, [*ours, *libraries])]
    chosen = theirs or [frame for frame in frames if _inside(frame, ours)] or list(frames)
    return f"{chosen[-1].filename}:{chosen[-1].lineno}, in {chosen[-1].name}" if chosen else ""


def _inside(frame: traceback.FrameSummary, folders: list[Path]) -> bool:
    # What has no file (<frozen importlib>, <string>) is nobody's code.
    return frame.filename.startswith("<") or any(Path(frame.filename).is_relative_to(folder) for folder in folders)


def _folders(*packages: str) -> list[Path]:
    specs = [importlib.util.find_spec(package) for package in packages]
    return [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]


def _library_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    standard = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return [Path(path) for path in {*standard, *site.getsitepackages(), site.getusersitepackages()}]
