"""Early stopping on the validation accuracy."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class EarlyStopping:
    """End a run after `patience` consecutive evaluations without a higher validation accuracy; 0: never.

    Source: Goodfellow, Bengio and Courville 2016, "Deep Learning", algorithm 7.1.
    """

    patience: int
    best: float = -1.0  # highest accuracy so far
    since: int = 0  # evaluations after that of `best`

    @property
    def is_due(self) -> bool:
        """Return whether the run ends here."""
        return 0 < self.patience <= self.since

    @property
    def reason(self) -> str:
        return f"no validation accuracy above {self.best:.2%} in {self.since} evaluations (train.patience)"

    def saved(self) -> dict[str, float]:
        """Return the fields to save with a checkpoint."""
        return {"best": self.best, "since": self.since}

    def update(self, accuracy: float) -> None:
        """Count an evaluation. An accuracy equal to the best one is no improvement."""
        if accuracy > self.best:
            self.best, self.since = accuracy, 0
        else:
            self.since += 1
