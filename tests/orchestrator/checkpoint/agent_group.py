"""What a group of agents knows in a simulation: the real opener of attempts, and the snapshot in its buffers."""

from __future__ import annotations

from orchestrator.checkpoint.store import Store
from orchestrator.coordination.failures import FailureConfig
from orchestrator.coordination.opening import Opener, Opening, Remembered
from orchestrator.stores import Stores
from tests.orchestrator.group import make_spec
from trainers.progress import Progress

WORLD_SIZE = 2


class AgentGroup:
    """Lives as long as its process."""

    def __init__(self, store: Store, driver: str) -> None:
        spec = make_spec("virtual://run", session=driver, failures=FailureConfig(agents=1000))
        self.opener = Opener(spec, Stores(storage=store), WORLD_SIZE, lambda *_, **__: None)
        self.opener._probed = True  # its findings under faults are the subject of other tests
        self.held: tuple[Progress, bytes] | None = None
        """The snapshot in its buffers."""
        self.committed = Progress()
        self.checkpoint: str | None = None

    def begin(self, opening: Opening) -> None:
        self.committed, self.checkpoint = opening.committed, opening.restore

    def remembered(self) -> Remembered | None:
        return self.held and Remembered(progress=self.held[0], committed=self.committed, checkpoint=self.checkpoint)
