"""Where the seconds go between an event and the first new step."""

from dataclasses import dataclass

__all__ = ["Recovery"]


@dataclass(frozen=True)
class Recovery:
    """One event and what it cost."""

    event: str
    stopping_s: float  # event -> the job no longer runs: noticing, saving, ending
    waiting_s: float  # -> it runs again: the scheduler
    starting_s: float  # -> the ranks' processes: batch script, launcher, agents
    startup_s: dict[str, float]  # of rank 0, by phase, the first step included
    repeated_steps: int

    @property
    def total_s(self) -> float:
        return self.stopping_s + self.waiting_s + self.starting_s + sum(self.startup_s.values())

    def line(self) -> str:
        """Return it as one line."""
        phases = " ".join(f"{name} {seconds:.1f}" for name, seconds in self.startup_s.items())
        return (
            f"{self.event}: {self.total_s:.1f} s = stopping {self.stopping_s:.1f}, scheduler "
            f"{self.waiting_s:.1f}, launcher {self.starting_s:.1f}, ranks [{phases}]; "
            f"{self.repeated_steps} steps again"
        )
