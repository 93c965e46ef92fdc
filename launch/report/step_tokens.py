"""The tokens that each step of a run trains on."""


class StepTokens:
    """How many tokens the steps of a run train on.

    Args:
        phases: (first step, counted from 1, and tokens of a step), in order.
    """

    def __init__(self, phases: list[tuple[int, int]]):
        self.phases = phases

    @classmethod
    def from_config(cls, config: dict) -> "StepTokens":
        """Returns those of a run with this config.json."""
        work, data = config.get("work") or {}, config["config"]["data"]
        tokens = work.get("tokens_per_step") or data["batch"] * data["seq_len"]
        phases = work.get("batch_phases") or [{"step": 1, "tokens": tokens}]
        return cls([(phase["step"], phase["tokens"]) for phase in phases])

    @property
    def differ(self) -> bool:
        return len(self.phases) > 1

    def before(self, step: int) -> int:
        """Returns the tokens of all steps before this one."""
        ends = [first for first, _ in self.phases[1:]] + [step]
        spans = zip(self.phases, ends, strict=True)
        return sum(tokens * max(min(end, step) - first, 0) for (first, tokens), end in spans)

    def mean(self, settings: dict) -> int:
        """Returns the tokens of a step, their mean over the run if they differ."""
        steps = settings["steps"] if self.differ else 1
        return round(self.before(steps + 1) / steps)

    def of(self, steps: list[int]) -> int:
        """Returns the tokens of these steps together."""
        return sum(self.before(step + 1) - self.before(step) for step in steps)
